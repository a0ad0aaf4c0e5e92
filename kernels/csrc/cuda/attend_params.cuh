// The arguments of attention and of decoding, as context.py and ops/attend_decode/reference.py define them.
#pragma once

#include "deltastore/layout.h"
#include "machine.cuh"

namespace deltastore::cuda {

enum FloatType : int32_t { kFloat32, kFloat16, kBfloat16 };

constexpr int kTokensOfTile = static_cast<int>(kTileTokens);

// Bytes of a tile's keys or values.
template <int kBits, int kHeadDim>
constexpr int kTileBytes = kTokensOfTile * kHeadDim * kBits / 8;

// What kernels need of a PageLayout: computed once, by the host.
struct PageFields {
  int32_t kv_heads, tiles, page_bytes;  // tiles of a page
  int32_t value_codes_offset, scales_offset, anchors_offset;
  uint32_t reciprocal_tiles;  // 2 ** 31 / tiles, rounded up
};

inline PageFields fields_of(const PageLayout& layout) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  const uint32_t tiles = static_cast<uint32_t>(layout.tiles());
  return {narrow(layout.kv_heads),          narrow(layout.tiles()),
          narrow(layout.page_bytes()),      narrow(layout.value_codes_offset()),
          narrow(layout.scales_offset()),   narrow(layout.anchors_offset()),
          (0x80000000u + tiles - 1) / tiles};
}

// Legend: B requests, H KV heads, Hq query heads, D head_dim, P tokens per page.
struct Context {
  PageFields layout;
  const uint8_t* pages;       // [pages, page_bytes]
  const int32_t* page_table;  // [B, table_stride]
  int64_t table_stride;
  const int32_t* packed_tokens;   // [B], multiples of 16
  const uint16_t* frame_key_rot;  // [frames, H, 16, D] float16
  const uint16_t* frame_value_rot;
  const int32_t* frame_ids;      // [B]
  const int32_t* frame_tokens;   // [B], 0 .. 15
  const uint16_t* sink_key_rot;  // [slots, H, sink_tokens, D] float16
  const uint16_t* sink_value_rot;
  const int32_t* sink_ids;  // [B], -1: none
  int32_t sink_tokens;      // 0 .. 16; 0: no sinks, and the three above are not read
};

struct AttendParams {
  Context context;
  const void* query_rot;  // [B, Hq, D] of query_type
  float* partial_out;     // [B, Hq, splits, D]: of each split, the softmax-weighted sum of values and ..
  float* partial_log2;    // [B, Hq, splits]: .. log2 of the sum of exp(score), -inf without tokens
  int32_t query_type;     // FloatType
  int32_t group;          // query heads of one KV head
  int32_t window_left;    // -1: none
  float scale;            // multiplies the dot product
  float soft_cap;         // 0: none
};

DELTASTORE_DEVICE float load_float(const void* floats, int32_t type, int64_t i) {
  if (type == kFloat32) return load(static_cast<const float*>(floats) + i);
  const uint16_t bits = load(static_cast<const uint16_t*>(floats) + i);
  return type == kFloat16 ? float_of_half(bits) : float_of_bfloat16(bits);
}

DELTASTORE_DEVICE void store_float(void* floats, int32_t type, int64_t i, float x) {
  if (type == kFloat32) {
    static_cast<float*>(floats)[i] = x;
  } else {
    static_cast<uint16_t*>(floats)[i] = type == kFloat16 ? half_of_float(x) : bfloat16_of_float(x);
  }
}

// Which of a request's stored tokens its decode query sees, and what they are read from.
struct View {
  int packed_tokens, frame_tokens;
  int visible_from;  // position
  int sink;          // slot, -1: none to be read
  int sunk_tokens;   // positions 0 .. sunk_tokens - 1 are the sink's, not the pages'

  DELTASTORE_DEVICE int packed_from() const { return visible_from > sunk_tokens ? visible_from : sunk_tokens; }
};

DELTASTORE_DEVICE View view_of(const Context& context, int request, int window_left) {
  View view{load(context.packed_tokens + request), load(context.frame_tokens + request), 0, -1, 0};
  // The query's own token is the last one stored, so the window reaches one token less far.
  const int shown_from = view.packed_tokens + view.frame_tokens - 1 - window_left;
  if (window_left >= 0 && shown_from > 0) view.visible_from = shown_from;
  if (context.sink_tokens > 0 && view.packed_tokens > 0 && load(context.sink_ids + request) >= 0) {
    view.sunk_tokens = context.sink_tokens;
    if (view.visible_from < view.sunk_tokens) view.sink = load(context.sink_ids + request);
  }
  return view;
}

}  // namespace deltastore::cuda
