// The CUDA kernels of one format and head_dim on fibers, for ctypes. Built by fiber_case.py.
#include "attend_decode.cuh"
#include "decode_context.cuh"

namespace {

using namespace deltastore::cuda;
using deltastore::PageLayout;

constexpr int kKeyBits = DELTASTORE_KEY_BITS, kValueBits = DELTASTORE_VALUE_BITS, kHeadDim = DELTASTORE_HEAD_DIM;

std::string error;

std::vector<fibers::Readable> ranges(const int64_t* pointers, const int64_t* bytes, int64_t count) {
  std::vector<fibers::Readable> result;
  for (int64_t i = 0; i < count; ++i) {
    const char* begin = reinterpret_cast<const char*>(pointers[i]);
    result.push_back({begin, begin + bytes[i]});
  }
  return result;
}

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// In the order of fiber_case.py: POINTERS and NUMBERS.
Context context_of(const int64_t* pointers, const int64_t* numbers) {
  Context context{};
  context.layout = fields_of(PageLayout{kKeyBits, kValueBits, numbers[0], kHeadDim, numbers[1]});
  context.table_stride = numbers[2];
  context.sink_tokens = static_cast<int32_t>(numbers[3]);
  context.pages = pointer<uint8_t>(pointers[0]);
  context.page_table = pointer<int32_t>(pointers[1]);
  context.packed_tokens = pointer<int32_t>(pointers[2]);
  context.frame_key_rot = pointer<uint16_t>(pointers[3]);
  context.frame_value_rot = pointer<uint16_t>(pointers[4]);
  context.frame_ids = pointer<int32_t>(pointers[5]);
  context.frame_tokens = pointer<int32_t>(pointers[6]);
  context.sink_key_rot = pointer<uint16_t>(pointers[7]);
  context.sink_value_rot = pointer<uint16_t>(pointers[8]);
  context.sink_ids = pointer<int32_t>(pointers[9]);
  return context;
}

}  // namespace

// query_rot [B, Hq, D] of query_type, partials as AttendParams says. Returns "" or an error.
extern "C" const char* attend_decode_on_fibers(const int64_t* pointers, const int64_t* bytes, int64_t pointer_count,
                                               const int64_t* numbers, double scale, double soft_cap, int64_t seed) {
  AttendParams params{};
  params.context = context_of(pointers, numbers);
  params.query_rot = pointer<void>(pointers[10]);
  params.partial_out = pointer<float>(pointers[11]);
  params.partial_log2 = pointer<float>(pointers[12]);
  params.query_type = static_cast<int32_t>(numbers[4]);
  params.group = static_cast<int32_t>(numbers[5]);
  params.window_left = static_cast<int32_t>(numbers[6]);
  params.scale = static_cast<float>(scale);
  params.soft_cap = static_cast<float>(soft_cap);
  const int batch = static_cast<int>(numbers[7]), splits = static_cast<int>(numbers[8]);
  const int kv_heads = static_cast<int>(numbers[0]), chunks = (params.group + kHeads - 1) / kHeads;
  static Shared<kHeadDim> shared;
  const auto poison = [] { memset(&shared, 0xFF, sizeof(shared)); };
  const auto readable = ranges(pointers, bytes, pointer_count);
  const auto attend = [&] { attend_decode<kKeyBits, kValueBits>(params, shared); };
  error = fibers::run(splits, kv_heads * chunks, batch, kThreads, seed, readable, poison, attend);
  return error.c_str();
}

// requests, positions [rows] int32 -> key_rot, value_rot [rows, H, D] of out_type.
extern "C" const char* decode_context_on_fibers(const int64_t* pointers, const int64_t* bytes, int64_t pointer_count,
                                                const int64_t* numbers) {
  DecodeParams params{};
  params.context = context_of(pointers, numbers);
  params.requests = pointer<int32_t>(pointers[10]);
  params.positions = pointer<int32_t>(pointers[11]);
  params.key_rot = pointer<void>(pointers[12]);
  params.value_rot = pointer<void>(pointers[13]);
  params.out_type = static_cast<int32_t>(numbers[4]);
  const int rows = static_cast<int>(numbers[5]), kv_heads = static_cast<int>(numbers[0]);
  error = fibers::run(
      rows, kv_heads, 1, kHeadDim, 0, ranges(pointers, bytes, pointer_count), [] {},
      [&] { decode_context<kKeyBits, kValueBits, kHeadDim>(params); });
  return error.c_str();
}
