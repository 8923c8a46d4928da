// The operations for C++ callers, and for each other. They pass the dispatcher, or skip it where it
// would only pick the CPU (glue.h): autograd, autocast, transforms and compilers apply either way.
// See neuron_ext/functional.py for the contracts; an undefined tensor is what None is there.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace neuron_ext {

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias = {});

at::Tensor sigmoid(const at::Tensor& input);

at::Tensor linear_sigmoid(const at::Tensor& input, const at::Tensor& weight,
                          const at::Tensor& bias = {});

/// `biases`: empty for none, else as many as there are weights; `output_activation`: nullopt or
/// "sigmoid".
at::Tensor mlp(const at::Tensor& input, at::TensorList weights, at::TensorList biases = {},
               std::optional<std::string_view> output_activation = std::nullopt);

/// Gradients of input, weight and bias; those not in `output_mask` are undefined tensors. The
/// gradient of the input takes the weight, that of the weight the input; what no wanted gradient
/// takes may be undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_output,
                                                               const at::Tensor& input,
                                                               const at::Tensor& weight,
                                                               std::array<bool, 3> output_mask);

at::Tensor sigmoid_backward(const at::Tensor& grad_output, const at::Tensor& output);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_sigmoid_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& output, std::array<bool, 3> output_mask);

// ---- settings of the whole process; neuron_ext/backends.py says what they do --------------------

bool batch_invariant();
void set_batch_invariant(bool enabled);

struct PackedWeights {
  std::int64_t max_bytes, bytes, count;
};
PackedWeights packed_weights();
void set_packed_weights(std::int64_t max_bytes);  // 0: off

}  // namespace neuron_ext
