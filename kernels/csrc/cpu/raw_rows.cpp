// Rows of any float type as frames, sinks and raw pages hold them: float16, finite.
#include "isa.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

constexpr float kLargestHalf = 65504.0f;

F32 load_number(const void* numbers, int64_t type, int64_t i) {
  switch (type) {
    case kFloat32: return load(static_cast<const float*>(numbers) + i);
    case kFloat16: return load_f16(static_cast<const uint16_t*>(numbers) + i);
    default: return load_bf16(static_cast<const uint16_t*>(numbers) + i);
  }
}

}  // namespace

void raw_rows(const FloatMatrix& in, int64_t begin, int64_t end, uint16_t* out) {
  const F32 largest = splat(kLargestHalf), least = splat(-kLargestHalf);
  for (int64_t i = begin; i < end; ++i, out += in.head_dim) {
    const int64_t row = i / in.inner * in.outer_stride + i % in.inner * in.inner_stride;
    for (int64_t d = 0; d < in.head_dim; d += 16) {
      store_f16(out + d, max(min(or_zero(load_number(in.data, in.type, row + d)), largest), least));
    }
  }
}

}  // namespace deltastore::DELTASTORE_ISA
