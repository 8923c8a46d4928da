// Tests of products that share a packed B, and of rows that must not depend on the product they are
// part of.
#include <cstddef>
#include <cstring>
#include <iostream>
#include <memory>
#include <new>
#include <vector>

#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// B of a product, packed for the active ISA, in memory that starts as nan.
class Packed {
 public:
  Packed(const Product& product, const ParallelFor& parallel_for) {
    const Packing packing = packing_of(product.desc);
    memory_.reset(static_cast<std::byte*>(::operator new(packing.bytes, kAlignment)));
    std::memset(memory_.get(), 0xff, packing.bytes);
    pack_b(packing, product.desc, product.inputs.b, memory_.get(), parallel_for);
  }
  const void* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
};

/// The product with its B packed, and no other B to be read.
Product with_packed_b(Product product, const Packed& packed) {
  product.inputs.b = nullptr;
  product.inputs.packed_b = packed.get();
  return product;
}

void test_packed_operands_are_exact() {
  int turn = 0;
  for (DType dtype : kDTypes) {
    for (std::int64_t n : {0, 1, 3, 16, 31, 33, 70}) {
      for (std::int64_t k : {0, 1, 2, 7, 40, 257, 600, 1025, 8192 + 77}) {
        for (std::int64_t m : {1, 13, 60}) {
          if (k > 1025 && m > 13) continue;
          const Product product(dtype, m, n, k, Product::Options::of(turn++), integer, integer,
                                exact_saved);
          const Product::Result expected =
              product.expected(reference_gemm(product.desc, product.inputs));
          for (Isa isa : supported_isas()) {
            set_active_isa(isa);
            const Packed packed(product, on_threads<3>());
            // Packed for one instruction set, it stays so.
            set_active_isa(Isa::kPortable);
            const Product shared = with_packed_b(product, packed);
            CHECK(shared.compute(serial()) == expected, shared.name());
            CHECK(shared.compute(on_threads<3>()) == expected, shared.name() << ", 3 threads");
          }
        }
      }
    }
  }
}

Product random_product(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k,
                       const Product::Options& options) {
  return Product(dtype, m, n, k, options, random_values(1, m, k, false),
                 random_values(2, k, n, false), random_values(3, m, k, false));
}

/// Rows [begin, begin + count) of a product, as a product.
Product rows_of(const Product& product, std::int64_t begin, std::int64_t count) {
  Product rows = product;
  const std::int64_t size = size_of(product.desc.dtype);
  const auto advance = [&](const void*& at, std::int64_t stride) {
    if (at != nullptr) at = static_cast<const std::byte*>(at) + begin * stride * size;
  };
  advance(rows.inputs.a, product.desc.a_stride_m);
  advance(rows.inputs.saved, product.desc.saved_stride_m);
  rows.desc.m = count;
  return rows;
}

bool same_rows(const Product& part, const Product::Result& rows, std::int64_t begin,
               const Product& whole, const Product::Result& all) {
  for (std::int64_t i = 0; i < part.desc.m; ++i) {
    for (std::int64_t j = 0; j < part.desc.n; ++j) {
      if (part.d(rows, i, j) != whole.d(all, begin + i, j)) return false;
    }
  }
  return true;
}

/// With the deciding m of the whole product, or with none, any rows of a product have the bits that
/// they have in it: where they are few and where they are many, and whether B was packed or not.
void test_rows_of_a_product() {
  for (DType dtype : kDTypes) {
    for (std::int64_t n : {1, 5, 40, 70}) {
      for (std::int64_t k : {3, 30, 300, 1200, 9000}) {
        if (k == 9000 && n > 5) continue;
        for (bool input_gradient : {false, true}) {
          Product::Options options;
          options.bias = !input_gradient;
          options.epilogue = input_gradient ? Activation::kIdentity : Activation::kSigmoid;
          options.prologue = input_gradient;
          options.b = input_gradient ? Layout::kRows : Layout::kColumns;
          for (std::int64_t m : {9, 47, 150}) {
            Product whole = random_product(dtype, m, n, k, options);
            for (std::int64_t deciding : {m, GemmDesc::kAnyBatch}) {
              whole.desc.whole_m = deciding;
              for (Isa isa : supported_isas()) {
                set_active_isa(isa);
                const Product::Result all = whole.compute(on_threads<3>());
                for (std::int64_t count : {1, 2, 7, 8}) {
                  const std::int64_t begin = (m - count) / 2;
                  const Product part = rows_of(whole, begin, count);
                  CHECK(same_rows(part, part.compute(serial()), begin, whole, all),
                        part.name() << ", " << deciding << " rows decide");
                }
                if (deciding != GemmDesc::kAnyBatch) continue;
                const Product shorter = rows_of(whole, 1, m / 2);
                CHECK(same_rows(shorter, shorter.compute(on_threads<4>()), 1, whole, all),
                      shorter.name());
              }
            }
          }
        }
      }
    }
  }
}

/// A packed B changes no bit of what the kernel that packs it computes without.
void test_packing_ahead_changes_nothing() {
  for (DType dtype : kDTypes) {
    for (std::int64_t k : {30, 300, 1200}) {
      for (std::int64_t m : {40, 200}) {
        Product::Options options;
        options.bias = true;
        options.epilogue = Activation::kSigmoid;
        const Product product = random_product(dtype, m, 100, k, options);
        for (Isa isa : supported_isas()) {
          set_active_isa(isa);
          const Product::Result expected = product.compute(serial());
          const Packed packed(product, serial());
          const Product shared = with_packed_b(product, packed);
          CHECK(shared.compute(serial()) == expected, shared.name());
          CHECK(shared.compute(on_threads<4>()) == expected, shared.name());
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_packed_operands_are_exact();
  test_rows_of_a_product();
  test_packing_ahead_changes_nothing();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
