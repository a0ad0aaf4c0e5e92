// Stored tokens as floats, for kernels that know nothing of pages: any positions of any requests of a context, from
// sinks, pages or frames, wherever they are. ops/decode/reference.py is the pages' twin.
//
// One thread a dim, one block a (row, KV head): extend reads a token's codes once for hundreds of queries, so plain
// look-ups of one code at a time are fast enough (a code costs some ten instructions, attention a thousand).
#pragma once

#include "attend_params.cuh"
#include "unpack.cuh"

namespace deltastore::cuda {

struct DecodeParams {
  Context context;
  const int32_t* requests;   // [rows]: of which request of the context ..
  const int32_t* positions;  // [rows]: .. which of its stored tokens
  void* key_rot;             // [rows, H, D] of out_type
  void* value_rot;
  int32_t out_type;  // FloatType
};

template <int kBits, int kHeadDim>
DELTASTORE_DEVICE float level_at(const uint8_t* codes, int line, int byte, int anchor, int nibble) {
  uint32_t levels[2];
  look_up<kBits>(code_at<kBits, kHeadDim>(codes, line, byte), levels);
  const int level = static_cast<int8_t>(levels[0]);
  const float log2_scale = static_cast<float>(anchor - kAnchorBias) / kAnchorsPerOctave -
                           static_cast<float>(nibble) * static_cast<float>(kScaleStepLog2);
  return static_cast<float>(level) * static_cast<float>(Codebook<kBits>::unit) * exp2_precise(log2_scale);
}

template <int kKeyBits, int kValueBits, int kHeadDim>
DELTASTORE_DEVICE void decode_context(const DecodeParams& params) {
  const Context& context = params.context;
  const PageFields& layout = context.layout;
  const int64_t row = block_index(0), heads = layout.kv_heads;
  const int kv_head = block_index(1), dim = thread_in_block();
  const int request = load(params.requests + row), position = load(params.positions + row);
  const int packed_tokens = load(context.packed_tokens + request);
  const int sink = context.sink_tokens > 0 && packed_tokens > 0 ? load(context.sink_ids + request) : -1;
  float key = 0, value = 0;
  const uint16_t *raw_key = nullptr, *raw_value = nullptr;
  if (position >= packed_tokens) {
    const int64_t frame = load(context.frame_ids + request);
    const int64_t offset = ((frame * heads + kv_head) * kTokensOfTile + position - packed_tokens) * kHeadDim;
    raw_key = context.frame_key_rot + offset;
    raw_value = context.frame_value_rot + offset;
  } else if (sink >= 0 && position < context.sink_tokens) {
    const int64_t offset = ((sink * heads + kv_head) * context.sink_tokens + position) * kHeadDim;
    raw_key = context.sink_key_rot + offset;
    raw_value = context.sink_value_rot + offset;
  } else {
    const int token = position % kTokensOfTile, tile_of_request = position / kTokensOfTile;
    const int page_of_request = tile_of_request / layout.tiles;
    const int64_t page_id = load(context.page_table + request * context.table_stride + page_of_request);
    const uint8_t* page = context.pages + page_id * layout.page_bytes;
    const int tile = kv_head * layout.tiles + tile_of_request % layout.tiles;
    const uint8_t* keys = page + tile * kTileBytes<kKeyBits, kHeadDim>;
    const uint8_t* values = page + layout.value_codes_offset + tile * kTileBytes<kValueBits, kHeadDim>;
    if constexpr (kKeyBits == kRawBits) {
      raw_key = reinterpret_cast<const uint16_t*>(keys) + token * kHeadDim;
      raw_value = reinterpret_cast<const uint16_t*>(values) + token * kHeadDim;
    } else {
      const uint8_t nibbles = load(page + layout.scales_offset + tile * kTokensOfTile + token);
      const uint8_t* anchors = page + layout.anchors_offset + 2 * tile;
      key = level_at<kKeyBits, kHeadDim>(keys, dim / 4, 4 * token + dim % 4, load(anchors), nibbles & 15);
      value = level_at<kValueBits, kHeadDim>(values, dim / 16 * 4 + token / 4, 4 * (dim % 16) + token % 4,
                                             load(anchors + 1), nibbles >> 4);
    }
  }
  if (raw_key != nullptr) {
    key = float_of_half(load(raw_key + dim));
    value = float_of_half(load(raw_value + dim));
  }
  const int64_t out = (row * heads + kv_head) * kHeadDim + dim;
  store_float(params.key_rot, params.out_type, out, key);
  store_float(params.value_rot, params.out_type, out, value);
}

}  // namespace deltastore::cuda
