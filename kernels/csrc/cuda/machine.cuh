// What the kernels need of the machine, in few functions, so that the very same kernels run on CUDA and, compiled by
// g++, on fibers: tests/kernels/cuda/fibers.h has the same functions for one fiber a thread.
//
// A warp is 32 lanes. For fragments, lane = 4 * row + column: `row` 0 .. 7, `column` 0 .. 3 (PTX ISA, "Matrix
// Fragments for mma.m16n8k32" and "mma.m16n8k16": groupID and threadID_in_group).
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include "fibers.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DELTASTORE_DEVICE __device__ __forceinline__
#define DELTASTORE_UNROLL _Pragma("unroll")

namespace deltastore::cuda {

struct alignas(16) Words4 {
  uint32_t word[4];
};

DELTASTORE_DEVICE int thread_in_block() { return threadIdx.x; }
// Volatile: what is derived from it is computed anew after a long loop instead of taking up registers in it.
DELTASTORE_DEVICE int block_index(int axis) {
  int index;
  if (axis == 0) asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  if (axis == 1) asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
  if (axis == 2) asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(index));
  return index;
}
DELTASTORE_DEVICE int grid_size(int axis) { return axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z; }

// Read-only memory that no thread of the kernel writes.
template <typename T>
DELTASTORE_DEVICE T load(const T* address) {
  return __ldg(address);
}
DELTASTORE_DEVICE Words4 load_words4(const void* address) {
  const uint4 words = __ldg(static_cast<const uint4*>(address));
  return {words.x, words.y, words.z, words.w};
}

// Byte i of the result is byte (selectors >> 4 * i & 7) of the eight bytes low, high. Bit 3 of a selector must be 0;
// __byte_perm would spend an instruction on making sure.
DELTASTORE_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
  return bytes;
}
DELTASTORE_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DELTASTORE_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DELTASTORE_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

DELTASTORE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DELTASTORE_DEVICE float exp2_precise(float x) { return exp2f(x); }
DELTASTORE_DEVICE float log2_precise(float x) { return log2f(x); }
DELTASTORE_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
DELTASTORE_DEVICE float divide_precise(float a, float b) { return __fdiv_rn(a, b); }
DELTASTORE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DELTASTORE_DEVICE float smaller(float a, float b) { return fminf(a, b); }
DELTASTORE_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DELTASTORE_DEVICE int round_to_int(float x) { return __float2int_rn(x); }

DELTASTORE_DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DELTASTORE_DEVICE uint16_t half_of_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
DELTASTORE_DEVICE float float_of_bfloat16(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
DELTASTORE_DEVICE uint16_t bfloat16_of_float(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Shared memory, read whenever asked for: the compiler would rather keep words in registers, and spill others.
DELTASTORE_DEVICE Words4 load_shared(const Words4& words) {
  Words4 read;
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(read.word[0]), "=r"(read.word[1]), "=r"(read.word[2]), "=r"(read.word[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&words))));
  return read;
}

DELTASTORE_DEVICE void block_barrier() { __syncthreads(); }
template <typename T>
DELTASTORE_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xFFFFFFFFu, x, lane);
}
template <typename T>
DELTASTORE_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}

// The 8 x 8 matrix of 16-bit elements of which each lane holds [row][2 * column, + 1]; transposed.
DELTASTORE_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// sums[16, 8] += a[16, 32] b[32, 8], int8 times int8: a lane holds, as bytes,
//   a[i]    = a[row + 8 * (i % 2)][4 * column + 16 * (i / 2) + 0 .. 3]
//   b[i]    = b[4 * column + 16 * i + 0 .. 3][row]
//   sums[i] = sums[row + 8 * (i / 2)][2 * column + i % 2]
DELTASTORE_DEVICE void multiply_int8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with uint8 b.
DELTASTORE_DEVICE void multiply_int8_by_uint8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums[16, 8] += a[16, 16] b[16, 8] in float16 with float32 sums; two elements a register:
//   a[i] = a[row + 8 * (i % 2)][2 * column + 8 * (i / 2) + 0, 1], b[i] = b[2 * column + 8 * i + 0, 1][row]
DELTASTORE_DEVICE void multiply_half(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace deltastore::cuda
#endif
