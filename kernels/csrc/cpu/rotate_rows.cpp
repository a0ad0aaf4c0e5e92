// rotate: the orthonormal Walsh-Hadamard transform of rows, by butterflies: at distances of 16 lanes and
// more between registers, below that within them. A row that is no power of two long is transformed in
// blocks that are, the largest first.
#include "isa.h"
#include "simd.h"

namespace deltastore::DELTASTORE_ISA {
namespace {

struct Float32 {
  using Number = float;
  static F32 load(const float* p) { return DELTASTORE_ISA::load(p); }
  static void store(float* p, const F32& x) { DELTASTORE_ISA::store(p, x); }
};
struct Float16 {
  using Number = uint16_t;
  static F32 load(const uint16_t* p) { return load_f16(p); }
  static void store(uint16_t* p, const F32& x) { store_f16(p, x); }
};
struct BFloat16 {
  using Number = uint16_t;
  static F32 load(const uint16_t* p) { return load_bf16(p); }
  static void store(uint16_t* p, const F32& x) { store_bf16(p, x); }
};

template <int kVectors, typename Type>
void rotate_row(const typename Type::Number* x, typename Type::Number* out, F32 scale) {
  F32 v[kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) {
    v[i] = mul(Type::load(x + 16 * i), scale);
    v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
  }
#pragma GCC unroll 5
  for (int distance = 1; distance < kVectors; distance *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < kVectors; ++i) {
      if (i & distance) continue;
      const F32 a = v[i], b = v[i + distance];
      v[i] = add(a, b);
      v[i + distance] = sub(a, b);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) Type::store(out + 16 * i, v[i]);
}

// The block of 16 * kVectors numbers from `first` on of every row.
template <int kVectors, typename Type>
void rotate_block(const FloatMatrix& in, int64_t begin, int64_t end, int64_t first, char* out) {
  using Number = typename Type::Number;
  const F32 scale = splat(kVectors == 2    ? 0.17677669529663687f
                          : kVectors == 4  ? 0.125f
                          : kVectors == 8  ? 0.08838834764831845f
                          : kVectors == 16 ? 0.0625f
                                           : 0.04419417382415922f);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t offset = i / in.inner * in.outer_stride + i % in.inner * in.inner_stride;
    rotate_row<kVectors, Type>(static_cast<const Number*>(in.data) + offset + first,
                               reinterpret_cast<Number*>(out) + i * in.head_dim + first, scale);
  }
}

template <typename Type>
void rotate_type(const FloatMatrix& in, int64_t begin, int64_t end, char* out) {
  int64_t first = 0;
  for (int64_t block = kMaxHeadDim; block >= 32; block /= 2) {
    if (!(in.head_dim & block)) continue;
    switch (block) {
      case 32: rotate_block<2, Type>(in, begin, end, first, out); break;
      case 64: rotate_block<4, Type>(in, begin, end, first, out); break;
      case 128: rotate_block<8, Type>(in, begin, end, first, out); break;
      case 256: rotate_block<16, Type>(in, begin, end, first, out); break;
      default: rotate_block<32, Type>(in, begin, end, first, out);
    }
    first += block;
  }
}

}  // namespace

void rotate_rows(const FloatMatrix& in, int64_t begin, int64_t end, void* out) {
  auto* bytes = static_cast<char*>(out);
  switch (in.type) {
    case kFloat32: rotate_type<Float32>(in, begin, end, bytes); break;
    case kFloat16: rotate_type<Float16>(in, begin, end, bytes); break;
    default: rotate_type<BFloat16>(in, begin, end, bytes);
  }
}

}  // namespace deltastore::DELTASTORE_ISA
