// Matrix units (AMX): a block's two products as products of whole tiles. The layout's lines are rows of
// the second operand as they are: 16 key lines are 64 dims of 16 tokens, and the 16 lines of one group
// of 16 dims in the 4 tiles of a block are its 64 tokens. Results equal the other instruction sets'
// bit for bit. Only here does "tile" also mean a register of this unit (tmm0 .. 7).
#pragma once

#include "attend_block.h"

#ifdef __AMX_INT8__

namespace deltastore::DELTASTORE_ISA {

static_assert(kBlockTokens == 64 && sizeof(Quad) == 4, "a weight row is one row of a tile register");
constexpr int64_t kPartRows = 16;  // query rows of one tile register

// With fewer rows than this, unpacking to memory costs more than the products save (measured: at
// head_dim 128, 4 rows take 1.3 times the time of simd_avx512.h's way, 8 rows 0.75 times).
constexpr int64_t kFewestProductRows = 6;

// Whether rows of this many dims are multiplied here: whole operands of 64 dims, or one of 32.
constexpr bool takes_products(int64_t rows, int64_t dim) {
  return rows >= kFewestProductRows && (dim % 64 == 0 || dim == 32);
}

// Numbers of tile registers, literals for the assembler: sums 0 .. 3 for up to four parts of 16 rows,
// then the operands of both products.
#define DELTASTORE_QUERY 4
#define DELTASTORE_KEYS 5
#define DELTASTORE_WEIGHTS 6
#define DELTASTORE_VALUES 7

// gcc 12 does not know that loading a tile register reads memory: nothing stored before may wait.
inline void finish_stores() { asm volatile("" ::: "memory"); }

enum class Operands { kInt8, kSplit };  // of this header's products, of amx_dense.h's

// Gives the registers their shapes for a number of query rows, and back what they were, if `used`.
class TileShapes {
 public:
  TileShapes(Operands operands, int64_t rows, int64_t dim, bool used) : used_(used) {
    if (!used_) return;
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config config{};
    config.palette = 1;
    const auto part = static_cast<uint8_t>(rows < kPartRows ? rows : kPartRows);
    for (int sum = 0; sum < 4; ++sum) config.set(sum, part, 64);
    if (operands == Operands::kInt8) {
      const int64_t depth = smaller(dim, 64);
      config.set(DELTASTORE_QUERY, part, depth);
      config.set(DELTASTORE_KEYS, static_cast<uint8_t>(depth / 4), 64);
      config.set(DELTASTORE_WEIGHTS, part, 64);
      config.set(DELTASTORE_VALUES, 16, 64);
    } else {
      config.set(4, part, 64);
      config.set(5, part, 64);
      config.set(6, 16, 64);
      config.set(7, 16, 64);
    }
    load(config);
  }
  ~TileShapes() {
    if (!used_) return;
    if (before_.palette) {
      load(before_);
    } else {
      _tile_release();
    }
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
    void set(int tile, uint8_t count, int64_t bytes) {
      rows[tile] = count;
      row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
  };
  static_assert(sizeof(Config) == 64, "what the instructions read and write");
  // gcc 12's own intrinsics only know of the first 8 bytes.
  static void load(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

  const bool used_;
  Config before_;
};

inline int64_t parts_of(int64_t rows) { return (rows + kPartRows - 1) / kPartRows; }

// DO(p) for each part p: register numbers are literals, hence the macros.
#define DELTASTORE_EACH_PART(parts, DO) \
  DO(0);                                \
  if ((parts) > 1) { DO(1); }           \
  if ((parts) > 2) { DO(2); }           \
  if ((parts) > 3) { DO(3); }

// Unpack first, multiply then: a tile register cannot be loaded from lines that are still on their way
// to memory, so every line must have its time.

// Scores of all rows, as whole numbers in place of floats.
template <int kBits>
void score_products(Block& block, const Query& query, int64_t rows, int64_t dim) {
  const auto table = load_table<kBits, 0>();
  const int64_t parts = parts_of(rows);
  const auto* queries = reinterpret_cast<const int8_t*>(query.quads);  // [rows, D]
  uint8_t* line_bytes = block.lines;                                   // [tiles, D / 4 lines, 64]
  for (int64_t t = 0; t < block.count; ++t) {
    for (int64_t octet = 0; octet < dim / 32; ++octet) {
      fetch(block.ahead[t], octet, kBits, block.value_bits);
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const Bytes codes = load_codes<kBits>(block.tiles[t].key, dim, octet, line);
        _mm512_store_si512(line_bytes, lookup<kBits>(table, codes));
        line_bytes += kLineBytes;
      }
    }
  }
  finish_stores();
  for (int64_t t = 0; t < block.count; ++t) {
#define DELTASTORE_DO(p) _tile_zero(p)
    DELTASTORE_EACH_PART(parts, DELTASTORE_DO)
#undef DELTASTORE_DO
    for (int64_t d = 0; d < dim; d += 64) {
      _tile_loadd(DELTASTORE_KEYS, block.lines + (t * dim + d) * kTileTokens, kLineBytes);
#define DELTASTORE_DO(p)                                                   \
  _tile_loadd(DELTASTORE_QUERY, queries + (p) * kPartRows * dim + d, dim); \
  _tile_dpbssd(p, DELTASTORE_QUERY, DELTASTORE_KEYS)
      DELTASTORE_EACH_PART(parts, DELTASTORE_DO)
#undef DELTASTORE_DO
    }
    float* scores = block.scores + t * kTileTokens;
#define DELTASTORE_DO(p) _tile_stored(p, scores + (p) * kPartRows * kBlockTokens, 4 * kBlockTokens)
    DELTASTORE_EACH_PART(parts, DELTASTORE_DO)
#undef DELTASTORE_DO
  }
}

template <int kBits>
void score_rows_by_products(Block& block, const Query& query, int64_t rows, int64_t dim) {
  score_products<kBits>(block, query, rows, dim);
  for (int64_t r = 0; r < rows; ++r) {
    float* scores = block.scores + r * kBlockTokens;
    const F32 unit = splat(query.unit[r] * static_cast<float>(level_unit(kBits)));
    for (int64_t i = 0; i < block.count * kTileTokens; i += 16) {
      const F32 dot = to_f32(_mm512_loadu_si512(scores + i));
      store(scores + i, mul(mul(dot, load(block.key_scale + i)), unit));
    }
  }
}

// The block's value lines: [D / 16 groups, 16 lines, 64], the group's four of each tile. A block of
// fewer tiles repeats its last; weights are zero there.
template <int kBits>
void unpack_values(Block& block, int64_t dim) {
  const auto table = load_table<kBits, 0>();
  for (int64_t t = 0; t < kBlockTiles; ++t) {
    const uint8_t* tile = block.tiles[smaller(t, block.count - 1)].value;
    for (int64_t octet = 0; octet < dim / 32; ++octet) {
      uint8_t* first = block.lines + (2 * octet * 16 + 4 * t) * kLineBytes;
#pragma GCC unroll 8
      for (int line = 0; line < 8; ++line) {
        const Bytes codes = load_codes<kBits>(tile, dim, octet, line);
        _mm512_store_si512(first + (line / 4 * 16 + line % 4) * kLineBytes, lookup<kBits>(table, codes));
      }
    }
  }
  finish_stores();
}

// out [rows, D] += weights * step * values, for all rows, after unpack_values.
inline void sum_products(const Block& block, const Quad* weights, float step, float* out, int64_t rows, int64_t dim) {
  const int64_t parts = parts_of(rows);
  alignas(64) int32_t sums[2][kMaxRows * 16];
  finish_stores();
  if (parts == 1) _tile_loadd(DELTASTORE_WEIGHTS, weights, kBlockTokens);
  for (int64_t group = 0; group < dim / 16; ++group) {
    int32_t* turn = sums[group % 2];
    _tile_loadd(DELTASTORE_VALUES, block.lines + group * 16 * kLineBytes, kLineBytes);
#define DELTASTORE_DO(p)                                                                                      \
  if (parts > 1) _tile_loadd(DELTASTORE_WEIGHTS, weights + (p) * kPartRows * kBlockTokens / 4, kBlockTokens); \
  _tile_zero(p);                                                                                              \
  _tile_dpbusd(p, DELTASTORE_WEIGHTS, DELTASTORE_VALUES);                                                     \
  _tile_stored(p, turn + (p) * kPartRows * 16, 64)
    DELTASTORE_EACH_PART(parts, DELTASTORE_DO)
#undef DELTASTORE_DO
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = out + r * dim + 16 * group;
      const F32 unit = splat(block.weight_unit[r] * step);
      store(sum, fma(to_f32(_mm512_load_si512(turn + r * 16)), unit, load(sum)));
    }
  }
}

}  // namespace deltastore::DELTASTORE_ISA

#undef DELTASTORE_EACH_PART
#undef DELTASTORE_QUERY
#undef DELTASTORE_KEYS
#undef DELTASTORE_WEIGHTS
#undef DELTASTORE_VALUES
#endif
