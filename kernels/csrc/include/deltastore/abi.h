// What the library exports: plain C, bound by deltastore_kernels/native.py with ctypes.
//
// Legend: B requests, H KV heads, Hq query heads, D head_dim, P tokens per page, T tokens.
// Every function that can refuse returns NULL, or a message that stays valid until the next call
// of the same thread.
#pragma once

#include <cstdint>

#include "layout.h"

// Raise when a struct or a signature below changes: a library built from older sources is refused.
#define DELTASTORE_ABI_VERSION 11

#pragma GCC visibility push(default)
extern "C" {

// context.py: StepContext and LayerStore
struct DeltastoreContext {
  deltastore::PagesOf<const uint8_t> pages;
  int64_t batch;
  const int64_t* page_table;  // [B, table_stride]: page of positions i*P .. (i+1)*P - 1
  int64_t table_stride;
  const int64_t* packed_tokens;     // [B], multiples of 16
  const uint16_t* frame_key_rot;    // [num_frames, H, 16, D] float16
  const uint16_t* frame_value_rot;  // [num_frames, H, 16, D] float16
  int64_t num_frames;
  const int64_t* frame_ids;        // [B]
  const int64_t* frame_tokens;     // [B], 0 .. 15
  const uint16_t* sink_key_rot;    // [num_sinks, H, sink_tokens, D] float16: read instead of the pages'
  const uint16_t* sink_value_rot;  // [num_sinks, H, sink_tokens, D]          first sink_tokens tokens
  int64_t num_sinks;
  int64_t sink_tokens;      // at most 16
  const int64_t* sink_ids;  // [B], -1: none; NULL where num_sinks is 0
  int64_t is_checked;       // deltastore_check_context found nothing wrong: attention does not look again
};

// context.py: Scoring
struct DeltastoreScoring {
  double scale;
  double soft_cap;      // 0: none
  int64_t window_left;  // -1: none
};

// context.py: LayerStore
struct DeltastoreLayerStore {
  deltastore::PagesOf<uint8_t> pages;
  uint16_t* frame_key_rot;    // [num_frames, H, 16, D] float16
  uint16_t* frame_value_rot;  // [num_frames, H, 16, D] float16
  int64_t num_frames;
  uint16_t* sink_key_rot;    // [num_sinks, H, sink_tokens, D] float16
  uint16_t* sink_value_rot;  // [num_sinks, H, sink_tokens, D] float16
  int64_t num_sinks;         // 0: sequences keep none
  int64_t sink_tokens;
  const float* key_shaping;  // [H, D, D], or null
};

// token_writes.py: TokenWrites
struct DeltastoreTokenWrites {
  int64_t tiles;
  const int64_t* tile_sources;  // [tiles, 16]
  const int64_t* tile_frames;   // [tiles]
  const int64_t* page_ids;      // [tiles]
  const int64_t* tile_ids;      // [tiles]
  int64_t rests;
  const int64_t* rest_rows;    // [rests]
  const int64_t* rest_frames;  // [rests]
  const int64_t* rest_lanes;   // [rests]
  int64_t sinks;
  const int64_t* sink_rows;  // [sinks]
  const int64_t* sink_ids;   // [sinks]
};

// Raw tiles [N, H, 16, D] to encode, D contiguous; strides in elements.
struct DeltastoreTileRows {
  const char* data;
  int64_t tile_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// Float rows [outer, inner, D], D contiguous; strides in elements.
enum { DELTASTORE_FLOAT32, DELTASTORE_FLOAT16, DELTASTORE_BFLOAT16 };
struct DeltastoreFloats {
  const void* data;
  int64_t type;
  int64_t outer, inner, head_dim;
  int64_t outer_stride, inner_stride;
};

int64_t deltastore_abi_version();

// Name of the instruction set in use; NULL and a message from deltastore_last_error if the
// environment asks for one that is unknown or that this CPU does not have.
const char* deltastore_isa();

// Space-separated names of those that this CPU has, best first.
const char* deltastore_isas();

// Switch to another instruction set (for tests).
const char* deltastore_use_isa(const char* name);

const char* deltastore_last_error();

// tiles, key_codes_offset, key_codes_bytes, value_codes_offset, .., anchors_bytes, page_bytes
void deltastore_page_layout(const deltastore::PageLayout* layout, int64_t sizes[10]);

// levels [2**bits] int8 in ascending order, and their unit; anchors [256], factors [16]
void deltastore_codec(int64_t bits, int8_t* levels, double* unit, float* anchors, float* factors);

// Whether all that B requests read lies within the pages, frames and sinks, without any window. Layers with as many of
// each need it once. attend_decode and attend_extend do the same, as far as their window sees, unless is_checked.
const char* deltastore_check_context(const DeltastoreContext* context);

// query_rot, out_rot [B, Hq, D], lse [B, Hq]: see ops/attend_decode/reference.py
const char* deltastore_attend_decode(const DeltastoreContext* context, const DeltastoreScoring* scoring,
                                     const float* query_rot, int64_t query_heads, float* out_rot, float* lse,
                                     int64_t threads);

// query_rot, out_rot [T, Hq, D], key_rot, value_rot [T, H, D], lse [T, Hq], new_tokens [B] with sum T:
// see ops/attend_extend/reference.py
const char* deltastore_attend_extend(const DeltastoreContext* context, const DeltastoreScoring* scoring,
                                     const float* query_rot, int64_t query_heads, const float* key_rot,
                                     const float* value_rot, const int64_t* new_tokens, float* out_rot, float* lse,
                                     int64_t threads);

// pages [num_pages, page_bytes]; the first `tokens` tokens (whole tiles) of the pages page_ids[0],
// [1], .. -> key_rot, value_rot [H, tokens, D] with head_stride floats from one head to the next
const char* deltastore_decode(const deltastore::PageLayout* layout, const uint8_t* pages, int64_t num_pages,
                              const int64_t* page_ids, int64_t tokens, float* key_rot, float* value_rot,
                              int64_t head_stride, int64_t threads);

// Encode tiles [N, H, 16, D] of float16 (is_half) or float32 to pages [num_pages, page_bytes]:
// tile i to tile tile_ids[i] of page page_ids[i]; key_shaping [H, D, D] or NULL. See ops/encode/reference.py; not for
// raw layouts.
const char* deltastore_encode(const deltastore::PageLayout* layout, uint8_t* pages, int64_t num_pages,
                              const int64_t* page_ids, const int64_t* tile_ids, int64_t tiles,
                              const DeltastoreTileRows* key_rot, const DeltastoreTileRows* value_rot, int64_t is_half,
                              const float* key_shaping, int64_t threads);

// key_rot, value_rot [T, H, D] into pages, frames and sinks: see ops/store_tokens/reference.py
const char* deltastore_store_tokens(const DeltastoreLayerStore* store, const DeltastoreTokenWrites* writes,
                                    const DeltastoreFloats* key_rot, const DeltastoreFloats* value_rot,
                                    int64_t threads);

// -> out [outer, inner, D] of the same type, contiguous: see ops/rotate/reference.py
const char* deltastore_rotate(const void* data, int64_t type, int64_t outer, int64_t inner, int64_t head_dim,
                              int64_t outer_stride, int64_t inner_stride, void* out, int64_t threads);

// For benchmarks: merely reads, and returns the parity of all 8-byte words.
uint64_t deltastore_read_bytes(const uint8_t* data, int64_t bytes, int64_t threads);

}  // extern "C"
#pragma GCC visibility pop
