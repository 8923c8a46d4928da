// Tests of gemm_sm90 and gemm_sm90_f32 on the emulator.
#include <cmath>
#include <cstdint>
#include <limits>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

constexpr const cuda::GemmKernel& kKernel = cuda::gemm_sm90;
constexpr const cuda::GemmKernel& kF32Kernel = cuda::gemm_sm90_f32;
constexpr DType k16Bits[] = {DType::kBFloat16, DType::kFloat16};

// Multiprocessors, which decide about tiles: with one, 256 columns where there are more than 128.
constexpr int kSmCounts[] = {1, 3};

bool accepts(const Product& product) {
  GemmPointers at = product.inputs;
  at.d = product.b.storage.empty() ? nullptr : const_cast<std::byte*>(product.b.storage.data());
  return kKernel.accepts(product.desc, at, kDevice);
}

/// Rows of D that the copy engine stores, or not.
void set_d_stride(Product& product, bool is_tiled) {
  product.desc.d_stride_m = (product.desc.n + 7) / 8 * 8 + (is_tiled ? 8 : 1);
}

/// Around the edges of tiles of 128 by 128 or 256 by 64, of what a warpgroup stores (64 by 64), of
/// what the ring has (256 or 384 k), and of bands of tiles.
void test_exact_sums() {
  struct Size {
    std::int64_t m, n, k;
  };
  const Size sizes[] = {
      {8, 8, 8},      {1, 8, 16},     {16, 1, 8},    {64, 64, 64},    {72, 56, 72},   {63, 65, 56},
      {128, 256, 64}, {136, 264, 64}, {129, 255, 1}, {264, 128, 456}, {40, 520, 264}, {8, 136, 712},
      {200, 24, 384}, {65, 72, 63},   {2056, 8, 8},  {2056, 264, 8},  {72, 16, 600}};
  int turn = 0, taken = 0;
  for (const auto& [m, n, k] : sizes) {
    for (const Layout a : {Layout::kRows, Layout::kColumns}) {
      for (const Layout b : {Layout::kRows, Layout::kColumns}) {
        for (const int sm_count : kSmCounts) {
          ++turn;
          Product::Options options = options_of(turn);
          options.a = a, options.b = b;
          Product product(k16Bits[turn % 2], m, n, k, options, integer, integer, exact_saved);
          set_d_stride(product, turn % 7 < 4);
          if (!accepts(product)) continue;
          ++taken;
          change_settings();
          check_exact(kKernel, product, compute(kKernel, product, {90, sm_count}));
        }
      }
    }
  }
  CHECK(taken > 80, taken << " products were accepted");
}

void test_random() {
  int turn = 0;
  for (const DType dtype : k16Bits) {
    for (const int sm_count : kSmCounts) {
      for (const bool has_sigmoid : {false, true}) {
        change_settings();
        constexpr std::int64_t kM = 136, kN = 280, kK = 520;
        Product::Options options;
        options.a = turn % 2 == 0 ? Layout::kRows : Layout::kColumns;
        options.b = turn++ / 2 % 2 == 0 ? Layout::kColumns : Layout::kRows;
        options.bias = true;
        options.prologue = !has_sigmoid;
        options.epilogue = has_sigmoid ? Activation::kSigmoid : Activation::kIdentity;
        const Values values = random_values(7, kK, kK, false);
        const auto outputs = [&](std::int64_t i, std::int64_t j) {
          return 1 / (1 + std::exp(-values(i, j)));
        };
        Product product(dtype, kM, kN, kK, options, values, values, outputs);
        set_d_stride(product, true);
        // One running sum of each element; dz is rounded to 16 bits.
        const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
        const double relative = 0x1p-24 * (kK + 5) + (options.prologue ? rounding : 0);
        check_close(kKernel, product, compute(kKernel, product, {90, sm_count}), relative);
      }
    }
  }
}

/// The same bits in any order of threads, for any lateness, with any tiles.
void test_orders() {
  const Values values = random_values(3, 392, 392, false);
  for (const auto& options : {layer_options(), gradient_options()}) {
    for (const cuda::GemmKernel* const kernel : {&kKernel, &kF32Kernel}) {
      Product product(kernel->dtypes.front(), 136, 264, 392, options, values, values, values);
      set_d_stride(product, true);
      check_orders(*kernel, product, {{90, 1}, {90, 2}, {90, 132}});
    }
  }
}

/// A prologue takes operands that the copy engine doesn't.
void test_prologue_layouts() {
  for (int layout = 0; layout < kLayouts; ++layout) {
    for (const bool has_sum : {false, true}) {
      change_settings();
      Product::Options options;
      options.a = static_cast<Layout>(layout);
      options.saved = static_cast<Layout>((layout + 2) % kLayouts);
      options.b = Layout::kRows;
      options.prologue = true;
      options.a_sum = has_sum;
      Product product(DType::kFloat16, 77, 40, 301, options, integer, integer, exact_saved);
      set_d_stride(product, has_sum);
      CHECK(accepts(product), product.name());
      check_exact(kKernel, product, compute(kKernel, product));
    }
  }
}

/// What the copy engine can't take is refused.
void test_refusals() {
  const auto is_taken = [](const auto& change) {
    alignas(16) static std::byte memory[16];
    GemmDesc desc;
    desc.dtype = DType::kBFloat16;
    desc.m = desc.n = desc.k = desc.a_stride_m = desc.b_stride_n = desc.d_stride_m = 64;
    GemmPointers at{.a = memory, .b = memory, .d = memory};
    change(desc, at);
    return kKernel.accepts(desc, at, kDevice);
  };
  using Desc = GemmDesc;
  using At = GemmPointers;
  const auto moved = [](const void* from) { return static_cast<const std::byte*>(from) + 2; };
  CHECK(is_taken([](Desc&, At&) {}), "as it is");
  CHECK(is_taken([](Desc& d, At&) { d.a_stride_m = 72; }), "rows with gaps");
  CHECK(is_taken([](Desc& d, At&) { d.a_stride_m = 1, d.a_stride_k = 64; }), "columns of A");
  CHECK(is_taken([](Desc& d, At&) { d.b_stride_n = 1, d.b_stride_k = 64; }), "rows of B");
  CHECK(is_taken([](Desc& d, At&) { d.d_stride_m = 65; }), "any rows of D");
  CHECK(!is_taken([](Desc& d, At&) { d.k = 0; }), "no k");
  CHECK(!is_taken([](Desc& d, At&) { d.n = 0; }), "no columns");
  CHECK(!is_taken([](Desc& d, At&) { d.a_stride_m = 68; }), "rows of A between 16 bytes");
  CHECK(!is_taken([](Desc& d, At&) { d.a_stride_m = 0; }), "one row for all of A");
  CHECK(!is_taken([](Desc& d, At&) { d.b_stride_n = -64; }), "columns of B backwards");
  CHECK(!is_taken([](Desc& d, At&) { d.b_stride_k = 2; }), "gaps both ways");
  CHECK(!is_taken([&](Desc&, At& at) { at.a = moved(at.a); }), "A between 16 bytes");
  CHECK(!is_taken([&](Desc&, At& at) { at.b = moved(at.b); }), "B between 16 bytes");
  CHECK(!is_taken([](Desc& d, At&) { d.m = std::int64_t{1} << 31; }), "rows beyond 32 bits");
}

// ---- f32 ---------------------------------------------------------------------------------------

constexpr Precision kPrecisions[] = {Precision::kHighest, Precision::kHigh, Precision::kMedium};

void test_f32_exact_sums() {
  struct Size {
    std::int64_t m, n, k;
  };
  int turn = 0;
  for (const auto& [m, n, k] : {Size{1, 1, 1}, Size{129, 127, 65}, Size{64, 140, 64},
                                Size{130, 70, 200}, Size{5, 260, 330}, Size{63, 65, 63}}) {
    for (const Precision precision : kPrecisions) {
      for (int repeat = 0; repeat < 2; ++repeat, ++turn) {
        change_settings();
        Product product(DType::kFloat32, m, n, k, options_of(turn), integer, integer, exact_saved);
        product.desc.precision = precision;
        check_exact(kF32Kernel, product, compute(kF32Kernel, product, {90, 1 + turn % 3}));
      }
    }
  }
}

double f32_error(Precision precision, std::int64_t k) { return split_error(precision, k, 64); }

void test_f32_random() {
  for (const Precision precision : kPrecisions) {
    for (const bool has_sigmoid : {false, true}) {
      change_settings();
      constexpr std::int64_t kM = 70, kN = 136, kK = 300;
      Product::Options options;
      options.bias = true;
      options.epilogue = has_sigmoid ? Activation::kSigmoid : Activation::kIdentity;
      const Values values = random_values(5, kK, kK, false);
      Product product(DType::kFloat32, kM, kN, kK, options, values, values, values);
      product.desc.precision = precision;
      check_close(kF32Kernel, product, compute(kF32Kernel, product), f32_error(precision, kK));
    }
  }
}

/// Values that don't split, in A and in B, at both ends of the exponents: as exact as all others,
/// and no other row or column suffers.
void test_f32_special_values() {
  constexpr std::int64_t kM = 200, kN = 260, kK = 150;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Values values = random_values(5, kN, kN, false);
  const auto a_values = [&](std::int64_t i, std::int64_t p) {
    if (i == 3 && p == 70) return kInfinity;
    if (i == 66 && p == 149) return 1e37;
    if (i == 67) return 1e-42 * std::round(10 * values(i, p));
    if (i == 199 && p == 0) return std::nan("");
    return values(i, p);
  };
  const auto b_values = [&](std::int64_t p, std::int64_t j) {
    if (j == 100 && p == 5) return -kInfinity;
    if (j == 101) return 1e-33 * values(p, j);
    return values(p, j);
  };
  for (const Precision precision : kPrecisions) {
    change_settings();
    Product product(DType::kFloat32, kM, kN, kK, {}, a_values, b_values, values);
    product.desc.precision = precision;
    const Product::Result result = compute(kF32Kernel, product);
    const cpu::ReferenceGemm reference = cpu::reference_gemm(product.desc, product.inputs);
    for (std::int64_t i = 0; i < kM; ++i) {
      for (std::int64_t j = 0; j < kN; ++j) {
        const double exact = reference.d[static_cast<std::size_t>(i * kN + j)];
        const double magnitude = reference.d_magnitude[static_cast<std::size_t>(i * kN + j)];
        const double got = product.d(result, i, j);
        const bool right =
            std::isnan(exact) ? std::isnan(got)
            : std::isinf(exact)
                ? got == exact
                : std::fabs(got - exact) <= f32_error(precision, kK) * magnitude + kK * 0x1p-149;
        CHECK(right, name_of(precision)
                         << " (" << i << ", " << j << "): " << got << ", not " << exact);
      }
    }
  }
}

/// Tiles that are computed again count once in the sums of columns.
void test_f32_sums_of_special_values() {
  const Values values = random_values(5, 260, 260, false);
  const auto a_values = [&](std::int64_t i, std::int64_t p) {
    return i == 67 || i == 199 ? 1e-42 * std::round(10 * values(i, p)) : values(i, p);
  };
  for (const Precision precision : kPrecisions) {
    change_settings();
    Product product(DType::kFloat32, 200, 260, 150, gradient_options(), a_values, values, values);
    product.desc.precision = precision;
    check_column_sums(kF32Kernel, product, compute(kF32Kernel, product));
  }
}

// ---- A' by itself ------------------------------------------------------------------------------

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// A product in two steps, as others that take the same A' would go on from the first.
const cuda::GemmKernel kTwoSteps = {
    "form_a, gemm",
    {},
    90,
    90,
    nullptr,
    [](const GemmDesc& desc, const cuda::Device& device) {
      return aligned(cuda::form_a_memory(desc)) + cuda::gemm_workspace(desc, {}, device);
    },
    [](const GemmDesc& desc, const GemmPointers& at, void* workspace, const cuda::Device& device,
       cuda::Stream stream) {
      CHECK(cuda::forms_a(desc, at, device), name_of(desc.dtype));
      GemmDesc left = desc;
      GemmPointers left_at = at;
      const cuda::Status status = cuda::form_a(left, left_at, workspace, stream);
      if (!status.ok()) return status.error;
      CHECK(!cuda::forms_a(left, left_at, device), name_of(desc.dtype));
      void* const rest = static_cast<std::byte*>(workspace) + aligned(cuda::form_a_memory(desc));
      return cuda::gemm(left, left_at, rest, device, stream).error;
    }};

void test_forming_a_first() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const Layout layout : {Layout::kRows, Layout::kColumns}) {
      change_settings();
      Product::Options options;
      options.a = layout, options.b = Layout::kRows;
      options.prologue = options.a_sum = true;
      const Product product(dtype, 131, 136, 264, options, integer, integer, exact_saved);
      check_exact(kTwoSteps, product, compute(kTwoSteps, product));
    }
  }
}

}  // namespace

int main() {
  test_refusals();
  test_exact_sums();
  test_prologue_layouts();
  test_random();
  test_orders();
  test_f32_exact_sums();
  test_f32_random();
  test_f32_special_values();
  test_f32_sums_of_special_values();
  test_forming_a_first();
  return failures == 0 ? 0 : 1;
}
