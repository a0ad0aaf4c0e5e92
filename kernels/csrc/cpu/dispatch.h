// The operations over whole batches, for a given instruction set. Compiled once, for any CPU.
#pragma once

#include "kernels.h"

namespace deltastore {

// One call of attend_decode or attend_extend. Legend: see abi.h.
struct AttendCall {
  const DeltastoreContext* context;
  const DeltastoreScoring* scoring;
  const float* query_rot;  // [T, Hq, D]
  int64_t query_heads;
  const int64_t* new_tokens;  // [B] with sum T; null in decode: one query each, at the last stored position
  const float* key_rot;       // [T, H, D] of the new tokens, or null
  const float* value_rot;
  float* out_rot;  // [T, Hq, D]
  float* lse;      // [T, Hq]
  int64_t threads;
};

void attend(const Kernels& kernels, const AttendCall& call);

// The first `tokens` tokens (whole tiles) of the pages page_ids[0], [1], ..: key_rot, value_rot
// [H, tokens, D] float, with head_stride floats from one head to the next.
void decode(const Kernels& kernels, const PageLayout& layout, const uint8_t* pages, const int64_t* page_ids,
            int64_t tokens, float* key_rot, float* value_rot, int64_t head_stride, int64_t threads);

using TileRows = DeltastoreTileRows;

struct EncodeCall {
  uint8_t* pages;           // [num_pages, page_bytes]
  const int64_t* page_ids;  // [tiles]
  const int64_t* tile_ids;  // [tiles]: within the page
  int64_t tiles;
  TileRows key_rot;
  TileRows value_rot;
  bool is_half;
  const float* key_shaping;  // [H, D, D], or null
  int64_t threads;
};

void encode(const Kernels& kernels, const PageLayout& layout, const EncodeCall& call);

// One call of store_tokens. Legend: see abi.h.
struct StoreCall {
  const DeltastoreLayerStore* store;
  const DeltastoreTokenWrites* writes;
  const FloatMatrix* key_rot;
  const FloatMatrix* value_rot;
  int64_t threads;
};

void store_tokens(const Kernels& kernels, const StoreCall& call);

// in.outer * in.inner rows of in.head_dim -> out, contiguous
void rotate(const Kernels& kernels, const FloatMatrix& in, void* out, int64_t threads);

uint64_t read_bytes(const Kernels& kernels, const uint8_t* data, int64_t bytes, int64_t threads);

}  // namespace deltastore
