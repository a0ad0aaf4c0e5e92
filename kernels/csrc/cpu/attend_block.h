// Scores and weighted sums of one block of tiles: integer dot products over packed codes, float
// ones over raw 16-bit floats. Each pass serves kHeads query heads with one unpacking of the codes.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {

constexpr int64_t kMaxQuads = kMaxHeadDim / 4;
constexpr int kHeadsPerPass = 4;

// One tile of the block, wherever its page lies. Raw tiles may have fewer than 16 tokens.
struct Tile {
  const uint8_t* key;
  const uint8_t* value;
  const uint8_t* scales;
  const uint8_t* anchors;
  int64_t tokens;
};

// The query heads of a segment, prepared.
struct Query {
  alignas(64) float rows[kMaxGroup * kMaxHeadDim];  // [heads, D], times scale and log2(e)
  alignas(64) Quad quads[kMaxGroup * kMaxQuads];    // [heads, D / 4] int8
  float unit[kMaxGroup];      // what one step of the integer dot product is worth, times scale
  int32_t start[kMaxGroup];   // first value of its accumulator
};

struct Block {
  Tile tiles[kBlockTiles];
  Tile next[kBlockTiles];  // the tiles to fetch meanwhile; only the addresses are used
  int64_t count;           // tiles
  int64_t value_bits;
  alignas(64) float key_scale[kBlockTokens];
  alignas(64) float value_scale[kBlockTokens];
  alignas(64) float scores[kMaxGroup * kBlockTokens];  // [heads, kBlockTokens]; then probabilities
  alignas(64) Quad weights[kMaxGroup * kBlockTokens / 4];  // [heads, kBlockTokens / 4]
  float weight_unit[kMaxGroup];  // what one step of `weights` times one level is worth
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

// Scores of heads head .. head + kHeads - 1. Few heads use more accumulators each, so that the
// dot products need not wait for one another.
template <int kBits, int kHeads>
void score_codes(Block& block, const Query& query, int64_t head, int64_t head_dim) {
  constexpr int kChains = kHeads <= 2 ? 4 : 2;
  static constexpr LevelTable kLevels = make_level_table<kBits>(kKeyOffset);
  const Table table = load_table(kLevels);
  const int64_t quads = head_dim / 4;
  for (int64_t t = 0; t < block.count; ++t) {
    I32 dots[kHeads][kChains];
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 0; c < kChains; ++c) dots[h][c] = splat_i32(c ? 0 : query.start[head + h]);
    }
    for (int64_t octet = 0; octet < head_dim / 32; ++octet) {
      if (head == 0) fetch(block.next[t], octet, kBits, block.value_bits);
      Bytes codes[8];
      load_codes<kBits>(block.tiles[t].key, head_dim, octet, codes);
      const Quad* factors = query.quads + head * quads + 8 * octet;
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const Levels levels = widen(lookup(table, codes[line]));
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          I32& dot = dots[h][line % kChains];
          dot = key_dot(dot, levels, factors + h * quads + line);
        }
      }
    }
    const F32 scale = load(block.key_scale + t * kTileTokens);
    for (int h = 0; h < kHeads; ++h) {
      for (int c = 1; c < kChains; ++c) dots[h][0] = add(dots[h][0], dots[h][c]);
      const F32 score = mul(mul(to_f32(dots[h][0]), scale), splat(query.unit[head + h]));
      store(block.scores + (head + h) * kBlockTokens + t * kTileTokens, score);
    }
  }
}

// out [heads, D] += weights * values, for heads head .. head + kHeads - 1.
template <int kBits, int kHeads>
void sum_codes(const Block& block, float* out, int64_t head, int64_t head_dim) {
  static constexpr LevelTable kLevels = make_level_table<kBits>(0);
  const Table table = load_table(kLevels);
  for (int64_t octet = 0; octet < head_dim / 32; ++octet) {  // two groups of 16 dims, 4 lines each
    I32 sums[kHeads][2];
    for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = splat_i32(0);
    for (int64_t t = 0; t < block.count; ++t) {
      Bytes codes[8];
      load_codes<kBits>(block.tiles[t].value, head_dim, octet, codes);
      const Quad* weights = block.weights + head * (kBlockTokens / 4) + t * 4;
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const Levels levels = widen(lookup(table, codes[line]));
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          I32& sum = sums[h][line / 4];
          sum = value_dot(sum, levels, weights + h * (kBlockTokens / 4) + line % 4);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      const F32 unit = splat(block.weight_unit[head + h]);
      float* row = out + (head + h) * head_dim + 32 * octet;
      for (int d = 0; d < 2; ++d) store(row + 16 * d, fma(to_f32(sums[h][d]), unit, load(row + 16 * d)));
    }
  }
}

template <int kHeads>
void score_raw(Block& block, const Query& query, int64_t head, int64_t head_dim) {
  for (int64_t t = 0; t < block.count; ++t) {
    const auto* keys = reinterpret_cast<const uint16_t*>(block.tiles[t].key);
    F32 rows[kHeads][16];
    for (int token = 0; token < 16; ++token) {
      F32 dots[kHeads];
      for (int h = 0; h < kHeads; ++h) dots[h] = splat(0.0f);
      // A frame's rows beyond its tokens hold anything at all.
      for (int64_t d = 0; token < block.tiles[t].tokens && d < head_dim; d += 16) {
        const F32 key = load_f16(keys + token * head_dim + d);
        for (int h = 0; h < kHeads; ++h) {
          dots[h] = fma(key, load(query.rows + (head + h) * head_dim + d), dots[h]);
        }
      }
      for (int h = 0; h < kHeads; ++h) rows[h][token] = dots[h];
    }
    for (int h = 0; h < kHeads; ++h) {
      store(block.scores + (head + h) * kBlockTokens + t * kTileTokens, sum_rows(rows[h]));
    }
  }
}

template <int kHeads>
void sum_raw(const Block& block, float* out, int64_t head, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 16) {
    F32 sums[kHeads];
    for (int h = 0; h < kHeads; ++h) sums[h] = load(out + (head + h) * head_dim + d);
    for (int64_t t = 0; t < block.count; ++t) {
      const auto* values = reinterpret_cast<const uint16_t*>(block.tiles[t].value);
      const float* weights = block.scores + head * kBlockTokens + t * kTileTokens;
      for (int64_t token = 0; token < block.tiles[t].tokens; ++token) {
        const F32 value = load_f16(values + token * head_dim + d);
        for (int h = 0; h < kHeads; ++h) {
          sums[h] = fma(value, splat(weights[h * kBlockTokens + token]), sums[h]);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) store(out + (head + h) * head_dim + d, sums[h]);
  }
}

}  // namespace deltastore::DELTASTORE_ISA
