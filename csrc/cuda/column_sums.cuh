// Sums of columns whose rows lie in a warp's fragments: lane 4 g + t has those of rows g.
#pragma once

#include "ptx/sync.cuh"

namespace neuron_ext::cuda {

/// Adds up each of the sums over the eight lanes of one t. Each lane is left with an eighth of
/// them, from the g-th on, as its first: at each step it gives away half of what it has for a share
/// in the other half.
template <int kLanes = 16, int kCount>
NEURON_EXT_DEVICE void sum_over_rows(float (&sums)[kCount], int lane) {
  static_assert(kCount % 8 == 0);
  constexpr int kHalf = kCount * kLanes / ptx::kWarp;
  const bool has_upper = (lane & kLanes) != 0;
#pragma unroll
  for (int s = 0; s < kHalf; ++s) {
    const float kept = has_upper ? sums[s + kHalf] : sums[s];
    const float given = has_upper ? sums[s] : sums[s + kHalf];
    sums[s] = kept + ptx::shuffle_xor(given, kLanes);
  }
  if constexpr (kLanes > 4) sum_over_rows<kLanes / 2>(sums, lane);
}

}  // namespace neuron_ext::cuda
