// Sixteen lanes in plain C++: loops that a compiler may vectorize for whatever it targets.
#pragma once

#include <cstring>

#include "../include/deltastore/codec.h"

namespace deltastore::DELTASTORE_ISA {

constexpr int kRowsPerPass = 4;   // query rows that one unpacking of codes serves: as registers allow
constexpr int kDotChains = 4;     // integer accumulators in flight when scoring
constexpr int kSumGroups = 1;     // groups of 16 dims summed at once
constexpr int kDenseRows = 4;     // strips of a float matrix product: rows,
constexpr int kDenseVectors = 1;  // and vectors of 16 columns

struct F32 {
  float lane[16];
};
struct I32 {
  int32_t lane[16];
};
struct Bytes {
  uint8_t lane[64];
};
struct Levels {
  int8_t lane[64];
};
struct Quad {
  int16_t factor[4];
};

template <typename Out, typename Function>
inline Out lanes(Function f) {
  Out result;
  constexpr int count = sizeof(result.lane) / sizeof(result.lane[0]);
  for (int i = 0; i < count; ++i) result.lane[i] = f(i);
  return result;
}

inline F32 load(const float* p) {
  return lanes<F32>([=](int i) { return p[i]; });
}
inline void store(float* p, F32 x) { std::memcpy(p, x.lane, sizeof(x)); }
inline F32 splat(float x) {
  return lanes<F32>([=](int) { return x; });
}
inline F32 add(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32 sub(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32 mul(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32 div(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F32 fma(const F32& a, const F32& b, const F32& c) {
  return lanes<F32>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// As x86 does: the second operand where either is NaN.
inline F32 max(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 min(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// x, and 0 where it is NaN
inline F32 or_zero(const F32& x) {
  return lanes<F32>([&](int i) { return x.lane[i] == x.lane[i] ? x.lane[i] : 0.0f; });
}
inline float first_lane(const F32& x) { return x.lane[0]; }
inline float reduce_max(const F32& x) {
  float result = x.lane[0];
  for (float lane : x.lane) result = lane > result ? lane : result;
  return result;
}
// In the order of the other instruction sets: halves onto each other.
inline float reduce_add(const F32& x) {
  F32 sum = x;
  for (int half = 8; half; half /= 2) {
    for (int i = 0; i < half; ++i) sum.lane[i] += sum.lane[i + half];
  }
  return sum.lane[0];
}
inline bool any_greater(const F32& a, float b) {
  bool any = false;
  for (float lane : a.lane) any |= lane > b;
  return any;
}
// Nearest whole number, ties to even, for |x| < 2**22.
inline F32 round(const F32& x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2**23: its last bit is worth 1
  return lanes<F32>([&](int i) { return (x.lane[i] + kShift) - kShift; });
}
// x * 2**n for whole n, -126 <= n <= 127
inline F32 scale_exp2(const F32& x, const F32& n) {
  return lanes<F32>([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.lane[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return x.lane[i] * power;
  });
}
inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  // Infinities and NaNs keep an all-ones exponent; else rebias by a multiplication, which also
  // makes subnormals right.
  uint32_t bits = magnitude << 13;
  float value;
  if (magnitude >= 0x7C00u) {
    bits |= 0x7F800000u;
    std::memcpy(&value, &bits, sizeof(value));
  } else {
    std::memcpy(&value, &bits, sizeof(value));
    value *= 0x1p112f;
  }
  return sign ? -value : value;
}
inline F32 load_f16(const uint16_t* p) {
  return lanes<F32>([=](int i) { return f16_to_f32(p[i]); });
}
// To the nearest, ties to even.
inline uint16_t f32_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more
  if (size < 0x38800000u) {  // below 2**-14: steps of 2**-24, which is what 0.5 has in float32
    float magnitude;
    std::memcpy(&magnitude, &size, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  const uint32_t rounded = size - 0x38000000u + 0xFFFu + (size >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}
inline F32 load_bf16(const uint16_t* p) {
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  F32 x;
  std::memcpy(&x, bits, sizeof(x));
  return x;
}
inline void store_bf16(uint16_t* p, const F32& x) {
  uint32_t bits[16];
  std::memcpy(bits, &x, sizeof(bits));
  for (int i = 0; i < 16; ++i) {
    const bool is_nan = (bits[i] & 0x7FFFFFFFu) > 0x7F800000u;
    p[i] = static_cast<uint16_t>(is_nan ? 0x7FC0u : (bits[i] + 0x7FFFu + (bits[i] >> 16 & 1)) >> 16);
  }
}
inline void store_f16(uint16_t* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(x.lane[i]);
}
// Lane i and the one at kDistance: their sum in the lower of the two, their difference in the upper.
template <int kDistance>
inline F32 butterfly(const F32& x) {
  return lanes<F32>([&](int i) {
    const float other = x.lane[i ^ kDistance];
    return i & kDistance ? other - x.lane[i] : x.lane[i] + other;
  });
}

inline I32 splat_i32(int32_t x) {
  return lanes<I32>([=](int) { return x; });
}
inline I32 add(const I32& a, const I32& b) {
  return lanes<I32>([&](int i) { return a.lane[i] + b.lane[i]; });
}
// Nearest whole number, ties to even, for |x| < 2**22.
inline I32 round_to_i32(const F32& x) {
  const F32 whole = round(x);
  return lanes<I32>([&](int i) { return static_cast<int32_t>(whole.lane[i]); });
}
inline F32 to_f32(const I32& x) {
  return lanes<F32>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline I32 load_u8(const uint8_t* p) {
  return lanes<I32>([=](int i) { return static_cast<int32_t>(p[i]); });
}
inline void store_u8(uint8_t* p, const I32& x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(x.lane[i]);
}
// x + step where a > b
inline I32 add_if_greater(const I32& x, const F32& a, const F32& b, int step) {
  return lanes<I32>([&](int i) { return x.lane[i] + (a.lane[i] > b.lane[i] ? step : 0); });
}
inline F32 lookup_low_nibble(const F32& table, const I32& x) {
  return lanes<F32>([&](int i) { return table.lane[x.lane[i] & 15]; });
}
inline F32 lookup_high_nibble(const F32& table, const I32& x) {
  return lanes<F32>([&](int i) { return table.lane[x.lane[i] >> 4 & 15]; });
}

// --- codes ---

inline Bytes load_bytes(const uint8_t* p) {
  return lanes<Bytes>([=](int i) { return p[i]; });
}

// The field of `width` bits at bit `shift` of each byte.
inline Bytes field(const Bytes& x, int shift, int width) {
  return lanes<Bytes>([&](int i) { return static_cast<uint8_t>(x.lane[i] >> shift & ((1 << width) - 1)); });
}

// Code of 3 bits from the 2-bit plane (field at bit `shift`) and the 1-bit plane (bit `bit`).
inline Bytes join(const Bytes& high, int shift, const Bytes& low, int bit) {
  return lanes<Bytes>(
      [&](int i) { return static_cast<uint8_t>((high.lane[i] >> shift & 3) << 1 | (low.lane[i] >> bit & 1)); });
}

template <int kBits>
using Table = LevelTable;
template <int kBits, int kOffset>
inline LevelTable load_table() {
  return make_level_table<kBits>(kOffset);
}
template <int kBits>
inline Bytes lookup(const LevelTable& table, const Bytes& code) {
  return lanes<Bytes>([&](int i) { return table.entries[code.lane[i]]; });
}

// Four lines of key codes (16 tokens x 4 dims each) -> rows [16 tokens][16 dims].
inline void key_rows(const Bytes lines[4], uint8_t* rows) {
  for (int token = 0; token < 16; ++token) {
    for (int d = 0; d < 16; ++d) rows[16 * token + d] = lines[d / 4].lane[4 * token + d % 4];
  }
}

// Four lines of value codes (16 dims x 4 tokens each) -> rows [16 tokens][16 dims].
inline void value_rows(const Bytes lines[4], uint8_t* rows) {
  for (int token = 0; token < 16; ++token) {
    for (int d = 0; d < 16; ++d) rows[16 * token + d] = lines[token / 4].lane[4 * d + token % 4];
  }
}

// --- integer dot products: acc[lane] += sum of 4 level bytes * 4 factors ---

constexpr int kKeyOffset = 0;

inline Levels widen(const Bytes& levels) {
  Levels wide;
  std::memcpy(wide.lane, levels.lane, sizeof(wide));
  return wide;
}

inline void make_query_quads(Quad* quads, const int8_t* query, int64_t count) {
  for (int64_t i = 0; i < 4 * count; ++i) quads[i / 4].factor[i % 4] = query[i];
}
inline I32 quad_dot(const I32& acc, const Levels& levels, const Quad& quad) {
  I32 result = acc;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 4; ++k) result.lane[i] += levels.lane[4 * i + k] * quad.factor[k];
  }
  return result;
}
inline I32 key_dot(const I32& acc, const Levels& levels, const Quad* query) { return quad_dot(acc, levels, *query); }
inline I32 value_dot(const I32& acc, const Levels& levels, const Quad* w) { return quad_dot(acc, levels, *w); }

// 16 numbers 0 .. 255 as 4 quads.
inline void store_weight_quads(Quad* quads, const I32& weights) {
  for (int i = 0; i < 16; ++i) quads[i / 4].factor[i % 4] = static_cast<int16_t>(weights.lane[i]);
}

// --- sums ---

// Lane t of the result is the sum of the lanes of rows[t].
inline F32 sum_rows(const F32 rows[16]) {
  return lanes<F32>([&](int i) { return reduce_add(rows[i]); });
}

}  // namespace deltastore::DELTASTORE_ISA
