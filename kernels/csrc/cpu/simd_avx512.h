// Sixteen lanes on AVX-512 with VNNI (Cascade Lake, Zen 4 and later): one register each. VBMI's look-ups
// would save the masks, but measured no faster: the dot products are what takes the time.
#pragma once

#include <immintrin.h>

#include "../include/deltastore/codec.h"

namespace deltastore::DELTASTORE_ISA {

constexpr int kRowsPerPass = 8;   // query rows that one unpacking of codes serves: as registers allow
constexpr int kDotChains = 8;     // integer accumulators in flight when scoring
constexpr int kSumGroups = 2;     // groups of 16 dims summed at once
constexpr int kDenseRows = 4;     // strips of a float matrix product: rows,
constexpr int kDenseVectors = 4;  // and vectors of 16 columns

using F32 = __m512;
using I32 = __m512i;
using Bytes = __m512i;   // one line: 64 codes, or 64 int8 levels
using Levels = __m512i;  // a line of levels, ready for a dot product
using Quad = int32_t;    // four int8 (or uint8) factors of a dot product

inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 splat(float x) { return _mm512_set1_ps(x); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
// x, and 0 where it is NaN
inline F32 or_zero(F32 x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
inline float first_lane(F32 x) { return _mm512_cvtss_f32(x); }
inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
inline float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
inline bool any_greater(F32 a, float b) { return _mm512_cmp_ps_mask(a, splat(b), _CMP_GT_OQ) != 0; }
inline F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2**n for whole n
inline F32 scale_exp2(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline void store_bf16(uint16_t* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(x),
                last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_f16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Lane i and the one at kDistance: their sum in the lower of the two, their difference in the upper.
template <int kDistance>
inline F32 butterfly(F32 x) {
  F32 other;
  if constexpr (kDistance == 1) other = _mm512_permute_ps(x, 0xB1);
  if constexpr (kDistance == 2) other = _mm512_permute_ps(x, 0x4E);
  if constexpr (kDistance == 4) other = _mm512_shuffle_f32x4(x, x, 0xB1);
  if constexpr (kDistance == 8) other = _mm512_shuffle_f32x4(x, x, 0x4E);
  constexpr __mmask16 kUpper = kDistance == 1 ? 0xAAAA : kDistance == 2 ? 0xCCCC : kDistance == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_mask_sub_ps(add(x, other), kUpper, other, x);
}

inline I32 splat_i32(int32_t x) { return _mm512_set1_epi32(x); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 round_to_i32(F32 x) { return _mm512_cvtps_epi32(x); }
inline F32 to_f32(I32 x) { return _mm512_cvtepi32_ps(x); }
inline I32 load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_u8(uint8_t* p, I32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
// x + step where a > b
inline I32 add_if_greater(I32 x, F32 a, F32 b, int step) {
  return _mm512_mask_add_epi32(x, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), x, _mm512_set1_epi32(step));
}
inline F32 lookup_low_nibble(F32 table, I32 x) { return _mm512_permutexvar_ps(x, table); }
inline F32 lookup_high_nibble(F32 table, I32 x) { return _mm512_permutexvar_ps(_mm512_srli_epi32(x, 4), table); }

// --- codes ---

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }

// The field of `width` bits at bit `shift` of each byte. Arguments but the first are constants once inlined.
inline Bytes field(Bytes x, int shift, int width) {
  const Bytes shifted = shift ? _mm512_srli_epi16(x, shift) : x;
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << width) - 1));
}

// Code of 3 bits from the 2-bit plane (field at bit `shift`) and the 1-bit plane (bit `bit`).
inline Bytes join(Bytes high, int shift, Bytes low, int bit) {
  const Bytes moved = shift ? _mm512_srli_epi16(high, shift) : high;
  const Bytes top = _mm512_add_epi8(moved, moved);
  const Bytes last = bit ? _mm512_srli_epi16(low, bit) : low;
  // bit 0 from `last`, the others from `top`
  const Bytes code = _mm512_ternarylogic_epi32(_mm512_set1_epi8(1), last, top, 0xCA);
  return _mm512_and_si512(code, _mm512_set1_epi8(7));
}

template <int kBits>
struct Table {
  __m512i entries;  // 16 bytes, repeated
};
template <int kBits, int kOffset>
inline Table<kBits> load_table() {
  static constexpr LevelTable kLevels = make_level_table<kBits>(kOffset);
  return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kLevels.entries)))};
}
template <int kBits>
inline Bytes lookup(const Table<kBits>& table, Bytes code) {
  return _mm512_shuffle_epi8(table.entries, code);
}

// Four lines of key codes (16 tokens x 4 dims each) -> rows [16 tokens][16 dims].
inline void key_rows(const Bytes lines[4], uint8_t* rows) {
  const __m512i ab_low = _mm512_unpacklo_epi32(lines[0], lines[1]), ab_high = _mm512_unpackhi_epi32(lines[0], lines[1]);
  const __m512i cd_low = _mm512_unpacklo_epi32(lines[2], lines[3]), cd_high = _mm512_unpackhi_epi32(lines[2], lines[3]);
  const __m512i by_token[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                               _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
  // 128-bit lane k of by_token[j] is token 4k + j
  for (int j = 0; j < 4; ++j) {
    auto* row = reinterpret_cast<__m128i*>(rows) + j;
    _mm_storeu_si128(row, _mm512_castsi512_si128(by_token[j]));
    _mm_storeu_si128(row + 4, _mm512_extracti32x4_epi32(by_token[j], 1));
    _mm_storeu_si128(row + 8, _mm512_extracti32x4_epi32(by_token[j], 2));
    _mm_storeu_si128(row + 12, _mm512_extracti32x4_epi32(by_token[j], 3));
  }
}

// Four lines of value codes (16 dims x 4 tokens each) -> rows [16 tokens][16 dims].
inline void value_rows(const Bytes lines[4], uint8_t* rows) {
  const __m512i by_token = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));  // in each 4 dims x 4 tokens
  const __m512i gather = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int i = 0; i < 4; ++i) {
    const __m512i tokens = _mm512_permutexvar_epi32(gather, _mm512_shuffle_epi8(lines[i], by_token));
    _mm512_storeu_si512(rows + 64 * i, tokens);
  }
}

// --- integer dot products: acc[lane] += sum of 4 level bytes * 4 factors ---

// VNNI multiplies unsigned by signed bytes: keys are offset to unsigned, and the accumulator starts
// at -kKeyOffset * (sum of the query) to make up for it. The result is exact.
constexpr int kKeyOffset = 128;

inline Levels widen(Bytes levels) { return levels; }

inline void make_query_quads(Quad* quads, const int8_t* query, int64_t count) {
  __builtin_memcpy(quads, query, static_cast<size_t>(4 * count));
}
inline I32 key_dot(I32 acc, Levels levels, const Quad* query) {
  return _mm512_dpbusd_epi32(acc, levels, _mm512_set1_epi32(*query));
}

// 16 numbers 0 .. 255 as 4 quads.
inline void store_weight_quads(Quad* quads, I32 weights) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtepi32_epi8(weights));
}
inline I32 value_dot(I32 acc, Levels levels, const Quad* weights) {
  return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(*weights), levels);
}

// --- sums ---

inline F32 fold_pairs(F32 a, F32 b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline F32 fold_quads(F32 a, F32 b) { return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE)); }

// Lane t of the result is the sum of the lanes of rows[t].
inline F32 sum_rows(const F32 rows[16]) {
  F32 quads[4];  // lane 4 * part + i of quads[q]: partial sum of row 4 * q + i
  for (int q = 0; q < 4; ++q) {
    const F32* r = rows + 4 * q;
    quads[q] = fold_quads(fold_pairs(r[0], r[1]), fold_pairs(r[2], r[3]));
  }
  const F32 low = add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44), _mm512_shuffle_f32x4(quads[0], quads[1], 0xEE));
  const F32 high = add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44), _mm512_shuffle_f32x4(quads[2], quads[3], 0xEE));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

}  // namespace deltastore::DELTASTORE_ISA
