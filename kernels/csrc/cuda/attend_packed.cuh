// Attention of a warp to four packed tiles, 64 tokens, in integers on tensor cores.
//
//   scores[tokens, heads] = levels of keys[tokens, dims] * query[dims, heads]
//   out[dims, heads]     += levels of values[dims, tokens] * weights[tokens, heads]
//
// Codes come out of a word in the order in which they lie in it. So nothing is put in order; instead the products'
// rows and columns are chosen so that every lane consumes whole words:
//
//   * a key word (4 or 8 of a token's lines, 8 or 16 dims) gives one lane's share of one or two products: register
//     4 * j + column is the lane's, and the query is arranged alike (`key_dim_of_byte`);
//   * a value word has several tokens of one dim, so a lane needs the weights of all 16 tokens of a tile: lane column c
//     has tile c, and dims are rows. Weights leave the scores with heads in columns and tokens in rows; one transpose
//     (movmatrix) of two bytes each gives them heads in rows. Lane row 2 * c + e ends in column c, so it scores
//     tokens of tile c: those of quads e and e + 2, which is what a value's nibbles of one byte are (unpack.cuh).
//
// Query and weights are 16-bit numbers in two bytes, and a product is taken for each: tensor cores are all but idle
// here, and rounding both to 8 bits as the CPU kernels do would cost 2% of an output. A weight is relative to the
// largest of its 64 tokens; small weights in other blocks keep their mass.
#pragma once

#include "attend_params.cuh"
#include "attend_state.cuh"
#include "unpack.cuh"

namespace deltastore::cuda {

constexpr int kTilesOfBlock = 4;
constexpr int kTokensOfBlock = kTilesOfBlock * kTokensOfTile;
constexpr float kQuerySteps = 32512;  // 127 * 256: rounded, the high byte is an int8
constexpr float kWeightSteps = 65535;

// One lane's share of the queries in one product, as int8 right-hand sides: high bytes for both halves, then low ones.
// Its bytes' dims, in the order in which keys' codes come out:
template <int kKeyBits>
DELTASTORE_DEVICE int key_dim_of_byte(int product, int half, int byte, const Lane& lane) {
  if constexpr (kKeyBits == 4) return 8 * (4 * product + lane.column) + 4 * (byte % 2) + 2 * half + byte / 2;
  return 16 * (4 * (product / 2) + lane.column) + 4 * (product % 2) + 8 * (byte % 2) + 2 * half + byte / 2;
}

// `query_row`: of head `row`; `steps`: kQuerySteps / the largest element.
template <int kKeyBits>
DELTASTORE_DEVICE Words4 packed_query(const float* query_row, float steps, int product, const Lane& lane) {
  Words4 words{};
  for (int half = 0; half < 2; ++half) {
    for (int byte = 0; byte < 4; ++byte) {
      // A head with infinities has some number here, and NaN as its sum.
      const float x = query_row[key_dim_of_byte<kKeyBits>(product, half, byte, lane)] * steps;
      const int whole = round_to_int(smaller(larger(x, -kQuerySteps), kQuerySteps)), upper = (whole + 128) >> 8;
      words.word[half] |= static_cast<uint32_t>(upper & 255) << 8 * byte;
      words.word[2 + half] |= static_cast<uint32_t>(whole & 255) << 8 * byte;  // whole - 256 * upper is -128 .. 127
    }
  }
  return words;
}

// A lane's words of four tiles' keys: of tile row / 2, quads row % 2 and row % 2 + 2, every fourth register.
template <int kBits, int kHeadDim>
struct KeyWords {
  static constexpr int kWidth = kBits == 3 ? 2 : kBits;
  static constexpr int kSteps = kHeadDim * kWidth / 128;  // registers of a tile / 4
  Words4 codes[kSteps][2];  // [j][i]: register 4 * j + column, tokens 0 .. 3 of quad row % 2 + 2 * i
  Words4 last[kBits == 3 ? kSteps : 1][2];

  DELTASTORE_DEVICE void fetch(const uint8_t* page, uint32_t tile_offset, const Lane& lane) {
    const uint8_t* mine = page + (tile_offset + 64 * lane.column + 16 * (lane.row % 2));
    DELTASTORE_UNROLL
    for (int k = 0; k < 2 * kSteps; ++k) codes[k / 2][k % 2] = load_words4(mine + 256 * (k / 2) + 32 * (k % 2));
    if constexpr (kBits == 3) {
      // Two registers of 2-bit codes share one of last bits.
      const uint8_t* plane = page + (tile_offset + kLastPlane<kHeadDim> + 64 * (lane.column / 2) + 16 * (lane.row % 2));
      DELTASTORE_UNROLL
      for (int k = 0; k < 2 * kSteps; ++k) last[k / 2][k % 2] = load_words4(plane + 128 * (k / 2) + 32 * (k % 2));
    }
  }

  // Levels of one token's dims for products kProducts * j ..: [product][half].
  static constexpr int kProducts = kBits == 4 ? 1 : 2;
  DELTASTORE_DEVICE void levels(int j, int i, int token, const Lane& lane, uint32_t (&out)[kProducts][2]) const {
    const uint32_t word = codes[j][i].word[token];
    if constexpr (kBits == 4) {
      look_up<4>(word, out[0]);
    } else {
      const Nibbles nibbles =
          kBits == 2 ? nibbles_of_2_bits(word)
                     : nibbles_of_3_bits(word, last[kBits == 3 ? j : 0][i].word[token] >> 4 * (lane.column % 2));
      look_up<kBits>(nibbles.even, out[0]);
      look_up<kBits>(nibbles.odd, out[kProducts - 1]);
    }
  }
};

// A lane's words of tile `column`'s values, of a part of all dims: of 32 dims, four neighbours (dim_of).
template <int kBits, int kHeadDim>
struct ValueWords {
  static constexpr int kDims = kHeadDim <= 128 ? kHeadDim : 64;  // more would not fit in registers
  static constexpr int kParts = kHeadDim / kDims;
  static constexpr int kRegisters = kBits == 4 ? 2 : 1;  // that hold all 16 tokens of 16 dims
  Words4 codes[kDims / 32][kRegisters];
  Words4 last[kBits == 3 ? kDims / 32 : 1];

  DELTASTORE_DEVICE void fetch(const uint8_t* page, uint32_t tile_offset, int part, const Lane& lane) {
    const uint8_t* mine = page + (tile_offset + 16 * (lane.row + (kRegisters - 1) * (lane.row & ~3u)));
    const uint8_t* plane = page + (tile_offset + kLastPlane<kHeadDim> + 16 * (lane.row % 4));
    DELTASTORE_UNROLL
    for (int i = 0; i < kDims / 32; ++i) {
      DELTASTORE_UNROLL
      for (int r = 0; r < kRegisters; ++r) {
        codes[i][r] = load_words4(mine + part * (kRegisters * kDims * 4) + 64 * (2 * kRegisters * i + r));
      }
      if constexpr (kBits == 3) {
        // One register of last bits has 32 dims: the first 16 in the lower nibbles.
        last[i] = load_words4(plane + part * (kDims * 2) + 64 * i);
      }
    }
  }

  // Levels of dim_of(lane, i, r), from the part's first: out[t] has tokens t of quads 0, 2, 1, 3.
  DELTASTORE_DEVICE void levels(int i, int r, const Lane& lane, uint32_t (&out)[4]) const {
    const int word = 2 * (i % 2) + r;
    const uint32_t first = codes[i / 2][0].word[word];
    Nibbles nibbles;
    if constexpr (kBits == 2) nibbles = nibbles_of_2_bits(first);
    if constexpr (kBits == 3) nibbles = nibbles_of_3_bits(first, last[i / 2].word[word] >> 4 * (lane.row / 4));
    if constexpr (kBits == 4) nibbles = nibbles_of_4_bits(first, codes[i / 2][kRegisters - 1].word[word]);
    uint32_t pair[2];
    look_up<kBits>(permute_bytes(nibbles.even, nibbles.odd, 0x5140), pair);
    out[0] = pair[0];
    out[1] = pair[1];
    look_up<kBits>(permute_bytes(nibbles.even, nibbles.odd, 0x7362), pair);
    out[2] = pair[0];
    out[3] = pair[1];
  }
};

// Scale bytes of the lane's eight tokens, and their tile's anchors.
struct ScaleWords {
  uint32_t quads[2];
  uint32_t anchors;  // the key's, then the value's

  DELTASTORE_DEVICE void fetch(const uint8_t* page, uint32_t scales_offset, uint32_t anchors_offset, const Lane& lane) {
    const uint8_t* mine = page + (scales_offset + 4 * (lane.row % 2));
    for (int i = 0; i < 2; ++i) quads[i] = load(reinterpret_cast<const uint32_t*>(mine + 8 * i));
    anchors = load(reinterpret_cast<const uint16_t*>(page + anchors_offset));
  }

  // log2 of the scale of token t of quad row % 2 + 2 * i; exact, so that no order of sums shows.
  DELTASTORE_DEVICE float log2_scale(bool of_value, int i, int t) const {
    const uint32_t nibbles = (of_value ? quads[i] >> 4 : quads[i]) & 0x0F0F0F0Fu;
    // 128 + nibble, by putting the nibble where a float has its ones
    const float biased = float_of_bits(permute_bytes(nibbles, 0x43000000u, 0x7044 | t << 8));
    const float anchor = static_cast<float>(static_cast<int>(anchors >> (of_value ? 8 : 0) & 255u));
    constexpr float kStep = static_cast<float>(kScaleStepLog2);
    const float largest = multiply_add(anchor, 1.0f / kAnchorsPerOctave,
                                       128 * kStep - static_cast<float>(kAnchorBias) / kAnchorsPerOctave);
    return multiply_add(biased, -kStep, largest);
  }
};

// What attend_packed_block knows of its tokens: position of the first, and which are not hidden.
struct Span {
  int position, from, to;
};

// Exponents of the weights: score + log2 of the value's scale, both in base 2. [i][t][h] is token t of quad
// row % 2 + 2 * i, head 2 * column + h.
struct BlockScores {
  float exponents[2][4][2];
  float value_log2[2][4];
};

template <int kKeyBits, int kHeadDim>
DELTASTORE_DEVICE void score_block(BlockScores& block, const Words4 (&query)[kHeadDim / 32][kWarpLanes],
                                   const KeyWords<kKeyBits, kHeadDim>& keys, const ScaleWords& scales, const Span& span,
                                   float unit, float soft_cap, const Lane& lane) {
  using Keys = KeyWords<kKeyBits, kHeadDim>;
  DELTASTORE_UNROLL
  for (int i = 0; i < 2; ++i) {
    DELTASTORE_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      int32_t high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
      DELTASTORE_UNROLL
      for (int j = 0; j < Keys::kSteps; ++j) {
        uint32_t levels[2][Keys::kProducts][2];
        for (int r = 0; r < 2; ++r) keys.levels(j, i, 2 * pair + r, lane, levels[r]);
        DELTASTORE_UNROLL
        for (int p = 0; p < Keys::kProducts; ++p) {
          const uint32_t a[4] = {levels[0][p][0], levels[1][p][0], levels[0][p][1], levels[1][p][1]};
          const Words4 factors = load_shared(query[Keys::kProducts * j + p][lane.index()]);
          multiply_int8(high, a, factors.word[0], factors.word[1]);
          multiply_int8(low, a, factors.word[2], factors.word[3]);
        }
      }
      DELTASTORE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int t = 2 * pair + r;
        const float key_scale = exp2_fast(scales.log2_scale(false, i, t)) * unit;
        block.value_log2[i][t] = scales.log2_scale(true, i, t);
        DELTASTORE_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float dot = static_cast<float>(high[2 * r + h] * 256 + low[2 * r + h]);
          block.exponents[i][t][h] = multiply_add(dot, key_scale, block.value_log2[i][t]);
        }
      }
    }
  }
  if (soft_cap != 0) {
    DELTASTORE_UNROLL
    for (int k = 0; k < 16; ++k) {
      float& exponent = block.exponents[k / 8][k / 2 % 4][k % 2];
      const float value_log2 = block.value_log2[k / 8][k / 2 % 4];
      exponent = cap_score(exponent - value_log2, soft_cap) + value_log2;
    }
  }
  if (span.position >= span.from && span.position + kTokensOfBlock <= span.to) return;
  DELTASTORE_UNROLL
  for (int k = 0; k < 8; ++k) {
    const int i = k / 4, t = k % 4;
    const int position = span.position + 16 * (lane.row / 2) + 4 * (lane.row % 2 + 2 * i) + t;
    const bool hidden = position < span.from || position >= span.to;
    for (int h = 0; h < 2; ++h) block.exponents[i][t][h] = hidden ? -INFINITY : block.exponents[i][t][h];
  }
}

// Weights as bytes, [t] has tokens t of quads 0, 2, 1, 3 of tile `column`, head `row`.
struct BlockWeights {
  uint32_t high[4], low[4];
};

// Takes the state to the block's reference; weights are relative to `reference`, the block's own.
template <int kHeadDim>
DELTASTORE_DEVICE void soften_block(BlockWeights& weights, float (&reference)[2], BlockScores& block,
                                    State<kHeadDim>& state) {
  DELTASTORE_UNROLL
  for (int h = 0; h < 2; ++h) reference[h] = kHidden;
  DELTASTORE_UNROLL
  for (int k = 0; k < 16; ++k) reference[k % 2] = larger(reference[k % 2], block.exponents[k / 8][k / 2 % 4][k % 2]);
  state.raise(reference);
  float sums[2] = {0, 0};
  DELTASTORE_UNROLL
  for (int t = 0; t < 4; ++t) {
    uint32_t steps[2][2];
    DELTASTORE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float inverse_scale = exp2_fast(-block.value_log2[i][t]);
      DELTASTORE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float weight = exp2_fast(block.exponents[i][t][h] - reference[h]);
        sums[h] = multiply_add(weight, inverse_scale, sums[h]);
        // 2 ** 23 + a whole number: the number lies in the low bits, rounded
        steps[h][i] = bits_of_float(multiply_add(weight, kWeightSteps, 8388608.0f));
      }
    }
    const uint32_t first = permute_bytes(steps[0][0], steps[0][1], 0x5140);  // low bytes, then high ones
    const uint32_t second = permute_bytes(steps[1][0], steps[1][1], 0x5140);
    weights.low[t] = transpose_8x8(permute_bytes(first, second, 0x5410));
    weights.high[t] = transpose_8x8(permute_bytes(first, second, 0x7632));
  }
  DELTASTORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    state.sum[h] = multiply_add(sums[h], exp2_fast(reference[h] - state.reference[h]), state.sum[h]);
  }
}

template <int kValueBits, int kHeadDim>
DELTASTORE_DEVICE void sum_block(State<kHeadDim>& state, const ValueWords<kValueBits, kHeadDim>& values, int part,
                                 const BlockWeights& weights, const float (&reference)[2], const Lane& lane) {
  constexpr float kUnit = static_cast<float>(Codebook<kValueBits>::unit / kWeightSteps);
  float unit[2];
  DELTASTORE_UNROLL
  for (int h = 0; h < 2; ++h) unit[h] = exp2_fast(reference[h] - state.reference[h]) * kUnit;
  DELTASTORE_UNROLL
  for (int i = 0; i < values.kDims / 16; ++i) {
    uint32_t levels[2][4];
    for (int r = 0; r < 2; ++r) values.levels(i, r, lane, levels[r]);
    int32_t sums[4] = {0, 0, 0, 0};
    const uint32_t a[2][4] = {{levels[0][0], levels[1][0], levels[0][1], levels[1][1]},
                              {levels[0][2], levels[1][2], levels[0][3], levels[1][3]}};
    multiply_int8_by_uint8(sums, a[0], weights.high[0], weights.high[1]);
    multiply_int8_by_uint8(sums, a[1], weights.high[2], weights.high[3]);
    DELTASTORE_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] *= 256;
    multiply_int8_by_uint8(sums, a[0], weights.low[0], weights.low[1]);
    multiply_int8_by_uint8(sums, a[1], weights.low[2], weights.low[3]);
    DELTASTORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      float& out = state.out[part * (values.kDims / 16) + i][k];
      out = multiply_add(static_cast<float>(sums[k]), unit[k % 2], out);
    }
  }
}

}  // namespace deltastore::cuda
