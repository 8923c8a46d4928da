// mlp: linear layers with a sigmoid after every hidden one, as one operation with one node in the
// graph. The stages are those of linear.cpp. With gradients in view, mlp_forward also returns the
// outputs of the hidden layers, end to end in one tensor: h_1, h_2, ..., each (batch, n_i) and
// contiguous.

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "glue.h"
#include "layer.h"
#include "neuron_ext/cpu.h"
#include "ops.h"

namespace neuron_ext {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<std::optional<Tensor>>;
using Name = std::optional<std::string_view>;
using OutputAndHidden = std::tuple<Tensor, Tensor>;

namespace {

/// Raises ValueError unless the lists fit together.
void check_stack(TensorList weights, size_t biases, const Name& output_activation) {
  TORCH_CHECK_VALUE(!weights.empty(), "mlp: weights is empty, expected at least one weight");
  TORCH_CHECK_VALUE(biases == weights.size(), "mlp: biases has ", biases, " entries, expected ",
                    weights.size(), ", one (or None) for each weight");
  TORCH_CHECK_VALUE(!output_activation.has_value() || *output_activation == "sigmoid",
                    "mlp: output_activation is '", output_activation.value_or(""),
                    "', expected None or 'sigmoid'");
}

Activation activation_of(size_t layer, size_t depth, const Name& output_activation) {
  return layer + 1 < depth || output_activation.has_value() ? Activation::kSigmoid
                                                            : Activation::kIdentity;
}

Tensor bias_of(const OptionalTensors& biases, size_t layer) {
  return value_or_undefined(biases.get(layer));
}

bool kernels_take_stack(const Tensor& input, TensorList weights, const OptionalTensors& biases) {
  if (biases.size() != weights.size()) return false;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!kernels_take(input, weights[i], bias_of(biases, i))) return false;
  }
  return true;
}

/// Raises unless the layers' shapes agree with the input's and with each other.
void check_layers(const Tensor& input, TensorList weights, const OptionalTensors& biases) {
  check_layer("mlp, layer 0", input, weights[0], bias_of(biases, 0));
  for (size_t i = 1; i < weights.size(); ++i) {
    const auto out_features = weights[i - 1].sym_size(0), in_features = weights[i].sym_size(1);
    TORCH_CHECK(out_features.sym_eq(in_features).expect_true(__FILE__, __LINE__), "mlp, layer ", i,
                ": weight has shape ", shape_of(weights[i]),
                " and so takes in_features = ", in_features, ", but the weight of layer ", i - 1,
                " has shape ", shape_of(weights[i - 1]),
                " and so gives out_features = ", out_features);
    check_bias(c10::str("mlp, layer ", i), bias_of(biases, i), weights[i], input.dim());
  }
}

/// Layer by layer through the operations of linear.cpp, each of which finds its own way.
Tensor mlp_by_layers(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                     const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  Tensor h = input;
  for (size_t i = 0; i < weights.size(); ++i) {
    h = activation_of(i, weights.size(), output_activation) == Activation::kSigmoid
            ? neuron_ext::linear_sigmoid(h, weights[i], biases.get(i))
            : neuron_ext::linear(h, weights[i], biases.get(i));
  }
  return h;
}

OutputAndHidden mlp_forward_by_layers(const Tensor& input, TensorList weights,
                                      const OptionalTensors& biases,
                                      const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  Tensor h = input;
  std::vector<Tensor> hidden;
  for (size_t i = 0; i + 1 < weights.size(); ++i) {
    h = neuron_ext::linear_sigmoid(h, weights[i], biases.get(i));
    hidden.push_back(h.reshape({-1}));
  }
  const size_t last = weights.size() - 1;
  Tensor output = output_activation.has_value()
                      ? neuron_ext::linear_sigmoid(h, weights[last], biases.get(last))
                      : neuron_ext::linear(h, weights[last], biases.get(last));
  return {output, hidden.empty() ? at::empty({0}, input.options()) : at::cat(hidden)};
}

// ---- CPU
// -----------------------------------------------------------------------------------------------

/// `rows` rows of hidden layer outputs at `data`, contiguous.
RowsView rows_at(void* data, std::int64_t rows, std::int64_t columns) {
  return {Tensor(), data, rows, columns, columns, 1};
}

/// Runs the layers; the output of hidden layer i goes to hidden(i).
template <class Hidden>
Tensor run_layers(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                  const Name& output_activation, RowsView x, const Hidden& hidden) {
  const size_t depth = weights.size();
  Tensor output = empty_rows(input, weights.back().size(0));
  for (size_t i = 0; i < depth; ++i) {
    const std::int64_t width = weights[i].size(0);
    void* y = i + 1 < depth ? hidden(i) : output.mutable_data_ptr();
    const Tensor bias = bias_of(biases, i);
    fprop(activation_of(i, depth, output_activation), x, weights[i],
          bias.defined() ? as_vector(bias, width) : bias, y);
    x = rows_at(y, x.rows, width);
  }
  return output;
}

Tensor mlp_cpu(const Tensor& input, TensorList weights, const OptionalTensors& biases,
               Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  // Two buffers take turns: a layer reads one and writes the other.
  const RowsView x = as_rows(input);
  std::int64_t widest = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) widest = std::max(widest, weights[i].size(0));
  Tensor buffers = empty_cpu({2, x.rows * widest}, input.scalar_type());
  auto* data = static_cast<char*>(buffers.mutable_data_ptr());
  const std::int64_t bytes = x.rows * widest * buffers.element_size();
  return run_layers(input, weights, biases, output_activation, x,
                    [&](size_t layer) { return data + (layer % 2) * bytes; });
}

OutputAndHidden mlp_forward_cpu(const Tensor& input, TensorList weights,
                                const OptionalTensors& biases, Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_forward_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  const RowsView x = as_rows(input);
  std::int64_t width = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) width += weights[i].size(0);
  Tensor hidden = empty_cpu({x.rows * width}, input.scalar_type());
  auto* next = static_cast<char*>(hidden.mutable_data_ptr());
  Tensor output = run_layers(input, weights, biases, output_activation, x, [&](size_t layer) {
    return std::exchange(next, next + x.rows * weights[layer].size(0) * hidden.element_size());
  });
  return {output, hidden};
}

void check_mlp_backward(const Tensor& grad_output, const Tensor& input, TensorList weights,
                        const OptionalTensors& biases, const Tensor& output, const Tensor& hidden,
                        const Name& output_activation, const c10::List<bool>& mask) {
  check_stack(weights, biases.size(), output_activation);
  check_layers(input, weights, biases);
  const auto features = weights.back().sym_size(0);
  check_rows("mlp_backward", "grad_output", grad_output, input, features);
  check_rows("mlp_backward", "output", output, input, features);
  c10::SymInt width = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) width += weights[i].sym_size(0);
  c10::SymInt rows = 1;
  for (std::int64_t i = 0; i + 1 < input.dim(); ++i) rows *= input.sym_size(i);
  TORCH_CHECK(
      hidden.dim() == 1 && hidden.sym_size(0).sym_eq(rows * width).expect_true(__FILE__, __LINE__),
      "mlp_backward: hidden has shape ", shape_of(hidden), ", expected (", rows * width, ",)");
  TORCH_CHECK(mask.size() == 1 + 2 * weights.size(), "mlp_backward: output_mask has ", mask.size(),
              " entries, expected ", 1 + 2 * weights.size(), ": input, weights, biases");
}

std::vector<Tensor> mlp_backward_by_layers(const Tensor& grad_output, const Tensor& input,
                                           TensorList weights, const OptionalTensors& biases,
                                           const Tensor& output, const Tensor& hidden,
                                           const Name& output_activation,
                                           const c10::List<bool>& mask);

bool kernels_take_backward(const Tensor& grad_output, const Tensor& input, TensorList weights,
                           const OptionalTensors& biases, const Tensor& output,
                           const Tensor& hidden) {
  return kernels_take_stack(input, weights, biases) && goes_with(input, grad_output) &&
         goes_with(input, output) && goes_with(input, hidden);
}

std::vector<Tensor> mlp_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                     TensorList weights, const OptionalTensors& biases,
                                     const Tensor& output, const Tensor& hidden,
                                     Name output_activation, const c10::List<bool>& mask) {
  if (!kernels_take_backward(grad_output, input, weights, biases, output, hidden)) {
    return mlp_backward_by_layers(grad_output, input, weights, biases, output, hidden,
                                  output_activation, mask);
  }
  check_mlp_backward(grad_output, input, weights, biases, output, hidden, output_activation, mask);
  const size_t depth = weights.size();
  const RowsView x = as_rows(input);
  const Tensor dense_hidden = hidden.contiguous();
  const std::int64_t size = hidden.element_size();
  const auto dtype = input.scalar_type();
  const auto wanted = [&](size_t i) { return mask.get(i); };

  // Gradients of hidden layers' outputs, in two buffers that take turns.
  std::int64_t widest = 0;
  for (size_t i = 1; i < depth; ++i) widest = std::max(widest, weights[i].size(1));
  Tensor buffers = empty_cpu({2, x.rows * widest}, dtype);
  auto* buffer = static_cast<char*>(buffers.mutable_data_ptr());

  std::vector<Tensor> grads(mask.size());
  RowsView dy = as_rows(grad_output);
  OptionalRows y = output_activation.has_value() ? OptionalRows(as_rows(output)) : std::nullopt;
  auto* h_end = static_cast<char*>(const_cast<void*>(dense_hidden.const_data_ptr())) +
                dense_hidden.numel() * size;
  for (size_t i = depth; i-- > 0;) {
    const Tensor& weight = weights[i];
    const std::int64_t in_features = weight.size(1);
    if (i > 0) h_end -= x.rows * in_features * size;
    const RowsView h = i > 0 ? rows_at(h_end, x.rows, in_features) : x;
    Tensor &dw = grads[1 + i], &db = grads[1 + depth + i];
    if (wanted(1 + i)) dw = empty_cpu({weight.size(0), in_features}, dtype);
    if (wanted(1 + depth + i)) db = empty_cpu({weight.size(0)}, dtype);
    if (dw.defined() || db.defined()) {
      wgrad(dy, y, h, dw.defined() ? dw.mutable_data_ptr() : nullptr,
            db.defined() ? db.mutable_data_ptr() : nullptr, dtype_of(input));
    }
    if (i == 0) {
      if (wanted(0)) {
        grads[0] = empty_rows(input, in_features);
        dgrad(dy, y, weight, grads[0].mutable_data_ptr());
      }
      break;
    }
    bool earlier = wanted(0);
    for (size_t j = 0; j < i; ++j) earlier |= wanted(1 + j) || wanted(1 + depth + j);
    if (!earlier) break;
    void* dh = buffer + (i % 2) * x.rows * widest * size;
    dgrad(dy, y, weight, dh);
    dy = rows_at(dh, x.rows, in_features);
    y = h;
  }
  std::vector<Tensor> result;
  for (Tensor& grad : grads) {
    if (grad.defined()) result.push_back(std::move(grad));
  }
  return result;
}

// ---- Meta
// ----------------------------------------------------------------------------------------------

Tensor mlp_meta(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  return empty_rows_symint(input, weights.back().sym_size(0));
}

OutputAndHidden mlp_forward_meta(const Tensor& input, TensorList weights,
                                 const OptionalTensors& biases, Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_forward_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  c10::SymInt size = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) size += weights[i].sym_size(0);
  for (std::int64_t i = 0; i + 1 < input.dim(); ++i) size *= input.sym_size(i);
  return {empty_rows_symint(input, weights.back().sym_size(0)),
          at::empty_symint({size}, input.options())};
}

std::vector<Tensor> mlp_backward_meta(const Tensor& grad_output, const Tensor& input,
                                      TensorList weights, const OptionalTensors& biases,
                                      const Tensor& output, const Tensor& hidden,
                                      Name output_activation, const c10::List<bool>& mask) {
  if (!kernels_take_backward(grad_output, input, weights, biases, output, hidden)) {
    return mlp_backward_by_layers(grad_output, input, weights, biases, output, hidden,
                                  output_activation, mask);
  }
  check_mlp_backward(grad_output, input, weights, biases, output, hidden, output_activation, mask);
  const size_t depth = weights.size();
  std::vector<Tensor> grads;
  if (mask.get(0)) grads.push_back(empty_rows_symint(input, input.sym_size(-1)));
  for (size_t i = 0; i < depth; ++i) {
    if (mask.get(1 + i)) grads.push_back(at::empty_symint(weights[i].sym_sizes(), input.options()));
  }
  for (size_t i = 0; i < depth; ++i) {
    if (mask.get(1 + depth + i)) {
      grads.push_back(at::empty_symint({weights[i].sym_size(0)}, input.options()));
    }
  }
  return grads;
}

// ---- autograd
// ------------------------------------------------------------------------------------------

Tensor mlp_autograd(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                    Name output_activation);
std::vector<Tensor> mlp_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                          TensorList weights, const OptionalTensors& biases,
                                          const Tensor& output, const Tensor& hidden,
                                          Name output_activation, const c10::List<bool>& mask);

bool any_tangent(const Tensor& input, TensorList weights, const OptionalTensors& biases) {
  bool any = has_tangent(input) || std::any_of(weights.begin(), weights.end(), has_tangent);
  for (size_t i = 0; i < biases.size(); ++i) any |= has_tangent(bias_of(biases, i));
  return any;
}

bool any_needs_grad(const Tensor& input, TensorList weights, const OptionalTensors& biases) {
  bool any = needs_grad(input) || std::any_of(weights.begin(), weights.end(), needs_grad);
  for (size_t i = 0; i < biases.size(); ++i) any |= needs_grad(bias_of(biases, i));
  return any;
}

Shortcut shortcut_for_stack(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                            std::initializer_list<Tensor> others = {}) {
  c10::DispatchKeySet keys = input.key_set();
  bool differentiable =
      any_needs_grad(input, weights, biases) || any_tangent(input, weights, biases);
  for (const Tensor& weight : weights) keys = keys | weight.key_set();
  for (size_t i = 0; i < biases.size(); ++i) {
    if (const Tensor bias = bias_of(biases, i); bias.defined()) keys = keys | bias.key_set();
  }
  for (const Tensor& t : others) {
    keys = keys | t.key_set();
    differentiable = differentiable || needs_grad(t) || has_tangent(t);
  }
  return shortcut(keys, differentiable);
}

Tensor call_mlp(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                const Name& output_activation) {
  const Shortcut to = shortcut_for_stack(input, weights, biases);
  if (to == Shortcut::kAutograd) return mlp_autograd(input, weights, biases, output_activation);
  if (to == Shortcut::kCpu) return mlp_cpu(input, weights, biases, output_activation);
  static const auto op =
      find_operator<Tensor(const Tensor&, TensorList, const OptionalTensors&, Name)>(
          "neuron_ext::mlp");
  return op.call(input, weights, biases, output_activation);
}

OutputAndHidden call_mlp_forward(const Tensor& input, TensorList weights,
                                 const OptionalTensors& biases, const Name& output_activation) {
  static const auto op =
      find_operator<OutputAndHidden(const Tensor&, TensorList, const OptionalTensors&, Name)>(
          "neuron_ext::mlp_forward");
  return op.call(input, weights, biases, output_activation);
}

std::vector<Tensor> call_mlp_backward(const Tensor& grad_output, const Tensor& input,
                                      TensorList weights, const OptionalTensors& biases,
                                      const Tensor& output, const Tensor& hidden,
                                      const Name& output_activation, const c10::List<bool>& mask) {
  static const auto op = find_operator<std::vector<Tensor>(
      const Tensor&, const Tensor&, TensorList, const OptionalTensors&, const Tensor&,
      const Tensor&, Name, const c10::List<bool>&)>("neuron_ext::mlp_backward");
  return op.call(grad_output, input, weights, biases, output, hidden, output_activation, mask);
}

/// Puts a known output of a sigmoid layer into the graph as that layer's result, without computing
/// it.
class KnownOutputFunction : public torch::autograd::Function<KnownOutputFunction> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& output, const Tensor& input,
                        const Tensor& weight, const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor y = output.detach();
    ctx->set_materialize_grads(false);
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->save_for_backward({input, weight, y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    std::tie(result[1], result[2], result[3]) = neuron_ext::linear_sigmoid_backward(
        grads[0], saved[0], saved[1], saved[2],
        {ctx->needs_input_grad(1), ctx->needs_input_grad(2), has_bias && ctx->needs_input_grad(3)});
    return result;
  }
};

/// The gradients in terms of linear.cpp's operations, which can be differentiated further. The
/// derivative is the total one: hidden and output count as the functions of input, weights and
/// biases that they are.
std::vector<Tensor> mlp_backward_by_layers(const Tensor& grad_output, const Tensor& input,
                                           TensorList weights, const OptionalTensors& biases,
                                           const Tensor& output, const Tensor& hidden,
                                           const Name& output_activation,
                                           const c10::List<bool>& mask) {
  const size_t depth = weights.size();
  std::vector<Tensor> inputs{input};
  c10::SymInt offset = 0;
  const auto known = [&](const Tensor& value, size_t layer) {
    const Tensor bias = bias_of(biases, layer);
    return KnownOutputFunction::apply(
        value.detach(), inputs[layer], weights[layer],
        bias.defined() ? OptionalTensor(as_vector(bias, weights[layer].sym_size(0)))
                       : std::nullopt);
  };
  for (size_t i = 0; i + 1 < depth; ++i) {
    c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
    sizes.back() = weights[i].sym_size(0);
    c10::SymInt numel = 1;
    for (const auto& size : sizes) numel *= size;
    inputs.push_back(known(hidden.slice_symint(0, offset, offset + numel).view_symint(sizes), i));
    offset += numel;
  }

  std::vector<Tensor> grads(mask.size());
  Tensor dy = grad_output;
  for (size_t i = depth; i-- > 0;) {
    bool earlier = mask.get(0);
    for (size_t j = 0; j < i; ++j) earlier |= mask.get(1 + j) || mask.get(1 + depth + j);
    const std::array<bool, 3> wanted{earlier, mask.get(1 + i), mask.get(1 + depth + i)};
    std::tie(dy, grads[1 + i], grads[1 + depth + i]) =
        activation_of(i, depth, output_activation) == Activation::kSigmoid
            ? neuron_ext::linear_sigmoid_backward(dy, inputs[i], weights[i],
                                                  i + 1 < depth ? inputs[i + 1] : known(output, i),
                                                  wanted)
            : neuron_ext::linear_backward(dy, inputs[i], weights[i], wanted);
    if (!earlier) break;
  }
  grads[0] = dy;
  std::vector<Tensor> result;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (mask.get(i)) result.push_back(grads[i]);
  }
  return result;
}

/// Saves the input, the weights, the output and the hidden layers' outputs. Biases are kept for
/// their place in the graph alone, not for their values: as with torch's own layers they may change
/// before backward.
class MlpFunction : public torch::autograd::Function<MlpFunction> {
 public:
  static constexpr bool is_traceable = true;

  /// `biases`: those that there are; `all_biases`: with nullopt for those that there aren't.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        [[maybe_unused]] TensorList biases, const OptionalTensors& all_biases,
                        const Name& output_activation) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, hidden] = call_mlp_forward(input, weights, all_biases, output_activation);
    variable_list saved{input, output, hidden};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->set_materialize_grads(false);
    ctx->saved_data["biases"] = all_biases;
    ctx->saved_data["output_sigmoid"] = output_activation.has_value();
    ctx->save_for_backward(std::move(saved));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto biases = ctx->saved_data["biases"].to<OptionalTensors>();
    const size_t depth = biases.size();
    std::vector<size_t> edge_of_bias(depth);
    size_t edges = 1 + depth;
    c10::List<bool> mask;
    for (size_t i = 0; i < edges; ++i) mask.push_back(ctx->needs_input_grad(i));
    for (size_t i = 0; i < depth; ++i) {
      const bool has_bias = bias_of(biases, i).defined();
      edge_of_bias[i] = edges;
      mask.push_back(has_bias && ctx->needs_input_grad(edges));
      edges += has_bias;
    }
    variable_list result(edges + 2);
    if (!grads[0].defined()) return result;

    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &output = saved[1], &hidden = saved[2];
    const std::vector<Tensor> wanted = call_mlp_backward(
        grads[0], input, TensorList(saved).slice(3), biases, output.detach(), hidden,
        ctx->saved_data["output_sigmoid"].toBool() ? Name("sigmoid") : std::nullopt, mask);
    for (size_t i = 0, next = 0; i < mask.size(); ++i) {
      if (mask.get(i)) result[i <= depth ? i : edge_of_bias[i - depth - 1]] = wanted[next++];
    }
    return result;
  }
};

Tensor mlp_autograd(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                    Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (transform_is_active() || any_tangent(input, weights, biases) ||
      !kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  if (!at::GradMode::is_enabled() || !any_needs_grad(input, weights, biases)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_mlp(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  std::vector<Tensor> present;
  OptionalTensors vectors;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor bias = bias_of(biases, i);
    if (!bias.defined()) {
      vectors.push_back(std::nullopt);
      continue;
    }
    present.push_back(as_vector(bias, weights[i].sym_size(0)));
    vectors.push_back(present.back());
  }
  return MlpFunction::apply(input, weights, TensorList(present), vectors, output_activation);
}

/// mlp_forward is what MlpFunction calls below autograd. Called by itself, it is differentiated as
/// what it is made of.
OutputAndHidden mlp_forward_autograd(const Tensor& input, TensorList weights,
                                     const OptionalTensors& biases, Name output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (transform_is_active() || any_tangent(input, weights, biases) ||
      (at::GradMode::is_enabled() && any_needs_grad(input, weights, biases))) {
    return mlp_forward_by_layers(input, weights, biases, output_activation);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_mlp_forward(input, weights, biases, output_activation);
}

std::vector<Tensor> mlp_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                          TensorList weights, const OptionalTensors& biases,
                                          const Tensor& output, const Tensor& hidden,
                                          Name output_activation, const c10::List<bool>& mask) {
  if (transform_is_active() || has_tangent(grad_output) || any_tangent(input, weights, biases) ||
      (at::GradMode::is_enabled() &&
       (needs_grad(grad_output) || any_needs_grad(input, weights, biases)))) {
    check_mlp_backward(grad_output, input, weights, biases, output, hidden, output_activation,
                       mask);
    return mlp_backward_by_layers(grad_output, input, weights, biases, output, hidden,
                                  output_activation, mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_mlp_backward(grad_output, input, weights, biases, output, hidden, output_activation,
                           mask);
}

// ---- autocast
// ------------------------------------------------------------------------------------------

template <at::DeviceType device>
Tensor mlp_autocast(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                    Name output_activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  OptionalTensors cast_biases;
  for (size_t i = 0; i < biases.size(); ++i) {
    cast_biases.push_back(at::autocast::cached_cast(dtype, OptionalTensor(biases.get(i)), device));
  }
  return call_mlp(at::autocast::cached_cast(dtype, input, device),
                  at::autocast::cached_cast(dtype, weights, device), cast_biases,
                  output_activation);
}

/// As the schemas have them, by value.
Tensor mlp_composite(const Tensor& input, TensorList weights, const OptionalTensors& biases,
                     Name output_activation) {
  return mlp_by_layers(input, weights, biases, output_activation);
}

OutputAndHidden mlp_forward_composite(const Tensor& input, TensorList weights,
                                      const OptionalTensors& biases, Name output_activation) {
  return mlp_forward_by_layers(input, weights, biases, output_activation);
}

std::vector<Tensor> mlp_backward_composite(const Tensor& grad_output, const Tensor& input,
                                           TensorList weights, const OptionalTensors& biases,
                                           const Tensor& output, const Tensor& hidden,
                                           Name output_activation, const c10::List<bool>& mask) {
  return mlp_backward_by_layers(grad_output, input, weights, biases, output, hidden,
                                output_activation, mask);
}

template <class Function>
void impl(torch::Library& library, const char* name, Function composite, Function cpu,
          Function meta, Function autograd) {
  using c10::DispatchKey;
  library.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, composite));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, composite));
  library.impl(name, torch::dispatch(DispatchKey::CPU, cpu));
  library.impl(name, torch::dispatch(DispatchKey::Meta, meta));
  library.impl(name, torch::dispatch(DispatchKey::Autograd, autograd));
}

}  // namespace

void register_mlp(torch::Library& library) {
  using c10::DispatchKey;
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  library.def(
      "mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str? output_activation=None) -> "
      "Tensor",
      tags);
  library.def(
      "mlp_forward(Tensor input, Tensor[] weights, Tensor?[] biases, str? output_activation=None) "
      "-> (Tensor output, Tensor hidden)",
      tags);
  library.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor?[] biases, Tensor "
      "output, "
      "Tensor hidden, str? output_activation, bool[] output_mask) -> Tensor[]",
      tags);
  impl(library, "mlp", &mlp_composite, &mlp_cpu, &mlp_meta, &mlp_autograd);
  impl(library, "mlp_forward", &mlp_forward_composite, &mlp_forward_cpu, &mlp_forward_meta,
       &mlp_forward_autograd);
  impl(library, "mlp_backward", &mlp_backward_composite, &mlp_backward_cpu, &mlp_backward_meta,
       &mlp_backward_autograd);
  library.impl("mlp", torch::dispatch(DispatchKey::AutocastCPU, mlp_autocast<at::kCPU>));
  library.impl("mlp", torch::dispatch(DispatchKey::AutocastCUDA, mlp_autocast<at::kCUDA>));
}

Tensor mlp(const Tensor& input, TensorList weights,
           const std::vector<std::optional<Tensor>>& biases,
           std::optional<std::string_view> output_activation) {
  OptionalTensors list;
  if (biases.empty()) {
    for (size_t i = 0; i < weights.size(); ++i) list.push_back(std::nullopt);
  }
  for (const auto& bias : biases) list.push_back(bias);
  return call_mlp(input, weights, list, output_activation);
}

}  // namespace neuron_ext
