// What a warp keeps while it attends: up to eight query heads of one KV head, softmax in base 2 over whatever tokens
// come (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include "machine.cuh"

namespace deltastore::cuda {

constexpr int kWarpLanes = 32;
constexpr int kHeads = 8;  // columns of a product: query heads that one warp serves, whether there are as many or not
constexpr float kHidden = -1e30f;  // finite, so that a difference of two is no NaN
constexpr float kLog2E = 1.4426950408889634f;

struct Lane {
  unsigned row, column;

  DELTASTORE_DEVICE unsigned index() const { return 4 * row + column; }
};

DELTASTORE_DEVICE Lane lane_of(unsigned thread) { return {thread % kWarpLanes / 4, thread % 4}; }

// A lane's dims: element [i][2 * r] and [i][2 * r + 1] of `out` are heads 2 * column and 2 * column + 1 of this dim.
// The order is that of value words in a page: four dims of a lane are neighbours (attend_packed.cuh).
DELTASTORE_DEVICE int dim_of(const Lane& lane, int i, int r) { return 32 * (i / 2) + 4 * lane.row + 2 * (i % 2) + r; }

// soft_cap * tanh(score / soft_cap), and to base 2: tanh(x) = 1 - 2 / (exp(2 x) + 1).
DELTASTORE_DEVICE float cap_score(float score, float soft_cap) {
  const float grown = exp2_fast(smaller(score * (2 * kLog2E) / soft_cap, 126.0f));
  return soft_cap * kLog2E * (1 - divide(2.0f, grown + 1));
}

template <int kHeadDim>
struct State {
  float reference[2];  // of heads 2 * column, + 1; the same in every row
  float sum[2];        // of 2 ** (score - reference) over this lane's tokens only
  float out[kHeadDim / 16][4];

  DELTASTORE_DEVICE void start(const float (&poison)[2]) {
    for (int h = 0; h < 2; ++h) {
      reference[h] = kHidden;
      sum[h] = poison[h];
    }
    DELTASTORE_UNROLL
    for (int i = 0; i < kHeadDim / 16; ++i) {
      DELTASTORE_UNROLL
      for (int r = 0; r < 4; ++r) out[i][r] = 0;
    }
  }

  // Takes this lane's largest exponents of a block to the warp's, and the state to a reference not below them.
  DELTASTORE_DEVICE void raise(float (&block_reference)[2]) {
    float shrink[2];
    DELTASTORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      DELTASTORE_UNROLL
      for (int rows = 4; rows < kWarpLanes; rows *= 2) {
        block_reference[h] = larger(block_reference[h], shuffle_xor(block_reference[h], rows));
      }
      block_reference[h] = larger(block_reference[h], kHidden);
      shrink[h] = 1;
    }
    if (block_reference[0] <= reference[0] && block_reference[1] <= reference[1]) return;
    DELTASTORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float raised = larger(reference[h], block_reference[h]);
      shrink[h] = exp2_fast(reference[h] - raised);
      reference[h] = raised;
      sum[h] *= shrink[h];
    }
    DELTASTORE_UNROLL
    for (int i = 0; i < kHeadDim / 16; ++i) {
      DELTASTORE_UNROLL
      for (int r = 0; r < 4; ++r) out[i][r] *= shrink[r % 2];
    }
  }
};

}  // namespace deltastore::cuda
