// Tests of stacks: the bits of their layers, one after the other, whatever the blocks of rows.
#include <cstddef>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "testing.h"

namespace {

using namespace neuron_ext;
using namespace neuron_ext::testing;

/// A stack with random contents; the input's rows have gaps, and every other weight is stored
/// (in, out). That of a backward has saved outputs and no biases.
class Stack {
 public:
  Stack(DType dtype, std::int64_t rows, const std::vector<std::int64_t>& widths, bool is_backward)
      : input_(random_array(dtype, rows * (widths[0] + 3), 1)) {
    mlp.dtype = dtype;
    mlp.rows = rows;
    mlp.input = input_.data();
    mlp.input_stride_row = widths[0] + 3;
    for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
      const std::int64_t in = widths[i], out = widths[i + 1];
      weights_.push_back(random_array(dtype, in * out, 10 + i));
      biases_.push_back(random_array(dtype, out, 20 + i));
      saved_.push_back(random_array(dtype, rows * out, 30 + i));
      MlpLayer layer;
      layer.in_features = in, layer.out_features = out;
      layer.activation = i + 2 < widths.size() ? Activation::kSigmoid : Activation::kIdentity;
      layer.weight = weights_.back().data();
      layer.weight_stride_out = i % 2 == 0 ? in : 1;
      layer.weight_stride_in = i % 2 == 0 ? 1 : out;
      if (i % 3 != 1 && !is_backward) layer.bias = biases_.back().data();
      if (is_backward && i % 3 != 2) {
        layer.saved = saved_.back().data();
        layer.activation = Activation::kSigmoid;
      }
      layers_.push_back(layer);
    }
    mlp.layers = layers_;
  }
  Stack(const Stack&) = delete;

  /// The outputs of all layers or only of the last, each between poisoned elements.
  std::vector<Bytes> run(bool keeps_hidden, const ParallelFor& parallel_for) {
    std::vector<Bytes> outputs = make_room(keeps_hidden);
    mlp_forward(mlp, parallel_for);
    return outputs;
  }

  /// The same, layer by layer.
  std::vector<Bytes> run_layers() {
    std::vector<Bytes> outputs = make_room(true);
    GemmPointers at;
    at.a = mlp.input;
    for (const MlpLayer& layer : layers_) {
      at.b = layer.weight, at.bias = layer.bias, at.d_saved = layer.saved, at.d = layer.output;
      gemm(product_of(mlp, layer), at, serial());
      at.a = at.d;
    }
    return outputs;
  }

  std::string name() const {
    std::ostringstream text;
    text << name_of(active_isa()) << ' ' << name_of(mlp.dtype) << ' ' << mlp.rows << " rows of";
    for (const MlpLayer& layer : layers_) text << ' ' << layer.in_features;
    text << ' ' << layers_.back().out_features << (mlp.batch_invariant ? ", batch-invariant" : "")
         << (layers_.front().saved != nullptr ? ", backward" : "");
    return text.str();
  }

  Mlp mlp;

 private:
  static constexpr std::size_t kGuard = 64;

  std::vector<Bytes> make_room(bool keeps_hidden) {
    std::vector<Bytes> outputs;
    for (MlpLayer& layer : layers_) {
      layer.output = nullptr;
      if (!keeps_hidden && &layer != &layers_.back()) continue;
      outputs.emplace_back(mlp.rows * layer.out_features * size_of(mlp.dtype) + 2 * kGuard,
                           std::byte{0xa5});
      layer.output = outputs.back().data() + kGuard;
    }
    return outputs;
  }

  Bytes input_;
  std::vector<Bytes> weights_, biases_, saved_;
  std::vector<MlpLayer> layers_;
};

void test_stacks_are_their_layers() {
  const std::vector<std::vector<std::int64_t>> widths = {
      {4, 5, 7, 3}, {40, 64, 33, 1}, {300, 270, 10}, {5, 1}, {3, 0, 2}, {2, 700, 2}};
  for (DType dtype : kDTypes) {
    for (const auto& width : widths) {
      for (std::int64_t rows : {0, 1, 5, 70, 600, 2500}) {
        if (rows == 2500 && width[0] > 40) continue;
        for (bool batch_invariant : {false, true}) {
          // Backward once: what differs is how a product ends.
          Stack stack(dtype, rows, width, rows % 2 == 0 && batch_invariant);
          stack.mlp.batch_invariant = batch_invariant;
          for (Isa isa : supported_isas()) {
            set_active_isa(isa);
            const std::vector<Bytes> expected = stack.run_layers();
            for (const ParallelFor& parallel_for : {serial(), on_threads<3>(), on_threads<16>()}) {
              CHECK(stack.run(true, parallel_for) == expected,
                    stack.name() << ", " << parallel_for.max_threads() << " threads");
              CHECK(stack.run(false, parallel_for).front() == expected.back(),
                    stack.name() << ", " << parallel_for.max_threads() << " threads, only output");
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_stacks_are_their_layers();
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}
