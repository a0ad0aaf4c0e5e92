// What Python calls: tensors in, kernels launched on the tensors' stream, nothing waited for. Built by FlashInfer's
// JIT with its helpers; deltastore_kernels/cuda_build.py. Shapes are checked by the callers (ops/*/cuda.py).
#include "kernels.cuh"
#include "tvm_ffi_utils.h"

namespace deltastore::cuda {
namespace {

template <typename T>
T* data(const TensorView& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

int32_t float_type(const TensorView& tensor) {
  const int64_t code = encode_dlpack_dtype(tensor.dtype());
  TVM_FFI_ICHECK(code == float32_code || code == float16_code || code == bfloat16_code)
      << "float32, float16 or bfloat16 are allowed";
  return code == float32_code ? kFloat32 : code == float16_code ? kFloat16 : kBfloat16;
}

void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  TVM_FFI_ICHECK(status == cudaSuccess) << kernel << ": " << cudaGetErrorString(status);
}

// Sinks without slots: empty tensors, sink_tokens 0.
Context context_of(TensorView pages, TensorView page_table, TensorView packed_tokens, TensorView frame_key_rot,
                   TensorView frame_value_rot, TensorView frame_ids, TensorView frame_tokens, TensorView sink_key_rot,
                   TensorView sink_value_rot, TensorView sink_ids, int64_t kv_heads, int64_t page_tokens,
                   int64_t sink_tokens) {
  for (const TensorView& index : {page_table, packed_tokens, frame_ids, frame_tokens, sink_ids}) {
    CHECK_INPUT_AND_TYPE(index, dl_int32);
  }
  CHECK_INPUT_AND_TYPE(pages, dl_uint8);
  for (const TensorView& raw : {frame_key_rot, frame_value_rot, sink_key_rot, sink_value_rot}) {
    CHECK_INPUT_AND_TYPE(raw, dl_float16);
  }
  const PageLayout layout{kKeyBits, kValueBits, kv_heads, kHeadDim, page_tokens};
  TVM_FFI_ICHECK_EQ(pages.size(1), layout.page_bytes());
  Context context{};
  context.layout = fields_of(layout);
  context.pages = data<uint8_t>(pages);
  context.page_table = data<int32_t>(page_table);
  context.table_stride = page_table.size(1);
  context.packed_tokens = data<int32_t>(packed_tokens);
  context.frame_key_rot = data<uint16_t>(frame_key_rot);
  context.frame_value_rot = data<uint16_t>(frame_value_rot);
  context.frame_ids = data<int32_t>(frame_ids);
  context.frame_tokens = data<int32_t>(frame_tokens);
  context.sink_key_rot = data<uint16_t>(sink_key_rot);
  context.sink_value_rot = data<uint16_t>(sink_value_rot);
  context.sink_ids = data<int32_t>(sink_ids);
  context.sink_tokens = static_cast<int32_t>(sink_tokens);
  return context;
}

}  // namespace

// query_rot [B, Hq, D], partial_out [B, Hq, splits, D] float32, partial_log2 [B, Hq, splits] float32
void run_attend_decode(TensorView query_rot, TensorView pages, TensorView page_table, TensorView packed_tokens,
                       TensorView frame_key_rot, TensorView frame_value_rot, TensorView frame_ids,
                       TensorView frame_tokens, TensorView sink_key_rot, TensorView sink_value_rot, TensorView sink_ids,
                       TensorView partial_out, TensorView partial_log2, int64_t kv_heads, int64_t page_tokens,
                       int64_t sink_tokens, int64_t window_left, double scale, double soft_cap) {
  CHECK_INPUT(query_rot);
  const int64_t batch = query_rot.size(0), query_heads = query_rot.size(1), splits = partial_out.size(2);
  TVM_FFI_ICHECK_EQ(query_rot.size(2), kHeadDim);
  if (batch == 0) return;
  AttendParams params{};
  params.context = context_of(pages, page_table, packed_tokens, frame_key_rot, frame_value_rot, frame_ids, frame_tokens,
                              sink_key_rot, sink_value_rot, sink_ids, kv_heads, page_tokens, sink_tokens);
  params.query_rot = query_rot.data_ptr();
  params.partial_out = data<float>(partial_out);
  params.partial_log2 = data<float>(partial_log2);
  params.query_type = float_type(query_rot);
  params.group = static_cast<int32_t>(query_heads / kv_heads);
  params.window_left = static_cast<int32_t>(window_left);
  params.scale = static_cast<float>(scale);
  params.soft_cap = static_cast<float>(soft_cap);
  const int64_t chunks = (params.group + kHeads - 1) / kHeads;
  const auto narrow = [](int64_t x) { return static_cast<unsigned>(x); };
  const dim3 grid(narrow(splits), narrow(kv_heads * chunks), narrow(batch));
  ffi::CUDADeviceGuard guard(query_rot.device().device_id);
  const cudaStream_t stream = get_stream(query_rot.device());
  deltastore_attend_decode<<<grid, kThreads, 0, stream>>>(params);
  check_launch("attend_decode");
}

// requests, positions [rows] int32; key_rot, value_rot [rows, H, D]
void run_decode_context(TensorView requests, TensorView positions, TensorView pages, TensorView page_table,
                        TensorView packed_tokens, TensorView frame_key_rot, TensorView frame_value_rot,
                        TensorView frame_ids, TensorView frame_tokens, TensorView sink_key_rot,
                        TensorView sink_value_rot, TensorView sink_ids, TensorView key_rot, TensorView value_rot,
                        int64_t kv_heads, int64_t page_tokens, int64_t sink_tokens) {
  CHECK_INPUT_AND_TYPE(requests, dl_int32);
  CHECK_INPUT_AND_TYPE(positions, dl_int32);
  CHECK_INPUT(key_rot);
  CHECK_INPUT(value_rot);
  const int64_t rows = requests.size(0);
  if (rows == 0) return;
  DecodeParams params{};
  params.context = context_of(pages, page_table, packed_tokens, frame_key_rot, frame_value_rot, frame_ids, frame_tokens,
                              sink_key_rot, sink_value_rot, sink_ids, kv_heads, page_tokens, sink_tokens);
  params.requests = data<int32_t>(requests);
  params.positions = data<int32_t>(positions);
  params.key_rot = key_rot.data_ptr();
  params.value_rot = value_rot.data_ptr();
  params.out_type = float_type(key_rot);
  ffi::CUDADeviceGuard guard(key_rot.device().device_id);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(kv_heads));
  deltastore_decode_context<<<grid, kHeadDim, 0, get_stream(key_rot.device())>>>(params);
  check_launch("decode_context");
}

}  // namespace deltastore::cuda

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend_decode, deltastore::cuda::run_attend_decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_context, deltastore::cuda::run_decode_context);
