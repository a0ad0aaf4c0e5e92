// encode of one tile, as ops/encode/reference.py defines it. Sums, products and comparisons are
// written so that every instruction set gives the same bytes: no fused multiply-add, one order of
// sums, and thresholds in place of logarithms. The twin sums in another order and takes float32
// logarithms, so where it is within a rounding error of a tie the two may decide differently.
#include "isa.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

constexpr float kSmallest = 0x1p-40f;
constexpr float kLargestHalf = 65504.0f;  // of float16

// 2 ** ((2 i + 1) / 16): half-way, in logarithms, between two eighths of an octave.
constexpr double kBetweenEighths[8] = {1.0442737824274138, 1.1387886347566916, 1.241857812073484,  1.3542555469368927,
                                       1.4768261459394993, 1.6104903319492543, 1.7562521603732995, 1.9152065613971474};
// 2 ** (-3 (2 i + 1) / 16): half-way between nibbles i and i + 1.
constexpr double kBetweenNibbles[kScaleNibbles - 1] = {
    0.8781260801866497,  0.6771277734684463,   0.5221368912137069,   0.40262258298731357,  0.310464453018371,
    0.23940082017464343, 0.18460326824243742,  0.14234857934458645,  0.10976576002333122,  0.08464097168355579,
    0.06526711140171336, 0.050327822873414196, 0.038808056627296375, 0.029925102521830428, 0.023075408530304677};

// Nearest anchor to a tile's largest scale.
int anchor_of(float largest) {
  if (largest >= 0x1p13f) return 255;
  int exponent = 0;
  float mantissa = __builtin_frexpf(largest, &exponent) * 2;  // 1 <= mantissa < 2, largest >= 2**-40
  int eighths = 8 * (exponent - 1);
  for (double edge : kBetweenEighths) eighths += mantissa > static_cast<float>(edge);
  const int anchor = eighths + kAnchorBias;
  return anchor < 0 ? 0 : anchor > 255 ? 255 : anchor;
}

struct Scales {
  int anchor;
  int nibbles[kTileTokens];
};

bool is_huge(const float* scale, int token) {
  int far_smaller = 0;
  for (int t = 0; t < kTileTokens; ++t) far_smaller += scale[token] > kHugeRatio * scale[t];
  return scale[token] >= kHugeScale && far_smaller >= kTileTokens / 2;
}

// Largest of a tile's scales without huge ones; at most half are. Apart, as are all rare paths here: inlined, they
// cost every tile 2%.
[[gnu::noinline, gnu::cold]] float largest_but_huge(const float* scale) {
  float largest = 0;
  for (int t = 0; t < kTileTokens; ++t) largest = scale[t] > largest && !is_huge(scale, t) ? scale[t] : largest;
  return largest;
}

// scale [16] -> the grid's nearest
Scales round_scales(const float* scale) {
  float largest = scale[0];
  for (int t = 1; t < kTileTokens; ++t) largest = scale[t] > largest ? scale[t] : largest;
  if (largest >= kHugeScale) largest = largest_but_huge(scale);
  Scales rounded{anchor_of(largest), {}};
  const float inverse = power_of_eighths(kAnchorBias - rounded.anchor);
  for (double edge : kBetweenNibbles) {
    for (int t = 0; t < kTileTokens; ++t) rounded.nibbles[t] += scale[t] * inverse < static_cast<float>(edge);
  }
  return rounded;
}

float scale_of(int anchor, int nibble) { return power_of_eighths(anchor - kAnchorBias - 3 * nibble); }

// Codes of 16 values: how many boundaries a value, in half level units, lies above.
template <int kBits>
inline I32 codes_of(F32 halves, F32 edges) {
  I32 code = splat_i32(0);
  for (int step = 1 << (kBits - 1); step; step /= 2) {
    const F32 edge = lookup_low_nibble(edges, add(code, splat_i32(step - 1)));
    code = add_if_greater(code, halves, edge, step);
  }
  return code;
}

struct Vector {
  const float* x;  // [D]
  int64_t dim;
  float square_sum;
  float rms;
};

Vector measure(const float* x, int64_t dim) {
  F32 sum = splat(0.0f);
  for (int64_t d = 0; d < dim; d += 16) sum = add(sum, mul(load(x + d), load(x + d)));
  const float square_sum = reduce_add(sum);
  const float rms = __builtin_sqrtf(square_sum / static_cast<float>(dim));
  return {x, dim, square_sum, rms > kSmallest ? rms : kSmallest};
}

// x [16, D] -> the same as packing.py: finite, and its vectors.
[[gnu::noinline, gnu::cold]] void measure_finite(float* x, int64_t dim, Vector* vectors) {
  const F32 largest = splat(kLargestHalf), least = splat(-kLargestHalf);
  for (int64_t i = 0; i < kTileTokens * dim; i += 16) store(x + i, max(min(or_zero(load(x + i)), largest), least));
  for (int t = 0; t < kTileTokens; ++t) vectors[t] = measure(x + t * dim, dim);
}

// x [16, D] -> its vectors. Makes x finite first: a number that is not shows in the sum of all squares.
inline void measure_tile(float* x, int64_t dim, Vector* vectors) {
  float square_sum = 0;
  for (int t = 0; t < kTileTokens; ++t) {
    vectors[t] = measure(x + t * dim, dim);
    square_sum += vectors[t].square_sum;
  }
  if (!(square_sum < kLargestHalf * kLargestHalf)) measure_finite(x, dim, vectors);
}

// Write the codes of x / divisor; return the squared error of levels * scale against x.
template <int kBits>
float quantize(const Vector& vector, float divisor, float scale, uint8_t* codes) {
  static constexpr FloatLevels kEdges = make_edges<kBits>(), kLevels = make_float_levels<kBits>();
  const F32 edges = load(kEdges.entries), levels = load(kLevels.entries);
  const F32 to_halves = splat(static_cast<float>(2 / Codebook<kBits>::unit) / divisor);
  F32 error = splat(0.0f);
  for (int64_t d = 0; d < vector.dim; d += 16) {
    const F32 x = load(vector.x + d);
    const I32 code = codes_of<kBits>(mul(x, to_halves), edges);
    const F32 miss = sub(mul(lookup_low_nibble(levels, code), splat(scale)), x);
    error = add(error, mul(miss, miss));
    store_u8(codes + d, code);
  }
  return reduce_add(error);
}

// The scale with <v, v_hat> = <v, v> for codes chosen at the vector's RMS.
template <int kBits>
float unbiased_scale(const Vector& vector) {
  static constexpr FloatLevels kEdges = make_edges<kBits>(), kLevels = make_float_levels<kBits>();
  const F32 edges = load(kEdges.entries), levels = load(kLevels.entries);
  const F32 to_halves = splat(static_cast<float>(2 / Codebook<kBits>::unit) / vector.rms);
  F32 dot = splat(0.0f);
  for (int64_t d = 0; d < vector.dim; d += 16) {
    const F32 x = load(vector.x + d);
    dot = add(dot, mul(x, lookup_low_nibble(levels, codes_of<kBits>(mul(x, to_halves), edges))));
  }
  const float product = reduce_add(dot);
  const float scale = vector.square_sum / (product > kSmallest ? product : kSmallest);
  return scale > kSmallest ? scale : kSmallest;
}

// x [16, D] -> codes [16, D]
template <int kBits>
Scales encode_keys(float* x, int64_t dim, uint8_t* codes) {
  Vector vectors[kTileTokens];
  float rms[kTileTokens];
  measure_tile(x, dim, vectors);
  for (int t = 0; t < kTileTokens; ++t) rms[t] = vectors[t].rms;
  Scales scales = round_scales(rms);
  for (int t = 0; t < kTileTokens; ++t) {
    const int nearest = scales.nibbles[t];
    float least = 0;
    constexpr int kSteps[] = {0, -1, 1};
    for (int step : kSteps) {
      const int nibble = nearest + step < 0 ? 0 : nearest + step >= kScaleNibbles ? kScaleNibbles - 1 : nearest + step;
      if (step && nibble == nearest) continue;
      const float scale = scale_of(scales.anchor, nibble);
      uint8_t tried[kMaxHeadDim];
      const float error = quantize<kBits>(vectors[t], scale, scale, step ? tried : codes + t * dim);
      if (step && !(error < least)) continue;
      least = error;
      scales.nibbles[t] = nibble;
      for (int64_t d = 0; step && d < dim; d += 16) __builtin_memcpy(codes + t * dim + d, tried + d, 16);
    }
  }
  return scales;
}

// One nibble for each of a tile's tokens, and what its keys become at those scales.
template <int kBits>
struct Attempt {
  int nibbles[kTileTokens];
  F32 scale, to_halves, cost;
  alignas(64) float errors[kMaxHeadDim * kTileTokens];  // [D, 16]
  uint8_t codes[kMaxHeadDim * kTileTokens];             // [D, 16]

  void start(const Scales& nearest, int step) {
    alignas(64) float scales[kTileTokens], halves[kTileTokens];
    for (int t = 0; t < kTileTokens; ++t) {
      const int nibble = nearest.nibbles[t] + step;
      nibbles[t] = nibble < 0 ? 0 : nibble >= kScaleNibbles ? kScaleNibbles - 1 : nibble;
      scales[t] = scale_of(nearest.anchor, nibbles[t]);
      halves[t] = static_cast<float>(2 / Codebook<kBits>::unit) / scales[t];
    }
    scale = load(scales);
    to_halves = load(halves);
    cost = splat(0.0f);
  }

  // Round dim d of all tokens, which earlier errors have moved from `key` to `target`.
  void round(int64_t d, F32 target, F32 key, float strength, F32 edges, F32 levels) {
    const I32 code = codes_of<kBits>(mul(target, to_halves), edges);
    store_u8(codes + d * kTileTokens, code);
    const F32 level = mul(lookup_low_nibble(levels, code), scale);
    const F32 miss = mul(sub(level, target), splat(strength));
    cost = add(cost, mul(miss, miss));
    store(errors + d * kTileTokens, sub(level, key));
  }

  F32 error(int64_t d) const { return load(errors + d * kTileTokens); }
};

// As encode_keys, dim by dim for all sixteen tokens at once: each dim's error moves what the later ones are
// rounded to. shaping [D, D]: see the twin. Two dims and all three attempts at a time, which share what they
// read of `shaping` and keep the adders busy; each target still takes the errors one by one, in order.
template <int kBits>
Scales encode_shaped_keys(float* x, int64_t dim, const float* shaping, uint8_t* codes) {
  static constexpr FloatLevels kEdges = make_edges<kBits>(), kLevels = make_float_levels<kBits>();
  const F32 edges = load(kEdges.entries), levels = load(kLevels.entries);
  Vector vectors[kTileTokens];
  measure_tile(x, dim, vectors);
  float rms[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) rms[t] = vectors[t].rms;
  Scales scales = round_scales(rms);
  alignas(64) float keys[kMaxHeadDim * kTileTokens];  // [D, 16]
  for (int t = 0; t < kTileTokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) keys[d * kTileTokens + t] = x[t * dim + d];
  }
  constexpr int kAttempts = 3, kSteps[kAttempts] = {0, -1, 1};
  Attempt<kBits> attempts[kAttempts];
  for (int i = 0; i < kAttempts; ++i) attempts[i].start(scales, kSteps[i]);
  for (int64_t d = 0; d < dim; d += 2) {
    const F32 key = load(keys + d * kTileTokens), next_key = load(keys + (d + 1) * kTileTokens);
    const float *row = shaping + d * dim, *next_row = row + dim;
    F32 target[kAttempts] = {key, key, key}, next[kAttempts] = {next_key, next_key, next_key};
    for (int64_t before = 0; before < d; ++before) {
      const F32 feedback = splat(row[before]), next_feedback = splat(next_row[before]);
      for (int i = 0; i < kAttempts; ++i) {
        const F32 error = attempts[i].error(before);
        target[i] = sub(target[i], mul(feedback, error));
        next[i] = sub(next[i], mul(next_feedback, error));
      }
    }
    for (int i = 0; i < kAttempts; ++i) {
      attempts[i].round(d, target[i], key, row[d], edges, levels);
      next[i] = sub(next[i], mul(splat(next_row[d]), attempts[i].error(d)));
      attempts[i].round(d + 1, next[i], next_key, next_row[d + 1], edges, levels);
    }
  }
  alignas(64) float least[kTileTokens], cost[kTileTokens];
  for (int i = 0; i < kAttempts; ++i) {
    store(cost, attempts[i].cost);
    for (int t = 0; t < kTileTokens; ++t) {
      if (i && !(cost[t] < least[t])) continue;
      least[t] = cost[t];
      scales.nibbles[t] = attempts[i].nibbles[t];
      for (int64_t d = 0; d < dim; ++d) codes[t * dim + d] = attempts[i].codes[d * kTileTokens + t];
    }
  }
  return scales;
}

// x [16, D] -> codes [16, D]
template <int kBits>
Scales encode_values(float* x, int64_t dim, uint8_t* codes) {
  Vector vectors[kTileTokens];
  float unbiased[kTileTokens];
  measure_tile(x, dim, vectors);
  for (int t = 0; t < kTileTokens; ++t) unbiased[t] = unbiased_scale<kBits>(vectors[t]);
  const Scales scales = round_scales(unbiased);
  for (int t = 0; t < kTileTokens; ++t) {
    const float scale = scale_of(scales.anchor, scales.nibbles[t]);
    quantize<kBits>(vectors[t], vectors[t].rms * scale / unbiased[t], scale, codes + t * dim);
  }
  return scales;
}

// --- codes [16, D] -> lines -> packed planes ---

void key_line(const uint8_t* codes, int64_t dim, int64_t line, uint8_t* out) {
  for (int t = 0; t < kTileTokens; ++t) __builtin_memcpy(out + 4 * t, codes + t * dim + 4 * line, 4);
}

void value_line(const uint8_t* codes, int64_t dim, int64_t line, uint8_t* out) {
  const uint8_t* first = codes + line % 4 * 4 * dim + line / 4 * 16;
  uint32_t words[16];  // whole words, or compilers move byte by byte
  for (int d = 0; d < 16; ++d) {
    words[d] = first[d] | first[dim + d] << 8 | first[2 * dim + d] << 16 | uint32_t{first[3 * dim + d]} << 24;
  }
  __builtin_memcpy(out, words, kLineBytes);
}

// A register of 8 / kWidth lines, their fields of kWidth bits at bit `shift`; eight bytes at a time.
template <int kWidth>
void pack_register(const uint8_t lines[][kLineBytes], int shift, uint8_t* out) {
  constexpr uint64_t kField = 0x0101010101010101 * ((1u << kWidth) - 1);
  for (int i = 0; i < kLineBytes; i += 8) {
    uint64_t packed = 0;
    for (int k = 0; k < 8 / kWidth; ++k) {
      uint64_t codes;
      __builtin_memcpy(&codes, lines[k] + i, 8);
      packed |= (codes >> shift & kField) << (k * kWidth);
    }
    __builtin_memcpy(out + i, &packed, 8);
  }
}

template <int kBits>
void pack(const uint8_t* codes, int64_t dim, bool is_key, uint8_t* tile) {
  for (int64_t octet = 0; octet < dim / 32; ++octet) {
    alignas(64) uint8_t lines[8][kLineBytes];
    for (int i = 0; i < 8; ++i) (is_key ? key_line : value_line)(codes, dim, 8 * octet + i, lines[i]);
    if constexpr (kBits == 4) {
      for (int r = 0; r < 4; ++r) pack_register<4>(lines + 2 * r, 0, tile + (4 * octet + r) * kLineBytes);
    } else {
      for (int r = 0; r < 2; ++r) pack_register<2>(lines + 4 * r, kBits - 2, tile + (2 * octet + r) * kLineBytes);
      if constexpr (kBits == 3) pack_register<1>(lines, 0, tile + low_plane_offset(dim) + octet * kLineBytes);
    }
  }
}

template <int kBits>
Scales encode_key(float* x, int64_t dim, const float* shaping, uint8_t* tile) {
  uint8_t codes[kTileTokens * kMaxHeadDim];
  const Scales scales = shaping ? encode_shaped_keys<kBits>(x, dim, shaping, codes) : encode_keys<kBits>(x, dim, codes);
  pack<kBits>(codes, dim, true, tile);
  return scales;
}

template <int kBits>
Scales encode_value(float* x, int64_t dim, uint8_t* tile) {
  uint8_t codes[kTileTokens * kMaxHeadDim];
  const Scales scales = encode_values<kBits>(x, dim, codes);
  pack<kBits>(codes, dim, false, tile);
  return scales;
}

Scales encode_key(int64_t bits, float* x, int64_t dim, const float* shaping, uint8_t* tile) {
  switch (bits) {
    case 2: return encode_key<2>(x, dim, shaping, tile);
    case 3: return encode_key<3>(x, dim, shaping, tile);
    default: return encode_key<4>(x, dim, shaping, tile);
  }
}

Scales encode_value(int64_t bits, float* x, int64_t dim, uint8_t* tile) {
  switch (bits) {
    case 2: return encode_value<2>(x, dim, tile);
    case 3: return encode_value<3>(x, dim, tile);
    default: return encode_value<4>(x, dim, tile);
  }
}

// rows [16, D] with `stride` elements from one to the next -> x [16, D] float
void widen_rows(const void* rows, bool is_half, int64_t stride, int64_t dim, float* x) {
  for (int t = 0; t < kTileTokens; ++t) {
    for (int64_t d = 0; d < dim; d += 16) {
      const int64_t i = t * stride + d;
      store(x + t * dim + d,
            is_half ? load_f16(static_cast<const uint16_t*>(rows) + i) : load(static_cast<const float*>(rows) + i));
    }
  }
}

}  // namespace

void encode_tile(const PageLayout& layout, const void* key_rot, const void* value_rot, bool is_half, int64_t key_stride,
                 int64_t value_stride, const float* key_shaping, const TileTarget& tile) {
  alignas(64) float x[kTileTokens * kMaxHeadDim];
  widen_rows(key_rot, is_half, key_stride, layout.head_dim, x);
  const Scales key = encode_key(layout.key_bits, x, layout.head_dim, key_shaping, tile.key);
  widen_rows(value_rot, is_half, value_stride, layout.head_dim, x);
  const Scales value = encode_value(layout.value_bits, x, layout.head_dim, tile.value);
  for (int t = 0; t < kTileTokens; ++t) tile.scales[t] = static_cast<uint8_t>(key.nibbles[t] | value.nibbles[t] << 4);
  tile.anchors[0] = static_cast<uint8_t>(key.anchor);
  tile.anchors[1] = static_cast<uint8_t>(value.anchor);
}

}  // namespace deltastore::DELTASTORE_ISA
