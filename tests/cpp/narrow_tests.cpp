// Tests of products that aren't squares: few rows or columns, long batches, few features. Every
// form that they take (csrc/cpu/forms.h), on both sides of what decides between them.
#include <cmath>
#include <iostream>
#include <vector>

#include "forms.h"
#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// fprop, dgrad or wgrad of a layer whose tensors are contiguous, as layers call them.
Product layer_product(char which, DType dtype, std::int64_t batch, std::int64_t in,
                      std::int64_t out, const Values& a, const Values& b, const Values& saved) {
  Product::Options options;
  std::int64_t m = batch, n = out, k = in;
  if (which == 'f') {
    options.bias = true;
  } else if (which == 'd') {
    options.b = Layout::kRows;
    options.prologue = true;
    n = in, k = out;
  } else {
    options.a = options.saved = Layout::kColumns;
    options.b = Layout::kRows;
    options.prologue = options.a_sum = true;
    m = out, n = in, k = batch;
  }
  Product product(dtype, m, n, k, options, a, b, saved);
  product.desc.d_stride_m = n;
  return product;
}

void test_few_features_are_exact() {
  for (DType dtype : kDTypes) {
    for (char which : {'f', 'd', 'w'}) {
      // Every remainder of a vector's lanes, and of the groups in which rows and vectors go.
      for (std::int64_t in = 1; in <= 36; in += in < 18 ? 1 : 3) {
        for (std::int64_t out : {1, 2, 3, 5, 8, 17}) {
          const std::int64_t batch = 64 + (in + out) % 7;
          check_exact(layer_product(which, dtype, batch, in, out, integer, integer, exact_saved));
        }
      }
      // Several strips, and several chunks of a long sum.
      for (std::int64_t batch : {255, 256, 700}) {
        check_exact(layer_product(which, dtype, batch, 3, 2, integer, integer, exact_saved));
        check_exact(layer_product(which, dtype, batch, 1, 1, integer, integer, exact_saved));
        check_exact(layer_product(which, dtype, batch, 64, 10, integer, integer, exact_saved));
        check_exact(layer_product(which, dtype, batch, 10, 64, integer, integer, exact_saved));
      }
      const std::int64_t chunks = dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 1 : 3;
      check_exact(
          layer_product(which, dtype, chunks * 4096 + 33, 5, 3, integer, integer, exact_saved));
    }
  }
}

/// Few terms of many sums, of a small batch's weight gradient among them, and rows of D that don't
/// end with a vector.
void test_few_terms_are_exact() {
  for (DType dtype : kDTypes) {
    for (std::int64_t few : {1, 2, 3, 8, 13}) {
      for (std::int64_t wide : {64, 77, 300, 1024 + 5}) {
        check_exact(layer_product('f', dtype, 70, few, wide, integer, integer, exact_saved));
        check_exact(layer_product('d', dtype, 70, wide, few, integer, integer, exact_saved));
        check_exact(layer_product('w', dtype, few, wide, 70, integer, integer, exact_saved));
        Product::Options options;
        options.a = Layout::kColumns;
        options.b = Layout::kRows;
        check_exact(Product(dtype, 70, wide, few, options, integer, integer, exact_saved));
      }
    }
  }
}

void test_few_rows_are_exact() {
  for (DType dtype : kDTypes) {
    // Several blocks of k, on every remainder of the groups of rows and columns.
    for (std::int64_t m : {1, 2, 3, 5, 8, 15, 16, 33, 64}) {
      for (std::int64_t n : {1, 6, 67}) {
        for (std::int64_t k : {256, 300, 2048 + 5}) {
          if (m * n * k > 3'000'000) continue;
          Product::Options options;
          options.bias = true;
          check_exact(Product(dtype, m, n, k, options, integer, integer, exact_saved));
          options.b = Layout::kRows;
          check_exact(Product(dtype, m, n, k, options, integer, integer, exact_saved));
        }
      }
    }
    // Few columns of A's many rows.
    for (std::int64_t n : {1, 4, 21, 40}) {
      Product::Options options;
      options.bias = true;
      check_exact(Product(dtype, 130, n, 300, options, integer, integer, exact_saved));
    }
  }
}

/// Rows of B that are read side by side, in several strips of columns and blocks of k. Cutting the
/// columns for other numbers of threads changes how many rows that are, but no bit.
void test_wide_rows() {
  Product::Options options;
  options.b = Layout::kRows;
  for (DType dtype : kDTypes) {
    for (std::int64_t m : {1, 3, 8}) {
      for (std::int64_t n : {250, 1024 + 5}) {
        for (std::int64_t k : {7, 33, 600}) {
          if (m > 4 && k < 32) continue;
          const Product exact(dtype, m, n, k, options, integer, integer, exact_saved);
          CHECK(form_of(exact.desc) == Form::kFewRows, exact.name());
          check_exact(exact);
          const Product product(dtype, m, n, k, options, random_values(5, m, k, false),
                                random_values(6, k, n, false), exact_saved);
          for (Isa isa : supported_isas()) {
            set_active_isa(isa);
            const Product::Result alone = product.compute(serial()),
                                  shared = product.compute(on_threads<3>());
            CHECK(alone.d == shared.d, product.name());
          }
        }
      }
    }
  }
}

/// Sums of many numbers of one sign, where a long running sum would lose most.
void test_long_sums_are_accurate() {
  const Values uniform = [](std::int64_t i, std::int64_t j) { return (integer(i, j) + 3.5) / 7; };
  const std::int64_t batch = 100'000;
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    double largest = 0;
    Product product = layer_product('w', dtype, batch, 3, 2, uniform, uniform, uniform);
    const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
    for (Isa isa : supported_isas()) {
      set_active_isa(isa);
      const Product::Result result = product.compute(serial());
      // Of rounding to nearest, the largest of 8 levels of pairwise sums and a strip's average.
      constexpr double kBound = 16;
      for (std::int64_t i = 0; i < product.desc.m; ++i) {
        for (std::int64_t j = 0; j < product.desc.n; ++j) {
          const double exact = reference.d[i * product.desc.n + j];
          const double error = std::abs(product.d(result, i, j) - exact) / (eps * exact);
          largest = std::max(largest, error);
          CHECK(error <= kBound, product.name() << " at " << i << ", " << j << ": " << error);
        }
        const double exact = reference.a_sum[i];
        const double error =
            std::abs(reference_load(dtype, result.a_sum.data(), Product::kGuard + i) - exact) /
            (eps * exact);
        largest = std::max(largest, error);
        CHECK(error <= kBound, product.name() << " sum " << i << ": " << error);
      }
    }
    std::cout << "sums of " << batch << " in " << name_of(dtype) << ": largest error " << largest
              << " eps\n";
  }
}

/// What isn't finite stays in its own row or column.
void test_nothing_leaks() {
  const double inf = std::numeric_limits<double>::infinity();
  for (DType dtype : kDTypes) {
    for (std::int64_t in : {1, 3, 13, 40}) {
      const std::int64_t batch = 130, out = 2, bad = 70;
      const auto a = [&](std::int64_t i, std::int64_t j) { return i == bad ? inf : integer(i, j); };
      for (char which : {'f', 'd'}) {
        const Product poisoned =
            layer_product(which, dtype, batch, in, out, a, integer, exact_saved);
        const Product clean =
            layer_product(which, dtype, batch, in, out, integer, integer, exact_saved);
        for (Isa isa : supported_isas()) {
          set_active_isa(isa);
          const Product::Result with = poisoned.compute(serial()),
                                without = clean.compute(serial());
          for (std::int64_t i = 0; i < batch; ++i) {
            for (std::int64_t j = 0; j < clean.desc.n && i != bad; ++j) {
              CHECK(clean.d(without, i, j) == poisoned.d(with, i, j), poisoned.name());
            }
          }
        }
      }
    }
  }
}

/// A row of D has the same bits wherever it lies and whatever it lies among.
void test_rows_depend_on_themselves() {
  for (DType dtype : kDTypes) {
    for (std::int64_t in : {1, 2, 7, 33}) {
      for (std::int64_t out : {1, 3, 20}) {
        const Values x = random_values(3, 300, in, false), w = random_values(4, out, in, false);
        const auto same = [&](std::int64_t, std::int64_t p) { return x(0, p); };
        const auto transposed = [&](std::int64_t p, std::int64_t j) { return w(j, p); };
        const Product product =
            layer_product('f', dtype, 299, in, out, same, transposed, exact_saved);
        for (Isa isa : supported_isas()) {
          set_active_isa(isa);
          const Product::Result result = product.compute(on_threads<3>());
          for (std::int64_t i = 1; i < 299; ++i) {
            for (std::int64_t j = 0; j < out; ++j) {
              CHECK(product.d(result, i, j) == product.d(result, 0, j), product.name());
            }
          }
        }
      }
    }
  }
}

void test_forms() {
  const auto form = [](char which, std::int64_t batch, std::int64_t in, std::int64_t out) {
    GemmDesc desc =
        layer_product(which, DType::kFloat32, 1, in, out, integer, integer, exact_saved).desc;
    if (which == 'w') {
      desc.k = batch;
      desc.a_stride_m = desc.saved_stride_m = 1;
      desc.a_stride_k = desc.saved_stride_k = out;
    } else {
      desc.m = batch;
    }
    return form_of(desc);
  };
  CHECK(form('f', 1'000'000, 3, 2) == Form::kLongRows, "x 3 -> 2");
  CHECK(form('f', 1'000'000, 3, 1) == Form::kLongColumn, "x 3 -> 1");
  CHECK(form('f', 100'000, 64, 1) == Form::kFewColumns, "x 64 -> 1");
  CHECK(form('d', 100'000, 64, 1) == Form::kLongRows, "gradient of x 64 -> 1");
  CHECK(form('w', 100'000, 64, 1) == Form::kLongSums, "weight's gradient of x 64 -> 1");
  CHECK(form('f', 16, 4096, 4096) == Form::kFewRows, "16 rows");
  CHECK(form('f', 64, 100'000, 10) == Form::kFewColumns, "10 columns of a long k");
  CHECK(form('w', 1, 1024, 1024) == Form::kLongRows, "weight's gradient of one row");
  CHECK(form('f', 512, 512, 512) == Form::kBlocked, "square");
}

}  // namespace

int main() {
  test_few_features_are_exact();
  test_few_terms_are_exact();
  test_few_rows_are_exact();
  test_wide_rows();
  test_long_sums_are_accurate();
  test_nothing_leaks();
  test_rows_depend_on_themselves();
  test_forms();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
