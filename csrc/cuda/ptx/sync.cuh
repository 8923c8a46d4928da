// Threads of a block and of a warp waiting for each other, and lanes of a warp exchanging values.
#pragma once

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

/// All threads of the block meet, and see each other's earlier memory accesses.
NEURON_EXT_DEVICE void block_sync() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::barrier_sync(0, 0);
#else
  __syncthreads();
#endif
}

/// `threads` threads, whole warps, meet at one of 16 barriers; 0 is block_sync's.
NEURON_EXT_DEVICE void barrier_sync(int id, int threads) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::barrier_sync(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// Counts among the `threads` of barrier_sync, but doesn't wait.
NEURON_EXT_DEVICE void barrier_arrive(int id, int threads) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::barrier_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// The lanes in the mask meet, and see each other's earlier memory accesses.
NEURON_EXT_DEVICE void warp_sync(std::uint32_t lanes = kAllLanes) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::warp_sync(lanes);
#else
  __syncwarp(lanes);
#endif
}

/// This thread's lane, in a block of one dimension.
NEURON_EXT_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }

/// The same, read at each call: nothing that is computed of it can occupy a register before.
NEURON_EXT_DEVICE int lane_id_now() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return lane_id();
#else
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

/// `value` of lane `source`. Every lane of the warp takes part in this and the following.
template <class T>
NEURON_EXT_DEVICE T shuffle(T value, int source) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::shuffle(value, source);
#else
  return __shfl_sync(kAllLanes, value, source);
#endif
}

/// `value` of the lane whose number differs in the bits of `flipped`.
template <class T>
NEURON_EXT_DEVICE T shuffle_xor(T value, int flipped) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::shuffle(value, emulator::lane() ^ flipped);
#else
  return __shfl_xor_sync(kAllLanes, value, flipped);
#endif
}

/// `value` of the lane `distance` further on; this lane's own where there is none.
template <class T>
NEURON_EXT_DEVICE T shuffle_down(T value, int distance) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  const int source = emulator::lane() + distance;
  return emulator::shuffle(value, source < kWarp ? source : emulator::lane());
#else
  return __shfl_down_sync(kAllLanes, value, distance);
#endif
}

/// Bit i: what lane i said.
NEURON_EXT_DEVICE std::uint32_t ballot(bool vote) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::ballot(vote);
#else
  return __ballot_sync(kAllLanes, vote);
#endif
}

/// Whether every thread of the block said so; also a block_sync.
NEURON_EXT_DEVICE bool block_all(bool vote) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::block_all(vote);
#else
  return __syncthreads_and(vote) != 0;
#endif
}

// ---- setmaxnreg: registers move from producer to consumer warpgroups ---------------------------
// All warps of a warpgroup execute it; the kernel has
// __launch_bounds__(threads, 1), and each role is one branch of a single if/else. kRegisters: 24 to
// 256 in steps of 8.

template <int kRegisters>
NEURON_EXT_DEVICE void release_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#ifndef NEURON_EXT_CUDA_EMULATOR
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
NEURON_EXT_DEVICE void claim_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
#ifndef NEURON_EXT_CUDA_EMULATOR
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace neuron_ext::cuda::ptx
