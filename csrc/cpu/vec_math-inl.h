// The activations and their gradients on a vector. A functor pair here is all that a kernel needs
// of an activation: the epilogue, the elementwise kernels and the packing prologue take them as
// template arguments.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// e^-r = 1 - r + r^2 Q(r) on |r| <= ln(2) / 2, Q from a Remez exchange on the relative error of
/// e^-r (2^-28.2 and 2^-57.9), and what splits x into n ln(2) + r.
template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kQ[] = {0x1.fffffcp-2f, -0x1.555492p-3f, 0x1.5558f2p-5f, -0x1.1239e2p-7f,
                                 0x1.6a2434p-10f};
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  // Beyond them the sigmoid has long reached 0 or 1, between them 2^n can't over- or underflow.
  static constexpr float kLowest = -105, kHighest = 60;
  static constexpr int kMantissaBits = 23, kExponentBias = 127, kHeadroom = 32;
  static constexpr float kHeadroomScale = 0x1p-32f;
};

template <>
struct ExpConstants<double> {
  static constexpr double kQ[] = {
      0x1.000000000000ap-1,  -0x1.55555555554fap-3,  0x1.555555555087cp-5,  -0x1.1111111127be6p-7,
      0x1.6c16c1842a11ap-10, -0x1.a01a012a57776p-13, 0x1.a0199a0c66d86p-16, -0x1.71df2552bf154p-19,
      0x1.28ad72cd4e7a8p-22, -0x1.ad7f6e38010f3p-26};
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fefa3p-1, kLn2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -747, kHighest = 400;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023, kHeadroom = 128;
  static constexpr double kHeadroomScale = 0x1p-128;
};

/// 1 / (1 + e^-x), within 0.81 ULP (f32) and 0.72 ULP (f64) for every x, results below the normal
/// range included.
///
/// With x = n ln(2) + r, it is 2^n / D, where D = 2^n + e^-r lies between 0.7 and 2^n + 1.5. D is
/// carried as a sum of two numbers; one division and a residual step then leave the last rounding
/// as nearly all of the error, but for the rounding of r, at most an eighth of an ULP. No step
/// depends on the sign of x, and the factor 2^n, kept 2^kHeadroom too large until the end so that
/// it is always a normal number, makes a subnormal result by a single rounding.
///
/// Where the result will be rounded to 16 bits, the steps that only serve the last bits are left
/// out: an error of 3 ULP of f32 moves a rounding to f16 by less than a thousandth of its ULP.
template <class V, bool kTo16Bits>
[[gnu::always_inline]] inline Reg<V> sigmoid(Reg<V> x) {
  using C = ExpConstants<Scalar<V>>;
  constexpr int kDegree = sizeof(C::kQ) / sizeof(C::kQ[0]) - 1;
  const Reg<V> one = V::set1(1);

  x = V::max(V::set1(C::kLowest), V::min(V::set1(C::kHighest), x));
  const Reg<V> rounded = V::fma(x, V::set1(C::kLog2E), V::set1(C::kRound));
  const Reg<V> n = rounded - V::set1(C::kRound);
  const Words<V> exponent = (reinterpret_cast<Words<V>>(rounded) << C::kMantissaBits) +
                            ((Words<V>{} + (C::kExponentBias + C::kHeadroom)) << C::kMantissaBits);
  const Reg<V> scale = reinterpret_cast<Reg<V>>(exponent);  // 2^(n + kHeadroom)

  if constexpr (kTo16Bits) {
    const Reg<V> r = V::fma(n, V::set1(-(C::kLn2High + C::kLn2Low)), x);
    Reg<V> q = V::set1(C::kQ[kDegree]);
#pragma GCC unroll 16
    for (int i = kDegree - 1; i >= 0; --i) q = V::fma(q, r, V::set1(C::kQ[i]));
    const Reg<V> d = V::fma(scale, V::set1(C::kHeadroomScale), V::fma(r * r, q, one - r));
    return scale / d * V::set1(C::kHeadroomScale);
  }

  const Reg<V> r = V::fma(n, V::set1(-C::kLn2Low), V::fma(n, V::set1(-C::kLn2High), x));

  Reg<V> q = V::set1(C::kQ[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) q = V::fma(q, r, V::set1(C::kQ[i]));
  const Reg<V> bend = r * r * q;

  // D = ((2^n + 1) - r) + bend, largest first, each sum followed by what its rounding lost.
  const Reg<V> d0 = V::fma(scale, V::set1(C::kHeadroomScale), one);
  const Reg<V> d0_low = V::fma(scale, V::set1(C::kHeadroomScale), one - d0);
  const Reg<V> d1 = d0 - r;
  const Reg<V> d1_low = (d0 - d1) - r;
  const Reg<V> d = d1 + bend;
  const Reg<V> d_low = ((d1 - d) + bend) + (d1_low + d0_low);

  const Reg<V> negated = V::set1(-1) / d;
  const Reg<V> residual = V::fma(negated, d_low, V::fma(negated, d, one));
  return V::fma(negated, residual, negated) * scale * V::set1(-C::kHeadroomScale);
}

/// apply<V, T> is what will be rounded to T.
struct Identity {
  template <class V, class T>
  static Reg<V> apply(Reg<V> x) {
    return x;
  }
  template <class V>
  static Reg<V> gradient(Reg<V> dy, Reg<V>) {
    return dy;
  }
};

struct Sigmoid {
  template <class V, class T>
  static Reg<V> apply(Reg<V> x) {
    return sigmoid<V, sizeof(T) == 2>(x);
  }
  template <class V>
  static Reg<V> gradient(Reg<V> dy, Reg<V> y) {
    return dy * (V::set1(1) - y) * y;
  }
};

/// Calls f with the functor that `activation` names.
template <class F>
void visit_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kIdentity:
      return f(Identity{});
    case Activation::kSigmoid:
      return f(Sigmoid{});
  }
}

}  // namespace
}  // namespace neuron_ext::cpu
