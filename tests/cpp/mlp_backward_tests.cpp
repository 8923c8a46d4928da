// Tests of a stack's gradients in blocks of rows, and of the sums to which their products add.
#include <cstddef>
#include <iostream>
#include <string>
#include <vector>

#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// Products that add to sums of the accumulators' type, in every form: exact, and nothing else is
/// touched.
void test_added_products() {
  int turn = 0;
  for (DType dtype : kDTypes) {
    for (std::int64_t m : {1, 3, 20, 40}) {
      for (std::int64_t n : {0, 1, 5, 16, 33, 100}) {
        for (std::int64_t k : {0, 1, 30, 300, 5000}) {
          Product::Options options = Product::Options::of(++turn);
          options.bias = false;
          options.a_sum = turn % 2 == 0;
          const Product product(dtype, m, n, k, options, integer, integer, exact_saved);
          const ReferenceGemm reference = reference_gemm(product.desc, product.inputs);
          const DType sum = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
          GemmDesc desc = product.desc;
          desc.adds = true;
          for (Isa isa : supported_isas()) {
            set_active_isa(isa);
            const std::int64_t size = size_of(sum);
            Bytes d(static_cast<std::size_t>((m * desc.d_stride_m + 1) * size), std::byte{0});
            Bytes a_sum(static_cast<std::size_t>((m + 1) * size), std::byte{0});
            GemmPointers at = product.inputs;
            at.d = d.data(), at.a_sum = a_sum.data();
            for (int times = 1; times <= 2; ++times) {
              gemm(desc, at, on_threads<3>());
              for (std::int64_t i = 0; i < m; ++i) {
                for (std::int64_t j = 0; j < desc.d_stride_m; ++j) {
                  const double exact = j < n ? times * reference.d[i * n + j] : 0;
                  CHECK(reference_load(sum, d.data(), i * desc.d_stride_m + j) == exact,
                        product.name() << " at " << i << ", " << j);
                }
                const double exact = desc.has_a_sum ? times * reference.a_sum[i] : 0;
                CHECK(reference_load(sum, a_sum.data(), i) == exact, product.name()
                                                                         << " sum " << i);
              }
            }
          }
        }
      }
    }
  }
}

/// A stack with random contents whose gradients are wanted; dy's rows have gaps if the number of
/// layers is odd.
class Stack {
 public:
  Stack(DType dtype, std::int64_t rows, const std::vector<std::int64_t>& widths,
        bool ends_in_sigmoid)
      : rows_(rows), dtype_(dtype) {
    const std::size_t depth = widths.size() - 1;
    const std::int64_t dy_stride = widths.back() + (depth % 2 == 1 ? 3 : 0);
    std::int64_t hidden = 0;
    for (std::size_t i = 1; i < depth; ++i) hidden += widths[i];
    dy_ = random_array(dtype, rows * dy_stride, 1);
    x_ = random_array(dtype, rows * widths[0], 2);
    hidden_ = outputs(rows * hidden);
    y_ = outputs(rows * widths.back());
    for (std::size_t i = 0; i < depth; ++i) {
      MlpLayerBackward layer;
      layer.in_features = widths[i], layer.out_features = widths[i + 1];
      layer.activation =
          i + 1 < depth || ends_in_sigmoid ? Activation::kSigmoid : Activation::kIdentity;
      weights_.push_back(random_array(dtype, widths[i] * widths[i + 1], 10 + i));
      layer.weight = weights_.back().data();
      layer.weight_stride_out = i % 2 == 0 ? widths[i] : 1;
      layer.weight_stride_in = i % 2 == 0 ? 1 : widths[i + 1];
      layers_.push_back(layer);
    }
    mlp.dtype = dtype, mlp.rows = rows;
    mlp.grad_output = {dy_.data(), dy_stride, 1};
    if (ends_in_sigmoid) mlp.output = {y_.data(), widths.back(), 1};
    mlp.input = {x_.data(), widths[0], 1};
    mlp.hidden = hidden_.data();
    mlp.layers = layers_;
  }
  Stack(const Stack&) = delete;

  /// dx, then each layer's dw and db. `wanted`: a bit for each of them.
  std::vector<Bytes> make_room(unsigned wanted) {
    std::vector<Bytes> grads;
    const auto room = [&](std::int64_t count) -> void* {
      grads.emplace_back(static_cast<std::size_t>(count * size_of(dtype_)), std::byte{0xa5});
      const bool is_wanted = (wanted >> (grads.size() - 1) & 1) != 0;
      return is_wanted ? grads.back().data() : nullptr;
    };
    mlp.grad_input = room(rows_ * layers_[0].in_features);
    bool before = mlp.grad_input != nullptr;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      MlpLayerBackward& layer = layers_[i];
      layer.wants_before = before;
      layer.grad_weight = room(layer.out_features * layer.in_features);
      layer.grad_bias = room(layer.out_features);
      before = before || layer.grad_weight != nullptr || layer.grad_bias != nullptr;
    }
    return grads;
  }

  /// The same product by product, the last layer's dz formed before both of its own if it's bf16.
  std::vector<Bytes> run_layers(unsigned wanted) {
    std::vector<Bytes> grads = make_room(wanted);
    GemmPointers at;
    GemmDesc desc;
    desc.dtype = dtype_;
    at.a = mlp.grad_output.data;
    std::int64_t a_stride = mlp.grad_output.stride_row;
    at.saved = mlp.output.data;
    Bytes dz[2];
    if (dtype_ == DType::kBFloat16 && at.saved != nullptr) {
      const std::int64_t columns = layers_.back().out_features,
                         row_bytes = columns * size_of(dtype_);
      Bytes& formed = dz[layers_.size() % 2];
      formed.resize(static_cast<std::size_t>(rows_ * row_bytes));
      for (std::int64_t r = 0; r < rows_; ++r) {
        activate_backward(Activation::kSigmoid, dtype_, columns,
                          dy_.data() + r * a_stride * size_of(dtype_), 1, y_.data() + r * row_bytes,
                          1, formed.data() + r * row_bytes, 1);
      }
      at.a = formed.data(), at.saved = nullptr, a_stride = columns;
    }
    const std::byte* h = hidden_.data() + hidden_.size();
    for (std::size_t i = layers_.size(); i-- > 0;) {
      const MlpLayerBackward& layer = layers_[i];
      if (i > 0) h -= rows_ * layer.in_features * size_of(dtype_);
      const void* const x = i > 0 ? h : x_.data();
      desc.prologue = at.saved == nullptr ? Activation::kIdentity : Activation::kSigmoid;
      if (layer.grad_weight != nullptr || layer.grad_bias != nullptr) {
        desc.m = layer.out_features, desc.k = rows_;
        desc.n = layer.grad_weight == nullptr ? 0 : layer.in_features;
        desc.a_stride_m = 1, desc.a_stride_k = a_stride;
        desc.saved_stride_m = 1, desc.saved_stride_k = layer.out_features;
        desc.b_stride_k = layer.in_features, desc.b_stride_n = 1;
        desc.d_stride_m = layer.in_features;
        desc.has_a_sum = layer.grad_bias != nullptr;
        desc.epilogue_gradient = Activation::kIdentity;
        at.b = x, at.d = layer.grad_weight, at.a_sum = layer.grad_bias;
        gemm(desc, at, serial());
      }
      if (!layer.wants_before) break;
      desc.m = rows_, desc.n = layer.in_features, desc.k = layer.out_features;
      desc.a_stride_m = a_stride, desc.a_stride_k = 1;
      desc.saved_stride_m = layer.out_features, desc.saved_stride_k = 1;
      desc.b_stride_k = layer.weight_stride_out, desc.b_stride_n = layer.weight_stride_in;
      desc.d_stride_m = desc.d_saved_stride_m = layer.in_features;
      desc.has_a_sum = false;
      desc.epilogue_gradient = i > 0 ? Activation::kSigmoid : Activation::kIdentity;
      dz[i % 2].resize(static_cast<std::size_t>(rows_ * layer.in_features * size_of(dtype_)));
      at.b = layer.weight, at.d_saved = x;
      at.d = i > 0 ? dz[i % 2].data() : mlp.grad_input;
      gemm(desc, at, serial());
      at.a = at.d, at.saved = nullptr, a_stride = layer.in_features;
    }
    return grads;
  }

  std::string name() const {
    std::string text = std::string(name_of(active_isa())) + ' ' + name_of(dtype_) + ' ' +
                       std::to_string(rows_) + " rows of";
    for (const MlpLayerBackward& layer : layers_) text += ' ' + std::to_string(layer.in_features);
    return text + ' ' + std::to_string(layers_.back().out_features);
  }

  MlpBackward mlp;

 private:
  /// What sigmoids might have given.
  Bytes outputs(std::int64_t count) const {
    Bytes array(static_cast<std::size_t>(count * size_of(dtype_)));
    for (std::int64_t i = 0; i < count; ++i) {
      reference_store(dtype_, array.data(), i, (integer(i, 5) + 3.5) / 7);
    }
    return array;
  }

  std::int64_t rows_;
  DType dtype_;
  Bytes dy_, x_, hidden_, y_;
  std::vector<Bytes> weights_;
  std::vector<MlpLayerBackward> layers_;
};

/// dx bit for bit as product by product; sums over the batch, which are added in another order,
/// within what that may change; everything the same on any threads.
void test_long_batches() {
  constexpr unsigned kAll = ~0u;
  int turn = 0;
  for (DType dtype : kDTypes) {
    const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    const double store = dtype == DType::kBFloat16  ? 0x1p-7
                         : dtype == DType::kFloat16 ? 0x1p-10
                                                    : 0;
    for (const auto& widths : std::vector<std::vector<std::int64_t>>{
             {4, 5, 7, 3}, {16, 32, 16}, {40, 33, 1, 20}, {3, 0, 2}, {9, 4}}) {
      // Five stacks: each meets both. For bf16, more is done behind a sigmoid.
      const bool ends_in_sigmoid = ++turn % 2 == 0 || dtype == DType::kBFloat16;
      const std::int64_t rows = 33'000;
      Stack stack(dtype, rows, widths, ends_in_sigmoid);
      for (Isa isa : {supported_isas().front(), supported_isas().back()}) {
        set_active_isa(isa);
        for (unsigned wanted : {kAll, 0x2u, 0x14u, 0x1u}) {
          const std::vector<Bytes> expected = stack.run_layers(wanted);
          const std::vector<Bytes> grads = stack.make_room(wanted);
          CHECK(mlp_backward(stack.mlp, serial()), stack.name() << " isn't taken");
          CHECK(grads[0] == expected[0], stack.name() << ", dx");
          for (std::size_t g = 1; g < grads.size(); ++g) {
            if ((wanted >> g & 1) == 0) {
              CHECK(grads[g] == expected[g], stack.name() << ", gradient " << g);
              continue;
            }
            const std::int64_t count = static_cast<std::int64_t>(grads[g].size()) / size_of(dtype);
            double largest = 0;
            for (std::int64_t e = 0; e < count; ++e) {
              largest = std::max(largest, std::abs(reference_load(dtype, expected[g].data(), e)));
            }
            for (std::int64_t e = 0; e < count; ++e) {
              const double is = reference_load(dtype, grads[g].data(), e);
              const double was = reference_load(dtype, expected[g].data(), e);
              // Sums of random terms; a row too few would show as a 180th of the largest.
              CHECK(std::abs(is - was) <= 64 * eps * largest + store * std::abs(was),
                    stack.name() << ", gradient " << g << " at " << e << ": " << is << ", not "
                                 << was);
            }
          }
          const std::vector<Bytes> again = stack.make_room(wanted);
          mlp_backward(stack.mlp, on_threads<5>());
          CHECK(again == grads, stack.name() << ", 5 threads");
        }
      }
    }
  }
}

void test_short_batches() {
  Stack stack(DType::kFloat32, 1000, {4, 5, 3}, false);
  stack.make_room(~0u);
  CHECK(!mlp_backward(stack.mlp, serial()), "a short batch");
}

}  // namespace

int main() {
  test_added_products();
  test_long_batches();
  test_short_batches();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
