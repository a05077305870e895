// The CUDA kernel around update_chunk, and its launch. Includes nothing of PyTorch, so that nvcc
// compiles it in seconds and anywhere.
#include <cuda_runtime.h>

#include "adamw_ema_table.h"

namespace mixflow {
namespace {

template <typename G, int K, bool kStored>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table) {
  update_chunk<G, K, kStored>(table, static_cast<int32_t>(blockIdx.x), threadIdx.x, kThreads);
}

__global__ void store_constants_kernel(const __grid_constant__ Constants constants,
                                       Constants* stored) {
  *stored = constants;
}

template <typename G, bool kStored>
void launch(const Table& table, cudaStream_t stream) {
  switch (table.emas) {
    case 0:
      adamw_ema_kernel<G, 0, kStored><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 1:
      adamw_ema_kernel<G, 1, kStored><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 2:
      adamw_ema_kernel<G, 2, kStored><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    case 3:
      adamw_ema_kernel<G, 3, kStored><<<table.blocks, kThreads, 0, stream>>>(table);
      break;
    default:
      adamw_ema_kernel<G, -1, kStored><<<table.blocks, kThreads, 0, stream>>>(table);
  }
}

const char* error_of_launch() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace mixflow

extern "C" const char* mixflow_adamw_ema_cuda(const mixflow::Table* table, int bfloat16_gradients,
                                              void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (table->stored == nullptr) {
    if (bfloat16_gradients) {
      mixflow::launch<uint16_t, false>(*table, on);
    } else {
      mixflow::launch<float, false>(*table, on);
    }
  } else if (bfloat16_gradients) {
    mixflow::launch<uint16_t, true>(*table, on);
  } else {
    mixflow::launch<float, true>(*table, on);
  }
  return mixflow::error_of_launch();
}

extern "C" const char* mixflow_store_constants_cuda(const mixflow::Constants* constants,
                                                    float* stored, void* stream) {
  mixflow::store_constants_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
      *constants, reinterpret_cast<mixflow::Constants*>(stored));
  return mixflow::error_of_launch();
}
