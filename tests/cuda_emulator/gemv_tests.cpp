// Tests of gemv on the emulator.
#include <cmath>
#include <cstdint>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

constexpr const cuda::GemmKernel& kKernel = cuda::gemv;

bool accepts(const GemmDesc& desc) { return kKernel.accepts(desc, {}, kDevice); }

struct Size {
  std::int64_t m, n, k;
};

/// Few rows or few columns, by a matrix around the edges of vectors of 16 bytes, of what a warp or
/// a block takes, of stages, and of chunks of k.
void test_exact_sums() {
  const Size sizes[] = {{1, 1, 1},     {1, 1, 0},     {1, 5, 1},    {2, 17, 8},    {3, 129, 31},
                        {4, 33, 129},  {5, 64, 257},  {8, 70, 100}, {1, 300, 600}, {7, 8, 2300},
                        {1, 40, 5000}, {16, 20, 530}, {9, 3, 1100}, {4, 1030, 5},  {2, 4500, 3},
                        {40, 0, 70},   {3, 2, 2100}};
  int turn = 0, taken = 0;
  for (const DType dtype : kDTypes) {
    for (const Size& size : sizes) {
      for (const bool is_few_columns : {false, true}) {
        for (const Layout matrix : {Layout::kRows, Layout::kColumns, Layout::kGaps}) {
          ++turn;
          const std::int64_t m = is_few_columns && size.n > 0 ? size.n : size.m;
          const std::int64_t n = is_few_columns && size.n > 0 ? size.m : size.n;
          Product::Options options = options_of(turn);
          (is_few_columns ? options.a : options.b) = matrix;
          options.a_sum = options.a_sum || n == 0;
          const Product product(dtype, m, n, size.k, options, integer, integer, exact_saved);
          if (!accepts(product.desc)) continue;
          ++taken;
          change_settings();
          check_exact(kKernel, product, compute(kKernel, product));
        }
      }
    }
  }
  CHECK(taken > 300, taken << " products were accepted");
}

void test_random() {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const auto& [m, n, k] : {Size{1, 70, 900}, Size{7, 66, 2500}, Size{66, 6, 1500}}) {
      for (const bool has_sigmoid : {false, true}) {
        for (const Layout layout : {Layout::kRows, Layout::kColumns}) {
          change_settings();
          Product::Options options;
          options.a = options.saved = options.b = layout;
          options.bias = true;
          options.prologue = turn++ % 3 == 0;
          options.epilogue = has_sigmoid ? Activation::kSigmoid : Activation::kIdentity;
          const Values values = random_values(7, std::max(m, k), std::max(k, n), false);
          const auto outputs = [&](std::int64_t i, std::int64_t j) {
            return 1 / (1 + std::exp(-values(i, j)));
          };
          const Product product(dtype, m, n, k, options, values, values, outputs);
          // A lane adds up every fourth k or less, then lanes, warps and chunks meet. dz has three
          // roundings of its own, and one to the dtype where it is rewritten.
          const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
          const double rewritten = spacing(dtype, 0.75) / 2;
          const double relative = eps * (static_cast<double>(k) / 4 + 8 + 8 + 256) +
                                  (options.prologue ? 3 * eps + 2 * rewritten : 0);
          check_close(kKernel, product, compute(kKernel, product), relative);
        }
      }
    }
  }
}

/// The same bits in any order of threads, and on any GPU.
void test_orders() {
  const Values values = random_values(3, 2400, 2400, false);
  for (const Layout layout : {Layout::kRows, Layout::kColumns}) {
    Product::Options options;
    options.b = layout;
    options.bias = true;
    options.a_sum = layout == Layout::kRows;
    const Product product(DType::kFloat32, 3, 41, 2300, options, values, values, values);
    check_orders(kKernel, product, {kDevice, {80, 7}});
  }
}

/// Up to how many rows and columns are few.
void test_choice() {
  const auto is_taken = [](DType dtype, std::int64_t m, std::int64_t n, bool has_a_sum) {
    GemmDesc desc;
    desc.dtype = dtype;
    desc.m = m, desc.n = n, desc.k = 100;
    desc.a_stride_m = desc.b_stride_n = 100;
    desc.d_stride_m = n;
    desc.has_a_sum = has_a_sum;
    return accepts(desc);
  };
  for (const DType dtype : kDTypes) {
    const std::int64_t most = dtype == DType::kFloat32 ? 16 : 8;
    CHECK(is_taken(dtype, 1, 1000, false), name_of(dtype));
    CHECK(is_taken(dtype, most, 1000, true), name_of(dtype));
    CHECK(!is_taken(dtype, most + 1, 1000, false), name_of(dtype));
    CHECK(is_taken(dtype, 1000, most, false), name_of(dtype));
    CHECK(!is_taken(dtype, 1000, most, true), name_of(dtype) << ": the sums are a vector more");
    CHECK(is_taken(dtype, 1000, 0, true), name_of(dtype));
    CHECK(!is_taken(dtype, 0, 1000, true), name_of(dtype));
  }
}

}  // namespace

int main() {
  test_exact_sums();
  test_random();
  test_orders();
  test_choice();
  return failures == 0 ? 0 : 1;
}
