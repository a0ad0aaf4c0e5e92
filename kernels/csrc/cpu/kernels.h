// What every instruction set implements, and what the instruction-set-independent code around it
// (plan, threads, merging) hands over. One struct of function pointers per instruction set.
#pragma once

#include "../include/deltastore/abi.h"

namespace deltastore {

// Tiles whose scores are softened at once. Weights are 8-bit within a block, so a longer block
// loses more of its small weights; a shorter one converts sums to float more often.
constexpr int64_t kBlockTiles = 4;
constexpr int64_t kBlockTokens = kBlockTiles * kTileTokens;

// Query heads that share one pass over a KV head's pages. Larger groups take several passes.
constexpr int64_t kMaxGroup = 16;

// A part of one request's context, for up to kMaxGroup query heads of one KV head.
struct Segment {
  int64_t request;
  int64_t kv_head;
  int64_t first_head;  // query heads first_head .. + heads - 1
  int64_t heads;
  int64_t first_tile;  // packed tiles first_tile .. end_tile - 1, counted from the request's start
  int64_t end_tile;
  int64_t visible_from;  // position of the first token that the window shows
  bool with_frame;
};

// Softmax so far, in base 2: sum and out are relative to 2**largest.
struct Partial {
  float largest[kMaxGroup];
  float sum[kMaxGroup];
  alignas(64) float out[kMaxGroup * kMaxHeadDim];  // [heads, D]
};

struct Kernels {
  const char* name;
  // query_rot [segment.heads, D]
  void (*attend_segment)(const DeltastoreContext& context, const DeltastoreScoring& scoring,
                         const float* query_rot, const Segment& segment, Partial* partial);
};

}  // namespace deltastore
