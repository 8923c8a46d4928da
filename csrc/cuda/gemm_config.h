// The CUDA matrix products as rows of data. Host code only: nothing here needs a compiler for GPUs.
#pragma once

#include <cstddef>
#include <span>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

struct GemmKernel {
  const char* name;
  std::span<const DType> dtypes;
  int lowest_sm, highest_sm;
  /// Beyond dtype and device, which the choice has compared by then: layout, size, alignment.
  bool (*accepts)(const GemmDesc& desc, const GemmPointers& at, const Device& device);
  std::size_t (*workspace)(const GemmDesc& desc, const Device& device);  // bytes
  /// Returns a cudaError_t: that of what it launched.
  int (*run)(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device& device,
             Stream stream);
};

extern const GemmKernel gemm_sm90;
extern const GemmKernel gemm_simt;

}  // namespace neuron_ext::cuda
