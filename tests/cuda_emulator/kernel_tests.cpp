// Tests of the kernels in csrc/cuda, on the emulator: against the f64 reference, in every order of
// threads and with every kind of lateness.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::emulator;
using namespace neuron_ext::testing;

// ---- matrix products ---------------------------------------------------------------------------

struct Size {
  std::int64_t m, n, k;
};

/// Around the edges of tiles, which for gemm_simt are 64, or 128 if there are many, by 16 (half of
/// it in f64), sums of 128 and chunks of 512 k.
std::vector<Size> sizes() {
  std::vector<Size> all = {{1, 1, 1},   {0, 5, 3},     {5, 0, 3},    {5, 3, 0},
                           {0, 0, 0},   {64, 64, 16},  {65, 63, 17}, {33, 31, 15},
                           {1, 130, 5}, {129, 2, 130}, {3, 2, 1100}, {66, 5, 1030}};
  for (std::int64_t k : {31, 127, 128, 129, 144}) all.push_back({7, 9, k});
  return all;
}

/// Integers, whose sums are exact: bit for bit the reference's result, rounded once.
void test_exact_sums(const cuda::GemmKernel& kernel) {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const auto& [m, n, k] : sizes()) {
      for (int repeat = 0; repeat < 3; ++repeat, ++turn) {
        change_settings();
        // A 16-bit D is exact as long as what is added up is small.
        const auto values = [&](std::int64_t i, std::int64_t j) { return integer(i, j); };
        const Product product(dtype, m, n, k, Product::Options::of(turn), values, values,
                              exact_saved);
        check_exact(kernel, product, compute(kernel, product));
      }
    }
  }
}

/// Products that are multiplied by a gradient, and whose columns are summed, on their way out or in
/// a pass of its own; in one chunk of k and in several.
void test_epilogue_gradient(cuda::GemmKernel kernel) {
  int turn = 0;
  for (const DType dtype : kDTypes) {
    for (const auto& [m, n, k] : sizes()) {
      change_settings();
      Product::Options options = options_of(++turn);
      options.bias = false;
      options.epilogue_gradient = true;
      options.d_sum = turn % 3 != 0;
      Product product(dtype, m, n, k, options, integer, integer, exact_saved);
      if (turn % 4 == 0) product.desc.d_stride_m = n;
      kernel.takes_epilogue_gradient = turn / 4 % 2 == 0;
      check_exact(kernel, product, compute(kernel, product));
    }
  }
  GemmDesc desc;
  desc.m = desc.n = 1;
  desc.has_bias = true;
  desc.epilogue_gradient = Activation::kSigmoid;
  CHECK(!cuda::gemm(desc, {}, nullptr, kDevice, nullptr).ok(), "a bias and a gradient");
  desc.epilogue_gradient = Activation::kIdentity;
  desc.has_d_sum = true;
  CHECK(!cuda::gemm(desc, {}, nullptr, kDevice, nullptr).ok(), "sums without a gradient");
}

void test_random(const cuda::GemmKernel& kernel) {
  for (const DType dtype : kDTypes) {
    for (const auto& [m, n, k] : {Size{70, 66, 200}, Size{5, 9, 1500}}) {
      for (int turn = 0; turn < 4; ++turn) {
        change_settings();
        Product::Options options = options_of(turn);
        options.a = options.b = options.saved = Layout::kRows;
        options.epilogue = options.epilogue_gradient || turn % 2 == 0 ? Activation::kIdentity
                                                                      : Activation::kSigmoid;
        const Values values = random_values(7, std::max(m, k), k + n, false);
        const auto outputs = [&](std::int64_t i, std::int64_t j) {
          return 1 / (1 + std::exp(-values(i, j)));
        };
        const Product product(dtype, m, n, k, options, values, values, outputs);
        // dz = dy (1 - y) y has three roundings of its own.
        const double relative =
            sum_error(dtype, k) + (options.prologue ? 3 * sum_error(dtype, 0) : 0);
        check_close(kernel, product, compute(kernel, product), relative);
      }
    }
  }
}

/// The same bits in any order of threads.
void test_orders(const cuda::GemmKernel& kernel) {
  const Values values = random_values(3, 1400, 1400, false);
  Product::Options options;
  options.bias = options.a_sum = true;
  const Product product(DType::kFloat32, 37, 41, 1300, options, values, values, values);
  check_orders(kernel, product);
}

/// Rows further apart than 32 bits can say: memory that is reserved, but only touched at its ends.
void test_far_apart(const cuda::GemmKernel& kernel) {
  constexpr std::int64_t kStride = (std::int64_t{1} << 31) + 8;
  constexpr std::size_t kBytes = 4 * (kStride + 64);
  const auto reserve = [] {
    return static_cast<float*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  float *const a = reserve(), *const d = reserve();
  if (a == MAP_FAILED || d == MAP_FAILED) return;  // a system that doesn't overcommit
  settings() = {};
  for (int i = 0; i < 2; ++i) {
    for (int p = 0; p < 3; ++p) a[i * kStride + p] = static_cast<float>(integer(i, p));
  }
  const float b[3] = {1, 2, 3};
  GemmDesc desc;
  desc.m = 2, desc.n = 1, desc.k = 3;
  desc.a_stride_m = desc.d_stride_m = kStride;
  const int error = kernel.run(desc, {.a = a, .b = b, .d = d}, nullptr, kDevice, nullptr);
  CHECK(error == 0, last_error());
  for (int i = 0; i < 2; ++i) {
    const float* const row = a + i * kStride;
    CHECK(d[i * kStride] == row[0] + 2 * row[1] + 3 * row[2], kernel.name << " row " << i);
  }
  munmap(a, kBytes);
  munmap(d, kBytes);
}

// ---- elementwise -------------------------------------------------------------------------------

/// One array of an elementwise test: `sizes` with these strides, inside what is just large enough.
struct Array {
  Array(DType dtype, const std::vector<std::int64_t>& sizes,
        const std::vector<std::int64_t>& strides, std::int64_t offset, const char* name)
      : dtype(dtype), first(offset) {
    std::int64_t last = offset;
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      const std::int64_t span = (sizes[d] - 1) * strides[d];
      (span < 0 ? first : last) += std::abs(span);
    }
    if (first > offset) last += first - offset;
    array =
        std::make_unique<GlobalArray>(static_cast<std::size_t>((last + 1) * size_of(dtype)), name);
    std::copy(strides.begin(), strides.end(), this->strides.begin());
  }

  std::byte* base() const { return array->data() + first * size_of(dtype); }
  double load(std::int64_t index) const { return cpu::reference_load(dtype, base(), index); }
  void store(std::int64_t index, double value) {
    cpu::reference_store(dtype, base(), index, value);
  }

  DType dtype;
  std::int64_t first;
  cuda::Dims strides{};
  std::unique_ptr<GlobalArray> array;
};

/// Calls f(position in x, in saved, in y) for each element.
template <class F>
void for_each_element(const std::vector<std::int64_t>& sizes, const Array& x, const Array& saved,
                      const Array& y, const F& f) {
  std::int64_t count = 1;
  for (std::int64_t size : sizes) count *= size;
  for (std::int64_t e = 0; e < count; ++e) {
    std::int64_t rest = e, at[3] = {};
    for (std::size_t d = 0; d < sizes.size(); ++d) {
      const std::int64_t index = rest % sizes[d];
      rest /= sizes[d];
      at[0] += index * x.strides[d];
      at[1] += index * saved.strides[d];
      at[2] += index * y.strides[d];
    }
    f(at[0], at[1], at[2]);
  }
}

struct Strides {
  std::vector<std::int64_t> x, saved, y;
  std::int64_t x_offset = 0, saved_offset = 0, y_offset = 0;
};

/// How far results may be from exact ones, in units of the last place. Sigmoid: the CPU's bounds
/// (f32 0.81, f64 0.72, and half an ULP more since the reference itself is rounded to f64), and
/// half an ULP of 16 bits with what its approximation adds. Gradient: three roundings, of up to
/// an ULP of the result each.
double ulp_bound(DType dtype, bool backward) {
  if (size_of(dtype) == 2) return backward ? 0.51 : 0.502;
  if (dtype == DType::kFloat64) return backward ? 3.5 : 1.22;
  return backward ? 3 : 0.82;
}

void check_elementwise(DType dtype, const std::vector<std::int64_t>& sizes, const Strides& strides,
                       const std::function<double(std::int64_t)>& input) {
  Array x(dtype, sizes, strides.x, strides.x_offset, "x");
  Array saved(dtype, sizes, strides.saved, strides.saved_offset, "saved");
  Array y(dtype, sizes, strides.y, strides.y_offset, "y");
  std::int64_t count = 0;
  for_each_element(sizes, x, saved, y, [&](std::int64_t xi, std::int64_t si, std::int64_t) {
    x.store(xi, input(count));
    saved.store(si, cpu::reference_activate(Activation::kSigmoid, input(count / 2)));
    ++count;
  });
  x.array->set_written();
  saved.array->set_written();
  cuda::ElementwiseDesc desc;
  desc.f = Activation::kSigmoid;
  desc.dtype = dtype;
  desc.rank = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), desc.sizes.begin());
  desc.in_strides = x.strides;
  desc.saved_strides = saved.strides;
  desc.out_strides = y.strides;
  for (const bool backward : {false, true}) {
    change_settings();
    std::memset(y.array->data(), 0xff, y.array->size());
    const cuda::Status status =
        backward ? cuda::activate_backward(desc, x.base(), saved.base(), y.base(), kDevice, nullptr)
                 : cuda::activate(desc, x.base(), y.base(), kDevice, nullptr);
    CHECK(status.ok(), status.kernel << ' ' << name_of(dtype) << ": " << last_error());
    for_each_element(sizes, x, saved, y, [&](std::int64_t xi, std::int64_t si, std::int64_t yi) {
      const double in = x.load(xi), got = y.load(yi);
      const double exact =
          backward ? cpu::reference_activate_backward(Activation::kSigmoid, in, saved.load(si))
                   : cpu::reference_activate(Activation::kSigmoid, in);
      if (std::isnan(exact)) {
        CHECK(std::isnan(got), status.kernel << ' ' << name_of(dtype) << " of " << in);
      } else if (std::isinf(exact)) {
        CHECK(got == exact, status.kernel << ' ' << name_of(dtype) << " of " << in);
      } else {
        const double bound = ulp_bound(dtype, backward) * spacing(dtype, exact);
        CHECK(std::fabs(got - exact) <= bound,
              status.kernel << ' ' << name_of(dtype) << " of " << in << " is " << got << ", not "
                            << exact << ": " << std::fabs(got - exact) / spacing(dtype, exact)
                            << " ULP");
      }
    });
  }
}

double moderate(std::int64_t i) { return integer(i, 3) * 1.3 + 0.01 * static_cast<double>(i % 97); }

void test_elementwise_layouts() {
  for (const DType dtype : kDTypes) {
    // Around the width of a vector, of what a block takes and of what a grid takes at once.
    for (const std::int64_t n : {1, 3, 8, 15, 17, 33, 255, 1025, 8200}) {
      for (const std::int64_t offset : {0, 1, 5}) {
        const Strides contiguous{{1}, {1}, {1}, offset, offset, offset};
        check_elementwise(dtype, {n}, contiguous, moderate);
      }
      check_elementwise(dtype, {n}, {{1}, {1}, {1}, 0, 1, 2}, moderate);
      check_elementwise(dtype, {n}, {{-1}, {3}, {2}, 0, 0, 0}, moderate);
      check_elementwise(dtype, {n}, {{0}, {0}, {1}, 0, 0, 0}, moderate);
    }
    check_elementwise(dtype, {}, {}, moderate);
    check_elementwise(dtype, {5, 7}, {{7, 1}, {1, 5}, {1, 6}, 0, 0, 0}, moderate);
    check_elementwise(dtype, {4, 3, 5}, {{1, 0, 4}, {-1, 20, 4}, {15, 5, 1}, 0, 2, 3}, moderate);
    check_elementwise(
        dtype, {2, 1, 2, 3, 1, 2, 2, 2},
        {{1, 9, 2, 4, 5, 12, 24, 48}, {48, 1, 24, 8, 7, 4, 2, 1}, {1, 9, 2, 4, 5, 12, 24, 48}},
        moderate);
    cuda::ElementwiseDesc empty;
    empty.dtype = dtype;
    empty.rank = 2;
    empty.sizes = {3, 0};
    CHECK(cuda::activate(empty, nullptr, nullptr, kDevice, nullptr).ok(), name_of(dtype));
  }
}

void test_elementwise_values() {
  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<double> special = {0.0,  -0.0,  infinity, -infinity, std::nan(""),
                                       1e30, -1e30, 1e-30,    -1e-30,    1e-42};
  const auto input = [&](std::int64_t i) {
    const auto index = static_cast<std::size_t>(i);
    if (index < special.size()) return special[index];
    // Both signs, from where the result is 1/2 to where it is 0 or 1, subnormal results included.
    return (i % 2 == 0 ? 1 : -1) * 110.0 * std::pow(static_cast<double>(i % 4001) / 4000, 3);
  };
  for (const DType dtype : kDTypes) check_elementwise(dtype, {8010}, {{1}, {1}, {1}}, input);
  const auto wide = [&](std::int64_t i) { return -7.5 * static_cast<double>(i % 101) + 0.3; };
  check_elementwise(DType::kFloat64, {101}, {{1}, {1}, {1}}, wide);
  // Every value of 16 bits.
  if (sees_accesses()) return;  // the values are no different there, and it takes long
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    check_elementwise(dtype, {65536}, {{1}, {1}, {1}}, [&](std::int64_t i) {
      const auto bits = static_cast<std::uint16_t>(i);
      return cpu::reference_load(dtype, &bits, 0);
    });
  }
}

}  // namespace

int main() {
  test_elementwise_layouts();
  test_elementwise_values();
  test_exact_sums(cuda::gemm_simt);
  test_epilogue_gradient(cuda::gemm_simt);
  test_random(cuda::gemm_simt);
  test_orders(cuda::gemm_simt);
  test_far_apart(cuda::gemm_simt);
  test_far_apart(cuda::gemv);
  return failures == 0 ? 0 : 1;
}
