// The kernels of one format and head_dim: DELTASTORE_KEY_BITS, DELTASTORE_VALUE_BITS (16: raw), DELTASTORE_HEAD_DIM.
#pragma once

#include "attend_decode.cuh"
#include "decode_context.cuh"

namespace deltastore::cuda {

constexpr int kKeyBits = DELTASTORE_KEY_BITS, kValueBits = DELTASTORE_VALUE_BITS, kHeadDim = DELTASTORE_HEAD_DIM;
// The most that need no register spilled (benchmarks/gpu/static_report.py).
constexpr bool kFewRegisters = kValueBits == 2 || kKeyBits == kRawBits;
constexpr int kBlocksOfMultiprocessor = kHeadDim == 64 ? 4 : kHeadDim == 128 && kFewRegisters ? 3 : 2;

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksOfMultiprocessor)
    deltastore_attend_decode(const __grid_constant__ AttendParams params) {
  __shared__ Shared<kHeadDim> shared;
  attend_decode<kKeyBits, kValueBits, kHeadDim>(params, shared);
}

extern "C" __global__ void __launch_bounds__(kHeadDim)
    deltastore_decode_context(const __grid_constant__ DecodeParams params) {
  decode_context<kKeyBits, kValueBits, kHeadDim>(params);
}

}  // namespace deltastore::cuda
