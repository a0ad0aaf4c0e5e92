// Scores and weighted sums of one block of tiles: integer dot products over packed codes, float
// ones over raw 16-bit floats. Each pass serves kRows query rows with one unpacking of the codes.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {

constexpr int64_t kMaxQuads = kMaxHeadDim / 4;

// One tile of the block. Raw tiles may have fewer than 16 tokens.
struct Tile : TileBytes {
  int64_t tokens;
};

// The query rows, prepared.
struct Query {
  alignas(64) float rows[kMaxRows * kMaxHeadDim];  // [rows, D], times scale and log2(e)
  alignas(64) Quad quads[kMaxRows * kMaxQuads];    // [rows, D / 4] int8
  float unit[kMaxRows];                            // what a query's step is worth, times scale
  int32_t start[kMaxRows];                         // first value of its accumulator
  float poison[kMaxRows];                          // NaN if an element is infinite or NaN, else 0
#ifdef __AMX_BF16__
  alignas(64) uint8_t operands[kMaxRows * kMaxHeadDim * 4];  // `rows`, see amx_dense.h
#endif
};

struct Block {
  Tile tiles[kBlockTiles];
  Tile ahead[kBlockTiles];  // tiles to fetch meanwhile; only the addresses are used
  bool fetches;             // whether `ahead` is set
  int64_t count;            // tiles
  int64_t value_bits;
  alignas(64) float key_scale[kBlockTokens];
  alignas(64) float value_scale[kBlockTokens];
  alignas(64) float scores[kMaxRows * kBlockTokens];  // [rows, kBlockTokens]; then probabilities
  // uint8 [rows, kBlockTokens / 4]; a remainder's step is 1/255 of a weight's
  alignas(64) Quad weights[kMaxRows * kBlockTokens / 4];
  alignas(64) Quad remainders[kMaxRows * kBlockTokens / 4];
  float weight_unit[kMaxRows];  // what one step of `weights` times one level is worth
#ifdef __AMX_INT8__
  alignas(64) uint8_t lines[kBlockTokens * kMaxHeadDim];  // unpacked keys or values
#endif
#ifdef __AMX_BF16__
  alignas(64) uint8_t operands[kMaxRows * kBlockTokens * 4];  // probabilities, see amx_dense.h
#endif
  alignas(64) uint8_t dense[dense_block_bytes(kMaxHeadDim)];  // raw tiles, arranged for many rows
};

struct AttendScratch {
  Query query;
  Block block;
};

inline void unpack_scales(Block& block) {
  const F32 factors = load(kScaleTables.factors);
  for (int64_t t = 0; t < block.count; ++t) {
    const I32 nibbles = load_u8(block.tiles[t].scales);
    const F32 key_largest = splat(kScaleTables.anchors[block.tiles[t].anchors[0]]);
    const F32 value_largest = splat(kScaleTables.anchors[block.tiles[t].anchors[1]]);
    store(block.key_scale + t * kTileTokens, mul(lookup_low_nibble(factors, nibbles), key_largest));
    store(block.value_scale + t * kTileTokens, mul(lookup_high_nibble(factors, nibbles), value_largest));
  }
}

// Pages are scattered and short, so the hardware sees no stream: ask for the next block's bytes of
// these 32 dims while this block is worked on.
inline void fetch(const Tile& next, int64_t octet, int64_t key_bits, int64_t value_bits) {
  for (int64_t i = 0; i < key_bits; ++i) __builtin_prefetch(next.key + (octet * key_bits + i) * kLineBytes);
  for (int64_t i = 0; i < value_bits; ++i) __builtin_prefetch(next.value + (octet * value_bits + i) * kLineBytes);
}

// Scores of rows row .. row + kRows - 1. Few rows use more accumulators each, so that the
// dot products need not wait for one another.
template <int kBits, int kRows>
void score_codes(Block& block, const Query& query, int64_t row, int64_t dim) {
  constexpr int kChains = kDotChains <= kRows ? 1 : kRows == 1 && kDotChains > 4 ? 4 : kDotChains / kRows;
  const auto table = load_table<kBits, kKeyOffset>();
  const int64_t quads = dim / 4;
  for (int64_t t = 0; t < block.count; ++t) {
    I32 dots[kRows][kChains];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kChains; ++c) dots[r][c] = splat_i32(c ? 0 : query.start[row + r]);
    }
    for (int64_t octet = 0; octet < dim / 32; ++octet) {
      if (row == 0) fetch(block.ahead[t], octet, kBits, block.value_bits);
      const Quad* factors = query.quads + row * quads + 8 * octet;
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const Bytes codes = load_codes<kBits>(block.tiles[t].key, dim, octet, line);
        const Levels levels = widen(lookup<kBits>(table, codes));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          I32& dot = dots[r][line % kChains];
          dot = key_dot(dot, levels, factors + r * quads + line);
        }
      }
    }
    const F32 scale = load(block.key_scale + t * kTileTokens);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 1; c < kChains; ++c) dots[r][0] = add(dots[r][0], dots[r][c]);
      const F32 score =
          mul(mul(to_f32(dots[r][0]), scale), splat(query.unit[row + r] * static_cast<float>(level_unit(kBits))));
      store(block.scores + (row + r) * kBlockTokens + t * kTileTokens, score);
    }
  }
}

// kSumGroups groups of 16 dims, four lines each, of which the first is line kFirst of the octet.
template <int kBits, int kRows, int kFirst>
inline void sum_lines(const Block& block, const Table<kBits>& table, const Quad* weights, float step, float* out,
                      int64_t row, int64_t octet, int64_t dim) {
  I32 sums[kRows][kSumGroups];
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kSumGroups; ++g) sums[r][g] = splat_i32(0);
  }
  for (int64_t t = 0; t < block.count; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < 4 * kSumGroups; ++i) {
      const int line = kFirst + i % kSumGroups * 4 + i / kSumGroups;
      const Bytes codes = load_codes<kBits>(block.tiles[t].value, dim, octet, line);
      const Levels levels = widen(lookup<kBits>(table, codes));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        I32& sum = sums[r][(line - kFirst) / 4];
        sum = value_dot(sum, levels, weights + (row + r) * (kBlockTokens / 4) + t * 4 + line % 4);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const F32 unit = splat(block.weight_unit[row + r] * step);
    float* sum = out + (row + r) * dim + 32 * octet + 4 * kFirst;
    for (int g = 0; g < kSumGroups; ++g) store(sum + 16 * g, fma(to_f32(sums[r][g]), unit, load(sum + 16 * g)));
  }
}

// out [rows, D] += weights * step * values, for rows row .. row + kRows - 1.
template <int kBits, int kRows>
void sum_codes(const Block& block, const Quad* weights, float step, float* out, int64_t row, int64_t dim) {
  const auto table = load_table<kBits, 0>();
  for (int64_t octet = 0; octet < dim / 32; ++octet) {
    sum_lines<kBits, kRows, 0>(block, table, weights, step, out, row, octet, dim);
    if constexpr (kSumGroups == 1) sum_lines<kBits, kRows, 4>(block, table, weights, step, out, row, octet, dim);
  }
}

inline void fetch_raw(const Tile& next, int64_t token, int64_t dim) {
  for (int64_t i = 0; i < 2 * dim; i += kLineBytes) {
    __builtin_prefetch(next.key + token * 2 * dim + i);
    __builtin_prefetch(next.value + token * 2 * dim + i);
  }
}

template <int kRows>
void score_raw(Block& block, const Query& query, int64_t row, int64_t dim) {
  for (int64_t t = 0; t < block.count; ++t) {
    const auto* keys = reinterpret_cast<const uint16_t*>(block.tiles[t].key);
    F32 rows[kRows][16];
    for (int token = 0; token < 16; ++token) {
      if (row == 0 && block.fetches) fetch_raw(block.ahead[t], token, dim);
      F32 dots[kRows];
      for (int r = 0; r < kRows; ++r) dots[r] = splat(0.0f);
      // A frame's rows beyond its tokens hold anything at all.
      for (int64_t d = 0; token < block.tiles[t].tokens && d < dim; d += 16) {
        const F32 key = load_f16(keys + token * dim + d);
        for (int r = 0; r < kRows; ++r) { dots[r] = fma(key, load(query.rows + (row + r) * dim + d), dots[r]); }
      }
      for (int r = 0; r < kRows; ++r) rows[r][token] = dots[r];
    }
    for (int r = 0; r < kRows; ++r) {
      store(block.scores + (row + r) * kBlockTokens + t * kTileTokens, sum_rows(rows[r]));
    }
  }
}

template <int kRows>
void sum_raw(const Block& block, float* out, int64_t row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 16) {
    F32 sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = load(out + (row + r) * dim + d);
    for (int64_t t = 0; t < block.count; ++t) {
      const auto* values = reinterpret_cast<const uint16_t*>(block.tiles[t].value);
      const float* weights = block.scores + row * kBlockTokens + t * kTileTokens;
      for (int64_t token = 0; token < block.tiles[t].tokens; ++token) {
        const F32 value = load_f16(values + token * dim + d);
        for (int r = 0; r < kRows; ++r) { sums[r] = fma(value, splat(weights[r * kBlockTokens + token]), sums[r]); }
      }
    }
    for (int r = 0; r < kRows; ++r) store(out + (row + r) * dim + d, sums[r]);
  }
}

}  // namespace deltastore::DELTASTORE_ISA
