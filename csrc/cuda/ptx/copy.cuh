// sm_80's asynchronous copies from global to shared memory. Each thread waits for its own copies;
// for those of others, a barrier has to follow.
#pragma once

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

/// Copies the first `count` of kBytes (4, 8 or 16, the alignment of both) and writes zeros for the
/// others, which it doesn't read.
template <int kBytes>
NEURON_EXT_DEVICE void copy_part_async(void* shared, const void* global, int count) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::copy_async(shared, global, kBytes, count);
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(count)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(count)
                 : "memory");
  }
#endif
}

/// All of kBytes, or, where not `valid`, as many zeros.
template <int kBytes>
NEURON_EXT_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  copy_part_async<kBytes>(shared, global, valid ? kBytes : 0);
}

/// Ends a group: this thread's copies since the last.
NEURON_EXT_DEVICE void copy_async_commit() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most the kPending last groups are unfinished.
template <int kPending>
NEURON_EXT_DEVICE void copy_async_wait() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace neuron_ext::cuda::ptx
