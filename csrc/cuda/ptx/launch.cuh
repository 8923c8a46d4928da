// Starting a kernel, from the host.
#pragma once

#include <cstddef>

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  std::size_t dynamic_shared_bytes = 0;
};

/// kernel(args...) in `stream`, a cudaStream_t. Returns a cudaError_t. Synchronises nothing and
/// allocates nothing, so that it may be captured in a graph.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
           const Arguments&... arguments) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  static_cast<void>(stream);
  return emulator::launch(shape.grid, shape.block, shape.dynamic_shared_bytes,
                          [=] { kernel(static_cast<Parameters>(arguments)...); });
#else
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (shape.dynamic_shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.dynamic_shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace neuron_ext::cuda::ptx
