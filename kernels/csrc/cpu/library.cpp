// The exported functions: which instruction set, argument checks, and the calls.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../include/deltastore/codec.h"
#include "dispatch.h"

namespace deltastore {

// DELTASTORE_ISAS(X): X(namespace) for each instruction set that setup.py compiled, best first.
#define DELTASTORE_DECLARE(isa) \
  namespace isa {               \
  extern const Kernels kernels; \
  }
DELTASTORE_ISAS(DELTASTORE_DECLARE)
#undef DELTASTORE_DECLARE

namespace {

thread_local char message[512];

const char* refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  return message;
}

#if defined(__x86_64__) && defined(__linux__)
// AMX, and the kernel's leave to use its registers (they are large, so a process has to ask).
bool has_matrix_unit() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(__x86_64__)
bool has_matrix_unit() { return false; }
#endif

bool cpu_has(const char* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(isa, "amx")) return avx512 && has_matrix_unit();
  if (!std::strcmp(isa, "avx512_vnni")) return avx512;
  if (!std::strcmp(isa, "avx2")) return avx2;
#endif
  return !std::strcmp(isa, "portable");
}

const Kernels* const* available() {
  static const Kernels* found[8] = {};
  static const bool once = [] {
    int count = 0;
#define DELTASTORE_ADD(isa) \
  if (cpu_has(isa::kernels.name)) found[count++] = &isa::kernels;
    DELTASTORE_ISAS(DELTASTORE_ADD)
#undef DELTASTORE_ADD
    return true;
  }();
  (void)once;
  return found;
}

const char* names() {
  static char joined[128];
  if (!joined[0]) {
    for (const Kernels* const* k = available(); *k; ++k) {
      if (joined[0]) std::strcat(joined, " ");
      std::strcat(joined, (*k)->name);
    }
  }
  return joined;
}

const Kernels* find(const char* name) {
  for (const Kernels* const* k = available(); *k; ++k) {
    if (!std::strcmp((*k)->name, name)) return *k;
  }
  refuse("DELTASTORE_CPU=%s: this CPU and this build have %s", name, names());
  return nullptr;
}

const Kernels*& in_use() {
  static const Kernels* kernels = [] {
    const char* asked = std::getenv("DELTASTORE_CPU");
    return asked && *asked ? find(asked) : *available();
  }();
  return kernels;
}

// Whether request b reads nothing but what is there.
const char* check_request(const DeltastoreContext& context, int64_t b, int64_t window_left) {
  const int64_t packed = context.packed_tokens[b], in_frame = context.frame_tokens[b];
  if (packed < 0 || packed % kTileTokens || in_frame < 0 || in_frame >= kTileTokens) {
    return refuse("request %lld: %lld packed tokens and %lld in its frame; allowed are multiples of 16 and 0 .. 15",
                  (long long)b, (long long)packed, (long long)in_frame);
  }
  if (context.num_sinks && context.sink_ids[b] >= context.num_sinks) {
    return refuse("request %lld: sink %lld of %lld", (long long)b, (long long)context.sink_ids[b],
                  (long long)context.num_sinks);
  }
  const int64_t frame = context.frame_ids[b];
  if (in_frame && (frame < 0 || frame >= context.num_frames)) {
    return refuse("request %lld: frame %lld of %lld", (long long)b, (long long)frame, (long long)context.num_frames);
  }
  const int64_t page_tokens = context.pages.layout.page_tokens, pages = (packed + page_tokens - 1) / page_tokens;
  if (pages > context.table_stride) {
    return refuse("request %lld: %lld packed tokens, but its row of the page table ends after %lld pages", (long long)b,
                  (long long)packed, (long long)context.table_stride);
  }
  const int64_t hidden = window_left < 0 ? 0 : packed + in_frame - 1 - window_left;
  for (int64_t i = hidden > 0 ? hidden / page_tokens : 0; i < pages; ++i) {
    const int64_t page = context.page_table[b * context.table_stride + i];
    if (!context.pages.has(page)) {
      return refuse("request %lld: page %lld of %lld", (long long)b, (long long)page, (long long)context.pages.count);
    }
  }
  return nullptr;
}

const char* check_requests(const DeltastoreContext& context, int64_t window_left) {
  for (int64_t b = 0; b < context.batch; ++b) {
    if (const char* refused = check_request(context, b, window_left)) return refused;
  }
  return nullptr;
}

const char* check_call(const DeltastoreContext& context, int64_t query_heads, int64_t window_left) {
  const PageLayout& layout = context.pages.layout;
  if (layout.head_dim > kMaxHeadDim || layout.head_dim % 32 || query_heads % layout.kv_heads) {
    return refuse("head_dim=%lld, %lld query heads, %lld KV heads: no such kernel", (long long)layout.head_dim,
                  (long long)query_heads, (long long)layout.kv_heads);
  }
  return context.is_checked ? nullptr : check_requests(context, window_left);
}

const char* check_pages(const PageLayout& layout, int64_t num_pages, const int64_t* page_ids, int64_t tokens) {
  for (int64_t i = 0; i < (tokens + layout.page_tokens - 1) / layout.page_tokens; ++i) {
    if (page_ids[i] < 0 || page_ids[i] >= num_pages) {
      return refuse("page %lld of %lld", (long long)page_ids[i], (long long)num_pages);
    }
  }
  return nullptr;
}

const char* check_writes(const DeltastoreLayerStore& store, const DeltastoreTokenWrites& writes, int64_t tokens) {
  const PageLayout& layout = store.pages.layout;
  if (layout.head_dim > kMaxHeadDim || layout.head_dim % 32) {
    return refuse("store_tokens: head_dim=%lld: no such kernel", (long long)layout.head_dim);
  }
  for (int64_t i = 0; i < writes.tiles; ++i) {
    const int64_t page = writes.page_ids[i], tile = writes.tile_ids[i], frame = writes.tile_frames[i];
    if ((page != kNoPage && !store.pages.has(page)) || tile < 0 || tile >= layout.tiles()) {
      return refuse("tile %lld of page %lld; there are %lld tiles in each of %lld pages", (long long)tile,
                    (long long)page, (long long)layout.tiles(), (long long)store.pages.count);
    }
    for (int64_t lane = 0; lane < kTileTokens; ++lane) {
      const int64_t source = writes.tile_sources[i * kTileTokens + lane];
      if (source >= tokens || (source < 0 && (frame < 0 || frame >= store.num_frames))) {
        return refuse("a tile takes row %lld of %lld, or frame %lld of %lld", (long long)source, (long long)tokens,
                      (long long)frame, (long long)store.num_frames);
      }
    }
  }
  for (int64_t i = 0; i < writes.rests; ++i) {
    const int64_t row = writes.rest_rows[i], frame = writes.rest_frames[i], lane = writes.rest_lanes[i];
    if (row < 0 || row >= tokens || frame < 0 || frame >= store.num_frames || lane < 0 || lane >= kTileTokens) {
      return refuse("row %lld of %lld to lane %lld of frame %lld of %lld", (long long)row, (long long)tokens,
                    (long long)lane, (long long)frame, (long long)store.num_frames);
    }
  }
  for (int64_t i = 0; i < writes.sinks && store.num_sinks; ++i) {
    const int64_t row = writes.sink_rows[i], sink = writes.sink_ids[i];
    if (row < 0 || row + store.sink_tokens > tokens || sink < 0 || sink >= store.num_sinks) {
      return refuse("row %lld of %lld to sink %lld of %lld", (long long)row, (long long)tokens, (long long)sink,
                    (long long)store.num_sinks);
    }
  }
  return nullptr;
}

// No exception crosses into C.
template <typename Function>
const char* guarded(const Function& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) { return refuse("%s", error.what()); }
}

}  // namespace
}  // namespace deltastore

using namespace deltastore;

extern "C" {

int64_t deltastore_abi_version() { return DELTASTORE_ABI_VERSION; }

const char* deltastore_isa() { return in_use() ? in_use()->name : nullptr; }

const char* deltastore_isas() { return names(); }

const char* deltastore_use_isa(const char* name) {
  const Kernels* kernels = find(name);
  if (!kernels) return message;
  in_use() = kernels;
  return nullptr;
}

const char* deltastore_last_error() { return message; }

void deltastore_page_layout(const PageLayout* layout, int64_t sizes[10]) {
  const int64_t all[10] = {layout->tiles(),
                           layout->key_codes_offset(),
                           layout->key_codes_bytes(),
                           layout->value_codes_offset(),
                           layout->value_codes_bytes(),
                           layout->scales_offset(),
                           layout->scales_bytes(),
                           layout->anchors_offset(),
                           layout->anchors_bytes(),
                           layout->page_bytes()};
  std::memcpy(sizes, all, sizeof(all));
}

void deltastore_codec(int64_t bits, int8_t* levels, double* unit, float* anchors, float* factors) {
  const int8_t* grid = bits == 2 ? Codebook<2>::levels : bits == 3 ? Codebook<3>::levels : Codebook<4>::levels;
  std::memcpy(levels, grid, size_t{1} << bits);
  *unit = level_unit(bits);
  std::memcpy(anchors, kScaleTables.anchors, sizeof(kScaleTables.anchors));
  std::memcpy(factors, kScaleTables.factors, sizeof(kScaleTables.factors));
}

const char* deltastore_check_context(const DeltastoreContext* context) { return check_requests(*context, -1); }

const char* deltastore_attend_decode(const DeltastoreContext* context, const DeltastoreScoring* scoring,
                                     const float* query_rot, int64_t query_heads, float* out_rot, float* lse,
                                     int64_t threads) {
  if (!in_use()) return message;
  if (const char* refused = check_call(*context, query_heads, scoring->window_left)) return refused;
  const AttendCall call{context, scoring, query_rot, query_heads, nullptr, nullptr, nullptr, out_rot, lse, threads};
  return guarded([&] { attend(*in_use(), call); });
}

const char* deltastore_attend_extend(const DeltastoreContext* context, const DeltastoreScoring* scoring,
                                     const float* query_rot, int64_t query_heads, const float* key_rot,
                                     const float* value_rot, const int64_t* new_tokens, float* out_rot, float* lse,
                                     int64_t threads) {
  if (!in_use()) return message;
  if (const char* refused = check_call(*context, query_heads, scoring->window_left)) return refused;
  const AttendCall call{context, scoring,   query_rot, query_heads, new_tokens,
                        key_rot, value_rot, out_rot,   lse,         threads};
  return guarded([&] { attend(*in_use(), call); });
}

const char* deltastore_decode(const PageLayout* layout, const uint8_t* pages, int64_t num_pages,
                              const int64_t* page_ids, int64_t tokens, float* key_rot, float* value_rot,
                              int64_t head_stride, int64_t threads) {
  if (!in_use()) return message;
  if (const char* refused = check_pages(*layout, num_pages, page_ids, tokens)) return refused;
  return guarded(
      [&] { decode(*in_use(), *layout, pages, page_ids, tokens, key_rot, value_rot, head_stride, threads); });
}

const char* deltastore_encode(const PageLayout* layout, uint8_t* pages, int64_t num_pages, const int64_t* page_ids,
                              const int64_t* tile_ids, int64_t tiles, const DeltastoreTileRows* key_rot,
                              const DeltastoreTileRows* value_rot, int64_t is_half, const float* key_shaping,
                              int64_t threads) {
  if (!in_use()) return message;
  if (layout->is_raw()) return refuse("encode: raw pages take a copy, not this");
  for (int64_t i = 0; i < tiles; ++i) {
    if (page_ids[i] < kNoPage || page_ids[i] >= num_pages || tile_ids[i] < 0 || tile_ids[i] >= layout->tiles()) {
      return refuse("tile %lld of page %lld; there are %lld tiles in each of %lld pages", (long long)tile_ids[i],
                    (long long)page_ids[i], (long long)layout->tiles(), (long long)num_pages);
    }
  }
  const EncodeCall call{pages, page_ids, tile_ids, tiles, *key_rot, *value_rot, is_half != 0, key_shaping, threads};
  return guarded([&] { encode(*in_use(), *layout, call); });
}

const char* deltastore_store_tokens(const DeltastoreLayerStore* store, const DeltastoreTokenWrites* writes,
                                    const DeltastoreFloats* key_rot, const DeltastoreFloats* value_rot,
                                    int64_t threads) {
  if (!in_use()) return message;
  if (const char* refused = check_writes(*store, *writes, key_rot->outer)) return refused;
  const StoreCall call{store, writes, key_rot, value_rot, threads};
  return guarded([&] { store_tokens(*in_use(), call); });
}

const char* deltastore_rotate(const void* data, int64_t type, int64_t outer, int64_t inner, int64_t head_dim,
                              int64_t outer_stride, int64_t inner_stride, void* out, int64_t threads) {
  if (!in_use()) return message;
  if (head_dim <= 0 || head_dim % 32 || head_dim > kMaxHeadDim) {
    return refuse("rotate: head_dim=%lld; allowed are multiples of 32 up to %lld", (long long)head_dim,
                  (long long)kMaxHeadDim);
  }
  const DeltastoreFloats in{data, type, outer, inner, head_dim, outer_stride, inner_stride};
  return guarded([&] { rotate(*in_use(), in, out, threads); });
}

uint64_t deltastore_read_bytes(const uint8_t* data, int64_t bytes, int64_t threads) {
  return in_use() ? read_bytes(*in_use(), data, bytes, threads) : 0;
}

}  // extern "C"
