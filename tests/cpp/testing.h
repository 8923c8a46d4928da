// What the tests of the core share: checks that report, threads, operands of any layout, and
// products with their expected results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "neuron_ext/cpu.h"
#include "neuron_ext/last_kernel.h"
#include "reference.h"
#include "registry.h"

namespace neuron_ext::testing {

using namespace neuron_ext::cpu;

using Bytes = std::vector<std::byte>;

// ---- reporting ----------------------------------------------------------------------------------

inline int failures = 0;
inline std::mutex report_mutex;

#define CHECK(condition, message)                                                  \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::ostringstream text;                                                     \
      text << message;                                                             \
      const std::lock_guard lock(report_mutex);                                    \
      if (++failures <= 20)                                                        \
        std::cerr << __LINE__ << ": " << #condition << ": " << text.str() << '\n'; \
    }                                                                              \
  } while (false)

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                    DType::kFloat16};

// ---- threads ------------------------------------------------------------------------------------

template <int kThreads>
void run_on_threads(std::int64_t n, std::int64_t grain, ParallelFor::Body body,
                    const void* closure) {
  const std::int64_t piece = std::max(grain, (n + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (std::int64_t begin = piece; begin < n; begin += piece) {
    threads.emplace_back(body, closure, begin, std::min(begin + piece, n));
  }
  body(closure, 0, std::min(piece, n));
  for (std::thread& thread : threads) thread.join();
}

template <int kThreads>
ParallelFor on_threads() {
  return ParallelFor(run_on_threads<kThreads>, kThreads);
}

// ---- operands -----------------------------------------------------------------------------------

using Values = std::function<double(std::int64_t, std::int64_t)>;

enum class Layout { kRows, kColumns, kGaps, kNegative, kExpandedRows, kExpandedColumns };
inline constexpr int kLayouts = 6;

/// A rows x columns view of dtype, somewhere inside its storage.
struct View {
  Bytes storage;
  const void* base = nullptr;
  std::int64_t stride_row = 0, stride_column = 0;

  View(DType dtype, Layout layout, std::int64_t rows, std::int64_t columns, const Values& values) {
    switch (layout) {
      case Layout::kRows:
        stride_row = columns, stride_column = 1;
        break;
      case Layout::kColumns:
        stride_row = 1, stride_column = rows;
        break;
      case Layout::kGaps:
        stride_row = 3 * columns + 5, stride_column = 3;
        break;
      case Layout::kNegative:
        stride_row = -(columns + 1), stride_column = 1;
        break;
      case Layout::kExpandedRows:
        stride_row = 0, stride_column = 1;
        break;
      case Layout::kExpandedColumns:
        stride_row = 1, stride_column = 0;
        break;
    }
    const std::int64_t row_span = stride_row * std::max<std::int64_t>(0, rows - 1);
    const std::int64_t column_span = stride_column * std::max<std::int64_t>(0, columns - 1);
    const std::int64_t first = -std::min<std::int64_t>(0, row_span);
    const std::int64_t count = std::abs(row_span) + std::abs(column_span) + 1;
    // Exactly as large as the view, so that a sanitizer sees any read beyond it; elsewhere nan.
    storage.assign(static_cast<std::size_t>(count * size_of(dtype)), std::byte{0xff});
    if (rows == 0 || columns == 0) return;
    base = storage.data() + first * size_of(dtype);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const bool same_row = layout == Layout::kExpandedRows;
        const bool same_column = layout == Layout::kExpandedColumns;
        reference_store(dtype, storage.data(), first + i * stride_row + j * stride_column,
                        values(same_row ? 0 : i, same_column ? 0 : j));
      }
    }
  }
};

/// One product: its operands, its reference result, and room for results.
struct Product {
  struct Options {
    Layout a = Layout::kRows, b = Layout::kColumns, saved = Layout::kRows;
    bool bias = false, bias_is_scalar = false, prologue = false, a_sum = false;
    bool epilogue_gradient = false, d_sum = false;
    Layout d_saved = Layout::kRows;  // of contiguous columns
    Activation epilogue = Activation::kIdentity;

    /// All layouts and all parts of a product, and most pairs of them, as turns go by.
    static Options of(int turn) {
      Options options;
      options.a = static_cast<Layout>(turn % kLayouts);
      options.b = static_cast<Layout>(turn / 2 % kLayouts);
      options.saved = static_cast<Layout>(turn / 3 % kLayouts);
      options.bias = turn % 3 != 0;
      options.bias_is_scalar = turn % 9 == 1;
      options.prologue = turn % 4 == 1;
      options.a_sum = turn % 5 < 2;
      return options;
    }
  };
  struct Result {
    Bytes d, a_sum, d_sum;
    bool operator==(const Result&) const = default;
  };

  Product(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k, const Options& options,
          const Values& a_values, const Values& b_values, const Values& saved_values)
      : a(dtype, options.a, m, k, a_values),
        b(dtype, options.b, k, n, b_values),
        saved(dtype, options.saved, m, options.prologue ? k : 0, saved_values),
        d_saved(dtype, options.d_saved, options.epilogue_gradient ? m : 0, n, saved_values),
        bias(dtype, Layout::kGaps, options.bias ? 1 : 0, n, b_values) {
    desc.m = m, desc.n = n, desc.k = k, desc.dtype = dtype;
    desc.a_stride_m = a.stride_row, desc.a_stride_k = a.stride_column;
    desc.b_stride_k = b.stride_row, desc.b_stride_n = b.stride_column;
    desc.d_stride_m = n + 3;
    desc.has_bias = options.bias;
    desc.bias_stride = options.bias_is_scalar ? 0 : bias.stride_column;
    desc.epilogue = options.epilogue;
    desc.epilogue_gradient =
        options.epilogue_gradient ? Activation::kSigmoid : Activation::kIdentity;
    desc.d_saved_stride_m = d_saved.stride_row;
    desc.prologue = options.prologue ? Activation::kSigmoid : Activation::kIdentity;
    desc.saved_stride_m = saved.stride_row, desc.saved_stride_k = saved.stride_column;
    desc.has_a_sum = options.a_sum;
    desc.has_d_sum = options.d_sum;
    inputs.a = a.base, inputs.b = b.base, inputs.saved = saved.base, inputs.bias = bias.base;
    inputs.d_saved = d_saved.base;
  }

  static constexpr std::int64_t kGuard = 40;  // poisoned elements around each output

  Result compute(const ParallelFor& parallel_for) const {
    return compute_by([&](const GemmPointers& at) { gemm(desc, at, parallel_for); });
  }

  /// By a row that needn't be the one to be chosen.
  Result compute(const GemmKernel& row, const ParallelFor& parallel_for) const {
    return compute_by([&](const GemmPointers& at) { row.run(row, desc, at, parallel_for); });
  }

  template <class F>
  Result compute_by(const F& compute) const {
    const std::int64_t size = size_of(desc.dtype);
    Result result = poisoned();
    GemmPointers at = inputs;
    at.d = result.d.data() + kGuard * size;
    at.a_sum = result.a_sum.data() + kGuard * size;
    compute(at);
    return result;
  }

  /// Memory for results.
  Result poisoned() const {
    const auto elements = [&](std::int64_t count) {
      return Bytes((count + 2 * kGuard) * size_of(desc.dtype), std::byte{0xa5});
    };
    return {elements(desc.m * desc.d_stride_m), elements(desc.m), elements(desc.n)};
  }

  /// What compute() must give where the reference's result is exact: rounded once, and nothing else
  /// written.
  Result expected(const ReferenceGemm& reference) const {
    Result result = poisoned();
    for (std::int64_t i = 0; i < desc.m; ++i) {
      for (std::int64_t j = 0; j < desc.n; ++j) {
        reference_store(desc.dtype, result.d.data(), kGuard + i * desc.d_stride_m + j,
                        reference.d[i * desc.n + j]);
      }
      if (desc.has_a_sum) {
        reference_store(desc.dtype, result.a_sum.data(), kGuard + i, reference.a_sum[i]);
      }
    }
    for (std::int64_t j = 0; desc.has_d_sum && j < desc.n; ++j) {
      double sum = 0;
      for (std::int64_t i = 0; i < desc.m; ++i) sum += d(result, i, j);
      reference_store(desc.dtype, result.d_sum.data(), kGuard + j, sum);
    }
    return result;
  }

  double d(const Result& result, std::int64_t i, std::int64_t j) const {
    return reference_load(desc.dtype, result.d.data(), kGuard + i * desc.d_stride_m + j);
  }

  std::string name() const {
    std::ostringstream text;
    text << name_of(active_isa()) << ' ' << last_kernel() << ' ' << name_of(desc.dtype) << " m "
         << desc.m << " n " << desc.n << " k " << desc.k << " A (" << desc.a_stride_m << ", "
         << desc.a_stride_k << ") B (" << desc.b_stride_k << ", " << desc.b_stride_n << ") saved ("
         << desc.saved_stride_m << ", " << desc.saved_stride_k << ") bias " << desc.has_bias
         << " prologue " << name_of(desc.prologue) << " epilogue " << name_of(desc.epilogue)
         << " gradient " << name_of(desc.epilogue_gradient) << " (" << desc.d_saved_stride_m
         << ", 1) a_sum " << desc.has_a_sum << " d_sum " << desc.has_d_sum;
    return text.str();
  }

  GemmDesc desc;
  GemmPointers inputs;
  View a, b, saved, d_saved, bias;
};

/// Compares every ISA's result, on one thread and on several, with the exact one, bit for bit.
inline void check_exact(const Product& product) {
  const Product::Result expected = product.expected(reference_gemm(product.desc, product.inputs));
  for (Isa isa : supported_isas()) {
    set_active_isa(isa);
    CHECK(product.compute(serial()) == expected, product.name());
    CHECK(product.compute(on_threads<3>()) == expected, product.name() << ", 3 threads");
  }
}

inline double spacing(DType dtype, double value) {
  const int bits[] = {24, 53, 8, 11}, lowest[] = {-149, -1074, -133, -24};
  const int index = static_cast<int>(dtype);
  int exponent;
  std::frexp(value, &exponent);
  return std::ldexp(1.0, std::max(exponent - bits[index], lowest[index]));
}

// Small integers, without a pattern that a wrong index could repeat.
inline double integer(std::int64_t i, std::int64_t j) {
  std::uint64_t mixed = static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u +
                        static_cast<std::uint64_t>(j) * 0xc2b2ae3d27d4eb4fu + 1;
  mixed ^= mixed >> 29;
  mixed *= 0xbf58476d1ce4e5b9u;
  return static_cast<double>((mixed >> 40) % 7) - 3;
}

// Outputs whose gradient y (1 - y) is exact: 0, 1/4, 0, -2.
inline double exact_saved(std::int64_t i, std::int64_t j) {
  const double outputs[] = {0, 0.5, 1, 2};
  return outputs[static_cast<int>(integer(i + 11, j)) & 3];
}

/// Values drawn once for every (i, j) of a rows x columns operand.
inline Values random_values(unsigned seed, std::int64_t rows, std::int64_t columns,
                            bool scale_rows) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<std::size_t>(rows * columns));
  for (std::int64_t i = 0; i < rows; ++i) {
    const double scale = !scale_rows ? 1 : i % 2 == 0 ? 1e30 : 1e-30;
    for (std::int64_t j = 0; j < columns; ++j) values[i * columns + j] = scale * normal(engine);
  }
  return [values, columns](std::int64_t i, std::int64_t j) { return values[i * columns + j]; };
}

/// `count` of them, as dtype holds them.
inline Bytes random_array(DType dtype, std::int64_t count, unsigned seed) {
  Bytes array(static_cast<std::size_t>(count * size_of(dtype)));
  const Values values = random_values(seed, 1, count, false);
  for (std::int64_t i = 0; i < count; ++i) reference_store(dtype, array.data(), i, values(0, i));
  return array;
}

}  // namespace neuron_ext::testing
