// Attention of some query rows to a run of one request's blocks: online softmax in base 2 over blocks of tiles (Milakov and
// Gimelshein, arXiv:1805.02867; Dao, arXiv:2205.14135).
//
// Over packed tiles both products are integer: the query is rounded to int8 (one scale per row),
// probability * value scale to uint8 (one scale per row and block). A block with a token that
// matters much (kFineShare) is summed twice, the second time with the remainders of its weights.
// In the other blocks a weight's rounding error is carried into the same lane of the next tile:
// small weights then lose no mass on average, where plain rounding would drop all below 1/510 of
// the block's largest. Over raw tiles, frames and new tokens everything is float32.
#include "attend_block.h"
#include "attend_dense.h"
#include "isa.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// Share of all weight so far that one token must have for its block to be summed with 16-bit weights.
constexpr float kFineShare = 1.0f / 128;

// Scores come out in base 2, unless a soft cap still has to see them first.
void prepare(Query& query, const Rows& rows, const PageLayout& layout, const DeltastoreScoring& scoring) {
  const int64_t dim = layout.head_dim;
  const float scale = static_cast<float>(scoring.scale) * (scoring.soft_cap != 0 ? 1.0f : kLog2E);
  const double level = layout.is_raw() ? 0 : level_unit(layout.key_bits);
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* row = rows.query_rot[r];
    float largest = 0, poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
      query.rows[r * dim + d] = row[d] * scale;
      const float size = row[d] < 0 ? -row[d] : row[d];
      largest = size > largest ? size : largest;
      poison += 0 * row[d];  // NaN if any element is infinite or NaN; then so shall the result be
    }
    const float inverse = largest > 1e-30f && poison == 0 ? 127 / largest : 0;
    int8_t rounded[kMaxHeadDim];
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float x = inverse > 0 ? row[d] * inverse : 0;
      rounded[d] = static_cast<int8_t>(static_cast<int>(x + (x < 0 ? -0.5f : 0.5f)));
      sum += rounded[d];
    }
    make_query_quads(query.quads + r * (dim / 4), rounded, dim / 4);
    query.unit[r] = largest / 127 * scale * static_cast<float>(level);
    query.start[r] = -kKeyOffset * sum;
    query.poison[r] = poison;
  }
  for (int64_t i = rows.count * dim; i < round_up(rows.count, kDenseRows) * dim; ++i) query.rows[i] = 0;
}

void cap_scores(float* scores, int64_t lanes, float soft_cap) {
  // cap * tanh(x / cap) = cap * (1 - 2 / (exp(2 x / cap) + 1)), then to base 2
  const F32 inner = splat(2 * kLog2E / soft_cap), outer = splat(soft_cap * kLog2E), one = splat(1.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 grown = exp2(mul(load(scores + i), inner));
    store(scores + i, mul(outer, sub(one, div(splat(2.0f), add(grown, one)))));
  }
}

// Scores of one row -> probabilities relative to 2**largest, in place; rescales what came before.
// Returns the largest token's share of all weight so far.
float soften(float* scores, int64_t lanes, Partial& partial, int64_t row, int64_t dim) {
  F32 most = splat(partial.largest[row]);
  for (int64_t i = 0; i < lanes; i += 16) most = max(load(scores + i), most);
  const float largest = reduce_max(most);
  if (largest > partial.largest[row]) {
    const float shrink = first_lane(exp2(splat(partial.largest[row] - largest)));
    partial.sum[row] *= shrink;
    float* out = partial.out + row * dim;
    for (int64_t d = 0; d < dim; d += 16) store(out + d, mul(load(out + d), splat(shrink)));
    partial.largest[row] = largest;
  }
  F32 sum = splat(0.0f);
  most = splat(0.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 weight = exp2(sub(load(scores + i), splat(partial.largest[row])));
    sum = add(sum, weight);
    most = max(weight, most);
    store(scores + i, weight);
  }
  partial.sum[row] += reduce_add(sum);
  return reduce_max(most) / partial.sum[row];
}

// probability * value scale of one row -> uint8 weights, and in a fine block their remainders.
void round_weights(Block& block, int64_t row, float level, bool fine) {
  const float* probabilities = block.scores + row * kBlockTokens;
  F32 products[kBlockTiles];
  F32 most = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    products[t] = mul(load(probabilities + 16 * t), load(block.value_scale + 16 * t));
    most = max(products[t], most);
  }
  const float largest = reduce_max(most);
  const F32 inverse = splat(largest > 1e-30f ? 255 / largest : 0);
  const F32 least = splat(0.0f), greatest = splat(255.0f), half = splat(0.5f);
  block.weight_unit[row] = largest / 255 * level;
  F32 carried = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t quad = (row * kBlockTokens + t * kTileTokens) / 4;
    const F32 wanted = fma(products[t], inverse, carried);
    const F32 rounded = max(min(round(fine ? sub(wanted, half) : wanted), greatest), least);
    const F32 rest = sub(wanted, rounded);
    store_weight_quads(block.weights + quad, rounded);
    if (fine) {
      store_weight_quads(block.remainders + quad, round(mul(max(min(rest, splat(1.0f)), least), greatest)));
    } else {
      carried = rest;
    }
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
  for (int64_t r = 0, pass; r < rows; r += pass) {
    pass = rows_of_pass(rows - r);
    switch (pass) {
      case 1: score<kBits, 1>(block, query, r, dim); break;
      case 2: score<kBits, 2>(block, query, r, dim); break;
      case 3: score<kBits, 3>(block, query, r, dim); break;
      case 4: score<kBits, 4>(block, query, r, dim); break;
      default: score<kBits, kRowsPerPass>(block, query, r, dim);
    }
  }
}

template <int kBits, int kRows>
void sum(Block& block, const float* shares, float* out, int64_t row, int64_t dim) {
  if constexpr (kBits == kRawBits) {
    sum_raw<kRows>(block, out, row, dim);
  } else {
    bool fine = false;
    for (int r = 0; r < kRows; ++r) fine |= shares[row + r] > kFineShare;
    const auto level = static_cast<float>(level_unit(kBits));
    for (int r = 0; r < kRows; ++r) round_weights(block, row + r, level, fine);
    sum_codes<kBits, kRows>(block, block.weights, 1.0f, out, row, dim);
    if (fine) sum_codes<kBits, kRows>(block, block.remainders, 1.0f / 255, out, row, dim);
  }
}

template <int kBits>
void sum_rows(Block& block, const float* shares, float* out, int64_t rows, int64_t dim) {
  for (int64_t r = 0, pass; r < rows; r += pass) {
    pass = rows_of_pass(rows - r);
    switch (pass) {
      case 1: sum<kBits, 1>(block, shares, out, r, dim); break;
      case 2: sum<kBits, 2>(block, shares, out, r, dim); break;
      case 3: sum<kBits, 3>(block, shares, out, r, dim); break;
      case 4: sum<kBits, 4>(block, shares, out, r, dim); break;
      default: sum<kBits, kRowsPerPass>(block, shares, out, r, dim);
    }
  }
}

// The block's scores -> probabilities. Its tokens are positions position .. + tokens - 1.
void soften_rows(Block& block, const Rows& rows, const DeltastoreScoring& scoring, int64_t position, int64_t tokens,
                 int64_t dim, Partial& partial, float* shares) {
  const int64_t lanes = block.count * kTileTokens;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* scores = block.scores + r * kBlockTokens;
    if (scoring.soft_cap != 0) cap_scores(scores, lanes, static_cast<float>(scoring.soft_cap));
    const int64_t hidden = smaller(rows.visible_from[r] - position, lanes);
    for (int64_t i = 0; i < hidden; ++i) scores[i] = -__builtin_inff();
    const int64_t end = smaller(rows.visible_to[r] - position, tokens);
    for (int64_t i = end < 0 ? 0 : end; i < lanes; ++i) scores[i] = -__builtin_inff();
    shares[r] = soften(scores, lanes, partial, r, dim);
  }
}

// One block of tiles, packed or raw.
void attend_tiles(AttendScratch& scratch, const Rows& rows, const DeltastoreScoring& scoring, int64_t position,
                  int64_t tokens, int64_t key_bits, int64_t value_bits, int64_t dim, Partial& partial) {
  Block& block = scratch.block;
  const Query& query = scratch.query;
  if (key_bits != kRawBits) unpack_scales(block);
  switch (key_bits) {
    case 2: score_rows<2>(block, query, rows.count, dim); break;
    case 3: score_rows<3>(block, query, rows.count, dim); break;
    case 4: score_rows<4>(block, query, rows.count, dim); break;
    default: score_rows<kRawBits>(block, query, rows.count, dim);
  }
  float shares[kMaxRows];
  soften_rows(block, rows, scoring, position, tokens, dim, partial, shares);
  switch (value_bits) {
    case 2: sum_rows<2>(block, shares, partial.out, rows.count, dim); break;
    case 3: sum_rows<3>(block, shares, partial.out, rows.count, dim); break;
    case 4: sum_rows<4>(block, shares, partial.out, rows.count, dim); break;
    default: sum_rows<kRawBits>(block, shares, partial.out, rows.count, dim);
  }
}

// Block `index` of the new tokens.
void attend_new(AttendScratch& scratch, const Rows& rows, const DeltastoreScoring& scoring, const NewTokens& fresh,
                int64_t index, int64_t dim, Partial& partial) {
  Block& block = scratch.block;
  block.count = kBlockTiles;
  const int64_t first = index * kBlockTokens, tokens = smaller(fresh.tokens - first, kBlockTokens);
  const float* key_t = fresh.key_t + first * dim;
  const float* value = fresh.value + first * dim;
  float shares[kMaxRows];
  multiply<false>(scratch.query.rows, dim, key_t, kBlockTokens, rows.count, dim, kBlockTokens, block.scores,
                  kBlockTokens);
  soften_rows(block, rows, scoring, fresh.position + first, tokens, dim, partial, shares);
  multiply<true>(block.scores, kBlockTokens, value, dim, rows.count, tokens, dim, partial.out, dim);
}

// Tile `tile` of the request, for its KV head.
Tile locate(const DeltastoreContext& context, const Blocks& blocks, int64_t tile) {
  const PageLayout& layout = context.layout;
  const int64_t* table = context.page_table + blocks.request * context.table_stride;
  const uint8_t* page = context.pages + table[tile / layout.tiles()] * layout.page_bytes();
  return {tile_in_page(layout, page, blocks.kv_head, tile % layout.tiles()), kTileTokens};
}

// The block that begins at `tile`, and where the block after it lies.
void locate_block(Block& block, const DeltastoreContext& context, const Blocks& blocks, int64_t tile) {
  block.value_bits = context.layout.value_bits;
  block.count = smaller(kBlockTiles, blocks.end_tile - tile);
  for (int64_t i = 0; i < block.count; ++i) block.tiles[i] = locate(context, blocks, tile + i);
  for (int64_t i = 0; i < kBlockTiles; ++i) {
    block.next[i] = locate(context, blocks, smaller(tile + kBlockTiles + i, blocks.end_tile - 1));
    __builtin_prefetch(block.next[i].scales);
    __builtin_prefetch(block.next[i].anchors);
  }
}

void locate_frame(Block& block, const DeltastoreContext& context, const Blocks& blocks) {
  const PageLayout& layout = context.layout;
  const int64_t row = context.frame_ids[blocks.request] * layout.kv_heads + blocks.kv_head;
  const int64_t offset = row * kTileTokens * layout.head_dim;
  block.count = 1;
  block.tiles[0] = {{reinterpret_cast<const uint8_t*>(context.frame_key_rot + offset),
                     reinterpret_cast<const uint8_t*>(context.frame_value_rot + offset), nullptr, nullptr},
                    context.frame_tokens[blocks.request]};
}

}  // namespace

void attend_segment(const DeltastoreContext& context, const DeltastoreScoring& scoring, const Rows& rows,
                    const Blocks& blocks, int64_t first, int64_t end, void* scratch_bytes, Partial* partial) {
  auto& scratch = *static_cast<AttendScratch*>(scratch_bytes);
  const PageLayout& layout = context.layout;
  const int64_t dim = layout.head_dim;
  prepare(scratch.query, rows, layout, scoring);
  for (int64_t r = 0; r < rows.count; ++r) {
    partial->largest[r] = -1e30f;  // finite, so that a difference of two is no NaN
    partial->sum[r] = scratch.query.poison[r];
  }
  for (int64_t i = 0; i < round_up(rows.count, kDenseRows) * dim; ++i) partial->out[i] = 0;

  const int64_t new_blocks = blocks.new_end - blocks.new_first;
  for (int64_t i = first; i < end; ++i) {
    if (i < new_blocks) {
      attend_new(scratch, rows, scoring, blocks.fresh, blocks.new_first + i, dim, *partial);
    } else if (i < blocks.before_tiles()) {
      locate_frame(scratch.block, context, blocks);
      attend_tiles(scratch, rows, scoring, context.packed_tokens[blocks.request],
                   context.frame_tokens[blocks.request], kRawBits, kRawBits, dim, *partial);
    } else {
      const int64_t tile = blocks.first_tile + (i - blocks.before_tiles()) * kBlockTiles;
      locate_block(scratch.block, context, blocks, tile);
      attend_tiles(scratch, rows, scoring, tile * kTileTokens, scratch.block.count * kTileTokens, layout.key_bits,
                   layout.value_bits, dim, *partial);
    }
  }
}

}  // namespace deltastore::DELTASTORE_ISA
