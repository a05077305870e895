// The CUDA kernel around update_chunk, and its launch. Includes nothing of PyTorch, so that nvcc
// compiles it in seconds and anywhere.
#include <cuda_runtime.h>

#include "adamw_ema_table.h"

namespace mixflow {
namespace {

template <typename G, int K>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table) {
  update_chunk<G, K>(table, static_cast<int32_t>(blockIdx.x), threadIdx.x, kThreads);
}

template <typename G>
void launch(const Table& table, cudaStream_t stream) {
  switch (table.emas) {
    case 0:
      adamw_ema_kernel<G, 0><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 1:
      adamw_ema_kernel<G, 1><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 2:
      adamw_ema_kernel<G, 2><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 3:
      adamw_ema_kernel<G, 3><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    default:
      adamw_ema_kernel<G, -1><<<table.blocks, kThreads, 0, stream>>>(table);
  }
}

}  // namespace
}  // namespace mixflow

extern "C" const char* mixflow_adamw_ema_cuda(const mixflow::Table* table, int bfloat16_gradients,
                                              void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (bfloat16_gradients) {
    mixflow::launch<uint16_t>(*table, on);
  } else {
    mixflow::launch<float>(*table, on);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
