// Attention to one tile of raw 16-bit floats: a raw page's, a frame or a sink. Floats on tensor cores: a query and a
// weight are each the sum of two float16 numbers, 22 bits, so two products are taken where one would lose half of
// them. Raw layers are few and bound by memory; frames and sinks are two tiles a request.
#pragma once

#include "attend_state.cuh"

namespace deltastore::cuda {

// Two floats as the halves' sums: high, and what it left out.
DELTASTORE_DEVICE void split_halves(float first, float second, uint32_t& high, uint32_t& low) {
  const uint16_t a = half_of_float(first), b = half_of_float(second);
  high = a | static_cast<uint32_t>(b) << 16;
  low = half_of_float(first - float_of_half(a)) | static_cast<uint32_t>(half_of_float(second - float_of_half(b))) << 16;
}

// One lane's share of the queries in one product, as right-hand sides: two high parts, then two low ones. Of 32 dims,
// which are two products, a lane has 8 * column .. + 7. `query_row`: of head `row`; `inverse`: of the largest element.
DELTASTORE_DEVICE Words4 raw_query(const float* query_row, float inverse, int product, const Lane& lane) {
  Words4 words;
  for (int half = 0; half < 2; ++half) {
    const float* pair = query_row + 32 * (product / 2) + 8 * lane.column + 4 * (product % 2) + 2 * half;
    // A head with infinities has some number here, and NaN as its sum.
    const float first = smaller(larger(pair[0] * inverse, -1.0f), 1.0f);
    const float second = smaller(larger(pair[1] * inverse, -1.0f), 1.0f);
    split_halves(first, second, words.word[half], words.word[2 + half]);
  }
  return words;
}

// Rows `row` and `row + 8` of a tile, 8 dims of each; zeros for tokens that are not there, whose memory may hold
// anything.
struct RawRows {
  Words4 of[2];

  DELTASTORE_DEVICE void fetch(const uint16_t* tile, int head_dim, int tokens, int dim_block, const Lane& lane) {
    DELTASTORE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int token = static_cast<int>(lane.row) + 8 * r;
      of[r] = Words4{{0, 0, 0, 0}};
      if (token < tokens) of[r] = load_words4(tile + token * head_dim + 32 * dim_block + 8 * lane.column);
    }
  }
};

// Tokens `position` .. + tokens - 1, of which those before `visible_from` are hidden. `unit` is what a step of the
// dot product is worth; in base 2 unless there is a soft cap.
template <int kHeadDim>
DELTASTORE_DEVICE void attend_raw_tile(State<kHeadDim>& state, const Words4 (&query)[kHeadDim / 16][kWarpLanes],
                                       const uint16_t* keys, const uint16_t* values, int tokens, int position,
                                       int visible_from, float unit, float soft_cap, const Lane& lane) {
  float scores[4] = {0, 0, 0, 0};  // [2 * r + h]: token row + 8 * r, head 2 * column + h
  DELTASTORE_UNROLL
  for (int block = 0; block < kHeadDim / 32; ++block) {
    RawRows rows;
    rows.fetch(keys, kHeadDim, tokens, block, lane);
    DELTASTORE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {rows.of[0].word[2 * i], rows.of[1].word[2 * i], rows.of[0].word[2 * i + 1],
                             rows.of[1].word[2 * i + 1]};
      const Words4 factors = query[2 * block + i][lane.index()];
      multiply_half(scores, a, factors.word[0], factors.word[1]);
      multiply_half(scores, a, factors.word[2], factors.word[3]);
    }
  }
  float largest[2] = {kHidden, kHidden};
  DELTASTORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int token = static_cast<int>(lane.row) + 8 * (i / 2);
    scores[i] *= unit;
    if (soft_cap != 0) scores[i] = cap_score(scores[i], soft_cap);
    if (token >= tokens || position + token < visible_from) scores[i] = -INFINITY;
    largest[i % 2] = larger(largest[i % 2], scores[i]);
  }
  state.raise(largest);
  // Weights of heads 2 * column, + 1; then, transposed, of head `row` and tokens 2 * column, + 1 (of eight).
  uint32_t high[2], low[2];
  DELTASTORE_UNROLL
  for (int r = 0; r < 2; ++r) {
    float weights[2];
    DELTASTORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      weights[h] = exp2_fast(scores[2 * r + h] - state.reference[h]);
      state.sum[h] += weights[h];
    }
    split_halves(weights[0], weights[1], high[r], low[r]);
    high[r] = transpose_8x8(high[r]);
    low[r] = transpose_8x8(low[r]);
  }
  DELTASTORE_UNROLL
  for (int block = 0; block < kHeadDim / 32; ++block) {
    RawRows rows;
    rows.fetch(values, kHeadDim, tokens, block, lane);
    DELTASTORE_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4];  // dim_of(lane, 2 * block + i, r), eight tokens each: [r + 2 * (token / 8)]
      DELTASTORE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const Words4& eight = rows.of[k / 2];
        a[k] = transpose_8x8(permute_bytes(eight.word[i], eight.word[i + 2], k % 2 == 0 ? 0x5410 : 0x7632));
      }
      multiply_half(state.out[2 * block + i], a, high[0], high[1]);
      multiply_half(state.out[2 * block + i], a, low[0], low[1]);
    }
  }
}

}  // namespace deltastore::cuda
