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
constexpr int64_t rows_of_pass(int64_t left) {
  return left >= kRowsPerPass ? kRowsPerPass : smaller(left, kRowsPerPass < 4 ? kRowsPerPass : 4);
}

// 2**x for x up to 126, relative error 1.1e-7; x is clamped from below (and NaN with it) to what stays
// a normal float. Minimax polynomial of 2**f on [-0.5, 0.5]: Remez exchange on the relative error,
// 1.9e-9 before rounding to float.
inline F32 exp2(F32 x) {
  x = max(x, splat(-126.0f));
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

// The codes of line 8 * octet + line of a tile. An octet is 32 dims of 16 tokens; `line` is a constant once the
// caller's loop is unrolled.
template <int kBits>
inline Bytes load_codes(const uint8_t* tile, int64_t head_dim, int64_t octet, int line) {
  if constexpr (kBits == 4) return field(load_bytes(tile + (4 * octet + line / 2) * kLineBytes), line % 2 * 4, 4);
  const Bytes pairs = load_bytes(tile + (2 * octet + line / 4) * kLineBytes);
  if constexpr (kBits == 2) return field(pairs, line % 4 * 2, 2);
  return join(pairs, line % 4 * 2, load_bytes(tile + low_plane_offset(head_dim) + octet * kLineBytes), line);
}

}  // namespace deltastore::DELTASTORE_ISA
