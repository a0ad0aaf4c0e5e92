// attend_decode over one segment: online softmax in base 2 over blocks of tiles (Milakov and
// Gimelshein, arXiv:1805.02867; Dao, arXiv:2205.14135), then the frame.
//
// Over packed tiles both products are integer: the query is rounded to int8 (one scale per head),
// probability * value scale to uint8 (one scale per head and block). The rounding error of a weight
// is carried into the same lane of the block's next tile: small weights then lose no mass on
// average, where plain rounding would drop all below 1/510 of the block's largest. Over raw tiles
// and frames everything is float32.
#include "attend_block.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// Scores come out in base 2, unless a soft cap still has to see them first.
void prepare(Query& query, const float* query_rot, int64_t heads, const PageLayout& layout,
             const DeltastoreScoring& scoring) {
  const int64_t dim = layout.head_dim;
  const float scale = static_cast<float>(scoring.scale) * (scoring.soft_cap != 0 ? 1.0f : kLog2E);
  for (int64_t h = 0; h < heads; ++h) {
    const float* row = query_rot + h * dim;
    float largest = 0, poison = 0;
    for (int64_t d = 0; d < dim; ++d) {
      query.rows[h * dim + d] = row[d] * scale;
      const float size = row[d] < 0 ? -row[d] : row[d];
      largest = size > largest ? size : largest;
      poison += 0 * row[d];  // NaN if any element is infinite or NaN; then so shall the result be
    }
    const float inverse = largest > 1e-30f && poison == 0 ? 127 / largest : 0;
    int8_t rounded[kMaxHeadDim];
    int32_t sum = 0;
    for (int64_t d = 0; d < dim && inverse > 0; ++d) {
      const float x = row[d] * inverse;
      rounded[d] = static_cast<int8_t>(static_cast<int>(x + (x < 0 ? -0.5f : 0.5f)));
      sum += rounded[d];
    }
    for (int64_t d = 0; d < dim && !(inverse > 0); ++d) rounded[d] = 0;
    make_query_quads(query.quads + h * (dim / 4), rounded, dim / 4);
    const double unit = layout.is_raw() ? 0 : level_unit(layout.key_bits);
    query.unit[h] = largest / 127 * scale * static_cast<float>(unit) + poison;
    query.start[h] = -kKeyOffset * sum;
  }
}

void cap_scores(float* scores, int64_t lanes, float soft_cap) {
  // cap * tanh(x / cap) = cap * (1 - 2 / (exp(2 x / cap) + 1)), then to base 2
  const F32 inner = splat(2 * kLog2E / soft_cap), outer = splat(soft_cap * kLog2E), one = splat(1.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 grown = exp2(mul(load(scores + i), inner));
    store(scores + i, mul(outer, sub(one, div(splat(2.0f), add(grown, one)))));
  }
}

// Scores of one head -> probabilities relative to 2**largest, in place; rescales what came before.
void soften(Block& block, Partial& partial, int64_t head, int64_t head_dim) {
  float* scores = block.scores + head * kBlockTokens;
  const int64_t lanes = block.count * kTileTokens;
  F32 most = splat(partial.largest[head]);
  for (int64_t i = 0; i < lanes; i += 16) most = max(load(scores + i), most);
  const float largest = reduce_max(most);
  if (largest > partial.largest[head]) {
    alignas(64) float shrink[16];
    store(shrink, exp2(splat(partial.largest[head] - largest)));
    partial.sum[head] *= shrink[0];
    float* row = partial.out + head * head_dim;
    for (int64_t d = 0; d < head_dim; d += 16) store(row + d, mul(load(row + d), splat(shrink[0])));
    partial.largest[head] = largest;
  }
  F32 sum = splat(0.0f);
  for (int64_t i = 0; i < lanes; i += 16) {
    const F32 weight = exp2(sub(load(scores + i), splat(partial.largest[head])));
    sum = add(sum, weight);
    store(scores + i, weight);
  }
  partial.sum[head] += reduce_add(sum);
}

// probability * value scale of one head -> uint8 weights, error carried along each lane.
void round_weights(Block& block, int64_t head, float level) {
  const float* probabilities = block.scores + head * kBlockTokens;
  F32 products[kBlockTiles];
  F32 most = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    products[t] = mul(load(probabilities + 16 * t), load(block.value_scale + 16 * t));
    most = max(products[t], most);
  }
  const float largest = reduce_max(most);
  const F32 inverse = splat(largest > 1e-30f ? 255 / largest : 0);
  block.weight_unit[head] = largest / 255 * level;
  F32 carried = splat(0.0f);
  for (int64_t t = 0; t < block.count; ++t) {
    const F32 wanted = fma(products[t], inverse, carried);
    const F32 rounded = max(min(round(wanted), splat(255.0f)), splat(0.0f));
    carried = sub(wanted, rounded);
    store_weight_quads(block.weights + (head * kBlockTokens + t * kTileTokens) / 4, rounded);
  }
}

void hide(float* scores, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) scores[i] = -__builtin_inff();
}

template <int kBits, int kHeads>
void score(Block& block, const Query& query, int64_t head, int64_t dim) {
  if constexpr (kBits == kRawBits) {
    score_raw<kHeads>(block, query, head, dim);
  } else {
    score_codes<kBits, kHeads>(block, query, head, dim);
  }
}

template <int kBits>
void score_heads(Block& block, const Query& query, int64_t heads, int64_t dim) {
  for (int64_t h = 0; h < heads; h += kHeadsPerPass) {
    switch (smaller(heads - h, kHeadsPerPass)) {
      case 1: score<kBits, 1>(block, query, h, dim); break;
      case 2: score<kBits, 2>(block, query, h, dim); break;
      case 3: score<kBits, 3>(block, query, h, dim); break;
      default: score<kBits, 4>(block, query, h, dim);
    }
  }
}

template <int kBits, int kHeads>
void sum(const Block& block, float* out, int64_t head, int64_t dim) {
  if constexpr (kBits == kRawBits) {
    sum_raw<kHeads>(block, out, head, dim);
  } else {
    sum_codes<kBits, kHeads>(block, out, head, dim);
  }
}

template <int kBits>
void sum_heads(const Block& block, float* out, int64_t heads, int64_t dim) {
  for (int64_t h = 0; h < heads; h += kHeadsPerPass) {
    switch (smaller(heads - h, kHeadsPerPass)) {
      case 1: sum<kBits, 1>(block, out, h, dim); break;
      case 2: sum<kBits, 2>(block, out, h, dim); break;
      case 3: sum<kBits, 3>(block, out, h, dim); break;
      default: sum<kBits, 4>(block, out, h, dim);
    }
  }
}

// `first` .. `end` of the block's lanes are the tokens that count.
void attend_block(Block& block, const Query& query, Partial& partial, int64_t heads, int64_t first,
                  int64_t end, int64_t key_bits, int64_t value_bits, const DeltastoreContext& context,
                  const DeltastoreScoring& scoring) {
  const int64_t dim = context.layout.head_dim;
  if (key_bits != kRawBits) unpack_scales(block);
  switch (key_bits) {
    case 2: score_heads<2>(block, query, heads, dim); break;
    case 3: score_heads<3>(block, query, heads, dim); break;
    case 4: score_heads<4>(block, query, heads, dim); break;
    default: score_heads<kRawBits>(block, query, heads, dim);
  }
  for (int64_t h = 0; h < heads; ++h) {
    if (scoring.soft_cap != 0) {
      cap_scores(block.scores + h * kBlockTokens, block.count * kTileTokens, static_cast<float>(scoring.soft_cap));
    }
    hide(block.scores + h * kBlockTokens, 0, first);
    hide(block.scores + h * kBlockTokens, end, block.count * kTileTokens);
    soften(block, partial, h, dim);
    if (key_bits != kRawBits) round_weights(block, h, static_cast<float>(level_unit(value_bits)));
  }
  switch (value_bits) {
    case 2: sum_heads<2>(block, partial.out, heads, dim); break;
    case 3: sum_heads<3>(block, partial.out, heads, dim); break;
    case 4: sum_heads<4>(block, partial.out, heads, dim); break;
    default: sum_heads<kRawBits>(block, partial.out, heads, dim);
  }
}

// Tile `tile` of the segment's request, for its KV head.
Tile locate(const DeltastoreContext& context, const Segment& segment, int64_t tile) {
  const PageLayout& layout = context.layout;
  const int64_t* table = context.page_table + segment.request * context.table_stride;
  const uint8_t* page = context.pages + table[tile / layout.tiles()] * layout.page_bytes();
  const int64_t place = segment.kv_head * layout.tiles() + tile % layout.tiles();
  return {page + layout.key_codes_offset() + place * layout.key_codes_bytes(),
          page + layout.value_codes_offset() + place * layout.value_codes_bytes(),
          page + layout.scales_offset() + place * layout.scales_bytes(),
          page + layout.anchors_offset() + place * layout.anchors_bytes(), kTileTokens};
}

// The block that begins at `tile`, and where the block after it lies.
void locate_block(Block& block, const DeltastoreContext& context, const Segment& segment, int64_t tile) {
  block.value_bits = context.layout.value_bits;
  block.count = smaller(kBlockTiles, segment.end_tile - tile);
  for (int64_t i = 0; i < block.count; ++i) {
    block.tiles[i] = tile == segment.first_tile ? locate(context, segment, tile + i) : block.next[i];
  }
  for (int64_t i = 0; i < kBlockTiles; ++i) {
    const int64_t next = smaller(tile + kBlockTiles + i, segment.end_tile - 1);
    block.next[i] = locate(context, segment, next);
    __builtin_prefetch(block.next[i].scales);
    __builtin_prefetch(block.next[i].anchors);
  }
}

void locate_frame(Block& block, const DeltastoreContext& context, const Segment& segment) {
  const PageLayout& layout = context.layout;
  const int64_t row = context.frame_ids[segment.request] * layout.kv_heads + segment.kv_head;
  const int64_t offset = row * kTileTokens * layout.head_dim;
  block.count = 1;
  block.tiles[0] = {reinterpret_cast<const uint8_t*>(context.frame_key_rot + offset),
                    reinterpret_cast<const uint8_t*>(context.frame_value_rot + offset), nullptr, nullptr,
                    context.frame_tokens[segment.request]};
}

void attend_segment(const DeltastoreContext& context, const DeltastoreScoring& scoring, const float* query_rot,
                    const Segment& segment, Partial* partial) {
  const PageLayout& layout = context.layout;
  Query query;
  Block block;
  prepare(query, query_rot, segment.heads, layout, scoring);
  for (int64_t h = 0; h < segment.heads; ++h) {
    partial->largest[h] = -1e30f;  // finite, so that a difference of two is no NaN
    partial->sum[h] = 0;
  }
  for (int64_t i = 0; i < segment.heads * layout.head_dim; ++i) partial->out[i] = 0;

  for (int64_t tile = segment.first_tile; tile < segment.end_tile; tile += kBlockTiles) {
    locate_block(block, context, segment, tile);
    attend_block(block, query, *partial, segment.heads, segment.visible_from - tile * kTileTokens,
                 block.count * kTileTokens, layout.key_bits, layout.value_bits, context, scoring);
  }
  if (segment.with_frame) {
    locate_frame(block, context, segment);
    attend_block(block, query, *partial, segment.heads,
                 segment.visible_from - context.packed_tokens[segment.request], block.tiles[0].tokens, kRawBits,
                 kRawBits, context, scoring);
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {DELTASTORE_ISA_NAME, attend_segment};

}  // namespace deltastore::DELTASTORE_ISA
