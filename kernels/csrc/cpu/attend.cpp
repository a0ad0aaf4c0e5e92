// Attention of a whole batch: which thread attends to which part, and merging the parts.
//
// An item is some query rows over one request's context in one KV head; it is a sequence of blocks.
// Work is counted in blocks * rows over all items in order, and each thread gets an equal run of
// it: one long request is shared by all threads, and many short ones are dealt out whole. An item
// cut by a run's end is merged from its parts in order. The cuts depend on the batch and on the
// number of threads alone, and so does every bit of the result.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace deltastore {
namespace {

// Less work than this many blocks of four rows is not worth waking a thread for.
constexpr int64_t kWorkPerThread = 8 * 4;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T, Free>;

template <typename T>
Buffer<T> allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that the calling thread keeps from call to call: fresh pages would cost more than a short call.
char* workspace(int64_t bytes) {
  static thread_local Buffer<char> held;
  static thread_local int64_t held_bytes = 0;
  if (bytes > held_bytes) {
    held_bytes = 0;
    held = allocate<char>(bytes);
    held_bytes = bytes;
  }
  return held.get();
}

struct Item {
  Blocks blocks;
  int64_t first_token;  // of the batch: query token of row 0
  int64_t first_row;    // rows first_row .. + rows - 1 of the request, numbered token * group + head
  int64_t rows;
  int64_t first_position;  // of the request's first query token
  int64_t first_work;      // in the sequence of all items' work
  int64_t work() const { return blocks.count() * rows; }
};

struct Plan {
  std::vector<Item> items;
  int64_t work = 0;
};

// New tokens of all requests and heads as the kernels want them.
struct Arranged {
  Buffer<uint8_t> blocks;
  std::vector<int64_t> first_block;  // [B]: blocks of the requests before, one head's
};

Item item_of(const AttendCall& call, int64_t request, int64_t kv_head, int64_t first_row, int64_t rows) {
  const DeltastoreContext& context = *call.context;
  const int64_t group = call.query_heads / context.pages.layout.kv_heads;
  const int64_t stored = context.packed_tokens[request] + context.frame_tokens[request];
  const int64_t window_left = call.scoring->window_left;
  Item item{};
  item.first_row = first_row;
  item.rows = rows;
  item.first_position = call.new_tokens ? stored : stored - 1;
  // Positions that the item's first row sees from, and its last row.
  const int64_t first = item.first_position + first_row / group;
  const int64_t last = item.first_position + (first_row + rows - 1) / group;
  const int64_t from = window_left < 0 ? 0 : std::max<int64_t>(0, first - window_left);
  Blocks& blocks = item.blocks;
  blocks.request = request;
  blocks.kv_head = kv_head;
  blocks.end_tile = context.packed_tokens[request] / kTileTokens;
  blocks.first_tile = std::min(from / kTileTokens, blocks.end_tile);
  const bool has_sinks = context.num_sinks > 0 && blocks.end_tile > 0 && context.sink_ids[request] >= 0;
  blocks.sink_tokens = has_sinks ? context.sink_tokens : 0;
  blocks.with_sinks = from < blocks.sink_tokens;
  blocks.with_frame = context.frame_tokens[request] > 0 && from < stored;
  if (call.new_tokens) {
    blocks.fresh.tokens = call.new_tokens[request];
    blocks.fresh.position = stored;
    blocks.new_first = std::max<int64_t>(0, from - stored) / kBlockTokens;
    blocks.new_end = (last - stored) / kBlockTokens + 1;
  }
  return item;
}

Plan make_plan(const AttendCall& call, const Arranged& arranged) {
  const DeltastoreContext& context = *call.context;
  const int64_t heads = context.pages.layout.kv_heads, dim = context.pages.layout.head_dim;
  const int64_t group = call.query_heads / heads;
  Plan plan;
  int64_t first_token = 0;
  for (int64_t request = 0; request < context.batch; ++request) {
    const int64_t tokens = call.new_tokens ? call.new_tokens[request] : 1;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = 0; row < tokens * group; row += kMaxRows) {
        Item item = item_of(call, request, head, row, std::min(kMaxRows, tokens * group - row));
        if (call.new_tokens) {
          const int64_t blocks = ceil_div(tokens, kBlockTokens);
          const int64_t first_block = arranged.first_block[request] * heads + head * blocks;
          item.blocks.fresh.blocks = arranged.blocks.get() + first_block * dense_block_bytes(dim);
        }
        item.first_token = first_token;
        item.first_work = plan.work;
        plan.work += item.work();
        plan.items.push_back(item);
      }
    }
    first_token += tokens;
  }
  return plan;
}

Arranged arrange(const Kernels& kernels, const AttendCall& call) {
  Arranged arranged;
  if (!call.new_tokens) return arranged;
  const int64_t heads = call.context->pages.layout.kv_heads, dim = call.context->pages.layout.head_dim;
  struct Piece {
    int64_t token, count, head, block;
  };
  std::vector<Piece> pieces;
  int64_t blocks = 0, first_token = 0;
  for (int64_t request = 0; request < call.context->batch; ++request) {
    const int64_t tokens = call.new_tokens[request], own = ceil_div(tokens, kBlockTokens);
    arranged.first_block.push_back(blocks);
    for (int64_t i = 0; i < heads * own; ++i) {
      const int64_t first = i % own * kBlockTokens;
      pieces.push_back({first_token + first, std::min(kBlockTokens, tokens - first), i / own, blocks * heads + i});
    }
    blocks += own;
    first_token += tokens;
  }
  arranged.blocks = allocate<uint8_t>(blocks * heads * dense_block_bytes(dim));
  const auto count = static_cast<int64_t>(pieces.size());
  const int64_t runs = std::max<int64_t>(1, std::min(call.threads, count / 8));
  for_each_run(runs, [&](int64_t run) {
    for (int64_t i = count * run / runs; i < count * (run + 1) / runs; ++i) {
      const Piece& piece = pieces[i];
      const int64_t row = (piece.token * heads + piece.head) * dim;
      kernels.arrange_block(call.key_rot + row, call.value_rot + row, heads * dim, piece.count, dim,
                            arranged.blocks.get() + piece.block * dense_block_bytes(dim));
    }
  });
  return arranged;
}

// Index of row r's query head in [T, Hq].
int64_t query_row(const AttendCall& call, const Item& item, int64_t r) {
  const int64_t group = call.query_heads / call.context->pages.layout.kv_heads;
  const int64_t row = item.first_row + r;
  return (item.first_token + row / group) * call.query_heads + item.blocks.kv_head * group + row % group;
}

Rows rows_of(const AttendCall& call, const Item& item) {
  const int64_t group = call.query_heads / call.context->pages.layout.kv_heads;
  Rows rows;
  rows.count = item.rows;
  for (int64_t r = 0; r < item.rows; ++r) {
    const int64_t position = item.first_position + (item.first_row + r) / group;
    rows.query_rot[r] = call.query_rot + query_row(call, item, r) * call.context->pages.layout.head_dim;
    rows.visible_from[r] = call.scoring->window_left < 0 ? 0 : position - call.scoring->window_left;
    rows.visible_to[r] = position + 1;
  }
  return rows;
}

// Blocks of an item (first, end) that lie in work begin .. end. An item's block belongs to where its
// work begins.
struct Cut {
  int64_t first, end;
  Cut(const Item& item, int64_t begin_work, int64_t end_work)
      : first(std::max<int64_t>(0, ceil_div(begin_work - item.first_work, item.rows))),
        end(std::min(item.blocks.count(), ceil_div(end_work - item.first_work, item.rows))) {}
  bool empty() const { return first >= end; }
  bool is_whole(const Item& item) const { return first == 0 && end == item.blocks.count(); }
};

// The first item with work at `begin_work` or after it: the last that begins there or before.
std::vector<Item>::const_iterator first_item(const std::vector<Item>& items, int64_t begin_work) {
  const auto after = std::upper_bound(items.begin(), items.end(), begin_work,
                                      [](int64_t work, const Item& item) { return work < item.first_work; });
  return after == items.begin() ? after : after - 1;
}

// A run has at most two cut items: one that began in an earlier run, and one that goes on after it.
int64_t part_index(int64_t run, const Cut& cut) { return 2 * run + (cut.first > 0 ? 0 : 1); }

// A request without tokens: no weight at all.
void finish_empty(const AttendCall& call, const Item& item) {
  const int64_t dim = call.context->pages.layout.head_dim;
  for (int64_t r = 0; r < item.rows; ++r) {
    const int64_t row = query_row(call, item, r);
    std::fill_n(call.out_rot + row * dim, dim, 0.0f);
    call.lse[row] = -HUGE_VALF;
  }
}

// Write an item's result from its parts.
void finish(const AttendCall& call, const Item& item, const Partial* const* parts, size_t count) {
  const int64_t dim = call.context->pages.layout.head_dim;
  for (int64_t r = 0; r < item.rows; ++r) {
    float largest = parts[0]->largest[r];
    for (size_t p = 1; p < count; ++p) largest = std::max(largest, parts[p]->largest[r]);
    const int64_t row = query_row(call, item, r);
    float* out = call.out_rot + row * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = 0;
    float sum = 0;
    for (size_t p = 0; p < count; ++p) {
      const float share = std::exp2(parts[p]->largest[r] - largest);
      sum += parts[p]->sum[r] * share;
      for (int64_t d = 0; d < dim; ++d) out[d] += parts[p]->out[r * dim + d] * share;
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= sum;
    call.lse[row] = static_cast<float>((largest + std::log2(static_cast<double>(sum))) * 0.6931471805599453);
  }
}

}  // namespace

void attend(const Kernels& kernels, const AttendCall& call) {
  const Arranged arranged = arrange(kernels, call);
  const Plan plan = make_plan(call, arranged);
  const int64_t runs = std::max<int64_t>(1, std::min(call.threads, plan.work / kWorkPerThread));
  // For each run: two parts of cut items, one of uncut items, scratch memory.
  auto* const cut_parts =
      reinterpret_cast<Partial*>(workspace(runs * (3 * static_cast<int64_t>(sizeof(Partial)) + kernels.scratch_bytes)));
  Partial* const uncut_parts = cut_parts + 2 * runs;
  char* const scratch = reinterpret_cast<char*>(uncut_parts + runs);
  const auto begin_of = [&](int64_t run) { return plan.work * run / runs; };

  for_each_run(runs, [&](int64_t run) {
    const int64_t begin = begin_of(run), end = begin_of(run + 1);
    for (auto at = first_item(plan.items, begin); at != plan.items.end() && at->first_work < end; ++at) {
      const Item& item = *at;
      const Cut cut(item, begin, end);
      if (cut.empty()) continue;
      Partial* partial = cut.is_whole(item) ? uncut_parts + run : cut_parts + part_index(run, cut);
      kernels.attend_segment(*call.context, *call.scoring, rows_of(call, item), item.blocks, cut.first, cut.end,
                             scratch + run * kernels.scratch_bytes, partial);
      if (cut.is_whole(item)) finish(call, item, &partial, 1);
    }
  });

  // Items come in the order of their work, and so do runs: both are gone through once.
  int64_t first_run = 0;
  std::vector<const Partial*> parts;
  for (const Item& item : plan.items) {
    if (item.blocks.count() == 0) finish_empty(call, item);
    while (first_run + 1 < runs && begin_of(first_run + 1) <= item.first_work) ++first_run;
    const int64_t end_work = item.first_work + item.work();
    parts.clear();
    for (int64_t run = first_run; run < runs && begin_of(run) < end_work; ++run) {
      const Cut cut(item, begin_of(run), begin_of(run + 1));
      if (!cut.empty() && !cut.is_whole(item)) parts.push_back(cut_parts + part_index(run, cut));
    }
    if (!parts.empty()) finish(call, item, parts.data(), parts.size());
  }
}

}  // namespace deltastore
