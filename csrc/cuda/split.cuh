// f32 as sums of bf16, for tensor cores.
//
// x = x0 + x1 + x2, each the nearest bf16 to what the ones before leave: 24 bits, all that x has.
// Of the nine products of two such sums those six whose terms are of order 2^-16 or more give full
// precision; two parts and three products, or one, are what torch calls high and medium. The
// smallest are added first.
//
// Not every x splits: parts of what is infinite, nan or close to the ends of the exponents aren't
// what they should be.
#pragma once

#include <cstdint>

#include "neuron_ext/gemm.h"
#include "ptx/numbers.cuh"

namespace neuron_ext::cuda {

/// Whether x is 0, or its parts and their products with other such numbers' are normal and finite.
NEURON_EXT_DEVICE bool splits(float x) {
  const float magnitude = x < 0 ? -x : x;
  return x == 0 || (magnitude >= 0x1p-100f && magnitude < 0x1p63f);
}

/// The next part of each of two neighbours, as a register of a fragment, and leaves the rest.
NEURON_EXT_DEVICE std::uint32_t take_parts(float& low, float& high) {
  const std::uint32_t parts = ptx::narrow_pair<BFloat16>(low, high);
  low -= ptx::float_of(parts << 16);
  high -= ptx::float_of(parts & 0xffff0000u);
  return parts;
}

/// Parts of each number.
inline int planes_for(Precision precision) {
  switch (precision) {
    case Precision::kMedium:
      return 1;
    case Precision::kHigh:
      return 2;
    default:
      return 3;
  }
}

}  // namespace neuron_ext::cuda
