// decode, encode and rotate: their tiles and rows are independent, so threads take equal runs of them.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace deltastore {
namespace {

// Fewer are not worth waking a thread for.
constexpr int64_t kDecodedTilesPerThread = 32;
constexpr int64_t kEncodedTilesPerThread = 8;
constexpr int64_t kRotatedNumbersPerThread = 1 << 16;

}  // namespace

void decode(const Kernels& kernels, const PageLayout& layout, const uint8_t* pages, const int64_t* page_ids,
            int64_t tokens, float* key_rot, float* value_rot, int64_t head_stride, int64_t threads) {
  const int64_t tiles = tokens / kTileTokens;  // of each head
  const int64_t all = tiles * layout.kv_heads;
  const int64_t runs = std::max<int64_t>(1, std::min(threads, all / kDecodedTilesPerThread));
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

void encode(const Kernels& kernels, const PageLayout& layout, const EncodeCall& call) {
  const int64_t all = call.tiles * layout.kv_heads;
  const int64_t runs = std::max<int64_t>(1, std::min(call.threads, all / kEncodedTilesPerThread));
  const int64_t element_bytes = call.is_half ? 2 : 4;
  for_each_run(runs, [&](int64_t run) {
    for (int64_t i = all * run / runs; i < all * (run + 1) / runs; ++i) {
      const int64_t tile = i / layout.kv_heads, head = i % layout.kv_heads;
      if (call.page_ids[tile] == kNoPage) continue;
      const auto rows = [&](const TileRows& side) {
        return side.data + (tile * side.tile_stride + head * side.head_stride) * element_bytes;
      };
      uint8_t* page = call.pages + call.page_ids[tile] * layout.page_bytes();
      kernels.encode_tile(layout, rows(call.key_rot), rows(call.value_rot), call.is_half, call.key_rot.token_stride,
                          call.value_rot.token_stride,
                          call.key_shaping ? call.key_shaping + head * layout.head_dim * layout.head_dim : nullptr,
                          tile_in_page(layout, page, head, call.tile_ids[tile]));
    }
  });
}

void rotate(const Kernels& kernels, const FloatMatrix& in, void* out, int64_t threads) {
  const int64_t rows = in.outer * in.inner;
  const int64_t runs = std::max<int64_t>(1, std::min(threads, rows * in.head_dim / kRotatedNumbersPerThread));
  for_each_run(runs, [&](int64_t run) { kernels.rotate_rows(in, rows * run / runs, rows * (run + 1) / runs, out); });
}

uint64_t read_bytes(const Kernels& kernels, const uint8_t* data, int64_t bytes, int64_t threads) {
  std::vector<uint64_t> parity(static_cast<size_t>(threads));
  for_each_run(threads, [&](int64_t run) {
    const int64_t begin = bytes / threads * run;
    parity[run] = kernels.read_bytes(data + begin, bytes / threads);
  });
  uint64_t all = 0;
  for (uint64_t one : parity) all ^= one;
  return all;
}

}  // namespace deltastore
