// A matrix product for float blocks: keys as columns, so that lanes are tokens when scoring and dims
// when summing, and nothing has to be added up across lanes.
#pragma once

#include "simd.h"

namespace deltastore::DELTASTORE_ISA {

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

}  // namespace deltastore::DELTASTORE_ISA
