// attend_decode: one query for each request over its stored context. ops/attend_decode/reference.py is its twin.
//
// A block of threads serves one request, one KV head (eight of its query heads) and one of `splits` parts of the
// request's tokens. Each of its warps walks alone over every (splits * warps)th block of tokens, with codes fetched
// one block ahead into registers; nothing is shared, and no barrier waited for, until all are done. Grid: (splits,
// H * chunks of eight heads, B), the same for all contexts, so that a CUDA graph may hold it.
#pragma once

#include "attend_packed.cuh"
#include "attend_raw.cuh"

namespace deltastore::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpLanes;

// The queries as right-hand sides, the same for all warps: too many to keep in registers.
template <int kHeadDim>
struct Query {
  Words4 raw[kHeadDim / 16][kWarpLanes];
  Words4 packed[kHeadDim / 32][kWarpLanes];
  float rows[kHeads][kHeadDim];  // zeros where there is no head
};

template <int kHeadDim>
struct Shared {
  union {
    Query<kHeadDim> query;
    float out[kWarps][kHeads][kHeadDim];  // when all warps are done with the queries
  };
  float reference[kWarps][kHeads];
  float sum[kWarps][kHeads];
};

// The query heads that a block of threads serves.
struct Heads {
  int kv_head, count;  // 1 .. kHeads of them
  int first;           // row of query_rot
};

DELTASTORE_DEVICE Heads heads_of(const AttendParams& params) {
  const int chunks = (params.group + kHeads - 1) / kHeads, chunk = block_index(1) % chunks;
  const int kv_head = block_index(1) / chunks, rest = params.group - chunk * kHeads;
  const int first = (block_index(2) * params.context.layout.kv_heads + kv_head) * params.group + chunk * kHeads;
  return {kv_head, rest < kHeads ? rest : kHeads, first};
}

// How large the queries are, and whether they are finite.
struct QuerySize {
  float largest;    // element of all heads without poison
  float poison[2];  // of heads 2 * column, + 1: NaN if an element is infinite or NaN, else 0

  // `steps` / the largest element, and what one of its inverse is worth: in base 2 unless there is a soft cap.
  DELTASTORE_DEVICE float inverse(float steps) const { return largest > 1e-30f ? divide_precise(steps, largest) : 0; }
  DELTASTORE_DEVICE float unit(const AttendParams& params) const {
    return largest * params.scale * (params.soft_cap == 0 ? kLog2E : 1.0f);
  }
};

template <int kKeyBits, int kHeadDim>
DELTASTORE_DEVICE QuerySize take_query(Query<kHeadDim>& query, const AttendParams& params, const Lane& lane) {
  const Heads heads = heads_of(params);
  for (int i = thread_in_block(); i < kHeads * kHeadDim; i += kThreads) {
    const bool is_head = i < heads.count * kHeadDim;
    query.rows[i / kHeadDim][i % kHeadDim] =
        is_head ? load_float(params.query_rot, params.query_type, static_cast<int64_t>(heads.first) * kHeadDim + i) : 0;
  }
  block_barrier();
  QuerySize size{};
  float poison = 0;
  for (int i = 0; i < kHeadDim / 4; ++i) {
    const float x = query.rows[lane.row][4 * i + lane.column];
    size.largest = larger(size.largest, fabsf(x));
    poison += x * 0.0f;
  }
  for (int columns = 1; columns < 4; columns *= 2) {
    size.largest = larger(size.largest, shuffle_xor(size.largest, columns));
    poison += shuffle_xor(poison, columns);
  }
  if (poison != 0) size.largest = 0;
  for (int rows = 4; rows < kWarpLanes; rows *= 2) {
    size.largest = larger(size.largest, shuffle_xor(size.largest, rows));
  }
  for (int h = 0; h < 2; ++h) size.poison[h] = shuffle(poison, 4 * (2 * lane.column + h));
  const int index = thread_in_block() % kWarpLanes;
  for (int i = thread_in_block() / kWarpLanes; i < kHeadDim / 16; i += kWarps) {
    query.raw[i][index] = raw_query(query.rows[lane.row], size.inverse(1.0f), i, lane);
    if constexpr (kKeyBits != kRawBits) {
      if (i >= kHeadDim / 32) continue;
      query.packed[i][index] = packed_query<kKeyBits>(query.rows[lane.row], size.inverse(kQuerySteps), i, lane);
    }
  }
  block_barrier();
  return size;
}

// Tiles first .. end - 1 of a request, dealt out to all warps of all its splits.
struct Share {
  int first_tile, end_tile;
  int warp, warps;

  // 64 tokens at a time for packed tiles, 16 for raw ones.
  DELTASTORE_DEVICE int first_block(int tiles) const { return first_tile / tiles + warp; }
  DELTASTORE_DEVICE int end_block(int tiles) const { return (end_tile + tiles - 1) / tiles; }
  // Frame and sink go to the warps whose turn it is next.
  DELTASTORE_DEVICE bool has_turn(int tiles, int after) const {
    const int blocks = end_tile > first_tile ? end_block(tiles) - first_tile / tiles : 0;
    return (blocks + after) % warps == warp;
  }
};

DELTASTORE_DEVICE Share share_of(const View& view) {
  return {view.packed_from() / kTokensOfTile, view.packed_tokens / kTokensOfTile,
          block_index(0) * kWarps + thread_in_block() / kWarpLanes, grid_size(0) * kWarps};
}

// Where the tiles of one request and KV head are.
struct Tiles {
  const Context& context;
  const int32_t* table;
  int first, end, head_tile;

  DELTASTORE_DEVICE Tiles(const Context& of, int request, int kv_head, const Share& share)
      : context(of),
        table(of.page_table + request * of.table_stride),
        first(share.first_tile),
        end(share.end_tile),
        head_tile(kv_head * of.layout.tiles) {}

  // A tile that there is: hidden ones stand for those before the first and after the last.
  DELTASTORE_DEVICE int nearest(int tile) const { return tile < first ? first : tile >= end ? end - 1 : tile; }
  DELTASTORE_DEVICE int page_of(int tile) const { return multiply_high(2 * tile, context.layout.reciprocal_tiles); }
  DELTASTORE_DEVICE int32_t page_id(int tile) const { return load(table + page_of(nearest(tile))); }
  DELTASTORE_DEVICE const uint8_t* page(int32_t id) const {
    return context.pages + static_cast<int64_t>(id) * context.layout.page_bytes;
  }
  // Which tile of a page's fields.
  DELTASTORE_DEVICE uint32_t in_page(int tile) const {
    const int there = nearest(tile);
    return head_tile + there - page_of(there) * context.layout.tiles;
  }
};

template <int kKeyBits, int kValueBits, int kHeadDim>
DELTASTORE_DEVICE void attend_all_packed(State<kHeadDim>& state, const AttendParams& params, const QuerySize& size,
                                         const Query<kHeadDim>& query, const View& view, const Share& share,
                                         const Lane& lane) {
  const int end_block = share.end_block(kTilesOfBlock);
  int block = share.first_block(kTilesOfBlock);
  if (share.first_tile >= share.end_tile || block >= end_block) return;
  constexpr float kLevel = static_cast<float>(Codebook<kKeyBits>::unit / kQuerySteps);
  const float unit = size.unit(params) * kLevel;
  const PageFields& layout = params.context.layout;
  const Tiles tiles(params.context, block_index(2), heads_of(params).kv_head, share);
  // Keys and scales of tile row / 2 of the block, values of tile `column`.
  const int key_tile = lane.row / 2, value_tile = lane.column;
  KeyWords<kKeyBits, kHeadDim> keys;
  ValueWords<kValueBits, kHeadDim> values;
  ScaleWords scales;
  const auto key_page = [&](int of_block) { return tiles.page_id(kTilesOfBlock * of_block + key_tile); };
  const auto value_page = [&](int of_block) { return tiles.page_id(kTilesOfBlock * of_block + value_tile); };
  const auto fetch_keys = [&](int of_block, int32_t page_id) {
    const uint8_t* page = tiles.page(page_id);
    const uint32_t tile = tiles.in_page(kTilesOfBlock * of_block + key_tile);
    keys.fetch(page, tile * kTileBytes<kKeyBits, kHeadDim>, lane);
    scales.fetch(page, layout.scales_offset + tile * kTokensOfTile, layout.anchors_offset + 2 * tile, lane);
  };
  const auto fetch_values = [&](int of_block, int32_t page_id, int part) {
    const uint32_t tile = tiles.in_page(kTilesOfBlock * of_block + value_tile);
    const uint32_t offset = layout.value_codes_offset + tile * kTileBytes<kValueBits, kHeadDim>;
    values.fetch(tiles.page(page_id), offset, part, lane);
  };
  // Registers hold a block of keys beside one of values, so both are asked for as soon as they are free. With
  // head_dim 256 they hold one of the two: then other warps have to fill the time.
  constexpr bool kAhead = ValueWords<kValueBits, kHeadDim>::kParts == 1;
  fetch_keys(block, key_page(block));
  if (kAhead) fetch_values(block, value_page(block), 0);
  for (int next = block + share.warps; block < end_block; block = next, next += share.warps) {
    const bool is_last = next >= end_block;
    const int32_t next_key_page = kAhead ? key_page(next) : 0, next_value_page = kAhead ? value_page(next) : 0;
    BlockScores scores;
    const Span span{block * kTokensOfBlock, view.packed_from(), view.packed_tokens};
    score_block<kKeyBits, kHeadDim>(scores, query.packed, keys, scales, span, unit, params.soft_cap, lane);
    if (kAhead && !is_last) fetch_keys(next, next_key_page);
    BlockWeights weights;
    float reference[2];
    soften_block(weights, reference, scores, state);
    DELTASTORE_UNROLL
    for (int part = 0; part < values.kParts; ++part) {
      if (!kAhead) fetch_values(block, value_page(block), part);
      sum_block(state, values, part, weights, reference, lane);
    }
    if (kAhead && !is_last) fetch_values(next, next_value_page, 0);
    if (!kAhead && !is_last) fetch_keys(next, key_page(next));
  }
}

template <int kHeadDim>
DELTASTORE_DEVICE void attend_all_raw(State<kHeadDim>& state, const AttendParams& params, const QuerySize& size,
                                      const Query<kHeadDim>& query, const View& view, const Share& share,
                                      bool raw_pages, const Lane& lane) {
  const int tiles_at_once = raw_pages ? 1 : kTilesOfBlock;
  const Context& context = params.context;
  const bool has_frame = view.frame_tokens > 0 && share.has_turn(tiles_at_once, 0);
  const bool has_sink = view.sink >= 0 && share.has_turn(tiles_at_once, 1);
  const bool has_pages = raw_pages && share.first_block(1) < share.end_tile;
  if (!has_frame && !has_sink && !has_pages) return;
  const int request = block_index(2), kv_head = heads_of(params).kv_head;
  const float unit = size.unit(params);
  const int64_t row_heads = context.layout.kv_heads;
  const Tiles tiles(context, request, kv_head, share);
  const int outside = (has_frame ? 1 : 0) + (has_sink ? 1 : 0);
  const int own_tiles = has_pages ? (share.end_tile - share.first_block(1) + share.warps - 1) / share.warps : 0;
  for (int i = 0; i < outside + own_tiles; ++i) {
    const uint16_t *keys, *values;
    int tokens = kTokensOfTile, position = 0, visible_from = view.visible_from;
    if (has_frame && i == 0) {
      const int64_t offset = (load(context.frame_ids + request) * row_heads + kv_head) * kTokensOfTile * kHeadDim;
      keys = context.frame_key_rot + offset;
      values = context.frame_value_rot + offset;
      tokens = view.frame_tokens;
      position = view.packed_tokens;
    } else if (i < outside) {
      const int64_t offset = (view.sink * row_heads + kv_head) * context.sink_tokens * kHeadDim;
      keys = context.sink_key_rot + offset;
      values = context.sink_value_rot + offset;
      tokens = context.sink_tokens;
    } else {
      const int tile = share.first_block(1) + (i - outside) * share.warps;
      const uint8_t* page = tiles.page(tiles.page_id(tile)) + tiles.in_page(tile) * (kTokensOfTile * kHeadDim * 2);
      keys = reinterpret_cast<const uint16_t*>(page);
      values = reinterpret_cast<const uint16_t*>(page + context.layout.value_codes_offset);
      position = tile * kTokensOfTile;
      visible_from = view.packed_from();
    }
    attend_raw_tile(state, query.raw, keys, values, tokens, position, visible_from, unit, params.soft_cap, lane);
  }
}

// The warps' states -> the block's part of the result.
template <int kHeadDim>
DELTASTORE_DEVICE void merge_warps(State<kHeadDim>& state, Shared<kHeadDim>& shared, const AttendParams& params,
                                   const Lane& lane) {
  const Heads heads = heads_of(params);
  const int warp = thread_in_block() / kWarpLanes;
  block_barrier();
  DELTASTORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    for (int rows = 4; rows < kWarpLanes; rows *= 2) state.sum[h] += shuffle_xor(state.sum[h], rows);
    const int head = 2 * lane.column + h;
    if (lane.row == 0) {
      shared.reference[warp][head] = state.reference[h];
      shared.sum[warp][head] = state.sum[h];
    }
    DELTASTORE_UNROLL
    for (int i = 0; i < kHeadDim / 8; ++i) {
      shared.out[warp][head][dim_of(lane, i / 2, i % 2)] = state.out[i / 2][2 * (i % 2) + h];
    }
  }
  block_barrier();
  const int splits = grid_size(0), split = block_index(0);
  for (int i = thread_in_block(); i < heads.count * kHeadDim; i += kThreads) {
    const int head = i / kHeadDim, dim = i % kHeadDim;
    float reference = kHidden, sum = 0, out = 0;
    for (int w = 0; w < kWarps; ++w) reference = larger(reference, shared.reference[w][head]);
    for (int w = 0; w < kWarps; ++w) {
      const float factor = exp2_fast(shared.reference[w][head] - reference);
      sum += shared.sum[w][head] * factor;
      out += shared.out[w][head][dim] * factor;
    }
    const int64_t part = static_cast<int64_t>(heads.first + head) * splits + split;
    params.partial_out[part * kHeadDim + dim] = sum == 0 ? 0 : divide_precise(out, sum);
    if (dim == 0) params.partial_log2[part] = sum == 0 ? -INFINITY : reference + log2_precise(sum);
  }
}

template <int kKeyBits, int kValueBits, int kHeadDim>
DELTASTORE_DEVICE void attend_decode(const AttendParams& params, Shared<kHeadDim>& shared) {
  const Lane lane = lane_of(thread_in_block());
  const QuerySize size = take_query<kKeyBits>(shared.query, params, lane);
  const View view = view_of(params.context, block_index(2), params.window_left);
  const Share share = share_of(view);
  State<kHeadDim> state;
  state.start(size.poison);
  attend_all_raw(state, params, size, shared.query, view, share, kKeyBits == kRawBits, lane);
  if constexpr (kKeyBits != kRawBits) {
    attend_all_packed<kKeyBits, kValueBits>(state, params, size, shared.query, view, share, lane);
  }
  merge_warps(state, shared, params, lane);
}

}  // namespace deltastore::cuda
