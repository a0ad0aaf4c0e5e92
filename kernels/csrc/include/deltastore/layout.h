// The byte layout of a KV page, as deltastore_kernels/layout.py defines it. That file explains it;
// this one only repeats the arithmetic, and tests/kernels/test_cpu_layout.py compares the two.
#pragma once

#include <cstdint>

namespace deltastore {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPageAlignBytes = 16;
constexpr int64_t kRawBits = 16;
constexpr int64_t kMaxHeadDim = 512;  // a multiple of 32, as every head_dim
constexpr int64_t kNoPage = -1;

constexpr double kScaleStepLog2 = 0.375;
constexpr int kScaleNibbles = 16;
constexpr int kAnchorsPerOctave = 8;
constexpr int kAnchorBias = 160;

struct PageLayout {
  int64_t key_bits;
  int64_t value_bits;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t page_tokens;

  constexpr bool is_raw() const { return key_bits == kRawBits; }
  constexpr int64_t tiles() const { return page_tokens / kTileTokens; }

  // Bytes of each field for one tile of one head.
  constexpr int64_t key_codes_bytes() const { return kTileTokens * head_dim * key_bits / 8; }
  constexpr int64_t value_codes_bytes() const { return kTileTokens * head_dim * value_bits / 8; }
  constexpr int64_t scales_bytes() const { return is_raw() ? 0 : kTileTokens; }
  constexpr int64_t anchors_bytes() const { return is_raw() ? 0 : 2; }

  // Where each field, [heads, tiles, bytes], begins in the page.
  constexpr int64_t key_codes_offset() const { return 0; }
  constexpr int64_t value_codes_offset() const { return kv_heads * tiles() * key_codes_bytes(); }
  constexpr int64_t scales_offset() const { return value_codes_offset() + kv_heads * tiles() * value_codes_bytes(); }
  constexpr int64_t anchors_offset() const { return scales_offset() + kv_heads * tiles() * scales_bytes(); }
  constexpr int64_t page_bytes() const {
    const int64_t used = anchors_offset() + kv_heads * tiles() * anchors_bytes();
    return (used + kPageAlignBytes - 1) / kPageAlignBytes * kPageAlignBytes;
  }
};

// A code of b bits is stored in planes, most significant first: 2 = 2, 3 = 2 + 1, 4 = 4 bits.
// The 1-bit plane of 3-bit codes follows the 2-bit plane of the same tile.
constexpr int64_t low_plane_offset(int64_t head_dim) { return kTileTokens * head_dim * 2 / 8; }

// layout.py: PageLayout(Format(4, 2), num_kv_heads=8, head_dim=128, page_tokens=64) and others.
constexpr PageLayout kK4V2{4, 2, 8, 128, 64};
static_assert(kK4V2.value_codes_offset() == 32768 && kK4V2.scales_offset() == 49152);
static_assert(kK4V2.anchors_offset() == 49664 && kK4V2.page_bytes() == 49728);
static_assert(PageLayout{3, 2, 3, 64, 16}.page_bytes() == 1984, "1974 bytes, padded");
static_assert(PageLayout{16, 16, 3, 64, 16}.page_bytes() == 12288, "2 bytes a value, nothing else");

// Where pages lie (context.py: LayerStore): finer ones from `first` on, by numbers from 0; coarser ones before `end`,
// by numbers below 0. As many of each as are counted here are there.
template <typename Byte>
struct PagesOf {
  PageLayout layout, coarse_layout;
  Byte* first;
  Byte* end;  // null where no page is coarse
  int64_t count, coarse_count;

  constexpr bool has(int64_t page) const { return page < count && page >= -coarse_count; }
  constexpr const PageLayout& layout_of(int64_t page) const { return page < 0 ? coarse_layout : layout; }
  constexpr Byte* page(int64_t page) const {
    return page < 0 ? end + page * coarse_layout.page_bytes() : first + page * layout.page_bytes();
  }
};

}  // namespace deltastore
