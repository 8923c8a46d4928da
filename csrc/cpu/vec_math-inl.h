// The activations and their gradients on a vector. A functor pair here is all that a kernel needs
// of an activation: the epilogue, the elementwise kernels and the packing prologue take them as
// template arguments.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// What the sigmoid needs of e^x = 2^(k / 8) e^r, |r| <= ln(2) / 16. Everything is scaled by a
/// number near 1, K, which was searched for until all eight K 2^(j / 8) lay within a twentieth of
/// an ULP of numbers of the type, so that no table of their low parts is needed.
template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // K e^-r - 1, from a Remez exchange (2^-33.5 of e^-r).
  static constexpr float kRest[] = {-0x1.4fadf6p-9f, -0x1.feb052p-1f, 0x1.feb052p-2f,
                                    -0x1.547fc6p-3f, 0x1.547f18p-5f};
  // The bits of K 2^(j / 8) / kHeadroomScale, less j << kPowerShift.
  static constexpr std::uint32_t kPowers[] = {0x4f7f5829, 0x4f7b3a3e, 0x4f77d424, 0x4f759202,
                                              0x4f748e45, 0x4f74e5be, 0x4f76b7da, 0x4f7a26de};
  static constexpr int kPowerShift = 20, kMantissaBits = 23;
  static constexpr float kHeadroomScale = 0x1p-32f;
  static constexpr float kSteps = 0x1.715476p+3f;                              // 8 / ln(2)
  static constexpr float kStepHigh = 0x1.62ep-4f, kStepLow = 0x1.0bfbe8p-18f;  // ln(2) / 8
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  // Beyond them the sigmoid has long reached 0 or 1, between them no power can over- or underflow.
  static constexpr float kLowest = -105, kHighest = 60;
};

template <>
struct ExpConstants<double> {
  static constexpr double kRest[] = {0x1.402b636b98cfbp-7,  -0x1.028056c6d731ap+0,
                                     0x1.028056c6d748fp-1,  -0x1.58ab1e5e745ebp-3,
                                     0x1.58ab1e4f4afb7p-5,  -0x1.13bc18401bb7ep-7,
                                     0x1.6fabc50fdd84fp-10, -0x1.a431d27fad439p-13};  // 2^-58.5
  static constexpr std::uint64_t kPowers[] = {
      0x47f028056c6d731a, 0x47ef9e5cf32bd452, 0x47ef3695f86bf1d7, 0x47eef3c180dc8998,
      0x47eed9379e07f01c, 0x47eeea9ddc8f86f6, 0x47ef2bee47665e49, 0x47efa17f0d8741c7};
  static constexpr int kPowerShift = 49, kMantissaBits = 52;
  static constexpr double kHeadroomScale = 0x1p-128;
  static constexpr double kSteps = 0x1.71547652b82fep+3;
  static constexpr double kStepHigh = 0x1.62e42fefap-4, kStepLow = 0x1.cf79abc9e3b3ap-43;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -747, kHighest = 400;
};

/// e^x as a quotient, power / (1 + rest), with power K 2^(k / 8), times 1 / kHeadroomScale, and
/// 1 + rest K e^-r.
template <class V>
struct Exponential {
  Reg<V> power, rest;
};

/// Where the result will be rounded to 16 bits, the steps that only serve the last bits of f32 are
/// left out, here and in sigmoid(): an error of 3 ULP of f32 moves a rounding to f16 by less than a
/// thousandth of its ULP.
template <class V, bool kTo16Bits>
[[gnu::always_inline]] inline Exponential<V> exponential(Reg<V> x) {
  using C = ExpConstants<Scalar<V>>;
  constexpr int kDegree = sizeof(C::kRest) / sizeof(C::kRest[0]) - 1;

  x = V::max(V::set1(C::kLowest), V::min(V::set1(C::kHighest), x));
  const Reg<V> rounded = V::fma(x, V::set1(C::kSteps), V::set1(C::kRound));
  const Reg<V> k = rounded - V::set1(C::kRound);
  const Words<V> index = reinterpret_cast<Words<V>>(rounded);
  const Words<V> power = V::lookup(C::kPowers, index) + (index << C::kPowerShift);

  Reg<V> r;
  if constexpr (kTo16Bits) {
    r = V::fma(k, V::set1(-(C::kStepHigh + C::kStepLow)), x);
  } else {
    r = V::fma(k, V::set1(-C::kStepLow), V::fma(k, V::set1(-C::kStepHigh), x));
  }
  Reg<V> rest = V::set1(C::kRest[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) rest = V::fma(rest, r, V::set1(C::kRest[i]));
  return {reinterpret_cast<Reg<V>>(power), rest};
}

/// 1 / (1 + e^-x), within 0.79 ULP (f32) and 0.8 ULP (f64) for every x, results below the normal
/// range included.
///
/// It is P / D, where P is the power and D = P + (1 + rest). P + 1 is carried as a sum of two
/// numbers, so that with the small rest D is known far beyond its last bit; one division and a
/// residual step leave the last rounding as nearly all of the error. No step depends on the sign of
/// x, and the power, kept too large until the end so that it is always a normal number, makes a
/// subnormal result by a single rounding.
template <class V, bool kTo16Bits>
[[gnu::always_inline]] inline Reg<V> sigmoid(const Exponential<V>& e) {
  using C = ExpConstants<Scalar<V>>;
  const Reg<V> one = V::set1(1), headroom = V::set1(C::kHeadroomScale);
  const Reg<V> power = e.power * headroom;
  const Reg<V> d0 = power + one;
  if constexpr (kTo16Bits) return e.power / (d0 + e.rest) * headroom;

  const Reg<V> d0_low = (V::max(power, one) - d0) + V::min(power, one);
  const Reg<V> d1 = e.rest + d0_low;
  const Reg<V> d = d0 + d1;
  const Reg<V> y = e.power / d;
  const Reg<V> residual = V::fma(-y, d1, V::fma(-y, d0, e.power));
  // Bits subtracted from those of 1 give 1 / d within 8 %: enough for a residual of about an ULP.
  using Lane = typename Integers<V>::Lane;
  constexpr Lane kReciprocal =
      2 * std::bit_cast<Lane>(Scalar<V>{1}) - (Lane{1} << (C::kMantissaBits - 4));
  const Words<V> inverse = (Words<V>{} + kReciprocal) - reinterpret_cast<Words<V>>(d);
  return V::fma(residual, reinterpret_cast<Reg<V>>(inverse), y) * headroom;
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
  // The two halves of apply.
  template <class V, class T>
  static Exponential<V> begin(Reg<V> x) {
    return exponential<V, sizeof(T) == 2>(x);
  }
  template <class V, class T>
  static Reg<V> finish(const Exponential<V>& e) {
    return sigmoid<V, sizeof(T) == 2>(e);
  }

  template <class V, class T>
  static Reg<V> apply(Reg<V> x) {
    return finish<V, T>(begin<V, T>(x));
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
