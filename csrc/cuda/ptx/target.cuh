// What a kernel is compiled for: a GPU, by nvcc, or the tests' emulator (tests/cuda_emulator), by
// any C++ compiler. This folder is the only place that knows the difference, and the only one with
// PTX: each function is one instruction, or the shortest sequence that makes sense on its own, with
// a body for each of the two. docs/cuda.md tells how to write a kernel on top of it.
#pragma once

#include <cstdint>

#include "neuron_ext/types.h"

#ifdef NEURON_EXT_CUDA_EMULATOR

#include "emulator.h"  // also __global__, threadIdx and the like

/// An array in a block's shared memory, uninitialised: NEURON_EXT_SHARED(float, tile, [16][68]).
#define NEURON_EXT_SHARED(type, name, dimensions)   \
  static char name##_identity;                      \
  using name##_array = type dimensions;             \
  name##_array& name = *static_cast<name##_array*>( \
      ::neuron_ext::emulator::static_shared(&name##_identity, sizeof(name##_array)))

/// Whether this compilation can use sm_90a's instructions. A kernel that does has an empty body
/// elsewhere, since every file is compiled for every architecture.
#define NEURON_EXT_HAS_SM90A 1

#else

#include <cuda_runtime.h>

#define NEURON_EXT_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define NEURON_EXT_HAS_SM90A 1
#else
#define NEURON_EXT_HAS_SM90A 0
#endif

#endif

#define NEURON_EXT_DEVICE __device__ __forceinline__

namespace neuron_ext::cuda::ptx {

inline constexpr int kWarp = 32;        // threads that execute together
inline constexpr int kWarpgroup = 128;  // threads that issue a wgmma together

/// The dynamic shared memory of the launch, as a T. For what must be aligned to more than 16 bytes,
/// up to 1024, or is larger than 48 KiB.
template <class T>
NEURON_EXT_DEVICE T& dynamic_shared() {
  static_assert(alignof(T) <= 1024);
#ifdef NEURON_EXT_CUDA_EMULATOR
  return *static_cast<T*>(emulator::dynamic_shared(sizeof(T)));
#else
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

/// Where in shared memory a pointer points, as instructions and descriptors want it.
NEURON_EXT_DEVICE std::uint32_t shared_address(const void* shared) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::shared_address(shared);
#else
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

}  // namespace neuron_ext::cuda::ptx
