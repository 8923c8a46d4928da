// Global memory: wide accesses, and the only ways in which blocks may wait for each other.
#pragma once

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

/// The widest access there is: one 128-bit load or store, 16-byte aligned.
struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

NEURON_EXT_DEVICE Bytes16 load_16_bytes(const void* source) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::check_alignment(source, 16);
  return *static_cast<const Bytes16*>(source);
#else
  const uint4 v = *static_cast<const uint4*>(source);
  return {{v.x, v.y, v.z, v.w}};
#endif
}

/// To global memory.
NEURON_EXT_DEVICE void store_16_bytes(void* target, const Bytes16& value) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::check_alignment(target, 16);
  *static_cast<Bytes16*>(target) = value;
#else
  // In PTX: the compiler takes an assignment apart where it may be skipped.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
               : "memory");
#endif
}

/// Adds to a counter in global memory and returns what it was: a release of what this thread did
/// (or saw) before, and an acquire of what others released by adding to it earlier.
NEURON_EXT_DEVICE std::uint32_t fetch_add(std::uint32_t* counter, std::uint32_t value) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::fetch_add(counter, value);
#else
  std::uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
#endif
}

/// Returns once a counter in global memory has reached a value: an acquire of what was released by
/// adding to it. The blocks that add must be able to run meanwhile.
NEURON_EXT_DEVICE void wait_for_at_least(const std::uint32_t* counter, std::uint32_t value) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::wait_for_at_least(counter, value);
#else
  std::uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now < value);
#endif
}

}  // namespace neuron_ext::cuda::ptx
