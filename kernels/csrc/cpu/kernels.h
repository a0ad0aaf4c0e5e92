// What every instruction set implements, and what the instruction-set-independent code around it
// (plan, threads, merging) hands over. One struct of function pointers per instruction set.
#pragma once

#include "../include/deltastore/abi.h"

namespace deltastore {

// Tokens whose scores are softened at once, in tiles. Weights are 8-bit within a block, so a longer
// block loses more of its small weights; a shorter one converts sums to float more often.
constexpr int64_t kBlockTiles = 4;
constexpr int64_t kBlockTokens = kBlockTiles * kTileTokens;

// Query rows that share one pass over a KV head's context: the query heads of its group, of one
// token (decode) or of many (extend).
constexpr int64_t kMaxRows = 64;

struct Rows {
  int64_t count;
  const float* query_rot[kMaxRows];  // [D] each
  int64_t visible_from[kMaxRows];    // positions that the row sees: from ..
  int64_t visible_to[kMaxRows];      // .. to - 1
};

// Float tokens come to the kernels in blocks of kBlockTokens, each arranged as an instruction set likes
// its operands (see attend_dense.h). Arranged numbers take four bytes on every instruction set.
constexpr int64_t dense_side_bytes(int64_t head_dim) { return kBlockTokens * head_dim * 4; }
constexpr int64_t dense_block_bytes(int64_t head_dim) { return 2 * dense_side_bytes(head_dim); }

// New tokens of one request and KV head that are not in the store.
struct NewTokens {
  const uint8_t* blocks;  // [blocks, dense_block_bytes]; the last one padded with zeros
  int64_t position;       // of the first
  int64_t tokens;
};

// The context of one request and KV head as a sequence of blocks, of which a segment is a run:
//
//     new_first .. new_end - 1 | sinks, if with_sinks | the frame, if with_frame | tiles first_tile .. end_tile - 1,
//                                                                                   by fours
//
// New tokens and sinks come first because they tend to matter most: see kFineShare in attend_segment.cpp.
struct Blocks {
  int64_t request;
  int64_t kv_head;
  NewTokens fresh;
  int64_t new_first;
  int64_t new_end;
  int64_t sink_tokens;  // positions 0 .. sink_tokens - 1 of the tiles are hidden: they are read from the sinks
  bool with_sinks;
  bool with_frame;
  int64_t first_tile;
  int64_t end_tile;

  int64_t before_tiles() const { return new_end - new_first + (with_sinks ? 1 : 0) + (with_frame ? 1 : 0); }
  int64_t count() const { return before_tiles() + (end_tile - first_tile + kBlockTiles - 1) / kBlockTiles; }
};

// Softmax so far, in base 2: sum and out are relative to 2**largest.
struct Partial {
  float largest[kMaxRows];
  float sum[kMaxRows];
  alignas(64) float out[kMaxRows * kMaxHeadDim];  // [rows, D]
};

using FloatMatrix = DeltastoreFloats;
constexpr int64_t kFloat32 = DELTASTORE_FLOAT32, kFloat16 = DELTASTORE_FLOAT16;

// One tile wherever its page lies.
template <typename Byte>
struct TileOf {
  Byte* key;
  Byte* value;
  Byte* scales;
  Byte* anchors;
};
using TileBytes = TileOf<const uint8_t>;
using TileTarget = TileOf<uint8_t>;

// Tile `tile` (0 .. layout.tiles() - 1) of KV head `head` in a page.
template <typename Byte>
TileOf<Byte> tile_in_page(const PageLayout& layout, Byte* page, int64_t head, int64_t tile) {
  const int64_t place = head * layout.tiles() + tile;
  return {page + layout.key_codes_offset() + place * layout.key_codes_bytes(),
          page + layout.value_codes_offset() + place * layout.value_codes_bytes(),
          page + layout.scales_offset() + place * layout.scales_bytes(),
          page + layout.anchors_offset() + place * layout.anchors_bytes()};
}

struct Kernels {
  const char* name;
  int64_t scratch_bytes;  // what attend_segment needs, 64-byte aligned
  // Attention of the rows to blocks first .. end - 1.
  void (*attend_segment)(const DeltastoreContext& context, const DeltastoreScoring& scoring, const Rows& rows,
                         const Blocks& blocks, int64_t first, int64_t end, void* scratch, Partial* partial);
  // key_rot, value_rot [tokens, D], `stride` floats from one token to the next -> one block
  void (*arrange_block)(const float* key_rot, const float* value_rot, int64_t stride, int64_t tokens, int64_t head_dim,
                        uint8_t* block);
  // key_rot, value_rot [16, D]
  void (*decode_tile)(const PageLayout& layout, const TileBytes& tile, float* key_rot, float* value_rot);
  // key_rot, value_rot [16, D] float16 (is_half) or float32, strides in elements; not for raw layouts.
  // key_shaping [D, D] of the head, or null
  void (*encode_tile)(const PageLayout& layout, const void* key_rot, const void* value_rot, bool is_half,
                      int64_t key_stride, int64_t value_stride, const float* key_shaping, const TileTarget& tile);
  // Rows begin .. end - 1 of `in` -> out [rows, D] float16, finite: as packing.to_raw
  void (*raw_rows)(const FloatMatrix& in, int64_t begin, int64_t end, uint16_t* out);
  // Rows begin .. end - 1 of `in` -> out [rows, D] of the same type; D a multiple of 32, at most kMaxHeadDim
  void (*rotate_rows)(const FloatMatrix& in, int64_t begin, int64_t end, void* out);
  // Reads all bytes (whole kilobytes) and returns the parity of their 8-byte words.
  uint64_t (*read_bytes)(const uint8_t* data, int64_t bytes);
};

}  // namespace deltastore
