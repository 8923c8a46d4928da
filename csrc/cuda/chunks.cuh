// Where a sum over k, or over a chunk of it, goes.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "chunks.h"

namespace neuron_ext::cuda {

/// D[i, j] from its sum over all k; returns what it became.
template <class T>
NEURON_EXT_DEVICE T finish(const GemmDesc& desc, const GemmPointers& at, std::int64_t i,
                           std::int64_t j, Accumulator<T> sum) {
  if (desc.has_bias) sum += ptx::widen(static_cast<const T*>(at.bias)[j * desc.bias_stride]);
  if (desc.has_epilogue_gradient()) {
    const T* const saved = static_cast<const T*>(at.d_saved);
    sum = gradient(desc.epilogue_gradient, sum, ptx::widen(saved[i * desc.d_saved_stride_m + j]));
  } else {
    sum = apply<T>(desc.epilogue, sum);
  }
  return static_cast<T*>(at.d)[i * desc.d_stride_m + j] = ptx::narrow<T>(sum);
}

/// Where a chunk's sum for D[i, j] goes.
template <class T>
NEURON_EXT_DEVICE Accumulator<T>& chunk_sum(const GemmDesc& desc, const ChunkSums& sums,
                                            std::int64_t chunk, std::int64_t i, std::int64_t j) {
  return static_cast<Accumulator<T>*>(sums.base)[(chunk * desc.m + i) * desc.n + j];
}

/// Returns what is stored.
template <class T>
NEURON_EXT_DEVICE Accumulator<T> store_sum(const GemmDesc& desc, const GemmPointers& at,
                                           const ChunkSums& sums, std::int64_t chunk,
                                           std::int64_t i, std::int64_t j, Accumulator<T> sum) {
  if (sums.base == nullptr) return ptx::widen(finish<T>(desc, at, i, j, sum));
  return chunk_sum<T>(desc, sums, chunk, i, j) = sum;
}

template <class T>
NEURON_EXT_DEVICE void store_a_sum(const GemmDesc& desc, const GemmPointers& at,
                                   const ChunkSums& sums, std::int64_t chunk, std::int64_t i,
                                   Accumulator<T> sum) {
  if (sums.base == nullptr) {
    static_cast<T*>(at.a_sum)[i] = ptx::narrow<T>(sum);
  } else {
    static_cast<Accumulator<T>*>(sums.base)[(sums.chunks * desc.n + chunk) * desc.m + i] = sum;
  }
}

}  // namespace neuron_ext::cuda
