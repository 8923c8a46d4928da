// sm_90's barriers in shared memory. A phase is complete when as many threads have arrived as the
// barrier was made for, and as many bytes as were announced; then the next begins, with the other
// parity. The first has parity 0.
#pragma once

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

struct Mbarrier {
  std::uint64_t state;  // opaque: only the functions below may touch it
};

/// One thread makes it; then mbarrier_init_fence, then a barrier before anyone else uses it.
NEURON_EXT_DEVICE void mbarrier_init(Mbarrier& barrier, int arrivals) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mbarrier_init(&barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

/// Makes this thread's mbarrier_init visible to the copy engine.
NEURON_EXT_DEVICE void mbarrier_init_fence() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mbarrier_init_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

NEURON_EXT_DEVICE void mbarrier_arrive(Mbarrier& barrier) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mbarrier_arrive(&barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
#endif
}

/// Arrives, and announces bytes that the copy engine will deliver in this phase: before the copies.
NEURON_EXT_DEVICE void mbarrier_arrive_expecting(Mbarrier& barrier, std::uint32_t bytes) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mbarrier_arrive(&barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
#endif
}

/// Waits until the phase of this parity is complete. Right after mbarrier_init, parity 1 counts as
/// complete: a producer's first wait for a free stage passes.
NEURON_EXT_DEVICE void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mbarrier_wait(&barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra WAIT_%=;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

/// Makes this thread's earlier ordinary writes to shared memory visible to the copy engine and the
/// tensor cores (the asynchronous proxy). By each thread that wrote, before the barrier after which
/// one of them is told to read.
NEURON_EXT_DEVICE void async_proxy_fence() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::async_proxy_fence();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace neuron_ext::cuda::ptx
