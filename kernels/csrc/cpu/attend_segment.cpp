// Attention of some query rows to a run of one request's blocks: online softmax in base 2 over blocks
// of tiles (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2205.14135).
//
// Over packed tiles both products are integer: the query is rounded to int8 (one scale per row),
// probability * value scale to uint8 (one scale per row and block). A block with a token that
// matters much (kFineShare) is summed twice, the second time with the remainders of its weights.
// In the other blocks a weight's rounding error is carried into the same lane of the next tile:
// small weights then lose no mass on average, where plain rounding would drop all below 1/510 of
// the block's largest. Over raw tiles, frames and new tokens everything is float32.
#include "amx.h"
#include "amx_dense.h"
#include "attend_block.h"
#include "attend_dense.h"
#include "isa.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// How far ahead of the block at work memory is asked for.
constexpr int64_t kAheadTiles = 1 * kBlockTiles;

// With fewer rows than this, arranging a block of raw tiles costs more than it saves.
constexpr int64_t kFewestArrangedRows = 9;

// Share of all weight so far that one token must have for its block to be summed with 16-bit weights.
constexpr float kFineShare = 1.0f / 128;

// One row for the integer products: whole multiples of largest / 127.
void round_query(Query& query, int64_t r, const float* row, int64_t dim, float scale) {
  F32 most = splat(0.0f), poison = splat(0.0f);  // NaN if any element is infinite or NaN; then so shall the result be
  for (int64_t d = 0; d < dim; d += 16) {
    const F32 x = load(row + d);
    most = max(max(x, sub(splat(0.0f), x)), most);
    poison = fma(x, splat(0.0f), poison);
  }
  const float largest = reduce_max(most);
  query.poison[r] = reduce_add(poison);
  const F32 inverse = splat(largest > 1e-30f && query.poison[r] == 0 ? 127 / largest : 0);
  alignas(64) int32_t whole[kMaxHeadDim];
  for (int64_t d = 0; d < dim; d += 16) {
    const I32 steps = round_to_i32(mul(load(row + d), inverse));
    __builtin_memcpy(whole + d, &steps, sizeof(steps));
  }
  int8_t rounded[kMaxHeadDim];
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    rounded[d] = static_cast<int8_t>(query.poison[r] == 0 ? whole[d] : 0);
    sum += rounded[d];
  }
  make_query_quads(query.quads + r * (dim / 4), rounded, dim / 4);
  query.unit[r] = largest / 127 * scale;
  query.start[r] = -kKeyOffset * sum;
}

// Scores come out in base 2, unless a soft cap still has to see them first.
void prepare(Query& query, const Rows& rows, int64_t dim, const DeltastoreScoring& scoring, bool packed, bool dense) {
  const float scale = static_cast<float>(scoring.scale) * (scoring.soft_cap != 0 ? 1.0f : kLog2E);
  for (int64_t r = 0; r < rows.count; ++r) {
    query.poison[r] = 0;
    if (packed) round_query(query, r, rows.query_rot[r], dim, scale);
    if (!dense) continue;
    for (int64_t d = 0; d < dim; d += 16) {
      store(query.rows + r * dim + d, mul(load(rows.query_rot[r] + d), splat(scale)));
    }
  }
  if (!dense) return;
  for (int64_t i = rows.count * dim; i < round_up(rows.count, kDenseRows) * dim; ++i) query.rows[i] = 0;
  prepare_dense(query, rows.count, dim);
}

void cap_scores(float* scores, int64_t lanes, float soft_cap) {
  // cap * tanh(x / cap) = cap * (1 - 2 / (exp(2 x / cap) + 1)), then to base 2
  const F32 inner = splat(2 * kLog2E / soft_cap), outer = splat(soft_cap * kLog2E), one = splat(1.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 grown = exp2(min(mul(load(scores + i), inner), splat(126.0f)));
    store(scores + i, mul(outer, sub(one, div(splat(2.0f), add(grown, one)))));
  }
}

// Scores of one row -> probabilities relative to 2**largest, in place; rescales what came before.
// Returns whether a token has more than kFineShare of all weight so far.
bool soften(float* scores, int64_t lanes, Partial& partial, int64_t row, int64_t dim) {
  F32 most = load(scores);
  for (int64_t i = 16; i < lanes; i += 16) most = max(load(scores + i), most);
  if (any_greater(most, partial.largest[row])) {
    const float largest = reduce_max(most);
    const float shrink = first_lane(exp2(splat(partial.largest[row] - largest)));
    partial.sum[row] *= shrink;
    float* out = partial.out + row * dim;
    for (int64_t d = 0; d < dim; d += 16) store(out + d, mul(load(out + d), splat(shrink)));
    partial.largest[row] = largest;
  }
  const F32 largest = splat(partial.largest[row]);
  F32 sum = splat(0.0f);
  most = splat(0.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 weight = exp2(sub(load(scores + i), largest));
    sum = add(sum, weight);
    most = max(weight, most);
    store(scores + i, weight);
  }
  partial.sum[row] += reduce_add(sum);
  return any_greater(most, partial.sum[row] * kFineShare);
}

// probability * value scale of one row -> uint8 weights, error carried along each lane.
void round_weights(Block& block, int64_t row, float level) {
  const float* probabilities = block.scores + row * kBlockTokens;
  F32 products[kBlockTiles];
  F32 most = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    products[t] = mul(load(probabilities + 16 * t), load(block.value_scale + 16 * t));
    most = max(products[t], most);
  }
  // 254.5, so that a weight and the error carried to it stay below 255.5.
  const float largest = reduce_max(most);
  const F32 inverse = splat(largest > 1e-30f ? 254.5f / largest : 0);
  block.weight_unit[row] = largest * (1 / 254.5f) * level;
  F32 carried = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    const F32 wanted = fma(products[t], inverse, carried);
    const I32 weight = round_to_i32(wanted);
    carried = sub(wanted, to_f32(weight));
    store_weight_quads(block.weights + (row * kBlockTokens + t * kTileTokens) / 4, weight);
  }
}

// The same for a block that matters: whole steps, and the remainders in 255 steps each.
void split_weights(Block& block, int64_t row, float level) {
  const float* probabilities = block.scores + row * kBlockTokens;
  F32 most = splat(0.0f);
  for (int64_t i = 0; i < block.count * kTileTokens; i += 16) {
    most = max(mul(load(probabilities + i), load(block.value_scale + i)), most);
  }
  const float largest = reduce_max(most);
  const F32 inverse = splat(largest > 1e-30f ? 255 / largest : 0);
  block.weight_unit[row] = largest * (1 / 255.0f) * level;
  for (int64_t i = 0; i < block.count * kTileTokens; i += 16) {
    const F32 wanted = mul(mul(load(probabilities + i), load(block.value_scale + i)), inverse);
    const F32 whole = max(round(sub(wanted, splat(0.5f))), splat(0.0f));
    const F32 rest = min(max(sub(wanted, whole), splat(0.0f)), splat(1.0f));
    store_weight_quads(block.weights + (row * kBlockTokens + i) / 4, round_to_i32(whole));
    store_weight_quads(block.remainders + (row * kBlockTokens + i) / 4, round_to_i32(mul(rest, splat(255.0f))));
  }
}

template <int kBits, int kRows>
void score(Block& block, const Query& query, int64_t row, int64_t dim) {
  if constexpr (kBits == kRawBits) {
    score_raw<kRows>(block, query, row, dim);
  } else {
    score_codes<kBits, kRows>(block, query, row, dim);
  }
}

template <int kBits>
void score_rows(Block& block, const Query& query, int64_t rows, int64_t dim) {
#ifdef __AMX_INT8__
  if constexpr (kBits != kRawBits) {
    if (takes_products(rows, dim)) return score_rows_by_products<kBits>(block, query, rows, dim);
  }
#endif
  for (int64_t r = 0, pass; r < rows; r += pass) {
    pass = rows_of_pass(rows - r);
    switch (pass) {
      case 1: score<kBits, 1>(block, query, r, dim); break;
      case 2: score<kBits, 2>(block, query, r, dim); break;
      case 3: score<kBits, smaller(3, kRowsPerPass)>(block, query, r, dim); break;
      case 4: score<kBits, smaller(4, kRowsPerPass)>(block, query, r, dim); break;
      default: score<kBits, kRowsPerPass>(block, query, r, dim);
    }
  }
}

// Weights of rows row .. + count - 1. Returns whether they have remainders.
bool make_weights(Block& block, const bool* matters, int64_t row, int64_t count, float level) {
  bool fine = false;
  for (int64_t r = row; r < row + count; ++r) fine |= matters[r];
  for (int64_t r = row; r < row + count; ++r) (fine ? split_weights : round_weights)(block, r, level);
  return fine;
}

template <int kBits, int kRows>
void sum(Block& block, const bool* matters, float* out, int64_t row, int64_t dim) {
  if constexpr (kBits == kRawBits) {
    sum_raw<kRows>(block, out, row, dim);
  } else {
    const bool fine = make_weights(block, matters, row, kRows, static_cast<float>(level_unit(kBits)));
    sum_codes<kBits, kRows>(block, block.weights, 1.0f, out, row, dim);
    if (fine) sum_codes<kBits, kRows>(block, block.remainders, 1.0f / 255, out, row, dim);
  }
}

#ifdef __AMX_INT8__
template <int kBits>
void sum_rows_by_products(Block& block, const bool* matters, float* out, int64_t rows, int64_t dim) {
  const bool fine = make_weights(block, matters, 0, rows, static_cast<float>(level_unit(kBits)));
  for (int64_t r = 0; r < rows && block.count < kBlockTiles; ++r) {
    for (int64_t q = r * kBlockTokens / 4 + block.count * 4; q < (r + 1) * kBlockTokens / 4; ++q) {
      block.weights[q] = block.remainders[q] = 0;
    }
  }
  unpack_values<kBits>(block, dim);
  sum_products(block, block.weights, 1.0f, out, rows, dim);
  if (fine) sum_products(block, block.remainders, 1.0f / 255, out, rows, dim);
}
#endif

template <int kBits>
void sum_rows(Block& block, const bool* matters, float* out, int64_t rows, int64_t dim) {
#ifdef __AMX_INT8__
  if constexpr (kBits != kRawBits) {
    if (takes_products(rows, dim)) return sum_rows_by_products<kBits>(block, matters, out, rows, dim);
  }
#endif
  for (int64_t r = 0, pass; r < rows; r += pass) {
    pass = rows_of_pass(rows - r);
    switch (pass) {
      case 1: sum<kBits, 1>(block, matters, out, r, dim); break;
      case 2: sum<kBits, 2>(block, matters, out, r, dim); break;
      case 3: sum<kBits, smaller(3, kRowsPerPass)>(block, matters, out, r, dim); break;
      case 4: sum<kBits, smaller(4, kRowsPerPass)>(block, matters, out, r, dim); break;
      default: sum<kBits, kRowsPerPass>(block, matters, out, r, dim);
    }
  }
}

// A block's tokens: positions position .. + tokens - 1, of which those before `visible_from` are hidden from all rows.
struct Span {
  int64_t position, tokens, visible_from = 0;
};

// The block's scores -> probabilities.
void soften_rows(Block& block, const Rows& rows, const DeltastoreScoring& scoring, const Span& span, int64_t dim,
                 Partial& partial, bool* matters) {
  const int64_t lanes = block.count * kTileTokens;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* scores = block.scores + r * kBlockTokens;
    if (scoring.soft_cap != 0) cap_scores(scores, lanes, static_cast<float>(scoring.soft_cap));
    const int64_t from = rows.visible_from[r] > span.visible_from ? rows.visible_from[r] : span.visible_from;
    const int64_t hidden = smaller(from - span.position, lanes);
    for (int64_t i = 0; i < hidden; ++i) scores[i] = -__builtin_inff();
    const int64_t end = smaller(rows.visible_to[r] - span.position, span.tokens);
    for (int64_t i = end < 0 ? 0 : end; i < lanes; ++i) scores[i] = -__builtin_inff();
    matters[r] = soften(scores, lanes, partial, r, dim);
  }
}

// One block of tiles, packed or raw.
void attend_tiles(AttendScratch& scratch, const Rows& rows, const DeltastoreScoring& scoring, const Span& span,
                  int64_t key_bits, int64_t value_bits, int64_t dim, Partial& partial) {
  Block& block = scratch.block;
  const Query& query = scratch.query;
  if (key_bits != kRawBits) unpack_scales(block);
  switch (key_bits) {
    case 2: score_rows<2>(block, query, rows.count, dim); break;
    case 3: score_rows<3>(block, query, rows.count, dim); break;
    case 4: score_rows<4>(block, query, rows.count, dim); break;
    default: score_rows<kRawBits>(block, query, rows.count, dim);
  }
  bool matters[kMaxRows];
  soften_rows(block, rows, scoring, span, dim, partial, matters);
  switch (value_bits) {
    case 2: sum_rows<2>(block, matters, partial.out, rows.count, dim); break;
    case 3: sum_rows<3>(block, matters, partial.out, rows.count, dim); break;
    case 4: sum_rows<4>(block, matters, partial.out, rows.count, dim); break;
    default: sum_rows<kRawBits>(block, matters, partial.out, rows.count, dim);
  }
}

// One arranged block of float tokens.
void attend_dense(AttendScratch& scratch, const Rows& rows, const DeltastoreScoring& scoring, const uint8_t* dense,
                  const Span& span, int64_t dim, Partial& partial) {
  Block& block = scratch.block;
  block.count = kBlockTiles;
  bool matters[kMaxRows];
  score_dense(block, scratch.query, dense, rows.count, dim);
  soften_rows(block, rows, scoring, span, dim, partial, matters);
  sum_dense(block, dense + dense_side_bytes(dim), rows.count, span.tokens, dim, partial.out);
}

// One block of raw tiles: arranged first where that pays.
void attend_raw(AttendScratch& scratch, const Rows& rows, const DeltastoreScoring& scoring, const Span& span,
                int64_t dim, Partial& partial) {
  Block& block = scratch.block;
  if (rows.count < kFewestArrangedRows) {
    attend_tiles(scratch, rows, scoring, span, kRawBits, kRawBits, dim, partial);
    return;
  }
  RawTileRows keys{{}, dim, span.tokens}, values{{}, dim, span.tokens};
  for (int64_t t = 0; t < block.count; ++t) {
    keys.tiles[t] = block.tiles[t].key;
    values.tiles[t] = block.tiles[t].value;
  }
  for (int64_t t = 0; block.fetches && t < block.count; ++t) {
    for (int64_t token = 0; token < kTileTokens; ++token) fetch_raw(block.ahead[t], token, dim);
  }
  arrange_keys(keys, dim, block.dense);
  arrange_values(values, dim, block.dense + dense_side_bytes(dim));
  attend_dense(scratch, rows, scoring, block.dense, span, dim, partial);
}

// Where one KV head's tiles lie in pages of one layout.
class HeadTiles {
 public:
  HeadTiles(const PageLayout& layout, const uint8_t* pages, int64_t head)
      : first_(tile_in_page(layout, pages, head, 0)),
        page_bytes_(layout.page_bytes()),
        key_bytes_(layout.key_codes_bytes()),
        value_bytes_(layout.value_codes_bytes()),
        scales_bytes_(layout.scales_bytes()),
        anchors_bytes_(layout.anchors_bytes()) {}

  Tile at(int64_t page, int64_t tile) const {
    const int64_t begin = page * page_bytes_;
    return {{first_.key + begin + tile * key_bytes_, first_.value + begin + tile * value_bytes_,
             first_.scales + begin + tile * scales_bytes_, first_.anchors + begin + tile * anchors_bytes_},
            kTileTokens};
  }

 private:
  TileBytes first_;
  int64_t page_bytes_, key_bytes_, value_bytes_, scales_bytes_, anchors_bytes_;
};

// Walks through the tiles of one request and KV head, of which kMixed says whether some may be coarse.
template <bool kMixed>
class TileWalk {
 public:
  TileWalk(const DeltastoreContext& context, const Blocks& blocks, int64_t tile)
      : finer_(context.pages.layout, context.pages.first, blocks.kv_head),
        coarse_(kMixed ? HeadTiles(context.pages.coarse_layout, context.pages.end, blocks.kv_head) : finer_),
        table_(context.page_table + blocks.request * context.table_stride),
        tiles_(context.pages.layout.tiles()),
        left_(blocks.end_tile - tile),
        page_(tile / tiles_),
        tile_(tile % tiles_) {}

  // Whether the next tile is coarse, if there is a next tile.
  bool is_coarse() const { return kMixed && table_[page_] < 0; }

  // How many tiles from the next one on, at most so many, which there are, are like it.
  int64_t alike(int64_t most) const {
    if (!kMixed) return most;
    int64_t count = tiles_ - tile_;
    for (int64_t page = page_ + 1; count < most && (table_[page] < 0) == is_coarse(); ++page) count += tiles_;
    return smaller(count, most);
  }

  // The next tile; after the last one, that again.
  Tile next() {
    if (left_ > 0) {
      now_ = (is_coarse() ? coarse_ : finer_).at(table_[page_], tile_);
      --left_;
      if (++tile_ == tiles_) {
        tile_ = 0;
        ++page_;
      }
    }
    return now_;
  }

 private:
  const HeadTiles finer_, coarse_;
  const int64_t* table_;
  const int64_t tiles_;
  int64_t left_, page_, tile_;
  Tile now_{};
};

// The next `count` tiles, and which to fetch meanwhile.
template <bool kMixed>
void advance(Block& block, TileWalk<kMixed>& walk, TileWalk<kMixed>& ahead, int64_t count) {
  block.count = count;
  block.fetches = true;
  for (int64_t i = 0; i < count; ++i) {
    block.tiles[i] = walk.next();
    block.ahead[i] = ahead.next();
    __builtin_prefetch(block.ahead[i].scales);
    __builtin_prefetch(block.ahead[i].anchors);
  }
}

// One raw tile outside the pages: the request's frame, or its sinks.
void locate(Block& block, const uint16_t* key_rot, const uint16_t* value_rot, int64_t tokens) {
  block.count = 1;
  block.fetches = false;
  block.tiles[0] = {
      {reinterpret_cast<const uint8_t*>(key_rot), reinterpret_cast<const uint8_t*>(value_rot), nullptr, nullptr},
      tokens};
}

// What attend_segment was asked for.
struct Segment {
  const DeltastoreContext& context;
  const DeltastoreScoring& scoring;
  const Rows& rows;
  const Blocks& blocks;
  int64_t first, end;
};

// The segment's new tokens, sinks and frame.
void attend_floats(const Segment& segment, AttendScratch& scratch, Partial& partial) {
  const DeltastoreContext& context = segment.context;
  const Blocks& blocks = segment.blocks;
  const PageLayout& layout = context.pages.layout;
  const int64_t dim = layout.head_dim;
  const int64_t new_blocks = blocks.new_end - blocks.new_first;
#ifdef __AMX_BF16__
  const TileShapes shapes(Operands::kSplit, segment.rows.count, dim, true);
#endif
  for (int64_t i = segment.first; i < smaller(segment.end, new_blocks); ++i) {
    const NewTokens& fresh = blocks.fresh;
    const int64_t block = blocks.new_first + i, token = block * kBlockTokens;
    attend_dense(scratch, segment.rows, segment.scoring, fresh.blocks + block * dense_block_bytes(dim),
                 {fresh.position + token, smaller(fresh.tokens - token, kBlockTokens)}, dim, partial);
  }
  const auto attend_outside = [&](int64_t block, const uint16_t* key_rot, const uint16_t* value_rot, int64_t slot,
                                  int64_t slot_tokens, const Span& span) {
    if (block < segment.first || block >= segment.end) return;
    const int64_t offset = (slot * layout.kv_heads + blocks.kv_head) * slot_tokens * dim;
    locate(scratch.block, key_rot + offset, value_rot + offset, span.tokens);
    attend_raw(scratch, segment.rows, segment.scoring, span, dim, partial);
  };
  const int64_t request = blocks.request;
  if (blocks.with_sinks) {
    attend_outside(new_blocks, context.sink_key_rot, context.sink_value_rot, context.sink_ids[request],
                   context.sink_tokens, {0, context.sink_tokens});
  }
  if (blocks.with_frame) {
    attend_outside(new_blocks + (blocks.with_sinks ? 1 : 0), context.frame_key_rot, context.frame_value_rot,
                   context.frame_ids[request], kTileTokens,
                   {context.packed_tokens[request], context.frame_tokens[request]});
  }
}

// The segment's packed or raw tiles.
template <bool kMixed>
void attend_all_tiles(const Segment& segment, AttendScratch& scratch, Partial& partial) {
  const auto& pages = segment.context.pages;
  const Blocks& blocks = segment.blocks;
  const Rows& rows = segment.rows;
  const int64_t dim = pages.layout.head_dim, before = blocks.before_tiles();
  int64_t tile = blocks.first_tile + (segment.first > before ? segment.first - before : 0) * kBlockTiles;
  const int64_t end_tile = smaller(blocks.first_tile + (segment.end - before) * kBlockTiles, blocks.end_tile);
#ifdef __AMX_BF16__
  const TileShapes shapes(pages.layout.is_raw() ? Operands::kSplit : Operands::kInt8, rows.count, dim,
                          pages.layout.is_raw() ? rows.count >= kFewestArrangedRows : takes_products(rows.count, dim));
#endif
  TileWalk<kMixed> walk(segment.context, blocks, tile);
  TileWalk<kMixed> ahead(segment.context, blocks, smaller(tile + kAheadTiles, blocks.end_tile - 1));
  for (; tile < end_tile; tile += scratch.block.count) {
    const PageLayout& layout = walk.is_coarse() ? pages.coarse_layout : pages.layout;
    advance(scratch.block, walk, ahead, walk.alike(smaller(kBlockTiles, end_tile - tile)));
    scratch.block.value_bits = layout.value_bits;
    const Span span{tile * kTileTokens, scratch.block.count * kTileTokens, blocks.sink_tokens};
    if (layout.is_raw()) {
      attend_raw(scratch, rows, segment.scoring, span, dim, partial);
    } else {
      attend_tiles(scratch, rows, segment.scoring, span, layout.key_bits, layout.value_bits, dim, partial);
    }
  }
}

}  // namespace

void attend_segment(const DeltastoreContext& context, const DeltastoreScoring& scoring, const Rows& rows,
                    const Blocks& blocks, int64_t first, int64_t end, void* scratch_bytes, Partial* partial) {
  auto& scratch = *static_cast<AttendScratch*>(scratch_bytes);
  const PageLayout& layout = context.pages.layout;
  const int64_t dim = layout.head_dim;
  const bool has_floats = first < blocks.before_tiles();
  const bool has_tiles = end > blocks.before_tiles();
  prepare(scratch.query, rows, dim, scoring, has_tiles && !layout.is_raw(), has_floats || layout.is_raw());
  for (int64_t r = 0; r < rows.count; ++r) {
    partial->largest[r] = -1e30f;  // finite, so that a difference of two is no NaN
    partial->sum[r] = scratch.query.poison[r];
  }
  for (int64_t i = 0; i < round_up(rows.count, kDenseRows) * dim; ++i) partial->out[i] = 0;
  const Segment segment{context, scoring, rows, blocks, first, end};
  if (has_floats) attend_floats(segment, scratch, *partial);
  if (!has_tiles) return;
  if (context.pages.coarse_count > 0) {
    attend_all_tiles<true>(segment, scratch, *partial);
  } else {
    attend_all_tiles<false>(segment, scratch, *partial);
  }
}

void arrange_block(const float* key_rot, const float* value_rot, int64_t stride, int64_t tokens, int64_t head_dim,
                   uint8_t* block) {
  arrange_keys(FloatRows{key_rot, stride, tokens}, head_dim, block);
  arrange_values(FloatRows{value_rot, stride, tokens}, head_dim, block + dense_side_bytes(head_dim));
}

}  // namespace deltastore::DELTASTORE_ISA
