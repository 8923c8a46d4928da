// Tests of gemm_narrow on the emulator.
#include <cmath>
#include <cstdint>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

constexpr const cuda::GemmKernel& kKernel = cuda::gemm_narrow;
constexpr DType k16Bits[] = {DType::kBFloat16, DType::kFloat16};

bool accepts(const Product& product) {
  return kKernel.accepts(product.desc, product.inputs, kDevice);
}

/// Around the edges of 16, 32 and 64 rows, of the columns and k of warps and blocks, and of chunks.
void test_exact_sums() {
  struct Size {
    std::int64_t m, n, k;
  };
  const Size sizes[] = {{9, 8, 8},      {16, 16, 32},  {17, 24, 40},   {32, 64, 64},
                        {33, 72, 136},  {64, 128, 64}, {10, 136, 264}, {24, 200, 520},
                        {64, 1, 72},    {48, 33, 200}, {63, 120, 776}, {31, 256, 1096},
                        {12, 40, 2056}, {9, 1, 8},     {40, 8, 1528}};
  int turn = 0, taken = 0;
  for (const auto& [m, n, k] : sizes) {
    for (const Layout b : {Layout::kRows, Layout::kColumns}) {
      for (const DType dtype : k16Bits) {
        for (int repeat = 0; repeat < 2; ++repeat) {
          ++turn;
          Product::Options options = options_of(turn);
          options.a = options.prologue && turn % 8 == 5 ? Layout::kGaps : Layout::kRows;
          options.b = b;
          options.a_sum = false;
          const Product product(dtype, m, n, k, options, integer, integer, exact_saved);
          if (!accepts(product)) continue;
          ++taken;
          change_settings();
          check_exact(kKernel, product, compute(kKernel, product));
        }
      }
    }
  }
  CHECK(taken > 80, taken << " products were accepted");
}

void test_random() {
  int turn = 0;
  for (const DType dtype : k16Bits) {
    for (const Layout b : {Layout::kRows, Layout::kColumns}) {
      for (const bool has_sigmoid : {false, true}) {
        change_settings();
        constexpr std::int64_t kM = 37, kN = 72, kK = 1304;
        Product::Options options;
        options.b = b;
        options.bias = true;
        options.prologue = turn++ % 3 == 0;
        options.epilogue = has_sigmoid ? Activation::kSigmoid : Activation::kIdentity;
        const Values values = random_values(7, kK, kK, false);
        const auto outputs = [&](std::int64_t i, std::int64_t j) {
          return 1 / (1 + std::exp(-values(i, j)));
        };
        const Product product(dtype, kM, kN, kK, options, values, values, outputs);
        CHECK(accepts(product), product.name());
        // Running sums of a warp, which meet; dz is rounded to 16 bits.
        const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
        const double relative = 0x1p-24 * (kK + 5) + (options.prologue ? rounding : 0);
        check_close(kKernel, product, compute(kKernel, product), relative);
      }
    }
  }
}

/// The same bits in any order of threads, and on any GPU.
void test_orders() {
  const Values values = random_values(3, 1032, 1032, false);
  for (const Layout b : {Layout::kRows, Layout::kColumns}) {
    Product::Options options;
    options.b = b;
    options.bias = true;
    options.epilogue = Activation::kSigmoid;
    const Product product(DType::kBFloat16, 20, 136, 1032, options, values, values, values);
    check_orders(kKernel, product, {kDevice, {80, 7}});
  }
}

void test_refusals() {
  const auto is_taken = [](const auto& change) {
    alignas(16) static std::byte memory[16];
    GemmDesc desc;
    desc.dtype = DType::kBFloat16;
    desc.m = 16, desc.n = desc.k = desc.a_stride_m = desc.b_stride_n = desc.d_stride_m = 64;
    GemmPointers at{.a = memory, .b = memory, .d = memory};
    change(desc, at);
    return kKernel.accepts(desc, at, kDevice);
  };
  using Desc = GemmDesc;
  using At = GemmPointers;
  const auto moved = [](const void* from) { return static_cast<const std::byte*>(from) + 2; };
  const auto across = [](Desc& d) { d.b_stride_n = 1, d.b_stride_k = 64; };
  CHECK(is_taken([](Desc&, At&) {}), "as it is");
  CHECK(is_taken([&](Desc& d, At&) { across(d); }), "rows of B");
  CHECK(is_taken([](Desc& d, At&) { d.a_stride_m = 0; }), "one row for all of A");
  CHECK(is_taken([](Desc& d, At&) { d.n = 63; }), "any columns along k");
  CHECK(!is_taken([&](Desc& d, At&) { across(d), d.n = 63; }), "columns across k");
  CHECK(!is_taken([](Desc& d, At&) { d.m = 8; }), "few rows");
  CHECK(!is_taken([](Desc& d, At&) { d.m = 65; }), "many rows");
  CHECK(!is_taken([](Desc& d, At&) { d.k = 60; }), "k between 16 bytes");
  CHECK(!is_taken([](Desc& d, At&) { d.k = 0; }), "no k");
  CHECK(!is_taken([](Desc& d, At&) { d.n = 0; }), "no columns");
  CHECK(!is_taken([](Desc& d, At&) { d.has_a_sum = true; }), "sums of A");
  CHECK(!is_taken([](Desc& d, At&) { d.a_stride_m = 1, d.a_stride_k = 64; }), "columns of A");
  CHECK(!is_taken([](Desc& d, At&) { d.a_stride_m = 68; }), "rows of A between 16 bytes");
  CHECK(!is_taken([](Desc& d, At&) { d.b_stride_n = 68; }), "columns of B between 16 bytes");
  CHECK(!is_taken([&](Desc&, At& at) { at.a = moved(at.a); }), "A between 16 bytes");
  CHECK(!is_taken([&](Desc&, At& at) { at.b = moved(at.b); }), "B between 16 bytes");
}

}  // namespace

int main() {
  test_exact_sums();
  test_random();
  test_orders();
  test_refusals();
  return failures == 0 ? 0 : 1;
}
