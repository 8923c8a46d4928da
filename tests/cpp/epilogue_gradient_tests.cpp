// Tests of products that are multiplied by an activation's gradient on their way out: a stack's
// input gradients, which become the dz of the layer before.
#include <iostream>
#include <stdexcept>
#include <vector>

#include "forms.h"
#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// dgrad of a layer with `out` outputs, of dz; d_saved and D with gaps after their rows or without.
Product input_gradient(DType dtype, std::int64_t batch, std::int64_t in, std::int64_t out,
                       Layout d_saved, const Values& a, const Values& b, const Values& saved) {
  Product::Options options;
  options.b = Layout::kRows;
  options.epilogue_gradient = true;
  options.d_saved = d_saved;
  Product product(dtype, batch, in, out, options, a, b, saved);
  if (d_saved == Layout::kRows) product.desc.d_stride_m = in;
  return product;
}

struct Shape {
  std::int64_t batch, in, out;
};

/// Every form, on every remainder of a vector.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (std::int64_t batch : {1, 3, 15, 70, 300}) {
    for (std::int64_t in : {1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 40, 70, 300}) {
      for (std::int64_t out : {0, 1, 3, 10, 33, 70, 300}) all.push_back({batch, in, out});
    }
  }
  return all;
}

void test_exact_products() {
  std::vector<bool> met(8);
  for (DType dtype : kDTypes) {
    for (const Shape& s : shapes()) {
      for (Layout d_saved : {Layout::kRows, Layout::kNegative}) {
        const Product product =
            input_gradient(dtype, s.batch, s.in, s.out, d_saved, integer, integer, exact_saved);
        met[static_cast<std::size_t>(form_of(product.desc))] = true;
        check_exact(product);
      }
    }
  }
  for (Form form :
       {Form::kBlocked, Form::kFewRows, Form::kFewColumns, Form::kLongColumn, Form::kLongRows}) {
    CHECK(met[static_cast<std::size_t>(form)], name_of(form) << " wasn't met");
  }
}

/// Where nothing is rounded between the two, the same bits as of the product and then the gradient.
void test_bits_of_two_steps() {
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const Shape& s : shapes()) {
      const Values saved = [](std::int64_t i, std::int64_t j) { return (integer(i, j) + 3.5) / 7; };
      const Product fused = input_gradient(dtype, s.batch, s.in, s.out, Layout::kRows,
                                           random_values(1, s.batch, s.out, false),
                                           random_values(2, s.out, s.in, false), saved);
      Product product = fused;
      product.desc.epilogue_gradient = Activation::kIdentity;
      for (Isa isa : supported_isas()) {
        set_active_isa(isa);
        Product::Result expected = product.compute(serial());
        void* const d = expected.d.data() + Product::kGuard * size_of(dtype);
        activate_backward(Activation::kSigmoid, dtype, s.batch * s.in, d, 1, fused.inputs.d_saved,
                          1, d, 1);
        CHECK(fused.compute(on_threads<3>()) == expected, fused.name());
      }
    }
  }
}

void test_what_does_not_go_together() {
  Product::Options options;
  options.epilogue_gradient = true;
  for (bool bias : {false, true}) {
    options.bias = bias;
    options.epilogue = bias ? Activation::kIdentity : Activation::kSigmoid;
    const Product product(DType::kFloat32, 2, 3, 4, options, integer, integer, exact_saved);
    bool thrown = false;
    try {
      product.compute(serial());
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    CHECK(thrown, product.name());
  }
}

}  // namespace

int main() {
  test_exact_products();
  test_bits_of_two_steps();
  test_what_does_not_go_together();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
