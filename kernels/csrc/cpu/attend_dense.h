// A block of float tokens: new ones, or raw tiles. Arranged once as the second operands of its two
// products, so that lanes are tokens when scoring and dims when summing, and nothing has to be added up
// across lanes. In plain registers that is
//
//     keys   [D, kBlockTokens] float    values [kBlockTokens, D] float
//
// and with matrix units what amx.h says.
#pragma once

#include "attend_block.h"

namespace deltastore::DELTASTORE_ISA {

// Rows of tokens in memory: sixteen lanes from dim d of token t, zeros beyond the last token.
struct FloatRows {
  const float* data;
  int64_t stride, tokens;
  F32 at(int64_t t, int64_t d) const { return t < tokens ? load(data + t * stride + d) : splat(0.0f); }
};

struct RawTileRows {
  const uint8_t* tiles[kBlockTiles];
  int64_t dim, tokens;
  F32 at(int64_t t, int64_t d) const {
    if (t >= tokens) return splat(0.0f);
    const auto* halves = reinterpret_cast<const uint16_t*>(tiles[t / kTileTokens]);
    return load_f16(halves + t % kTileTokens * dim + d);
  }
};

#ifndef __AMX_BF16__

// As plain floats they need no preparation.
inline void prepare_dense(Query&, int64_t, int64_t) {}

template <typename TokenRows>
void arrange_keys(const TokenRows& rows, int64_t dim, uint8_t* side) {
  auto* key_t = reinterpret_cast<float*>(side);
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t d = 0; d < dim; d += 16) {
      alignas(64) float key[16];
      store(key, rows.at(t, d));
      for (int64_t i = 0; i < 16; ++i) key_t[(d + i) * kBlockTokens + t] = key[i];
    }
  }
}

template <typename TokenRows>
void arrange_values(const TokenRows& rows, int64_t dim, uint8_t* side) {
  auto* value = reinterpret_cast<float*>(side);
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    for (int64_t d = 0; d < dim; d += 16) store(value + t * dim + d, rows.at(t, d));
  }
}

// c [kDenseRows, 16 * kVectors] (+)= a [kDenseRows, depth] * b [depth, 16 * kVectors]; strides in floats.
template <int kVectors, bool kAdd>
inline void multiply_strip(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                           int64_t c_stride) {
  F32 sums[kDenseRows][kVectors];
  for (int r = 0; r < kDenseRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = kAdd ? load(c + r * c_stride + 16 * v) : splat(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * b_stride + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kDenseRows; ++r) {
      const F32 factor = splat(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(columns[v], factor, sums[r][v]);
    }
  }
  for (int r = 0; r < kDenseRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + 16 * v, sums[r][v]);
  }
}

// c [rows, columns] (+)= a [rows, depth] * b [depth, columns]. Works on whole strips of kDenseRows
// rows: the rows up to the next multiple must be there, whatever they hold.
template <bool kAdd>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t depth,
              int64_t columns, float* c, int64_t c_stride) {
  constexpr int64_t kWide = 16 * kDenseVectors;
  for (int64_t r = 0; r < rows; r += kDenseRows) {
    int64_t j = 0;
    for (; j + kWide <= columns; j += kWide) {
      multiply_strip<kDenseVectors, kAdd>(a + r * a_stride, a_stride, b + j, b_stride, depth, c + r * c_stride + j,
                                          c_stride);
    }
    for (; j < columns; j += 16) {
      multiply_strip<1, kAdd>(a + r * a_stride, a_stride, b + j, b_stride, depth, c + r * c_stride + j, c_stride);
    }
  }
}

inline void score_dense(Block& block, const Query& query, const uint8_t* keys, int64_t rows, int64_t dim) {
  multiply<false>(query.rows, dim, reinterpret_cast<const float*>(keys), kBlockTokens, rows, dim, kBlockTokens,
                  block.scores, kBlockTokens);
}

// out [rows, D] += probabilities * values of the block's first `tokens` tokens
inline void sum_dense(Block& block, const uint8_t* values, int64_t rows, int64_t tokens, int64_t dim, float* out) {
  multiply<true>(block.scores, kBlockTokens, reinterpret_cast<const float*>(values), dim, rows, tokens, dim, out, dim);
}

#endif

}  // namespace deltastore::DELTASTORE_ISA
