// The lanes of the instruction set this file is compiled for, and what is built on them alone.
// DELTASTORE_ISA names it (and the namespace); setup.py gives the matching compiler flags.
//
// Only these headers' own inline functions are used in such files: an inline function of the
// standard library, compiled here for a newer CPU, could be the copy that the linker keeps for all.
#pragma once

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace deltastore::DELTASTORE_ISA {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How many of the `left` rows the next pass takes.
constexpr int64_t rows_of_pass(int64_t left) { return left >= kRowsPerPass ? kRowsPerPass : smaller(left, 4); }

// 2**x, relative error 1.1e-7; x is clamped to what stays a normal float. Minimax polynomial of
// 2**f on [-0.5, 0.5] (Remez exchange on the relative error, 1.9e-9 before rounding to float).
inline F32 exp2(F32 x) {
  x = min(max(x, splat(-126.0f)), splat(126.0f));
  const F32 whole = round(x);
  const F32 f = sub(x, whole);
  F32 p = splat(1.5345810970757157e-4f);
  p = fma(p, f, splat(1.3399930903688073e-3f));
  p = fma(p, f, splat(9.618489071726799e-3f));
  p = fma(p, f, splat(5.550328642129898e-2f));
  p = fma(p, f, splat(2.4022646248340607e-1f));
  p = fma(p, f, splat(6.931471824645996e-1f));
  p = fma(p, f, splat(1.0f));
  return scale_exp2(p, whole);
}

// The codes of lines 8 * octet .. + 7 of a tile: the bytes that 32 dims of 16 tokens take.
template <int kBits>
inline void load_codes(const uint8_t* tile, int64_t head_dim, int64_t octet, Bytes codes[8]) {
  if constexpr (kBits == 4) {
    for (int r = 0; r < 4; ++r) {
      const Bytes packed = load_bytes(tile + (4 * octet + r) * kLineBytes);
      codes[2 * r] = field<0, 4>(packed);
      codes[2 * r + 1] = field<4, 4>(packed);
    }
  } else if constexpr (kBits == 2) {
    for (int r = 0; r < 2; ++r) {
      const Bytes packed = load_bytes(tile + (2 * octet + r) * kLineBytes);
      codes[4 * r] = field<0, 2>(packed);
      codes[4 * r + 1] = field<2, 2>(packed);
      codes[4 * r + 2] = field<4, 2>(packed);
      codes[4 * r + 3] = field<6, 2>(packed);
    }
  } else {
    const Bytes high0 = load_bytes(tile + 2 * octet * kLineBytes);
    const Bytes high1 = load_bytes(tile + (2 * octet + 1) * kLineBytes);
    const Bytes low = load_bytes(tile + low_plane_offset(head_dim) + octet * kLineBytes);
    codes[0] = join<0, 0>(high0, low);
    codes[1] = join<2, 1>(high0, low);
    codes[2] = join<4, 2>(high0, low);
    codes[3] = join<6, 3>(high0, low);
    codes[4] = join<0, 4>(high1, low);
    codes[5] = join<2, 5>(high1, low);
    codes[6] = join<4, 6>(high1, low);
    codes[7] = join<6, 7>(high1, low);
  }
}

}  // namespace deltastore::DELTASTORE_ISA
