// Codes -> int8 levels, eight at a time, by byte permutes: a permute's selectors are nibbles, and so are codes once
// every code has a nibble of its own. The order in which they come out is the order in which nibbles lie in a word;
// queries and weights are laid out alike instead of putting codes in order (attend_packed.cuh).
#pragma once

#include "deltastore/codec.h"
#include "machine.cuh"

namespace deltastore::cuda {

// Levels 4 * i .. 4 * i + 3 of a codebook as bytes; of smaller codebooks, from the start again.
template <int kBits>
constexpr uint32_t make_level_word(int i) {
  uint32_t word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const int code = (4 * i + byte) % (1 << kBits);
    word |= static_cast<uint32_t>(static_cast<uint8_t>(Codebook<kBits>::levels[code])) << 8 * byte;
  }
  return word;
}
template <int kBits, int i>
constexpr uint32_t kLevelWord = make_level_word<kBits>(i);

// Eight codes, nibble k is code k -> levels[0] of codes 0 .. 3, levels[1] of codes 4 .. 7.
template <int kBits>
DELTASTORE_DEVICE void look_up(uint32_t codes, uint32_t (&levels)[2]) {
  if constexpr (kBits == 4) {
    // A permute chooses among eight levels: look in the negative and in the positive half, then choose by bit 3.
    const uint32_t within_half = codes & 0x77777777u;
    const uint32_t halves = ((codes >> 1) & 0x44444444u) | 0x32103210u;
    DELTASTORE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t negative = permute_bytes(kLevelWord<4, 0>, kLevelWord<4, 1>, within_half >> 16 * i);
      const uint32_t positive = permute_bytes(kLevelWord<4, 2>, kLevelWord<4, 3>, within_half >> 16 * i);
      levels[i] = permute_bytes(negative, positive, halves >> 16 * i);
    }
  } else {
    DELTASTORE_UNROLL
    for (int i = 0; i < 2; ++i) {
      levels[i] = permute_bytes(kLevelWord<kBits, 0>, kLevelWord<kBits, 1>, codes >> 16 * i);
    }
  }
}

// Each byte of a word of 2-bit codes holds one code of lines 0 .. 3. -> as nibbles, low and high of each byte:
// `even` lines 0 and 2, `odd` lines 1 and 3.
struct Nibbles {
  uint32_t even, odd;
};

DELTASTORE_DEVICE Nibbles nibbles_of_2_bits(uint32_t codes) {
  return {codes & 0x33333333u, (codes >> 2) & 0x33333333u};
}

// The same for 3-bit codes: `last` has the last bit of line i at bit i of each byte (its other bits do not matter).
DELTASTORE_DEVICE Nibbles nibbles_of_3_bits(uint32_t codes, uint32_t last) {
  const uint32_t spread = (last & 0x03030303u) | ((last << 2) & 0x30303030u);
  return {((codes << 1) & 0x66666666u) | (spread & 0x11111111u),
          ((codes >> 1) & 0x66666666u) | ((spread >> 1) & 0x11111111u)};
}

// The same for 4-bit codes, of which a word holds two lines only.
DELTASTORE_DEVICE Nibbles nibbles_of_4_bits(uint32_t lines_0_1, uint32_t lines_2_3) {
  return {(lines_0_1 & 0x0F0F0F0Fu) | ((lines_2_3 << 4) & 0xF0F0F0F0u),
          ((lines_0_1 >> 4) & 0x0F0F0F0Fu) | (lines_2_3 & 0xF0F0F0F0u)};
}

// Where the last bits of 3-bit codes begin, from the first byte of a tile's codes.
template <int kHeadDim>
constexpr int kLastPlane = static_cast<int>(low_plane_offset(kHeadDim));

// One code on its own, where speed does not matter: `line` and `byte` within a tile's keys or values (layout.py).
template <int kBits, int kHeadDim>
DELTASTORE_DEVICE int code_at(const uint8_t* codes, int line, int byte) {
  constexpr int kWidth = kBits == 3 ? 2 : kBits, kLines = 8 / kWidth;
  int code = load(codes + line / kLines * 64 + byte) >> line % kLines * kWidth & ((1 << kWidth) - 1);
  if constexpr (kBits == 3) {
    code = 2 * code + (load(codes + kLastPlane<kHeadDim> + line / 8 * 64 + byte) >> line % 8 & 1);
  }
  return code;
}

}  // namespace deltastore::cuda
