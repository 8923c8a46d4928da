// The activations and their gradients on one element. A functor here is all that a kernel needs of
// an activation.
#pragma once

#include "neuron_ext/activation.h"
#include "ptx/numbers.cuh"

namespace neuron_ext::cuda {

using ptx::Accumulator;

/// e^-r = 1 - r + r^2 q(r) for |r| <= ln(2) / 2, and what splits x into n ln(2) + r: the constants
/// of the CPU's sigmoid.
template <class S>
struct ExpTerms;

template <>
struct ExpTerms<float> {
  static NEURON_EXT_DEVICE float q(float r) {
    float sum = 0x1.6a2434p-10f;
    sum = ptx::fma(sum, r, -0x1.1239e2p-7f);
    sum = ptx::fma(sum, r, 0x1.5558f2p-5f);
    sum = ptx::fma(sum, r, -0x1.555492p-3f);
    return ptx::fma(sum, r, 0x1.fffffcp-2f);
  }
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  static constexpr float kLowest = -105, kHighest = 60;
  static constexpr int kMantissaBits = 23, kExponentBias = 127, kHeadroom = 32;
  static constexpr float kHeadroomScale = 0x1p-32f;
  static NEURON_EXT_DEVICE float power_of_2(std::uint32_t exponent) {
    return ptx::float_of(exponent << kMantissaBits);
  }
  static NEURON_EXT_DEVICE float reciprocal(float x) { return ptx::reciprocal_approximate(x); }
};

template <>
struct ExpTerms<double> {
  static NEURON_EXT_DEVICE double q(double r) {
    double sum = -0x1.ad7f6e38010f3p-26;
    sum = ptx::fma(sum, r, 0x1.28ad72cd4e7a8p-22);
    sum = ptx::fma(sum, r, -0x1.71df2552bf154p-19);
    sum = ptx::fma(sum, r, 0x1.a0199a0c66d86p-16);
    sum = ptx::fma(sum, r, -0x1.a01a012a57776p-13);
    sum = ptx::fma(sum, r, 0x1.6c16c1842a11ap-10);
    sum = ptx::fma(sum, r, -0x1.1111111127be6p-7);
    sum = ptx::fma(sum, r, 0x1.555555555087cp-5);
    sum = ptx::fma(sum, r, -0x1.55555555554fap-3);
    return ptx::fma(sum, r, 0x1.000000000000ap-1);
  }
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefa3p-1, kLn2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -747, kHighest = 400;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023, kHeadroom = 128;
  static constexpr double kHeadroomScale = 0x1p-128;
  static NEURON_EXT_DEVICE double power_of_2(std::int64_t exponent) {
    return ptx::double_of(exponent << kMantissaBits);
  }
  static NEURON_EXT_DEVICE double reciprocal(double x) { return 1 / x; }
};

/// 1 / (1 + e^-x) within an ULP, results below the normal range included. As on the CPU
/// (csrc/cpu/vec_math-inl.h says why): 2^n / (2^n + e^-r), the denominator as a sum of two numbers,
/// one division, one residual step. That step squares the division's error, so that of f32 may be
/// approximate: a division proper takes eight more instructions and a branch, which keeps elements
/// from being computed side by side.
template <class S>
NEURON_EXT_DEVICE S sigmoid(S x) {
  using C = ExpTerms<S>;
  x = ptx::maximum(S{C::kLowest}, ptx::minimum(S{C::kHighest}, x));
  const S rounded = ptx::fma(x, C::kLog2E, C::kRound);
  const S n = rounded - C::kRound;
  const S scale = C::power_of_2(ptx::bits_of(rounded) + (C::kExponentBias + C::kHeadroom));
  const S r = ptx::fma(n, -C::kLn2Low, ptx::fma(n, -C::kLn2High, x));
  const S bend = r * r * C::q(r);

  // D = ((2^n + 1) - r) + bend, largest first, each sum followed by what its rounding lost.
  const S d0 = ptx::fma(scale, C::kHeadroomScale, S{1});
  const S d0_low = ptx::fma(scale, C::kHeadroomScale, S{1} - d0);
  const S d1 = d0 - r;
  const S d1_low = (d0 - d1) - r;
  const S d = d1 + bend;
  const S d_low = ((d1 - d) + bend) + (d1_low + d0_low);

  const S negated = -C::reciprocal(d);
  const S residual = ptx::fma(negated, d_low, ptx::fma(negated, d, S{1}));
  return ptx::fma(negated, residual, negated) * scale * -C::kHeadroomScale;
}

/// The same where the result will be rounded to 16 bits: e^x / (1 + e^x) by the special functions'
/// unit. What that costs, 2^-16 of the result at x = -90 and less elsewhere, is an eighth of a
/// thousandth of a bf16's last place. e^x, not e^-x, since it may be subnormal; from x = 64 on, the
/// quotient has long been 1.
NEURON_EXT_DEVICE float sigmoid_to_16_bits(float x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  const float e = ptx::exp2_approximate(ptx::minimum(x, 64.0f) * kLog2E);
  return e * ptx::reciprocal_approximate(1.0f + e);
}

/// apply<T>: what will be rounded to T.
struct Identity {
  template <class T>
  static NEURON_EXT_DEVICE Accumulator<T> apply(Accumulator<T> x) {
    return x;
  }
  template <class S>
  static NEURON_EXT_DEVICE S gradient(S dy, S) {
    return dy;
  }
};

struct Sigmoid {
  template <class T>
  static NEURON_EXT_DEVICE Accumulator<T> apply(Accumulator<T> x) {
    if constexpr (sizeof(T) == 2) {
      return sigmoid_to_16_bits(x);
    } else {
      return sigmoid(x);
    }
  }
  template <class S>
  static NEURON_EXT_DEVICE S gradient(S dy, S y) {
    return dy * (S{1} - y) * y;
  }
};

/// Calls f with the functor that `activation` names: on the host, to choose a kernel.
template <class F>
auto visit_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSigmoid:
      return f(Sigmoid{});
    case Activation::kIdentity:
      break;
  }
  return f(Identity{});
}

/// The same choice in a kernel, where it costs little beside the rest.
template <class T>
NEURON_EXT_DEVICE Accumulator<T> apply(Activation activation, Accumulator<T> x) {
  return activation == Activation::kSigmoid ? Sigmoid::apply<T>(x) : x;
}
template <class S>
NEURON_EXT_DEVICE S gradient(Activation activation, S dy, S y) {
  return activation == Activation::kSigmoid ? Sigmoid::gradient(dy, y) : dy;
}

}  // namespace neuron_ext::cuda
