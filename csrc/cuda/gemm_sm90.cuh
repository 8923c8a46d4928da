// What the products on sm_90a's tensor cores share: the shape of a block, its ring of stages, and
// operands in shared memory.
#pragma once

#include <cstdint>

#include "gemm_tiles.cuh"
#include "neuron_ext/gemm.h"
#include "ptx/mbarrier.cuh"
#include "ptx/numbers.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace neuron_ext::cuda {
namespace {

using ptx::Major;

constexpr int kK = 64;                  // of a tile: a swizzle's span
constexpr int kConsumers = 2;           // warpgroups that multiply
constexpr int kRows = kM / kConsumers;  // of one of them
constexpr int kThreads = (1 + kConsumers) * ptx::kWarpgroup;

// What the warpgroups do with 65536 registers: 232 leave room beside 128 sums.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * ptx::kWarpgroup <= 65536);

/// The stage that is next, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;

  NEURON_EXT_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

/// Of each stage: that the copies into it are complete, and that all consumers have read it.
template <int kStages>
struct RingBarriers {
  ptx::Mbarrier full[kStages], empty[kStages];
};

/// What all threads of a block do first.
template <int kStages>
NEURON_EXT_DEVICE void set_up(RingBarriers<kStages>& barriers, const ptx::TensorMap& a_map,
                              const ptx::TensorMap& b_map) {
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(a_map);
    ptx::prefetch_tensor_map(b_map);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(barriers.full[stage], 1);
      ptx::mbarrier_init(barriers.empty[stage], kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::block_sync();
}

/// The first warpgroup's part: one thread of it fills stage after stage with the steps of all the
/// block's tiles. load(stage, full, place, step) starts copies of `bytes` in all.
template <int kN, int kStages, class Load>
NEURON_EXT_DEVICE void fill_stages(RingBarriers<kStages>& barriers, const Cut& cut, int steps,
                                   std::uint32_t bytes, const Load& load) {
  ptx::release_registers<kProducerRegisters>();
  if (threadIdx.x != 0) return;
  Ring<kStages> ring;
  for (std::int64_t tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
    const TilePlace place = cut.place<kN>(tile);
    for (int step = 0; step < steps; ++step) {
      ptx::mbarrier_wait(barriers.empty[ring.stage], ring.parity ^ 1);
      ptx::Mbarrier& full = barriers.full[ring.stage];
      ptx::mbarrier_arrive_expecting(full, bytes);
      load(ring.stage, full, place, step);
      ring.advance();
    }
  }
}

// ---- operands in shared memory -----------------------------------------------------------------

/// kCount rows (or columns) of an operand, by kK. Along k it is one box; otherwise one for each
/// span of 64 rows (or columns), one after the other.
template <int kCount, Major kMajor, class T>
NEURON_EXT_DEVICE void load_tile(T* tile, const ptx::TensorMap& map, ptx::Mbarrier& loaded, int mn,
                                 int k) {
  if constexpr (kMajor == Major::kK) {
    ptx::tma_load(tile, map, loaded, mn, k);
  } else {
#pragma unroll
    for (int c = 0; c < kCount; c += kK) ptx::tma_load(tile + c * kK, map, loaded, k, mn + c);
  }
}

constexpr int kSpan = 128;  // bytes

template <class T>
NEURON_EXT_DEVICE std::uint64_t descriptor_of(const T* tile) {
  return ptx::matrix_descriptor(tile, 8 * kSpan, kK * kSpan, ptx::Swizzle::k128Bytes);
}

/// From 16 k to the next: 32 bytes along a row, or 16 rows.
template <Major kMajor>
constexpr int kStep = kMajor == Major::kK ? 32 : 16 * kSpan;

/// The part of a bias that a tile's columns have, in the registers of a warpgroup: read while the
/// tile is multiplied.
template <class T, int kN>
struct Bias {
  static constexpr int kValues = kN / ptx::kWarpgroup;
  float values[kValues];

  NEURON_EXT_DEVICE void load(const GemmDesc& desc, const void* bias, int j0, int thread) {
#pragma unroll
    for (int r = 0; r < kValues; ++r) {
      const std::int64_t j = j0 + thread + r * ptx::kWarpgroup;
      values[r] = 0;
      if (!desc.has_bias || j >= desc.n) continue;
      values[r] = ptx::widen(static_cast<const T*>(bias)[j * desc.bias_stride]);
    }
  }
  NEURON_EXT_DEVICE void store(float (&shared)[kN], int thread) const {
#pragma unroll
    for (int r = 0; r < kValues; ++r) shared[thread + r * ptx::kWarpgroup] = values[r];
  }
};

}  // namespace
}  // namespace neuron_ext::cuda
