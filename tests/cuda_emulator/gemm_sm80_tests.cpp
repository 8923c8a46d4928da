// Tests of gemm_sm80 on the emulator.
#include <cmath>
#include <cstdint>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

constexpr const cuda::GemmKernel& kKernel = cuda::gemm_sm80;

// Multiprocessors, which decide about tiles: with one, wide ones where there are more columns than
// a narrow one has.
constexpr int kSmCounts[] = {1, 100};

/// Columns of a wide tile, and k of a stage.
std::int64_t wide(DType dtype) { return dtype == DType::kFloat64 ? 128 : 256; }
std::int64_t stage_k(DType dtype) { return 64 / size_of(dtype); }

Product make_product(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k,
                     const Product::Options& options, const Values& values, const Values& saved) {
  Product product(dtype, m, n, k, options, values, values, saved);
  product.desc.precision = Precision::kHigh;
  return product;
}

/// Whether the operands are what the kernel can read, of any size.
bool accepts(const Product& product) {
  GemmDesc desc = product.desc;
  desc.whole_m = std::int64_t{1} << 20;  // enough tiles
  return kKernel.accepts(desc, product.inputs, {80, 1});
}

/// Rows of D that are stored in pieces of 16 bytes where n allows it, or not.
void set_d_stride(Product& product, bool is_aligned) {
  product.desc.d_stride_m = (product.desc.n + 7) / 8 * 8 + (is_aligned ? 8 : 1);
}

/// Around the edges of tiles, of a warp's part, of pieces, of stages, of the ring, and of chunks of
/// k; operands of rows that aren't full pieces.
void test_exact_sums() {
  struct Size {
    std::int64_t m, n, k;  // n: beyond wide tiles, k: beyond stages
  };
  int turn = 0, taken = 0;
  for (const DType dtype : kDTypes) {
    const std::int64_t w = wide(dtype), s = stage_k(dtype);
    const Size sizes[] = {{8, 8, 8},
                          {1, 8, 16},
                          {16, 1, 8},
                          {64, 64, s},
                          {72, 56, s + 8},
                          {63, w - 1, 1},
                          {129, w, 2},
                          {136, 24, 3 * s},
                          {40, w + 8, 4 * s},
                          {65, 72, 63},
                          {8, 136, 200},
                          {128, w / 2, 5 * s - 1},
                          {2056, 8, 8},
                          {9, 7, 1},
                          {24, 40, 6 * s},
                          {72, 56, 64 * s},
                          {8, 136, 100 * s + 8}};
    for (const auto& [m, n, k] : sizes) {
      for (const Layout a : {Layout::kRows, Layout::kColumns}) {
        for (const Layout b : {Layout::kRows, Layout::kColumns}) {
          ++turn;
          Product::Options options = options_of(turn);
          options.a = a, options.b = b;
          Product product = make_product(dtype, m, n, k, options, integer, exact_saved);
          set_d_stride(product, turn % 7 < 4);
          if (!accepts(product)) continue;
          ++taken;
          change_settings();
          check_exact(kKernel, product, compute(kKernel, product, {80, kSmCounts[turn % 2]}));
        }
      }
    }
  }
  CHECK(taken > 120, taken << " products were accepted");
}

/// Rows with gaps, whose last pieces hold what isn't the operand's.
void test_gaps() {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const Layout a : {Layout::kRows, Layout::kColumns}) {
      for (const Layout b : {Layout::kRows, Layout::kColumns}) {
        change_settings();
        Product::Options options;
        options.a = a, options.b = b;
        // Operands of 80 x 144 and 144 x 80, of which a corner is multiplied: beyond it lies nan.
        const auto corner = [](std::int64_t i, std::int64_t j) {
          return i < 77 && j < 77 ? integer(i, j) : std::nan("");
        };
        const auto swapped = [&](std::int64_t p, std::int64_t j) {
          return p < 77 && j < 77 ? integer(p, j) : std::nan("");
        };
        Product product(dtype, 80, 80, 144, options, corner, swapped, corner);
        product.desc.precision = Precision::kHigh;
        product.desc.m = product.desc.n = product.desc.k = 77;
        set_d_stride(product, turn++ % 2 == 0);
        CHECK(accepts(product), product.name());
        check_exact(kKernel, product, compute(kKernel, product, {80, 1}));
      }
    }
  }
}

/// What sums of k products may be off by, in units of their magnitudes.
double error_of(DType dtype, std::int64_t k, bool has_prologue) {
  const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  // One running sum of each element.
  const double sum = eps * static_cast<double>(k + 5);
  // tf32 rounds both factors to 11 bits; dz has three roundings of its own, one of them to 16 bits.
  const double factors = dtype == DType::kFloat32 ? 0x1.01p-10 : 0;
  const double dz = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : 0;
  return sum + factors + (has_prologue ? dz + 3 * eps : 0);
}

void test_random() {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const int sm_count : kSmCounts) {
      for (const bool has_sigmoid : {false, true}) {
        change_settings();
        constexpr std::int64_t kM = 136, kK = 328;
        const std::int64_t n = wide(dtype) + 24;
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
        Product product = make_product(dtype, kM, n, kK, options, values, outputs);
        set_d_stride(product, true);
        check_close(kKernel, product, compute(kKernel, product, {80, sm_count}),
                    error_of(dtype, kK, options.prologue));
      }
    }
  }
}

/// The same bits in any order of threads, for any lateness, with any tiles.
void test_orders() {
  const Values values = random_values(3, 264, 264, false);
  for (const DType dtype : kDTypes) {
    for (const auto& options : {layer_options(), gradient_options()}) {
      Product product = make_product(dtype, 136, wide(dtype) + 8, 200, options, values, values);
      set_d_stride(product, true);
      check_orders(kKernel, product, {{80, kSmCounts[0]}, {80, kSmCounts[1]}});
    }
  }
}

/// A prologue takes operands that copies can't.
void test_prologue_layouts() {
  for (int layout = 0; layout < kLayouts; ++layout) {
    for (const DType dtype : {DType::kFloat16, DType::kFloat64}) {
      change_settings();
      Product::Options options;
      options.a = static_cast<Layout>(layout);
      options.saved = static_cast<Layout>((layout + 2) % kLayouts);
      options.b = Layout::kRows;
      options.prologue = true;
      options.a_sum = layout % 2 == 0;
      Product product = make_product(dtype, 77, 40, 101, options, integer, exact_saved);
      set_d_stride(product, true);
      CHECK(accepts(product), product.name());
      check_exact(kKernel, product, compute(kKernel, product, {80, 3}));
    }
  }
}

/// What is refused: what copies can't read, f32 that isn't to be rounded, and few tiles where
/// smaller ones, or cuts of k, occupy a GPU.
void test_refusals() {
  const auto is_taken = [](DType dtype, const auto& change) {
    alignas(16) static std::byte memory[16];
    GemmDesc desc;
    desc.dtype = dtype;
    desc.precision = Precision::kMedium;
    desc.m = desc.n = desc.k = desc.a_stride_m = desc.b_stride_n = desc.d_stride_m = 1024;
    GemmPointers at{.a = memory, .b = memory, .d = memory};
    change(desc, at);
    return kKernel.accepts(desc, at, {80, 108});
  };
  using Desc = GemmDesc;
  using At = GemmPointers;
  const auto moved = [](const void* from) { return static_cast<const std::byte*>(from) + 8; };
  for (const DType dtype : kDTypes) {
    CHECK(is_taken(dtype, [](Desc&, At&) {}), name_of(dtype));
    CHECK(is_taken(dtype, [](Desc& d, At&) { d.a_stride_m = 1, d.a_stride_k = 1024; }),
          "columns of A");
    CHECK(is_taken(dtype, [](Desc& d, At&) { d.b_stride_n = 1, d.b_stride_k = 1024; }),
          "rows of B");
    CHECK(is_taken(dtype, [](Desc& d, At&) { d.a_stride_m = 0, d.b_stride_n = -1024; }),
          "rows in any order");
    CHECK(is_taken(dtype, [](Desc& d, At&) { d.d_stride_m = 1025; }), "any rows of D");
    CHECK(!is_taken(dtype, [](Desc& d, At&) { d.k = 0; }), "no k");
    CHECK(!is_taken(dtype, [](Desc& d, At&) { d.n = 0; }), "no columns");
    CHECK(!is_taken(dtype, [](Desc& d, At&) { d.a_stride_m = 1025; }),
          "rows of A between 16 bytes");
    CHECK(!is_taken(dtype, [](Desc& d, At&) { d.b_stride_k = 2; }), "gaps both ways");
    CHECK(!is_taken(dtype, [&](Desc&, At& at) { at.a = moved(at.a); }), "A between 16 bytes");
    CHECK(!is_taken(dtype, [&](Desc&, At& at) { at.b = moved(at.b); }), "B between 16 bytes");
    CHECK(!is_taken(dtype, [](Desc& d, At&) { d.m = std::int64_t{1} << 31; }),
          "rows beyond 32 bits");
    CHECK(is_taken(dtype, [](Desc& d, At&) { d.m = d.n = 64, d.k = 65536; }), "one tile, much k");
  }
  CHECK(!is_taken(DType::kFloat64, [](Desc& d, At&) { d.m = d.n = 120, d.k = 512; }),
        "tiles and chunks that leave a GPU idle");
  CHECK(is_taken(DType::kBFloat16, [](Desc& d, At&) { d.m = d.n = 64; }), "one tile, little k");
  CHECK(!is_taken(DType::kFloat32, [](Desc& d, At&) { d.precision = Precision::kHighest; }),
        "exact f32");
}

}  // namespace

int main() {
  test_refusals();
  test_exact_sums();
  test_gaps();
  test_prologue_layouts();
  test_random();
  test_orders();
  return failures == 0 ? 0 : 1;
}
