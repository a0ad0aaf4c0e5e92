// attend_decode for a whole batch: which thread attends to which part, and merging the parts.
//
// Work is counted in blocks of tiles, over all (request, KV head) items in order. Each thread gets
// an equal run of that sequence, so one long request is shared by all threads and many short ones
// are dealt out whole; an item cut by a run's end is merged from its parts in order. The cut
// depends on the batch and the number of threads alone, and so does every bit of the result.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace deltastore {
namespace {

// Fewer than this many blocks are not worth waking a thread for.
constexpr int64_t kBlocksPerThread = 8;

struct Item {
  Segment whole;
  int64_t first_block;  // in the sequence of all items' blocks
  int64_t blocks;
};

struct Work {
  std::vector<Item> items;
  int64_t blocks = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The whole of one request's context that a query at its last token sees, for one KV head.
Segment visible_part(const DeltastoreContext& context, int64_t window_left, int64_t request) {
  const int64_t packed = context.packed_tokens[request], in_frame = context.frame_tokens[request];
  const int64_t position = packed + in_frame - 1;
  Segment segment{};
  segment.request = request;
  if (window_left >= 0 && position > window_left) segment.visible_from = position - window_left;
  segment.end_tile = packed / kTileTokens;
  segment.first_tile = std::min(segment.visible_from / kTileTokens, segment.end_tile);
  segment.with_frame = in_frame > 0;
  return segment;
}

Work plan(const DeltastoreContext& context, int64_t window_left, int64_t query_heads) {
  const int64_t group = query_heads / context.layout.kv_heads;
  Work work;
  for (int64_t request = 0; request < context.batch; ++request) {
    Segment segment = visible_part(context, window_left, request);
    const int64_t tiles = segment.end_tile - segment.first_tile;
    const int64_t blocks = std::max<int64_t>(1, ceil_div(tiles, kBlockTiles));
    for (segment.kv_head = 0; segment.kv_head < context.layout.kv_heads; ++segment.kv_head) {
      for (int64_t first = 0; first < group; first += kMaxGroup) {
        segment.first_head = segment.kv_head * group + first;
        segment.heads = std::min(kMaxGroup, group - first);
        work.items.push_back({segment, work.blocks, blocks});
        work.blocks += blocks;
      }
    }
  }
  return work;
}

// Blocks begin .. end - 1 (counted within the item) of an item.
Segment cut(const Item& item, int64_t begin, int64_t end) {
  Segment segment = item.whole;
  segment.first_tile = item.whole.first_tile + begin * kBlockTiles;
  segment.end_tile = std::min(item.whole.first_tile + end * kBlockTiles, item.whole.end_tile);
  segment.with_frame = item.whole.with_frame && end == item.blocks;
  return segment;
}

// A run has at most two cut items: one that began in an earlier run, and one that goes on after it.
size_t part_index(int64_t run, int64_t from) { return static_cast<size_t>(2 * run + (from > 0 ? 0 : 1)); }

struct Output {
  float* out_rot;  // [B, Hq, D]
  float* lse;      // [B, Hq]
};

// Write an item's result from its parts.
void finish(const Item& item, const Partial* const* parts, int64_t count, int64_t query_heads, int64_t dim,
            Output output) {
  const int64_t first_row = item.whole.request * query_heads + item.whole.first_head;
  for (int64_t h = 0; h < item.whole.heads; ++h) {
    float largest = parts[0]->largest[h];
    for (int64_t p = 1; p < count; ++p) largest = std::max(largest, parts[p]->largest[h]);
    float* row = output.out_rot + (first_row + h) * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] = 0;
    float sum = 0;
    for (int64_t p = 0; p < count; ++p) {
      const float share = std::exp2(parts[p]->largest[h] - largest);
      sum += parts[p]->sum[h] * share;
      for (int64_t d = 0; d < dim; ++d) row[d] += parts[p]->out[h * dim + d] * share;
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;  // a request without tokens gets zeros
    for (int64_t d = 0; d < dim; ++d) row[d] *= inverse;
    output.lse[first_row + h] = static_cast<float>((largest + std::log2(static_cast<double>(sum))) * 0.6931471805599453);
  }
}

}  // namespace

void attend_decode(const Kernels& kernels, const DeltastoreContext& context, const DeltastoreScoring& scoring,
                   const float* query_rot, int64_t query_heads, float* out_rot, float* lse, int64_t threads) {
  const Work work = plan(context, scoring.window_left, query_heads);
  const int64_t dim = context.layout.head_dim;
  const Output output{out_rot, lse};
  threads = std::max<int64_t>(1, std::min(threads, work.blocks / kBlocksPerThread));
  std::vector<Partial> cut_parts(static_cast<size_t>(threads > 1 ? 2 * threads : 0));

  for_each_run(threads, [&](int64_t run) {
    const int64_t begin = work.blocks * run / threads, end = work.blocks * (run + 1) / threads;
    Partial uncut;
    for (const Item& item : work.items) {
      const int64_t from = std::max(begin - item.first_block, int64_t{0});
      const int64_t to = std::min(end - item.first_block, item.blocks);
      if (from >= to) continue;
      const bool is_cut = from > 0 || to < item.blocks;
      Partial* partial = is_cut ? &cut_parts[part_index(run, from)] : &uncut;
      const int64_t row = item.whole.request * query_heads + item.whole.first_head;
      kernels.attend_segment(context, scoring, query_rot + row * dim, cut(item, from, to), partial);
      if (!is_cut) finish(item, &partial, 1, query_heads, dim, output);
    }
  });

  for (const Item& item : work.items) {
    std::vector<const Partial*> parts;
    for (int64_t run = 0; run < threads; ++run) {
      const int64_t from = std::max(work.blocks * run / threads - item.first_block, int64_t{0});
      const int64_t to = std::min(work.blocks * (run + 1) / threads - item.first_block, item.blocks);
      if (from < to && (from > 0 || to < item.blocks)) parts.push_back(&cut_parts[part_index(run, from)]);
    }
    if (!parts.empty()) finish(item, parts.data(), static_cast<int64_t>(parts.size()), query_heads, dim, output);
  }
}

}  // namespace deltastore
