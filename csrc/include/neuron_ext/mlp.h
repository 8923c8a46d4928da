// A stack of layers, each of which takes the one before it for its input. What a layer computes is
// said in gemm.h.
#pragma once

#include <cstdint>
#include <span>

#include "neuron_ext/activation.h"
#include "neuron_ext/gemm.h"
#include "neuron_ext/types.h"

namespace neuron_ext {

/// y = f(x Wᵀ + b), or, with a saved output of f, y = (x Wᵀ) f'(at saved): what backward goes down,
/// dz for dz, is such a stack of the transposed weights. Strides are in elements and may be zero or
/// negative.
struct MlpLayer {
  std::int64_t in_features = 0, out_features = 0;
  Activation activation = Activation::kIdentity;

  const void* weight = nullptr;
  std::int64_t weight_stride_out = 0, weight_stride_in = 1;
  const void* packed_weight = nullptr;  // as GemmPointers::packed_b, which says what is read then

  const void* bias = nullptr;  // null: none, as where there is a saved output
  std::int64_t bias_stride = 1;

  const void* saved = nullptr;  // (rows, out_features), contiguous; or null

  // (rows, out_features), contiguous. Null for a hidden layer whose output nobody needs later: then
  // it exists only while the next layer reads it.
  void* output = nullptr;

  // (out_features), of the output's columns as GemmDesc::has_d_sum says; null: not wanted.
  void* output_sum = nullptr;
};

struct Mlp {
  DType dtype = DType::kFloat32;  // of everything
  Precision precision = Precision::kHighest;
  std::int64_t rows = 0;
  const void* input = nullptr;
  std::int64_t input_stride_row = 0, input_stride_column = 1;
  std::span<const MlpLayer> layers;
  bool batch_invariant = false;  // GemmDesc::kAnyBatch for every layer
};

/// What the gradients of a stack take of a layer, and where its own go.
struct MlpLayerBackward {
  std::int64_t in_features = 0, out_features = 0;
  Activation activation = Activation::kIdentity;  // whose gradient needs its output

  bool wants_before = false;  // a gradient before its own: what takes the weight
  const void* weight = nullptr;
  std::int64_t weight_stride_out = 0, weight_stride_in = 1;

  // (out_features, in_features) and (out_features), contiguous; null: not wanted.
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
};

struct MlpBackward {
  /// A matrix of as many rows as the batch.
  struct Rows {
    const void* data = nullptr;
    std::int64_t stride_row = 0, stride_column = 1;
  };

  DType dtype = DType::kFloat32;  // of everything
  Precision precision = Precision::kHighest;
  std::int64_t rows = 0;
  Rows grad_output;
  Rows output;  // if the last layer has an activation
  Rows input;   // if the first weight's gradient is wanted
  // The hidden layers' outputs, end to end, each (rows, out_features) and contiguous.
  const void* hidden = nullptr;
  std::span<const MlpLayerBackward> layers;
  void* grad_input = nullptr;  // (rows, in_features), contiguous; null: not wanted
  bool batch_invariant = false;
};

/// What is asked of one layer of a stack, as a product of all rows.
inline GemmDesc product_of(const Mlp& mlp, const MlpLayer& layer) {
  GemmDesc desc;
  desc.m = mlp.rows;
  desc.whole_m = mlp.batch_invariant ? GemmDesc::kAnyBatch : mlp.rows;
  desc.n = layer.out_features;
  desc.k = layer.in_features;
  desc.dtype = mlp.dtype;
  desc.precision = mlp.precision;
  if (&layer == mlp.layers.data()) {
    desc.a_stride_m = mlp.input_stride_row;
    desc.a_stride_k = mlp.input_stride_column;
  } else {
    desc.a_stride_m = layer.in_features;
  }
  desc.b_stride_k = layer.weight_stride_in;
  desc.b_stride_n = layer.weight_stride_out;
  desc.d_stride_m = layer.out_features;
  desc.has_bias = layer.bias != nullptr;
  desc.bias_stride = layer.bias_stride;
  if (layer.saved == nullptr) {
    desc.epilogue = layer.activation;
  } else {
    desc.epilogue_gradient = layer.activation;
    desc.d_saved_stride_m = layer.out_features;
    desc.has_d_sum = layer.output_sum != nullptr;
  }
  return desc;
}

}  // namespace neuron_ext
