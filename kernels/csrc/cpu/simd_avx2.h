// Sixteen lanes on AVX2: two registers each. Integer dot products go through 16-bit factors, which
// need no sign trick and cannot saturate.
#pragma once

#include <immintrin.h>

#include "../include/deltastore/codec.h"

namespace deltastore::DELTASTORE_ISA {

constexpr int kRowsPerPass = 4;   // query rows that one unpacking of codes serves: as registers allow
constexpr int kDotChains = 4;     // integer accumulators in flight when scoring
constexpr int kSumGroups = 1;     // groups of 16 dims summed at once
constexpr int kDenseRows = 4;     // strips of a float matrix product: rows,
constexpr int kDenseVectors = 1;  // and vectors of 16 columns

struct F32 {
  __m256 half[2];
};
struct I32 {
  __m256i half[2];
};
struct Bytes {
  __m256i half[2];
};
// A line of levels as int16: in each 32-bit lane bytes 0 and 2 in `even`, bytes 1 and 3 in `odd`.
struct Levels {
  __m256i even[2];
  __m256i odd[2];
};
struct Quad {
  int32_t even;
  int32_t odd;
};

inline F32 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.half[0]);
  _mm256_storeu_ps(p + 8, x.half[1]);
}
inline F32 splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
// clang-format off: it takes the braces of a value for a block's.
#define DELTASTORE_BOTH(f, a, b) {{f((a).half[0], (b).half[0]), f((a).half[1], (b).half[1])}}
// clang-format on
inline F32 add(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_add_ps, a, b); }
inline F32 sub(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_sub_ps, a, b); }
inline F32 mul(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_mul_ps, a, b); }
inline F32 div(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_div_ps, a, b); }
inline F32 max(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_max_ps, a, b); }
inline F32 min(F32 a, F32 b) { return DELTASTORE_BOTH(_mm256_min_ps, a, b); }
inline I32 add(I32 a, I32 b) { return DELTASTORE_BOTH(_mm256_add_epi32, a, b); }
#undef DELTASTORE_BOTH
inline F32 fma(F32 a, F32 b, F32 c) {
  return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}
// x, and 0 where it is NaN
inline F32 or_zero(F32 x) {
  for (__m256& half : x.half) half = _mm256_and_ps(half, _mm256_cmp_ps(half, half, _CMP_ORD_Q));
  return x;
}
inline float first_lane(F32 x) { return _mm256_cvtss_f32(x.half[0]); }
inline float reduce_max(F32 x) {
  __m256 m = _mm256_max_ps(x.half[0], x.half[1]);
  m = _mm256_max_ps(m, _mm256_permute2f128_ps(m, m, 1));
  m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4E));
  return _mm256_cvtss_f32(_mm256_max_ps(m, _mm256_permute_ps(m, 0xB1)));
}
inline float reduce_add(F32 x) {
  __m256 s = _mm256_add_ps(x.half[0], x.half[1]);
  s = _mm256_add_ps(s, _mm256_permute2f128_ps(s, s, 1));
  s = _mm256_add_ps(s, _mm256_permute_ps(s, 0x4E));
  return _mm256_cvtss_f32(_mm256_add_ps(s, _mm256_permute_ps(s, 0xB1)));
}
inline bool any_greater(F32 a, float b) {
  const __m256 least = _mm256_set1_ps(b);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.half[0], least, _CMP_GT_OQ),
                                         _mm256_cmp_ps(a.half[1], least, _CMP_GT_OQ))) != 0;
}
inline F32 round(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {{_mm256_round_ps(x.half[0], kNearest), _mm256_round_ps(x.half[1], kNearest)}};
}
// x * 2**n for whole n, -126 <= n <= 127
inline F32 scale_exp2(F32 x, F32 n) {
  F32 result;
  for (int i = 0; i < 2; ++i) {
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n.half[i]), _mm256_set1_epi32(127));
    result.half[i] = _mm256_mul_ps(x.half[i], _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
  }
  return result;
}
inline F32 load_f16(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
}
inline F32 load_bf16(const uint16_t* p) {
  F32 x;
  for (int i = 0; i < 2; ++i) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    x.half[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  return x;
}
inline void store_bf16(uint16_t* p, F32 x) {
  __m256i rounded[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(x.half[i]);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256 sum = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF))));
    const __m256 is_nan = _mm256_cmp_ps(x.half[i], x.half[i], _CMP_UNORD_Q);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    rounded[i] = _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(sum, nan, is_nan)), 16);
  }
  const __m256i packed = _mm256_packus_epi32(rounded[0], rounded[1]);  // 0-3, 8-11 | 4-7, 12-15
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store_f16(uint16_t* p, F32 x) {
  auto* q = reinterpret_cast<__m128i*>(p);
  for (int i = 0; i < 2; ++i) _mm_storeu_si128(q + i, _mm256_cvtps_ph(x.half[i], _MM_FROUND_TO_NEAREST_INT));
}
// Lane i and the one at kDistance: their sum in the lower of the two, their difference in the upper.
template <int kDistance>
inline F32 butterfly(F32 x) {
  if constexpr (kDistance == 8) {
    return {{_mm256_add_ps(x.half[0], x.half[1]), _mm256_sub_ps(x.half[0], x.half[1])}};
  } else {
    for (__m256& half : x.half) {
      __m256 other;
      if constexpr (kDistance == 1) other = _mm256_permute_ps(half, 0xB1);
      if constexpr (kDistance == 2) other = _mm256_permute_ps(half, 0x4E);
      if constexpr (kDistance == 4) other = _mm256_permute2f128_ps(half, half, 1);
      constexpr int kUpper = kDistance == 1 ? 0xAA : kDistance == 2 ? 0xCC : 0xF0;
      half = _mm256_blend_ps(_mm256_add_ps(half, other), _mm256_sub_ps(other, half), kUpper);
    }
    return x;
  }
}

inline I32 splat_i32(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline I32 round_to_i32(F32 x) { return {{_mm256_cvtps_epi32(x.half[0]), _mm256_cvtps_epi32(x.half[1])}}; }
inline F32 to_f32(I32 x) { return {{_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1])}}; }
inline I32 load_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {{_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}};
}
inline void store_u8(uint8_t* p, I32 x) {
  const __m256i words = _mm256_packus_epi32(x.half[0], x.half[1]);  // 0-3, 8-11 | 4-7, 12-15
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  // 32-bit pieces: 0-3, 8-11 in low and 4-7, 12-15 in high
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}
// x + step where a > b
inline I32 add_if_greater(I32 x, F32 a, F32 b, int step) {
  for (int i = 0; i < 2; ++i) {
    const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(a.half[i], b.half[i], _CMP_GT_OQ));
    x.half[i] = _mm256_add_epi32(x.half[i], _mm256_and_si256(greater, _mm256_set1_epi32(step)));
  }
  return x;
}
inline __m256 lookup_nibble(F32 table, __m256i nibble) {
  const __m256 low = _mm256_permutevar8x32_ps(table.half[0], nibble);
  const __m256 high = _mm256_permutevar8x32_ps(table.half[1], nibble);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibble, 28)));
}
inline F32 lookup_low_nibble(F32 table, I32 x) {
  return {{lookup_nibble(table, x.half[0]), lookup_nibble(table, x.half[1])}};
}
inline F32 lookup_high_nibble(F32 table, I32 x) {
  return {
      {lookup_nibble(table, _mm256_srli_epi32(x.half[0], 4)), lookup_nibble(table, _mm256_srli_epi32(x.half[1], 4))}};
}

// --- codes ---

inline Bytes load_bytes(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
}

// The field of `width` bits at bit `shift` of each byte. Arguments but the first are constants once inlined.
inline Bytes field(Bytes x, int shift, int width) {
  const __m256i mask = _mm256_set1_epi8((1 << width) - 1);
  for (__m256i& half : x.half) half = _mm256_and_si256(shift ? _mm256_srli_epi16(half, shift) : half, mask);
  return x;
}

// Code of 3 bits from the 2-bit plane (field at bit `shift`) and the 1-bit plane (bit `bit`).
inline Bytes join(Bytes high, int shift, Bytes low, int bit) {
  const Bytes top = field(high, shift, 2);
  const Bytes last = field(low, bit, 1);
  Bytes code;
  for (int i = 0; i < 2; ++i) {
    code.half[i] = _mm256_add_epi8(_mm256_add_epi8(top.half[i], top.half[i]), last.half[i]);
  }
  return code;
}

template <int kBits>
struct Table {
  __m256i entries;  // 16 bytes, twice
};
template <int kBits, int kOffset>
inline Table<kBits> load_table() {
  static constexpr LevelTable kLevels = make_level_table<kBits>(kOffset);
  return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevels.entries)))};
}
template <int kBits>
inline Bytes lookup(const Table<kBits>& table, Bytes code) {
  return {{_mm256_shuffle_epi8(table.entries, code.half[0]), _mm256_shuffle_epi8(table.entries, code.half[1])}};
}

// Four lines of key codes (16 tokens x 4 dims each) -> rows [16 tokens][16 dims].
inline void key_rows(const Bytes lines[4], uint8_t* rows) {
  for (int i = 0; i < 2; ++i) {
    const __m256i a = lines[0].half[i], b = lines[1].half[i], c = lines[2].half[i], d = lines[3].half[i];
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    const __m256i by_token[4] = {_mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
                                 _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)};
    // 128-bit lane k of by_token[j] is token 8i + 4k + j
    for (int j = 0; j < 4; ++j) {
      auto* row = reinterpret_cast<__m128i*>(rows) + 8 * i + j;
      _mm_storeu_si128(row, _mm256_castsi256_si128(by_token[j]));
      _mm_storeu_si128(row + 4, _mm256_extracti128_si256(by_token[j], 1));
    }
  }
}

// Four lines of value codes (16 dims x 4 tokens each) -> rows [16 tokens][16 dims].
inline void value_rows(const Bytes lines[4], uint8_t* rows) {
  const __m256i by_token = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));  // in each 4 dims x 4 tokens
  const __m256i gather = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {  // 8 dims of 4 tokens
      const __m256i tokens = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(lines[i].half[half], by_token), gather);
      auto* row = rows + 64 * i + 8 * half;
      _mm_storel_epi64(reinterpret_cast<__m128i*>(row), _mm256_castsi256_si128(tokens));
      _mm_storeh_pd(reinterpret_cast<double*>(row + 16), _mm_castsi128_pd(_mm256_castsi256_si128(tokens)));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(row + 32), _mm256_extracti128_si256(tokens, 1));
      _mm_storeh_pd(reinterpret_cast<double*>(row + 48), _mm_castsi128_pd(_mm256_extracti128_si256(tokens, 1)));
    }
  }
}

// --- integer dot products: acc[lane] += sum of 4 level bytes * 4 factors ---

constexpr int kKeyOffset = 0;

inline Levels widen(Bytes levels) {
  Levels wide;
  for (int i = 0; i < 2; ++i) {
    wide.even[i] = _mm256_srai_epi16(_mm256_slli_epi16(levels.half[i], 8), 8);
    wide.odd[i] = _mm256_srai_epi16(levels.half[i], 8);
  }
  return wide;
}

inline int32_t pack_int16(int low, int high) {
  return static_cast<int32_t>((static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xFFFFu));
}
inline void make_query_quads(Quad* quads, const int8_t* query, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* q = query + 4 * i;
    quads[i] = {pack_int16(q[0], q[2]), pack_int16(q[1], q[3])};
  }
}
inline I32 quad_dot(I32 acc, const Levels& levels, const Quad* quad) {
  const __m256i even = _mm256_set1_epi32(quad->even);
  const __m256i odd = _mm256_set1_epi32(quad->odd);
  for (int i = 0; i < 2; ++i) {
    acc.half[i] = _mm256_add_epi32(acc.half[i], _mm256_madd_epi16(levels.even[i], even));
    acc.half[i] = _mm256_add_epi32(acc.half[i], _mm256_madd_epi16(levels.odd[i], odd));
  }
  return acc;
}
inline I32 key_dot(I32 acc, const Levels& levels, const Quad* query) { return quad_dot(acc, levels, query); }
inline I32 value_dot(I32 acc, const Levels& levels, const Quad* weights) { return quad_dot(acc, levels, weights); }

// 16 numbers 0 .. 255 as 4 quads.
inline void store_weight_quads(Quad* quads, I32 weights) {
  for (int i = 0; i < 2; ++i) {
    // w: w0 w1 w2 w3 in each 128-bit lane; shifted: w2 w3 . .
    const __m256i w = weights.half[i];
    const __m256i shifted = _mm256_slli_epi32(_mm256_shuffle_epi32(w, 0x0E), 16);
    const __m256i pairs = _mm256_or_si256(w, shifted);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(quads + 2 * i), _mm256_castsi256_si128(pairs));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(quads + 2 * i + 1), _mm256_extracti128_si256(pairs, 1));
  }
}

// --- sums ---

// Lane t of the result is the sum of the lanes of rows[t].
inline F32 sum_rows(const F32 rows[16]) {
  F32 result;
  for (int i = 0; i < 2; ++i) {
    __m256 quads[2];
    for (int q = 0; q < 2; ++q) {
      const F32* r = rows + 8 * i + 4 * q;
      __m256 folded[4];
      for (int k = 0; k < 4; ++k) folded[k] = _mm256_add_ps(r[k].half[0], r[k].half[1]);
      quads[q] = _mm256_hadd_ps(_mm256_hadd_ps(folded[0], folded[1]), _mm256_hadd_ps(folded[2], folded[3]));
    }
    result.half[i] = _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                   _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
  return result;
}

}  // namespace deltastore::DELTASTORE_ISA
