// Between storage types and the type of sums, and the special functions' unit.
#pragma once

#include "target.cuh"

#ifdef NEURON_EXT_CUDA_EMULATOR
#include <bit>
#include <cmath>
#endif

namespace neuron_ext::cuda::ptx {

// ---- conversions, to nearest, ties to even -----------------------------------------------------

NEURON_EXT_DEVICE std::uint32_t bits_of(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::bit_cast<std::uint32_t>(x);
#else
  return __float_as_uint(x);
#endif
}

NEURON_EXT_DEVICE float float_of(std::uint32_t bits) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::bit_cast<float>(bits);
#else
  return __uint_as_float(bits);
#endif
}

NEURON_EXT_DEVICE double double_of(std::int64_t bits) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::bit_cast<double>(bits);
#else
  return __longlong_as_double(bits);
#endif
}

NEURON_EXT_DEVICE std::int64_t bits_of(double x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::bit_cast<std::int64_t>(x);
#else
  return __double_as_longlong(x);
#endif
}

NEURON_EXT_DEVICE float widen(float x) { return x; }
NEURON_EXT_DEVICE double widen(double x) { return x; }
NEURON_EXT_DEVICE float widen(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }
NEURON_EXT_DEVICE float widen(Float16 x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::widen(x);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

/// The type in which sums of T are formed.
template <class T>
using Accumulator = decltype(widen(T{}));

/// narrow<T>(x): the nearest T.
template <class T, class S>
NEURON_EXT_DEVICE T narrow(S x) {
  return x;
}
template <>
NEURON_EXT_DEVICE BFloat16 narrow<BFloat16>(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::narrow_bf16(x);
#else
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <>
NEURON_EXT_DEVICE Float16 narrow<Float16>(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::narrow_f16(x);
#else
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

/// Two neighbours in memory, or a register of a fragment: `low` at the lower address.
template <class T>
NEURON_EXT_DEVICE std::uint32_t narrow_pair(float low, float high);
template <>
NEURON_EXT_DEVICE std::uint32_t narrow_pair<BFloat16>(float low, float high) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::narrow_bf16(low).bits | std::uint32_t{emulator::narrow_bf16(high).bits} << 16;
#else
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
template <>
NEURON_EXT_DEVICE std::uint32_t narrow_pair<Float16>(float low, float high) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::narrow_f16(low).bits | std::uint32_t{emulator::narrow_f16(high).bits} << 16;
#else
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

/// The nearest tf32 (10 mantissa bits), ties away from zero, in a float's place.
NEURON_EXT_DEVICE std::uint32_t narrow_tf32(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::narrow_tf32(x);
#else
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#endif
}

// ---- arithmetic --------------------------------------------------------------------------------
// Kernels are compiled without contraction, as everything here is: a fused multiply-add is asked
// for.

NEURON_EXT_DEVICE float fma(float a, float b, float c) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::fma(a, b, c);
#else
  return __fmaf_rn(a, b, c);
#endif
}

NEURON_EXT_DEVICE double fma(double a, double b, double c) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return std::fma(a, b, c);
#else
  return __fma_rn(a, b, c);
#endif
}

/// The smaller and the larger; nan if either is. (fmin and fmax drop it.)
template <class S>
NEURON_EXT_DEVICE S minimum(S a, S b) {
  return a < b || a != a ? a : b;
}
template <class S>
NEURON_EXT_DEVICE S maximum(S a, S b) {
  return a > b || a != a ? a : b;
}

/// 2^x within 2 ULP, subnormals included.
NEURON_EXT_DEVICE float exp2_approximate(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::approximate(std::exp2(x), 2);
#else
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// 1 / x within 1 ULP, where neither is subnormal.
NEURON_EXT_DEVICE float reciprocal_approximate(float x) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  return emulator::approximate(1.0f / x, 1);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace neuron_ext::cuda::ptx
