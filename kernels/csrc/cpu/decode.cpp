// decode of many pages: tiles are independent, so threads take equal runs of them.
#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace deltastore {
namespace {

constexpr int64_t kTilesPerThread = 32;  // fewer are not worth waking a thread for

}  // namespace

void decode(const Kernels& kernels, const PageLayout& layout, const uint8_t* pages, const int64_t* page_ids,
            int64_t tokens, float* key_rot, float* value_rot, int64_t head_stride, int64_t threads) {
  const int64_t tiles = tokens / kTileTokens;  // of each head
  const int64_t all = tiles * layout.kv_heads;
  const int64_t runs = std::max<int64_t>(1, std::min(threads, all / kTilesPerThread));
  for_each_run(runs, [&](int64_t run) {
    for (int64_t i = all * run / runs; i < all * (run + 1) / runs; ++i) {
      const int64_t head = i / tiles, tile = i % tiles;
      const uint8_t* page = pages + page_ids[tile / layout.tiles()] * layout.page_bytes();
      const int64_t row = head * head_stride + tile * kTileTokens * layout.head_dim;
      kernels.decode_tile(layout, tile_in_page(layout, page, head, tile % layout.tiles()), key_rot + row,
                          value_rot + row);
    }
  });
}

}  // namespace deltastore
