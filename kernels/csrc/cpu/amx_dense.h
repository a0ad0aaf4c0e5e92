// Matrix units (AMX) over float blocks. They multiply bfloat16 only, so every float is split into two of
// them, x = high + low to 2**-17, and a product is three: high * high + low * high + high * low. What is
// left out (low * low, and the rounding of low) is about 2**-17 of a product: float32 quality at several
// times the speed of plain registers. Sums are float32.
//
// A tile register holds 16 rows of the first operand, 32 depths each, and of the second one 16 pairs of 32
// depths, for 16 columns. All lie as such operands of 16 rows of 64 bytes, high half first:
//
//     query          [D / 32, parts of 16 rows, high | low][16 rows, 32 dims]
//     probabilities  [2, parts of 16 rows, high | low][16 rows, 32 tokens]
//     keys           [D / 32, 4 groups of 16 tokens, high | low][16 pairs of dims, 16 tokens, 2]
//     values         [2, D / 16 groups of dims, high | low][16 pairs of tokens, 16 dims, 2]
#pragma once

#include "attend_block.h"

#ifdef __AMX_BF16__

namespace deltastore::DELTASTORE_ISA {

constexpr int64_t kHalfBytes = 16 * kLineBytes;  // one tile register
constexpr int64_t kOperandBytes = 2 * kHalfBytes;
constexpr int64_t kMaxParts = kMaxRows / kPartRows;

// Both halves of 16 floats as bfloat16 numbers in the upper 16 bits of their lanes; the lower bits of
// `low` are not cleared.
struct Split {
  __m512i high, low;
};

inline Split split(F32 x) {
  const __m512i half_step = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half_step), mask);
  const F32 rest = sub(x, _mm512_castsi512_ps(high));
  return {high, _mm512_add_epi32(_mm512_castps_si512(rest), half_step)};
}

// The upper 16 bits of the 32 lanes of a and b, in order.
inline __m512i upper_halves(__m512i a, __m512i b) {
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, odd, b);
}

// The same, each of a's beside b's.
inline __m512i pair_upper_halves(__m512i a, __m512i b) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(a, 16), b);
}

// x [rows, columns] float -> first operands [columns / 32, kMaxParts]
inline void split_rows(const float* x, int64_t rows, int64_t columns, uint8_t* operands) {
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* high = operands + r / kPartRows * kOperandBytes + r % kPartRows * kLineBytes;
    for (int64_t c = 0; c < columns; c += 32, high += kMaxParts * kOperandBytes) {
      const Split a = split(load(x + r * columns + c)), b = split(load(x + r * columns + c + 16));
      _mm512_store_si512(high, upper_halves(a.high, b.high));
      _mm512_store_si512(high + kHalfBytes, upper_halves(a.low, b.low));
    }
  }
}

inline void prepare_dense(Query& query, int64_t rows, int64_t dim) {
  split_rows(query.rows, rows, dim, query.operands);
}

// Rows of 16 32-bit numbers -> columns, in place.
inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks within each 128-bit lane
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c);
    y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d);
    y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // lane k of y[4 j + i] holds column 4 k + i of rows 4 j ..
    const __m512i a = _mm512_shuffle_i32x4(y[i], y[4 + i], 0x88), b = _mm512_shuffle_i32x4(y[i], y[4 + i], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(y[8 + i], y[12 + i], 0xDD);
    x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
    x[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

inline void store_operand(uint8_t* operand, const __m512i rows[16]) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(operand + i * kLineBytes, rows[i]);
}

template <typename TokenRows>
void arrange_keys(const TokenRows& rows, int64_t dim, uint8_t* side) {
  for (int64_t d = 0; d < dim; d += 32) {
    for (int64_t first = 0; first < kBlockTokens; first += 16, side += kOperandBytes) {
      __m512i high[16], low[16];
      for (int i = 0; i < 16; ++i) {
        const Split a = split(rows.at(first + i, d)), b = split(rows.at(first + i, d + 16));
        high[i] = upper_halves(a.high, b.high);
        low[i] = upper_halves(a.low, b.low);
      }
      transpose(high);
      transpose(low);
      store_operand(side, high);
      store_operand(side + kHalfBytes, low);
    }
  }
}

template <typename TokenRows>
void arrange_values(const TokenRows& rows, int64_t dim, uint8_t* side) {
  for (int64_t first = 0; first < kBlockTokens; first += 32) {
    for (int64_t d = 0; d < dim; d += 16, side += kOperandBytes) {
      for (int i = 0; i < 16; ++i) {
        const Split a = split(rows.at(first + 2 * i, d)), b = split(rows.at(first + 2 * i + 1, d));
        _mm512_store_si512(side + i * kLineBytes, pair_upper_halves(a.high, b.high));
        _mm512_store_si512(side + kHalfBytes + i * kLineBytes, pair_upper_halves(a.low, b.low));
      }
    }
  }
}

// Adds 32 depths to the sums 0, 1 of the first part of rows and two groups of columns, and 2, 3 of the
// second part, if there is one. `first` and `second` are the first ones' operands; the others follow.
template <int kParts>
inline void multiply_split(const uint8_t* first, const uint8_t* second) {
#define DELTASTORE_MULTIPLY    \
  _tile_dpbf16ps(0, 4, 6);     \
  _tile_dpbf16ps(1, 4, 7);     \
  if constexpr (kParts == 2) { \
    _tile_dpbf16ps(2, 5, 6);   \
    _tile_dpbf16ps(3, 5, 7);   \
  }
  _tile_loadd(6, second, kLineBytes);
  _tile_loadd(7, second + kOperandBytes, kLineBytes);
  _tile_loadd(4, first + kHalfBytes, kLineBytes);
  if constexpr (kParts == 2) _tile_loadd(5, first + kOperandBytes + kHalfBytes, kLineBytes);
  DELTASTORE_MULTIPLY  // low * high
      _tile_loadd(4, first, kLineBytes);
  if constexpr (kParts == 2) _tile_loadd(5, first + kOperandBytes, kLineBytes);
  DELTASTORE_MULTIPLY  // high * high
      _tile_loadd(6, second + kHalfBytes, kLineBytes);
  _tile_loadd(7, second + kOperandBytes + kHalfBytes, kLineBytes);
  DELTASTORE_MULTIPLY  // high * low
#undef DELTASTORE_MULTIPLY
}

// c [kParts * 16, columns] (+)= first [.., 32 * depths] * second [32 * depths, columns], for all columns.
template <int kParts, bool kAdd>
void multiply_part(const uint8_t* first, const uint8_t* second, int64_t depths, int64_t columns, float* c) {
  for (int64_t column = 0; column < columns; column += 32, c += 32) {
    if constexpr (kAdd) {
      _tile_loadd(0, c, 4 * columns);
      _tile_loadd(1, c + 16, 4 * columns);
      if constexpr (kParts == 2) _tile_loadd(2, c + kPartRows * columns, 4 * columns);
      if constexpr (kParts == 2) _tile_loadd(3, c + kPartRows * columns + 16, 4 * columns);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t depth = 0; depth < depths; ++depth) {
      multiply_split<kParts>(first + depth * kMaxParts * kOperandBytes,
                             second + (depth * columns + column) / 16 * kOperandBytes);
    }
    _tile_stored(0, c, 4 * columns);
    _tile_stored(1, c + 16, 4 * columns);
    if constexpr (kParts == 2) _tile_stored(2, c + kPartRows * columns, 4 * columns);
    if constexpr (kParts == 2) _tile_stored(3, c + kPartRows * columns + 16, 4 * columns);
  }
}

template <bool kAdd>
void multiply_rows(const uint8_t* first, const uint8_t* second, int64_t rows, int64_t depths, int64_t columns,
                   float* c) {
  finish_stores();
  for (int64_t r = 0; r < rows; r += 2 * kPartRows) {
    const uint8_t* part = first + r / kPartRows * kOperandBytes;
    if (rows - r > kPartRows) {
      multiply_part<2, kAdd>(part, second, depths, columns, c + r * columns);
    } else {
      multiply_part<1, kAdd>(part, second, depths, columns, c + r * columns);
    }
  }
  finish_stores();
}

inline void score_dense(Block& block, const Query& query, const uint8_t* keys, int64_t rows, int64_t dim) {
  multiply_rows<false>(query.operands, keys, rows, dim / 32, kBlockTokens, block.scores);
}

// out [rows, D] += probabilities * values; probabilities beyond the block's tokens are zero.
inline void sum_dense(Block& block, const uint8_t* values, int64_t rows, int64_t tokens, int64_t dim, float* out) {
  split_rows(block.scores, rows, kBlockTokens, block.operands);
  multiply_rows<true>(block.operands, values, rows, (tokens + 31) / 32, dim, out);
}

}  // namespace deltastore::DELTASTORE_ISA

#endif
