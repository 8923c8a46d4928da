// Rows of products whose batch mustn't decide on anything: they have the same bits in every batch.
#include <cstdint>

#include "gemm_testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

constexpr std::int64_t kLargestBatch = 80;

/// The first m rows of a product with weights along or across k: a layer's output, or its input's
/// gradient.
Product rows_of_product(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k,
                        bool is_gradient) {
  Product::Options options;
  options.bias = !is_gradient;
  options.epilogue = is_gradient ? Activation::kIdentity : Activation::kSigmoid;
  options.prologue = is_gradient;
  options.b = is_gradient ? Layout::kRows : Layout::kColumns;
  Product product(dtype, m, n, k, options, random_values(1, kLargestBatch, k, false),
                  random_values(2, k, n, false), random_values(3, kLargestBatch, k, false));
  product.desc.whole_m = GemmDesc::kAnyBatch;
  return product;
}

void test_rows_have_the_same_bits_in_every_batch() {
  const struct {
    std::int64_t n, k;
  } sizes[] = {{1, 40}, {5, 700}, {40, 7}, {72, 1100}};
  for (const int sm : {80, 90}) {
    for (const DType dtype : kDTypes) {
      for (const auto& [n, k] : sizes) {
        for (const bool is_gradient : {false, true}) {
          const cuda::Device device{sm, 3};
          const Product largest = rows_of_product(dtype, kLargestBatch, n, k, is_gradient);
          const Product::Result all = compute(largest, device);
          for (const std::int64_t m : {1, 8, 20, 65}) {
            change_settings();
            const Product product = rows_of_product(dtype, m, n, k, is_gradient);
            const Product::Result rows = compute(product, device);
            for (std::int64_t e = 0; e < m * n; ++e) {
              CHECK(product.d(rows, e / n, e % n) == largest.d(all, e / n, e % n),
                    product.name() << ", sm " << sm << ", element " << e);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_rows_have_the_same_bits_in_every_batch();
  return failures == 0 ? 0 : 1;
}
