// Tests of the torch-free core, for every instruction set that this machine can run.
//
//   core_tests                        everything below, in under a minute
//   core_tests --exhaustive-sigmoid   the sigmoid of every f32, prints its largest error (minutes)
//   core_tests --active-isa           prints the ISA in use; the tests call it with
//   NEURON_EXT_CPU_ISA set

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "neuron_ext/cpu.h"
#include "reference.h"
#include "scalar.h"
#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

// ---- gemm ---------------------------------------------------------------------------------------

void test_exact_sums() {
  int turn = 0;
  const auto check = [&](DType dtype, std::int64_t m, std::int64_t n, std::int64_t k) {
    check_exact(
        Product(dtype, m, n, k, Product::Options::of(turn++), integer, integer, exact_saved));
  };
  for (DType dtype : kDTypes) {
    // Every remainder of the register tiles.
    for (std::int64_t m = 0; m <= 31; ++m) {
      for (std::int64_t n = 0; n <= 35; n += 1 + (m + n) % 3) check(dtype, m, n, 1 + (m + n) % 6);
    }
    // Every remainder of a vector along k, on both sides of a block.
    for (std::int64_t k = 0; k <= 40; ++k) {
      check(dtype, 3, 5, k);
      check(dtype, 15, 33, k);
    }
    for (std::int64_t k : {255, 256, 257, 300, 511, 513, 600, 1025}) {
      check(dtype, 2, 9, k);
      check(dtype, 17, 35, k);
    }
    // Several tiles.
    check(dtype, 90, 130, 70);
    check(dtype, 1, 700, 33);
    check(dtype, 700, 1, 33);
    // Several chunks of k.
    check(dtype, 9, 20, 8192 + 77);
    check(dtype, 16, 3, 3 * 4096);
    check(dtype, 12, 0, 9000);
  }
}

/// The layers' own calls: fprop (NT), dgrad (NN), wgrad (TN), with what each asks for.
void test_layer_products() {
  for (DType dtype : kDTypes) {
    for (std::int64_t batch : {1, 4, 33, 100}) {
      for (std::int64_t in : {1, 5, 40}) {
        for (std::int64_t out : {1, 7, 50}) {
          Product::Options fprop;
          fprop.bias = true;
          check_exact(Product(dtype, batch, out, in, fprop, integer, integer, exact_saved));
          Product::Options dgrad;
          dgrad.b = Layout::kRows;
          dgrad.prologue = true;
          check_exact(Product(dtype, batch, in, out, dgrad, integer, integer, exact_saved));
          Product::Options wgrad;
          wgrad.a = wgrad.saved = Layout::kColumns;
          wgrad.b = Layout::kRows;
          wgrad.prologue = wgrad.a_sum = true;
          check_exact(Product(dtype, out, in, batch, wgrad, integer, integer, exact_saved));
        }
      }
    }
  }
}

/// |D - Dref| <= c (|A'| |B| + |b|) with c for sums of at most 512 terms, and for those of blocks
/// and chunks.
void test_error_bounds() {
  double worst = 0;
  for (DType dtype : kDTypes) {
    const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    for (bool scale_rows : {false, true}) {
      if (scale_rows && dtype == DType::kFloat16) continue;
      for (std::int64_t m : {3, 30}) {
        for (std::int64_t k : {20, 256, 1000, 9000}) {
          const std::int64_t n = 40;
          Product::Options options;
          options.bias = true;
          options.prologue = k == 1000;
          const Values uniform = [](std::int64_t i, std::int64_t j) {
            return (integer(i, j) + 3.5) / 7;
          };
          const Product product(dtype, m, n, k, options, random_values(1, m, k, scale_rows),
                                random_values(2, k, n, false), uniform);
          const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
          // Terms of a block, rounded products of the prologue, blocks, chunks, lanes, bias.
          const double terms = std::min<double>(k, 512) + 3 + k / 256.0 + 32 + 5;
          // A row may round dz to bf16, which is what a layer that stores it does.
          const double dz = options.prologue && dtype == DType::kBFloat16 ? 0x1p-8 : 0;
          for (Isa isa : supported_isas()) {
            set_active_isa(isa);
            const Product::Result result = product.compute(serial());
            for (std::int64_t i = 0; i < m; ++i) {
              for (std::int64_t j = 0; j < n; ++j) {
                const double exact = reference.d[i * n + j];
                const double magnitude = reference.d_magnitude[i * n + j];
                const double error = std::abs(product.d(result, i, j) - exact);
                const double store =
                    dtype == DType::kFloat32 ? 0 : spacing(dtype, exact) * 0.5 * (1 + 1e-3);
                CHECK(error <= (terms * eps + dz) * magnitude + store,
                      product.name()
                          << " at " << i << ", " << j << ": error " << error << " of " << exact);
                if (dtype == DType::kFloat32)
                  worst = std::max(worst, error / (2 * eps * magnitude));
              }
            }
          }
        }
      }
    }
  }
  std::cout << "gemm f32: largest error " << worst << " eps (|A||B| + |b|)\n";
}

void test_fused_sigmoid() {
  for (DType dtype : kDTypes) {
    for (std::int64_t m : {1, 20}) {
      for (std::int64_t k : {0, 5, 300}) {
        const std::int64_t n = 37;
        Product::Options options;
        options.bias = true;
        options.epilogue = Activation::kSigmoid;
        // Integers over 4: sums are exact, so that only the sigmoid and the store round.
        const Values quarters = [](std::int64_t i, std::int64_t j) { return integer(i, j) / 4; };
        const Product product(dtype, m, n, k, options, integer, quarters, integer);
        const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
        for (Isa isa : supported_isas()) {
          set_active_isa(isa);
          const Product::Result result = product.compute(serial());
          for (std::int64_t i = 0; i < m; ++i) {
            for (std::int64_t j = 0; j < n; ++j) {
              const double exact = reference.d[i * n + j];
              const double limit = size_of(dtype) == 2 ? 0.501 : 1;
              CHECK(std::abs(product.d(result, i, j) - exact) <= limit * spacing(dtype, exact),
                    product.name() << " at " << i << ", " << j << ": " << product.d(result, i, j)
                                   << " for " << exact);
            }
          }
        }
      }
    }
  }
}

/// Subnormal operands, terms and results count like all others, beside any values, infinite ones
/// included.
void test_tiny_values() {
  struct Exponents {
    int a, b;
  };
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Exponents& exponents :
         {Exponents{-130, 100}, Exponents{100, -130}, Exponents{-60, -60}, Exponents{-66, -66},
          Exponents{-20, -110}, Exponents{0, -131}, Exponents{-56, -56}}) {
      for (std::int64_t m : {4, 30}) {
        for (std::int64_t k : {2, 33, 300}) {
          for (Layout b_layout : {Layout::kRows, Layout::kColumns}) {
            for (bool all_tiny : {false, true}) {
              const std::int64_t n = 45;
              const Values a = random_values(6, m, k, false), b = random_values(7, k, n, false);
              // Where not all is tiny, only some columns of B are.
              const Values a_scaled = [&](std::int64_t i, std::int64_t p) {
                if (i == 2 && p == 1) return std::numeric_limits<double>::infinity();
                return std::ldexp(a(i, p), exponents.a);
              };
              const Values b_scaled = [&](std::int64_t p, std::int64_t j) {
                const bool tiny = all_tiny || j % 7 == 3;
                const double value = p == 1 ? std::abs(b(p, j)) + 1 : b(p, j);
                return std::ldexp(value, tiny ? exponents.b : 0);
              };
              Product::Options options;
              options.b = b_layout;
              const Product product(dtype, m, n, k, options, a_scaled, b_scaled, integer);
              const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
              for (Isa isa : supported_isas()) {
                set_active_isa(isa);
                const Product::Result result = product.compute(serial());
                for (std::int64_t e = 0; e < m * n; ++e) {
                  const double exact = reference.d[e], d = product.d(result, e / n, e % n);
                  const double bound = (k + 3) * (0x1p-24 * reference.d_magnitude[e] + 0x1p-150) +
                                       0.501 * spacing(dtype, exact);
                  CHECK(d == exact || std::abs(d - exact) <= bound,
                        product.name()
                            << " scaled by 2^" << exponents.a << " and 2^" << exponents.b << " at "
                            << e / n << ", " << e % n << ": " << d << " for " << exact);
                }
              }
            }
          }
        }
      }
    }
  }
}

/// Nans and infinities stay in their row and column.
void test_isolation() {
  for (DType dtype : kDTypes) {
    for (std::int64_t m : {4, 40}) {
      const std::int64_t n = 45, k = 270;
      const Values a = [](std::int64_t i, std::int64_t p) {
        return i == 2 && p == 7 ? std::numeric_limits<double>::quiet_NaN() : integer(i, p);
      };
      const Values b = [](std::int64_t p, std::int64_t j) {
        return j == 5 && p == 3 ? std::numeric_limits<double>::infinity() : integer(p, j) + 0.5;
      };
      for (Layout b_layout : {Layout::kRows, Layout::kColumns}) {
        Product::Options options;
        options.b = b_layout;
        const Product product(dtype, m, n, k, options, a, b, integer);
        for (Isa isa : supported_isas()) {
          set_active_isa(isa);
          const Product::Result result = product.compute(serial());
          for (std::int64_t i = 0; i < m; ++i) {
            for (std::int64_t j = 0; j < n; ++j) {
              CHECK(std::isfinite(product.d(result, i, j)) == (i != 2 && j != 5),
                    product.name() << " at " << i << ", " << j);
            }
          }
        }
      }
    }
  }
}

/// Bitwise the same for any thread count, and from several threads at once.
void test_threads() {
  struct Shape {
    std::int64_t m, n, k;
  };
  for (DType dtype : kDTypes) {
    for (const Shape& shape : {Shape{200, 300, 700}, Shape{30, 40, 20000}, Shape{5, 3000, 600},
                               Shape{129, 65, 40}, Shape{1000, 10, 64}}) {
      Product::Options options;
      options.bias = options.prologue = options.a_sum = true;
      options.epilogue = Activation::kSigmoid;
      const Values a = random_values(3, shape.m, shape.k, false);
      const Values b = random_values(4, shape.k, shape.n, false);
      const Product product(dtype, shape.m, shape.n, shape.k, options, a, b, a);
      for (Isa isa : supported_isas()) {
        if (isa == Isa::kPortable && shape.m == 200) continue;  // slow, and the same driver
        set_active_isa(isa);
        const Product::Result one = product.compute(serial());
        CHECK(product.compute(on_threads<2>()) == one, product.name() << ", 2 threads");
        CHECK(product.compute(on_threads<3>()) == one, product.name() << ", 3 threads");
        CHECK(product.compute(on_threads<8>()) == one, product.name() << ", 8 threads");
        CHECK(product.compute(on_threads<61>()) == one, product.name() << ", 61 threads");
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 3; ++caller) {
          callers.emplace_back([&] {
            CHECK(product.compute(on_threads<2>()) == one, product.name() << ", three callers");
          });
        }
        for (std::thread& caller : callers) caller.join();
      }
    }
  }
}

// ---- elementwise --------------------------------------------------------------------------------

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;

template <class T>
std::vector<T> sigmoid_of(const std::vector<T>& x) {
  std::vector<T> y(x.size());
  activate(Activation::kSigmoid, kDTypeOf<T>, static_cast<std::int64_t>(x.size()), x.data(), 1,
           y.data(), 1);
  return y;
}

template <class T>
bool same_bits(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
}

/// Same bits, or both nan.
template <class T>
bool same_values(const std::vector<T>& x, const std::vector<T>& y) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    const bool both_nan = std::isnan(widen(x[i])) && std::isnan(widen(y[i]));
    if (!both_nan && std::memcmp(&x[i], &y[i], sizeof(T)) != 0) return false;
  }
  return x.size() == y.size();
}

/// The largest error in units of the last place; x that are nan must give nan.
template <class T>
double largest_error(const std::vector<T>& x, const std::vector<T>& y) {
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double value = widen(x[i]);
    const double computed = widen(y[i]);
    if (std::isnan(value)) {
      CHECK(std::isnan(computed), "sigmoid(nan) = " << computed);
      continue;
    }
    const long double e = std::exp(-std::abs(value));
    const long double exact = (value >= 0 ? 1 : e) / (1 + e);
    const double ulp = spacing(kDTypeOf<T>, static_cast<double>(exact));
    worst = std::max(worst, static_cast<double>(std::abs(computed - exact)) / ulp);
  }
  return worst;
}

/// Every sign and exponent, `count` mantissas each, and finer where the sigmoid bends.
template <class T, class Bits>
std::vector<T> all_exponents(int mantissa_bits, int exponents, int count) {
  std::mt19937_64 engine(5);
  std::vector<T> values;
  for (Bits exponent = 0; exponent < static_cast<Bits>(exponents); ++exponent) {
    for (int i = 0; i < count; ++i) {
      const Bits random = static_cast<Bits>(engine());
      const Bits mantissa = i == 0 ? 0 : random & ((Bits{1} << mantissa_bits) - 1);
      const T value = std::bit_cast<T>(exponent << mantissa_bits | mantissa);
      values.push_back(value);
      values.push_back(-value);
    }
  }
  std::uniform_real_distribution<T> bend(-800, 200);
  for (int i = 0; i < 100 * count; ++i) values.push_back(bend(engine) / (1 << i % 8));
  return values;
}

template <class T>
void check_sigmoid(const std::vector<T>& x, double limit) {
  std::vector<T> first;
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    const std::vector<T> y = sigmoid_of(x);
    const double worst = largest_error(x, y);
    std::cout << "sigmoid " << name_of(kDTypeOf<T>) << ' ' << name_of(isa) << ": largest error "
              << worst << " ULP over " << x.size() << " values\n";
    CHECK(worst <= limit, name_of(isa) << ' ' << name_of(kDTypeOf<T>) << ": " << worst << " ULP");
    if (first.empty()) first = y;
    CHECK(same_values(first, y), name_of(isa) << ' ' << name_of(kDTypeOf<T>) << " differs from "
                                              << name_of(supported_isas()[0]));
    for (std::size_t i = 0; i < x.size(); i += 997) {
      CHECK(same_values(sigmoid_of(std::vector<T>{x[i]}), std::vector<T>{y[i]}),
            name_of(isa) << ' ' << name_of(kDTypeOf<T>) << ": one element differs from many at "
                         << static_cast<double>(widen(x[i])));
    }
  }
}

void test_sigmoid() {
  check_sigmoid(all_exponents<float, std::uint32_t>(23, 256, 600), 0.9);
  check_sigmoid(all_exponents<double, std::uint64_t>(52, 2048, 100), 0.9);
  const float inf = std::numeric_limits<float>::infinity();
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    const std::vector<float> y = sigmoid_of(std::vector<float>{inf, -inf, 0, -0.0f, -100, 1e30f});
    CHECK(same_bits(y, {1, 0, 0.5f, 0.5f, 0x1.b4ep-145f, 1}),
          name_of(isa) << ": " << y[0] << ' ' << y[1] << ' ' << y[2] << ' ' << y[3] << ' '
                       << std::hexfloat << y[4]);
  }
}

template <class T>
void test_all_16_bit_values() {
  std::vector<T> x;
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    x.push_back({static_cast<std::uint16_t>(bits)});
  check_sigmoid(x, 0.501);
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    std::vector<T> copy(x.size());
    activate(Activation::kIdentity, kDTypeOf<T>, static_cast<std::int64_t>(x.size()), x.data(), 1,
             copy.data(), 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const bool is_nan = std::isnan(widen(x[i]));
      CHECK(is_nan ? std::isnan(widen(copy[i])) : copy[i].bits == x[i].bits,
            name_of(isa) << ' ' << name_of(kDTypeOf<T>) << " bits " << x[i].bits << " became "
                         << copy[i].bits);
    }
  }
}

/// The scalar conversions, against exact arithmetic in f64; the vectors' are compared with them in
/// gemm.
template <class T>
void test_narrowing() {
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 4099) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    const float rounded = widen(narrow<T>(x));
    if (std::isnan(x)) {
      CHECK(std::isnan(rounded), name_of(kDTypeOf<T>) << " of nan is " << rounded);
      continue;
    }
    const double unit = spacing(kDTypeOf<T>, x);
    const double exact = std::nearbyint(x / unit) * unit;  // ties to even
    const double largest = kDTypeOf<T> == DType::kFloat16 ? 65504 : 0x1.fep127;
    const double expected = std::abs(exact) > largest
                                ? std::copysign(std::numeric_limits<double>::infinity(), x)
                                : exact;
    CHECK(std::isinf(x) ? rounded == x : rounded == expected,
          name_of(kDTypeOf<T>) << " of " << x << " is " << rounded);
  }
}

/// Each of 2^12 products of two values of T, rounded by the epilogue.
template <class T>
void test_stores() {
  const std::int64_t n = 64;
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 engine(seed);
    const auto any = [&] {
      return std::vector<double>{widen(T{static_cast<std::uint16_t>(engine())})}[0];
    };
    std::vector<double> a, b;
    for (std::int64_t i = 0; i < n; ++i) a.push_back(any()), b.push_back(any());
    const Product product(
        kDTypeOf<T>, n, n, 1, {}, [&](std::int64_t i, std::int64_t) { return a[i]; },
        [&](std::int64_t, std::int64_t j) { return b[j]; }, integer);
    for (Isa isa : supported_isas()) {
      set_active_isa(isa);
      const Product::Result result = product.compute(serial());
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
          const float exact = static_cast<float>(a[i]) * static_cast<float>(b[j]);
          const double expected = widen(narrow<T>(exact)), stored = product.d(result, i, j);
          CHECK(stored == expected || (std::isnan(stored) && std::isnan(expected)),
                product.name() << ": " << a[i] << " times " << b[j] << " gave " << stored);
        }
      }
    }
  }
}

template <class T>
void test_elementwise_views() {
  constexpr DType kDType = kDTypeOf<T>;
  using A = Accumulator<T>;
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    for (std::int64_t n : {0, 1, 5, 16, 31, 255, 256, 257, 600}) {
      for (std::int64_t stride : {1, 3, -1, -2, 0}) {
        const std::int64_t span = std::abs(stride) * std::max<std::int64_t>(0, n - 1);
        const std::int64_t first = stride < 0 ? span : 0;
        std::vector<T> x(span + 1), y(span + 1);
        for (std::int64_t i = 0; i <= span; ++i) {
          x[i] = narrow<T>(static_cast<A>(integer(i, n)));
          y[i] = narrow<T>(static_cast<A>((integer(n, i) + 3) / 8));
        }
        for (std::int64_t out_stride : {1, 2, -3}) {
          const std::int64_t out_span = std::abs(out_stride) * std::max<std::int64_t>(0, n - 1);
          const std::int64_t out_first = out_stride < 0 ? out_span : 0;
          const T poison = narrow<T>(static_cast<A>(-77));
          std::vector<T> forward(out_span + 9, poison), backward(out_span + 9, poison);
          activate(Activation::kSigmoid, kDType, n, x.data() + first, stride,
                   forward.data() + out_first, out_stride);
          activate_backward(Activation::kSigmoid, kDType, n, x.data() + first, stride,
                            y.data() + first, stride, backward.data() + out_first, out_stride);
          std::vector<T> expected_forward(out_span + 9, poison);
          std::vector<T> expected_backward(out_span + 9, poison);
          for (std::int64_t i = 0; i < n; ++i) {
            const T x_i = x[first + i * stride], y_i = y[first + i * stride];
            const A rest = 1 - widen(y_i);
            expected_forward[out_first + i * out_stride] = sigmoid_of(std::vector<T>{x_i})[0];
            expected_backward[out_first + i * out_stride] =
                narrow<T>(widen(x_i) * rest * widen(y_i));
          }
          CHECK(same_bits(forward, expected_forward), name_of(isa) << ' ' << name_of(kDType)
                                                                   << " n " << n << " strides "
                                                                   << stride << ", " << out_stride);
          CHECK(same_bits(backward, expected_backward),
                name_of(isa) << ' ' << name_of(kDType) << " backward, n " << n << " strides "
                             << stride << ", " << out_stride);
        }
        if (stride == 0) continue;
        std::vector<T> in_place = x;
        activate(Activation::kSigmoid, kDType, n, in_place.data() + first, stride,
                 in_place.data() + first, stride);
        for (std::int64_t i = 0; i < n; ++i) {
          CHECK(same_bits(std::vector<T>{in_place[first + i * stride]},
                          sigmoid_of(std::vector<T>{x[first + i * stride]})),
                name_of(isa) << ' ' << name_of(kDType) << " in place, n " << n << " stride "
                             << stride);
        }
      }
    }
  }
}

// ---- instruction sets ---------------------------------------------------------------------------

bool throws_naming(const std::function<void()>& f, const std::string& what) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find(what) != std::string::npos;
  }
  return false;
}

void test_isas(const std::string& program) {
  CHECK(!supported_isas().empty() && supported_isas()[0] == Isa::kPortable, "portable is missing");
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    CHECK(parse_isa(name_of(isa)) == isa, name_of(isa));
    const std::vector<Isa> supported = supported_isas();
    const bool runs = std::find(supported.begin(), supported.end(), isa) != supported.end();
    const std::string command =
        "NEURON_EXT_CPU_ISA=" + std::string(name_of(isa)) + " '" + program + "' --active-isa";
    CHECK((std::system((command + " | grep -qx " + name_of(isa)).c_str()) == 0) == runs, command);
    if (runs) {
      set_active_isa(isa);
      CHECK(active_isa() == isa, name_of(isa));
    } else {
      CHECK(throws_naming([&] { set_active_isa(isa); }, name_of(isa)), name_of(isa));
    }
  }
  CHECK(!parse_isa("AVX2") && !parse_isa(""), "parse_isa takes exact names");
  const std::string command = "NEURON_EXT_CPU_ISA=nonsense '" + program + "' --active-isa";
  CHECK(
      std::system(
          (command + " | grep -q 'nonsense.*portable, avx2, avx512, avx512_bf16, amx'").c_str()) ==
          0,
      command);

  for (const KernelInfo& kernel : kernels()) {
    CHECK(!kernel.dtypes.empty(), kernel.name);
    CHECK(kernel.name.find(name_of(kernel.isa)) != std::string::npos, kernel.name);
  }
  set_active_isa(Isa::kPortable);
  Product(DType::kFloat32, 20, 20, 20, {}, integer, integer, integer).compute(serial());
  CHECK(std::string(last_kernel()) == "gemm_f32_4x8_portable", last_kernel());
}

// ---- every f32 ----------------------------------------------------------------------------------

int run_exhaustive_sigmoid() {
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    std::vector<double> worst(threads), where(threads);
    std::vector<std::thread> workers;
    for (int worker = 0; worker < threads; ++worker) {
      workers.emplace_back([&, worker] {
        constexpr std::uint64_t kPiece = 1 << 16;
        std::vector<float> x(kPiece);
        for (std::uint64_t begin = worker * kPiece; begin < std::uint64_t{1} << 32;
             begin += threads * kPiece) {
          for (std::uint64_t i = 0; i < kPiece; ++i) {
            x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(begin + i));
          }
          const std::vector<float> y = sigmoid_of(x);
          for (std::uint64_t i = 0; i < kPiece; ++i) {
            const double value = x[i];
            if (std::isnan(value)) {
              CHECK(std::isnan(y[i]), "sigmoid(nan) = " << y[i]);
              continue;
            }
            const double e = std::exp(-std::abs(value));
            const double exact = (value >= 0 ? 1 : e) / (1 + e);
            const double error = std::abs(y[i] - exact) / spacing(DType::kFloat32, exact);
            if (error > worst[worker]) worst[worker] = error, where[worker] = value;
          }
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    const auto largest = std::max_element(worst.begin(), worst.end());
    std::cout << "sigmoid f32 " << name_of(isa) << ", all 2^32 values: largest error " << *largest
              << " ULP at " << where[largest - worst.begin()] << '\n';
    CHECK(*largest < 1, name_of(isa));
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "";
  if (option == "--active-isa") {
    try {
      std::cout << name_of(active_isa()) << '\n';
    } catch (const std::invalid_argument& error) {
      std::cout << error.what() << '\n';
      return 1;
    }
    return 0;
  }
  if (option == "--exhaustive-sigmoid") return run_exhaustive_sigmoid();

  std::cout << "running on";
  for (Isa isa : supported_isas()) std::cout << ' ' << name_of(isa);
  std::cout << '\n';
  test_isas(argv[0]);
  test_sigmoid();
  test_all_16_bit_values<BFloat16>();
  test_all_16_bit_values<Float16>();
  test_narrowing<BFloat16>();
  test_narrowing<Float16>();
  test_stores<BFloat16>();
  test_stores<Float16>();
  test_elementwise_views<float>();
  test_elementwise_views<double>();
  test_elementwise_views<BFloat16>();
  test_elementwise_views<Float16>();
  test_exact_sums();
  test_layer_products();
  test_error_bounds();
  test_fused_sigmoid();
  test_tiny_values();
  test_isolation();
  test_threads();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
