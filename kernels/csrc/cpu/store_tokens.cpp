// store_tokens: whole tiles first, which read the frames, then what goes to frames and sinks.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace deltastore {
namespace {

// Fewer are not worth waking a thread for.
constexpr int64_t kTilesPerThread = 8;
constexpr int64_t kRestNumbersPerThread = 1 << 16;

struct Side {
  const FloatMatrix* rows;
  uint16_t* frames;  // [frames, H, 16, D]
  uint16_t* sinks;   // [sinks, H, S, D]
};

// One head's raw tile [16, D]: lanes from the new tokens' rows, or from the frame.
void gather(const Kernels& kernels, const Side& side, const int64_t* sources, int64_t frame, int64_t head,
            const PageLayout& layout, uint16_t* tile) {
  const uint16_t* waiting = side.frames + (frame * layout.kv_heads + head) * kTileTokens * layout.head_dim;
  for (int64_t lane = 0; lane < kTileTokens; ++lane) {
    const int64_t row = sources[lane] * layout.kv_heads + head, at = lane * layout.head_dim;
    if (sources[lane] >= 0) {
      kernels.raw_rows(*side.rows, row, row + 1, tile + at);
    } else {
      std::memcpy(tile + at, waiting + at, sizeof(uint16_t) * layout.head_dim);
    }
  }
}

void put_tile(const Kernels& kernels, const StoreCall& call, const Side* sides, int64_t index, int64_t head) {
  const DeltastoreLayerStore& store = *call.store;
  const DeltastoreTokenWrites& writes = *call.writes;
  const int64_t page = writes.page_ids[index];
  const PageLayout& layout = store.pages.layout_of(page);
  const int64_t dim = layout.head_dim;
  alignas(64) uint16_t tiles[2][kTileTokens * kMaxHeadDim];
  for (int side = 0; side < 2; ++side) {
    gather(kernels, sides[side], writes.tile_sources + index * kTileTokens, writes.tile_frames[index], head, layout,
           tiles[side]);
  }
  const TileTarget target = tile_in_page(layout, store.pages.page(page), head, writes.tile_ids[index]);
  if (layout.is_raw()) {
    std::memcpy(target.key, tiles[0], layout.key_codes_bytes());
    std::memcpy(target.value, tiles[1], layout.value_codes_bytes());
    return;
  }
  kernels.encode_tile(layout, tiles[0], tiles[1], true, dim, dim,
                      store.key_shaping ? store.key_shaping + head * dim * dim : nullptr, target);
}

}  // namespace

void store_tokens(const Kernels& kernels, const StoreCall& call) {
  const DeltastoreLayerStore& store = *call.store;
  const DeltastoreTokenWrites& writes = *call.writes;
  const PageLayout& layout = store.pages.layout;
  const Side sides[2] = {{call.key_rot, store.frame_key_rot, store.sink_key_rot},
                         {call.value_rot, store.frame_value_rot, store.sink_value_rot}};
  const int64_t tiles = writes.tiles * layout.kv_heads;
  const int64_t tile_runs = std::max<int64_t>(1, std::min(call.threads, tiles / kTilesPerThread));
  for_each_run(tile_runs, [&](int64_t run) {
    for (int64_t i = tiles * run / tile_runs; i < tiles * (run + 1) / tile_runs; ++i) {
      const int64_t index = i / layout.kv_heads;
      if (writes.page_ids[index] == kNoPage) continue;
      put_tile(kernels, call, sides, index, i % layout.kv_heads);
    }
  });

  const int64_t numbers = writes.rests * layout.kv_heads * layout.head_dim;
  const int64_t rest_runs = std::max<int64_t>(1, std::min(call.threads, numbers / kRestNumbersPerThread));
  for_each_run(rest_runs, [&](int64_t run) {
    for (int64_t i = writes.rests * run / rest_runs; i < writes.rests * (run + 1) / rest_runs; ++i) {
      for (int64_t head = 0; head < layout.kv_heads; ++head) {
        const int64_t row = writes.rest_rows[i] * layout.kv_heads + head;
        const int64_t lane = (writes.rest_frames[i] * layout.kv_heads + head) * kTileTokens + writes.rest_lanes[i];
        for (const Side& side : sides) {
          kernels.raw_rows(*side.rows, row, row + 1, side.frames + lane * layout.head_dim);
        }
      }
    }
  });

  for (int64_t i = 0; i < writes.sinks && store.num_sinks; ++i) {
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      for (int64_t token = 0; token < store.sink_tokens; ++token) {
        const int64_t row = (writes.sink_rows[i] + token) * layout.kv_heads + head;
        const int64_t at = (writes.sink_ids[i] * layout.kv_heads + head) * store.sink_tokens + token;
        for (const Side& side : sides) {
          kernels.raw_rows(*side.rows, row, row + 1, side.sinks + at * layout.head_dim);
        }
      }
    }
  }
}

}  // namespace deltastore
