// What is asked of CUDA itself.
#include <cuda_runtime.h>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

Status query_device(int ordinal, Device& device) {
  constexpr const char* kName = "query_device";
  int major = 0, minor = 0;
  const auto ask = [&](cudaDeviceAttr attribute, int& value) {
    return cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  for (const cudaError_t error : {ask(cudaDevAttrComputeCapabilityMajor, major),
                                  ask(cudaDevAttrComputeCapabilityMinor, minor),
                                  ask(cudaDevAttrMultiProcessorCount, device.sm_count)}) {
    if (error != cudaSuccess) return {error, kName};
  }
  device.sm = 10 * major + minor;
  return {};
}

}  // namespace neuron_ext::cuda
