// Tests of products that are computed as products of bf16 parts: AMX's rows, made from tiles of
// plain C++, so that any machine runs their packing, loops and driver; AMX's own where there is
// one; and AVX512-BF16's. Prints the accuracy of each beside that of f32 multiply-adds.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"
#include "registry.h"
#include "scalar.h"
#include "testing.h"
// Last: see isa_avx2.cpp.
#include "kernels-inl.h"
#include "tiles-inl.h"

namespace neuron_ext::cpu {
namespace {

// ---- rows for any machine -----------------------------------------------------------------------

/// As many lanes as a tile has columns, of whatever the machine has.
struct Vector {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  typedef float Reg __attribute__((vector_size(64)));
  typedef std::uint16_t Halves __attribute__((vector_size(32)));

  static Reg set1(float x) { return x - Reg{}; }
  static Reg fma(Reg a, Reg b, Reg c) {
    for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return fma(a, b, c); }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  template <class Indices>
  static Indices lookup(const std::uint32_t (&table)[8], Indices i) {
    for (int lane = 0; lane < kLanes; ++lane) i[lane] = table[i[lane] % 8];
    return i;
  }
  static Reg widen(Halves h) {
    Reg lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = cpu::widen(Float16{h[i]});
    return lanes;
  }
  static Halves narrow(Reg x) {
    Halves lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = cpu::narrow<Float16>(x[i]).bits;
    return lanes;
  }
};

/// The instructions as Intel defines them.
struct PlainTiles {
  using Row = Vector::Reg;
  struct State {
    bool configured = false;
    Row sums[4][kTileRows];
  };
  static State& state() {
    static thread_local State state;
    return state;
  }

  static void configure() {
    if (state().configured) std::abort();
    state().configured = true;
  }
  static void release() {
    if (!state().configured) std::abort();
    state().configured = false;
  }
  static void zero() {
    for (auto& tile : configured().sums) std::fill_n(tile, kTileRows, Row{});
  }
  static void load(const float* sums, std::int64_t stride) {
    for (int tile = 0; tile < 4; ++tile) {
      for (int i = 0; i < kTileRows; ++i) {
        configured().sums[tile][i] = cpu::load<Vector>(place(sums, stride, tile, i));
      }
    }
  }
  template <int kRows, int kColumns>
  static void store(float* sums, std::int64_t stride) {
    for (int tile = 0; tile < 4; ++tile) {
      if (tile / 2 >= kRows || tile % 2 >= kColumns) continue;
      for (int i = 0; i < kTileRows; ++i) {
        cpu::store<Vector>(const_cast<float*>(place(sums, stride, tile, i)),
                           configured().sums[tile][i]);
      }
    }
  }
  template <int kRows, int kColumns>
  static void multiply_add(const float* a, const float* b) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        multiply_add(a + i * kTileWords, b + j * kTileWords, configured().sums[2 * i + j]);
      }
    }
  }

 private:
  static State& configured() {
    if (!state().configured) std::abort();
    return state();
  }
  static const float* place(const float* sums, std::int64_t stride, int tile, int i) {
    return sums + (tile / 2 * kTileRows + i) * stride + tile % 2 * kTileRows;
  }

  /// Even and odd k are summed apart, from zero, one rounding to a multiply-add.
  static void multiply_add(const float* a, const float* b, Row (&sums)[kTileRows]) {
    for (int i = 0; i < kTileRows; ++i) {
      Row even = {}, odd = {};
      for (int p = 0; p < kTileRows; ++p) {
        const Words<Vector> a_pair =
            Words<Vector>{} + std::bit_cast<std::uint32_t>(a[i * kTileRows + p]);
        const auto b_pair = reinterpret_cast<Words<Vector>>(cpu::load<Vector>(b + p * kTileRows));
        even = add_product(lower<Vector>(a_pair), lower<Vector>(b_pair), even);
        odd = add_product(upper<Vector>(a_pair), upper<Vector>(b_pair), odd);
      }
      sums[i] = flushed(flushed(sums[i]) + flushed(even + odd));
    }
  }
  static Row add_product(Row a, Row b, Row c) {
    a = flushed(a), b = flushed(b);
    const Row product = a * b;  // exact unless it's tiny
    Row sum = product + c;
    const Row magnitude = product < 0 ? -product : product;
    for (int i = 0; i < Vector::kLanes; ++i) {
      if (a[i] != 0 && b[i] != 0 && magnitude[i] < 0x1p-100f) sum[i] = std::fma(a[i], b[i], c[i]);
    }
    return flushed(sum);
  }
  static Row flushed(Row x) {
    const auto bits = reinterpret_cast<Words<Vector>>(x);
    return (bits & 0x7f800000) == 0 ? reinterpret_cast<Row>(bits & 0x80000000) : x;
  }
};

constexpr GemmKernel kPlain = blocked_kernel<Vector, kCarefulMr>("gemm_f32", Isa::kPortable);
constexpr auto kTileRowsOfTable = tiles_kernels<Vector, PlainTiles>(&kPlain);

}  // namespace
}  // namespace neuron_ext::cpu

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// A row for one dtype. Its products are inexact by up to `loss` of |a| |b|.
struct Row {
  const GemmKernel* kernel;
  DType dtype;
  double loss;
  bool native;
  std::string name() const { return std::string(kernel->name) + (native ? "" : ", tiles in C++"); }
};

std::vector<Row> all_rows() {
  std::vector<Row> rows;
  const auto add = [&](std::span<const GemmKernel> kernels, bool native) {
    for (const GemmKernel& kernel : kernels) {
      if (kernel.careful == nullptr) continue;
      for (DType dtype : kDTypes) {
        if (!kernel.takes(dtype)) continue;
        const std::string name = kernel.name;
        const double loss = dtype != DType::kFloat32                   ? 0
                            : name.find("bf16x6") != std::string::npos ? 0x1p-24
                            : name.find("bf16x3") != std::string::npos ? 0x1p-15
                                                                       : 0x1.02p-7;
        rows.push_back({&kernel, dtype, loss, native});
      }
    }
  };
  add(kTileRowsOfTable, false);
#if defined(__x86_64__)
  if (is_supported(Isa::kAvx512Bf16)) add(avx512_bf16_kernels().gemm, true);
  if (is_supported(Isa::kAmx)) add(amx_kernels().gemm, true);
#endif
  return rows;
}

std::string describe(const Row& row, const Product& product) {
  return row.name() + ": " + product.name();
}

// ---- exact sums ---------------------------------------------------------------------------------

double sign(std::int64_t i, std::int64_t j) { return std::fmod(integer(i, j), 2); }

/// -1, 0 or 1 in each of as many parts.
template <int kParts>
double in_parts(std::int64_t i, std::int64_t j) {
  double x = 0;
  for (int part = 0; part < kParts; ++part) x += std::ldexp(sign(i + 40 * part, j), -9 * part);
  return x;
}

void test_exact_sums() {
  for (const Row& row : all_rows()) {
    int turn = 0;
    const auto check = [&](std::int64_t m, std::int64_t n, std::int64_t k, const Values& a,
                           const Values& b) {
      const Product product(row.dtype, m, n, k, Product::Options::of(turn++), a, b, exact_saved);
      const Product::Result expected =
          product.expected(reference_gemm(product.desc, product.inputs));
      CHECK(product.compute(*row.kernel, serial()) == expected, describe(row, product));
      CHECK(product.compute(*row.kernel, on_threads<3>()) == expected, describe(row, product)
                                                                           << ", 3 threads");
    };
    // Every remainder of the tiles, and of their k.
    for (std::int64_t m = 0; m <= 35; ++m) {
      for (std::int64_t n = m % 5; n <= 35; n += 5) check(m, n, 1 + (m + n) % 6, integer, integer);
    }
    for (std::int64_t k = 0; k <= 70; ++k) check(17, 33, k, integer, integer);
    // Both sides of a block, several tiles, several chunks of k.
    for (std::int64_t k : {255, 256, 257, 300, 511, 513, 1025}) check(35, 18, k, integer, integer);
    check(90, 130, 70, integer, integer);
    check(12, 0, 9000, integer, integer);
    check(9, 20, 8192 + 77, integer, integer);
    // Numbers of several parts: every product of planes, where all others are zero.
    const bool three = row.loss == 0x1p-24, two = three || row.dtype == DType::kFloat16;
    for (std::int64_t k = 1; k <= 8; ++k) {
      for (int repeat = 0; repeat < 4; ++repeat) {
        if (three) check(33, 20, k, in_parts<3>, sign);
        if (three) check(20, 33, k, sign, in_parts<3>);
        if (two) check(20, 20, k, in_parts<2>, in_parts<2>);
        if (row.loss == 0x1p-15) check(33, 20, k, in_parts<2>, sign);
        if (row.loss == 0x1p-15) check(20, 33, k, sign, in_parts<2>);
      }
    }
  }
}

// ---- accuracy -----------------------------------------------------------------------------------

struct Errors {
  double largest = 0, sum = 0;
  std::int64_t count = 0;
};

/// Errors in units of 2^-24 (|A| |B|).
Errors errors_of(const Product& product, const Product::Result& result,
                 const ReferenceGemm& reference) {
  Errors errors;
  for (std::int64_t i = 0; i < product.desc.m; ++i) {
    for (std::int64_t j = 0; j < product.desc.n; ++j) {
      const std::int64_t e = i * product.desc.n + j;
      if (reference.d_magnitude[e] == 0) continue;
      const double error =
          std::abs(product.d(result, i, j) - reference.d[e]) / (0x1p-24 * reference.d_magnitude[e]);
      errors.largest = std::max(errors.largest, error);
      errors.sum += error;
      ++errors.count;
    }
  }
  return errors;
}

void test_accuracy() {
  struct Data {
    const char* name;
    std::int64_t k;
    Values a, b;
  };
  const std::int64_t m = 40, n = 48;
  std::vector<Data> data;
  for (std::int64_t k : {64, 512, 4000}) {
    data.push_back({"normal", k, random_values(1, m, k, false), random_values(2, k, n, false)});
    data.push_back({"uniform", k,
                    [a = random_values(3, m, k, false)](auto i, auto p) {
                      return std::abs(std::fmod(a(i, p), 1));
                    },
                    [b = random_values(4, k, n, false)](auto p, auto j) {
                      return std::abs(std::fmod(b(p, j), 1));
                    }});
  }
  data.push_back({"rows of 1e30 and 1e-30", 512, random_values(5, m, 512, true),
                  random_values(6, 512, n, false)});
  // Every other term takes back the one before it, but for its last bits.
  data.push_back({"cancelling", 512,
                  [a = random_values(7, m, 512, false)](auto i, auto p) {
                    return p % 2 == 0 ? a(i, p) : -a(i, p - 1) * (1 + 0x1p-18);
                  },
                  [b = random_values(8, 512, n, false)](auto p, auto j) { return b(p & ~1, j); }});
  std::cout << "errors in 2^-24 (|A||B|): largest, mean\n" << std::fixed << std::setprecision(3);
  for (const Data& each : data) {
    const Product product(DType::kFloat32, m, n, each.k, {}, each.a, each.b, integer);
    const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
    const Errors plain = errors_of(product, product.compute(kPlain, serial()), reference);
    const auto print = [&](const std::string& name, const Errors& errors) {
      std::cout << "  " << std::left << std::setw(24) << each.name << " k " << std::setw(5)
                << each.k << std::setw(46) << name << errors.largest << ' '
                << errors.sum / static_cast<double>(errors.count) << '\n';
    };
    print("f32 multiply-adds", plain);
    for (const Row& row : all_rows()) {
      if (row.dtype != DType::kFloat32) continue;
      const Errors errors = errors_of(product, product.compute(*row.kernel, serial()), reference);
      print(row.name(), errors);
      // An instruction's sums of 16 terms each, added; blocks of 8 of them, added; blocks.
      const double bound = row.loss * 0x1p24 + 16 + 2 + 8 + static_cast<double>(each.k) / 256 + 2;
      CHECK(errors.largest <= bound, describe(row, product) << ": " << errors.largest);
      if (row.loss <= 0x1p-24) {
        CHECK(errors.largest <= std::max(plain.largest, 1.0), describe(row, product));
        CHECK(errors.sum <= plain.sum, describe(row, product));
      }
    }
  }
}

/// 16-bit results are f32's, rounded once.
void test_rounding_of_halves() {
  for (const Row& row : all_rows()) {
    if (row.dtype == DType::kFloat32) continue;
    for (std::int64_t k : {30, 700}) {
      const std::int64_t m = 40, n = 40;
      const Product product(row.dtype, m, n, k, {}, random_values(1, m, k, false),
                            random_values(2, k, n, false), integer);
      const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
      const Product::Result result = product.compute(*row.kernel, serial());
      for (std::int64_t e = 0; e < m * n; ++e) {
        const double error = std::abs(product.d(result, e / n, e % n) - reference.d[e]);
        CHECK(error <= 32 * 0x1p-24 * reference.d_magnitude[e] +
                           0.501 * spacing(row.dtype, reference.d[e]),
              describe(row, product));
      }
    }
  }
}

// ---- what parts can't hold ----------------------------------------------------------------------

/// As core_tests' test of the same: subnormal operands, terms and results count like all others.
void test_tiny_values() {
  struct Exponents {
    int a, b;
  };
  for (const Row& row : all_rows()) {
    if (row.dtype == DType::kFloat16) continue;  // has none
    for (const Exponents& exponents :
         {Exponents{-130, 100}, Exponents{100, -130}, Exponents{-60, -60}, Exponents{-66, -66},
          Exponents{-20, -110}, Exponents{0, -131}, Exponents{-45, -45}, Exponents{-105, 40}}) {
      for (std::int64_t k : {2, 33, 300}) {
        for (bool all_tiny : {false, true}) {
          const std::int64_t m = 34, n = 45;
          const Values a = random_values(6, m, k, false), b = random_values(7, k, n, false);
          const Values a_scaled = [&](std::int64_t i, std::int64_t p) {
            return std::ldexp(a(i, p), exponents.a);
          };
          const Values b_scaled = [&](std::int64_t p, std::int64_t j) {
            return std::ldexp(b(p, j), all_tiny || j % 7 == 3 ? exponents.b : 0);
          };
          const Product product(row.dtype, m, n, k, {}, a_scaled, b_scaled, integer);
          const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
          const Product::Result result = product.compute(*row.kernel, serial());
          for (std::int64_t e = 0; e < m * n; ++e) {
            const double exact = reference.d[e], d = product.d(result, e / n, e % n);
            const double bound =
                (static_cast<double>(k + 3) * 0x1p-24 + row.loss) * reference.d_magnitude[e] +
                static_cast<double>(k + 3) * 0x1p-150 + 0.501 * spacing(row.dtype, exact);
            CHECK(std::abs(d - exact) <= bound,
                  describe(row, product) << " scaled by 2^" << exponents.a << " and 2^"
                                         << exponents.b << ": " << d << " for " << exact);
          }
        }
      }
    }
  }
}

/// Values that have no parts give what multiply-adds give, bit for bit, and change no bit of the
/// rows and columns without them.
void test_special_values() {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const Row& row : all_rows()) {
    const double largest = row.dtype == DType::kFloat16    ? 65504
                           : row.dtype == DType::kBFloat16 ? 0x1.fep127
                                                           : 0x1.fffffep127;
    for (double special : {kInf, -kInf, kNan, largest, -largest, largest / 2, 0x1p-149}) {
      for (std::int64_t k : {3, 45, 270}) {
        for (Layout layout : {Layout::kRows, Layout::kColumns}) {
          const std::int64_t m = 40, n = 45;
          const Values a = random_values(9, m, k, false), b = random_values(10, k, n, false);
          Product::Options options;
          options.a = options.b = layout;
          options.a_sum = true;
          const auto product_with = [&](bool in_a, bool in_b) {
            return Product(
                row.dtype, m, n, k, options,
                [&](std::int64_t i, std::int64_t p) {
                  return in_a && i == 2 && p == k - 1 ? special : a(i, p);
                },
                [&](std::int64_t p, std::int64_t j) {
                  return in_b && j == 35 && p == 1 ? special : j == 3 ? 0 : b(p, j);
                },
                integer);
          };
          const Product with = product_with(true, true), without = product_with(false, false);
          const Product::Result d = with.compute(*row.kernel, serial());
          const Product::Result usual = without.compute(*row.kernel, serial());
          const Product::Result by_f32 = with.compute(kPlain, serial());
          const bool is_split = std::isfinite(special) && std::abs(special) < largest / 4 &&
                                std::abs(special) > 0x1p-100;
          for (std::int64_t i = 0; i < m; ++i) {
            for (std::int64_t j = 0; j < n; ++j) {
              const bool touched = i == 2 || j == 35;
              const double value = with.d(d, i, j);
              const double right = touched ? with.d(by_f32, i, j) : without.d(usual, i, j);
              if (touched && (is_split || row.dtype == DType::kFloat16)) continue;
              // Blocks of k other than the special value's are computed as usual.
              const double allowed = touched && std::isfinite(right)
                                         ? std::abs(right) * (row.loss + 0x1p-20) +
                                               (row.loss + 0x1p-20) * static_cast<double>(k) * 8
                                         : 0;
              CHECK(value == right || (std::isnan(value) && std::isnan(right)) ||
                        std::abs(value - right) <= allowed,
                    describe(row, with) << " special " << special << " at " << i << ", " << j
                                        << ": " << value << " for " << right);
            }
          }
          const double sum = reference_load(row.dtype, d.a_sum.data(), Product::kGuard + 2);
          const double right = reference_load(row.dtype, by_f32.a_sum.data(), Product::kGuard + 2);
          CHECK((std::isnan(sum) && std::isnan(right)) || sum == right ||
                    std::abs(sum - right) <= 0x1p-7 * std::abs(right) + 0x1p-18,
                describe(row, with) << " sum of A's row " << sum << " for " << right);
        }
      }
    }
  }
}

/// Terms next to the largest number that take each other back: no sum of two of them is finite.
void test_sums_near_overflow() {
  for (const Row& row : all_rows()) {
    if (row.dtype == DType::kFloat16) continue;
    const std::int64_t m = 20, n = 20;
    for (std::int64_t k : {1, 2, 40}) {
      // Products next to 2^127, of either sign.
      const Values a = [](std::int64_t i, std::int64_t p) {
        return std::ldexp(1.9921875 - static_cast<double>(i % 3) / 16, 63) * (p % 2 == 0 ? 1 : -1);
      };
      const Values b = [](std::int64_t p, std::int64_t j) {
        return std::ldexp(1.9921875 - static_cast<double>(p / 2 % 2 + j % 2) / 8, 62);
      };
      const Product product(row.dtype, m, n, k, {}, a, b, integer);
      const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
      const Product::Result result = product.compute(*row.kernel, serial());
      for (std::int64_t e = 0; e < m * n; ++e) {
        const double d = product.d(result, e / n, e % n);
        CHECK(std::isfinite(d) &&
                  std::abs(d - reference.d[e]) <=
                      0x1p-16 * reference.d_magnitude[e] + spacing(row.dtype, reference.d[e]),
              describe(row, product) << ": " << d << " for " << reference.d[e]);
      }
    }
  }
}

// ---- threads, and the choice --------------------------------------------------------------------

void test_threads() {
  struct Shape {
    std::int64_t m, n, k;
  };
  for (const Row& row : all_rows()) {
    for (const Shape& shape : {Shape{100, 90, 300}, Shape{30, 40, 9000}}) {
      Product::Options options;
      options.bias = options.prologue = options.a_sum = true;
      const Values a = random_values(3, shape.m, shape.k, row.dtype == DType::kFloat32);
      const Product product(row.dtype, shape.m, shape.n, shape.k, options, a,
                            random_values(4, shape.k, shape.n, false), a);
      const Product::Result one = product.compute(*row.kernel, serial());
      CHECK(product.compute(*row.kernel, on_threads<2>()) == one, describe(row, product));
      CHECK(product.compute(*row.kernel, on_threads<7>()) == one, describe(row, product));
    }
  }
}

void test_choice() {
  GemmDesc desc;
  const auto chosen = [&](Precision precision, std::int64_t m, std::int64_t n, std::int64_t k) {
    desc.m = m, desc.n = n, desc.k = k, desc.precision = precision;
    for (const GemmKernel& kernel : kTileRowsOfTable) {
      if (kernel.takes(desc.dtype) && kernel.accepts(desc, form_of(desc)))
        return std::string(kernel.name);
    }
    return std::string();
  };
  CHECK(chosen(Precision::kHighest, 512, 512, 512) == "gemm_f32_bf16x6_32x32_amx", "");
  CHECK(chosen(Precision::kHigh, 512, 512, 512) == "gemm_f32_bf16x3_32x32_amx", "");
  CHECK(chosen(Precision::kMedium, 512, 512, 512) == "gemm_f32_bf16_32x32_amx", "");
  CHECK(chosen(Precision::kStrict, 512, 512, 512).empty(), "strict");
  CHECK(chosen(Precision::kHighest, 2, 512, 512).empty(), "narrow");
  CHECK(chosen(Precision::kHighest, 512, 512, 5).empty(), "six products of 5 k of 32");
  CHECK(chosen(Precision::kMedium, 512, 512, 5) == "gemm_f32_bf16_32x32_amx", "one product");
  desc.dtype = DType::kBFloat16;
  CHECK(chosen(Precision::kStrict, 512, 512, 512) == "gemm_bf16_32x32_amx", "bf16");
  desc.dtype = DType::kFloat16;
  CHECK(chosen(Precision::kStrict, 512, 512, 512) == "gemm_f16_bf16x4_32x32_amx", "f16");
  desc.dtype = DType::kFloat64;
  CHECK(chosen(Precision::kHighest, 512, 512, 512).empty(), "f64");

  // Of the whole table: only `medium` gives up precision without AMX.
  desc.dtype = DType::kFloat32;
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    for (Precision precision : {Precision::kStrict, Precision::kHighest, Precision::kHigh}) {
      desc.precision = precision;
      const std::string name = choose_gemm(desc).name;
      const bool splits = isa == Isa::kAmx && precision != Precision::kStrict;
      CHECK((name.find("bf16") != std::string::npos) == splits, name);
    }
    desc.precision = Precision::kMedium;
    const std::string name = choose_gemm(desc).name;
    CHECK((name.find("f32_bf16") != std::string::npos) == (isa >= Isa::kAvx512Bf16), name);
  }
}

}  // namespace

int main() {
  test_choice();
  test_exact_sums();
  test_accuracy();
  test_rounding_of_halves();
  test_tiny_values();
  test_special_values();
  test_sums_near_overflow();
  test_threads();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
