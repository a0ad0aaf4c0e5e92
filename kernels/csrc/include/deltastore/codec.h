// The numbers of the codec, as deltastore_kernels/codec.py defines them (it says where they are
// from): x ~= level * level_unit * scale. tests/kernels/test_cpu_layout.py compares the two.
#pragma once

#include <cstdint>

#include "layout.h"

namespace deltastore {

// Levels of the codebook of `bits` bits in ascending order; the code is the index.
template <int kBits>
struct Codebook;

template <>
struct Codebook<2> {
  static constexpr int8_t levels[4] = {-127, -38, 38, 127};
  static constexpr double unit = 1.5104 / 127;
};

template <>
struct Codebook<3> {
  static constexpr int8_t levels[8] = {-127, -79, -45, -14, 14, 45, 79, 127};
  static constexpr double unit = 2.1520 / 127;
};

template <>
struct Codebook<4> {
  static constexpr int8_t levels[16] = {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127};
  static constexpr double unit = 2.7326 / 127;
};

constexpr double level_unit(int64_t bits) {
  return bits == 2 ? Codebook<2>::unit : bits == 3 ? Codebook<3>::unit : Codebook<4>::unit;
}

// A token of at least this scale, and over so many times the scale of half of its tile's tokens, is huge.
constexpr float kHugeScale = 256.0f;
constexpr float kHugeRatio = 128.0f;

// A codebook's levels plus `offset` as the bytes of a 16-entry look-up table.
struct alignas(16) LevelTable {
  uint8_t entries[16];
};

template <int kBits>
constexpr LevelTable make_level_table(int offset) {
  LevelTable table{};
  for (int i = 0; i < 1 << kBits; ++i) table.entries[i] = static_cast<uint8_t>(Codebook<kBits>::levels[i] + offset);
  return table;
}

// A codebook as codec.py: levels() rounds it, for look-ups by code.
struct alignas(64) FloatLevels {
  float entries[16];
};

template <int kBits>
constexpr FloatLevels make_float_levels() {
  FloatLevels table{};
  for (int i = 0; i < 1 << kBits; ++i) {
    table.entries[i] = static_cast<float>(Codebook<kBits>::levels[i] * Codebook<kBits>::unit);
  }
  return table;
}

// Boundaries between neighbouring levels in half level units; the last entry is never exceeded.
template <int kBits>
constexpr FloatLevels make_edges() {
  FloatLevels table{};
  for (int i = 0; i < 16; ++i) table.entries[i] = 1e30f;
  for (int i = 0; i + 1 < 1 << kBits; ++i) {
    table.entries[i] = static_cast<float>(Codebook<kBits>::levels[i] + Codebook<kBits>::levels[i + 1]);
  }
  return table;
}

// 2 ** (i / 8): a scale is one of these times a power of two, for anchors and for nibbles alike
// (a nibble's step is 3 / 8), so no exponential is ever taken.
constexpr double kEighths[8] = {1.0,
                                1.0905077326652577,
                                1.1892071150027210,
                                1.2968395546510096,
                                1.4142135623730951,
                                1.5422108254079407,
                                1.6817928305074290,
                                1.8340080864093424};

// 2 ** (eighths / 8), rounded once.
constexpr double exp2_eighths(int eighths) {
  const int octave = (eighths >= 0 ? eighths : eighths - 7) / 8;
  double power = 1.0;
  for (int i = 0; i < octave; ++i) power *= 2.0;
  for (int i = 0; i > octave; --i) power *= 0.5;
  return kEighths[eighths - 8 * octave] * power;
}

// All that anchors and nibbles reach, and the anchors' inverses.
constexpr int kFewestEighths = -kAnchorBias - 3 * (kScaleNibbles - 1);
constexpr int kMostEighths = kAnchorBias;

struct ScaleTables {
  float anchors[256];            // largest scale of a tile, by its anchor byte
  float factors[kScaleNibbles];  // scale / largest scale, by nibble
  float eighths[kMostEighths - kFewestEighths + 1];
};

constexpr ScaleTables make_scale_tables() {
  static_assert(kAnchorsPerOctave == 8 && kScaleStepLog2 == 0.375, "both in eighths of an octave");
  ScaleTables tables{};
  for (int a = 0; a < 256; ++a) tables.anchors[a] = static_cast<float>(exp2_eighths(a - kAnchorBias));
  for (int n = 0; n < kScaleNibbles; ++n) tables.factors[n] = static_cast<float>(exp2_eighths(-3 * n));
  for (int e = kFewestEighths; e <= kMostEighths; ++e) {
    tables.eighths[e - kFewestEighths] = static_cast<float>(exp2_eighths(e));
  }
  return tables;
}

constexpr ScaleTables kScaleTables = make_scale_tables();

// 2 ** (eighths / 8)
inline float power_of_eighths(int eighths) { return kScaleTables.eighths[eighths - kFewestEighths]; }

}  // namespace deltastore
