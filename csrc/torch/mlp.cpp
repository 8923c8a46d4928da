// mlp: linear layers with a sigmoid after every hidden one, as one operation with one node in the
// graph. The stages are those of linear.cpp. With gradients in view, mlp_forward also returns the
// outputs of the hidden layers, end to end in one tensor: h_1, h_2, ..., each (batch, n_i) and
// contiguous.
//
// mlp_backward takes what its wanted gradients take, as torch's layers save it: the input for the
// first weight's gradient, a weight for those of what comes before it, the output if a sigmoid made
// it. Its derivative is the total one: hidden and output count as the functions of input, weights
// and biases that they are. `places` stand in the graph for those of them that aren't there
// themselves.

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "glue.h"
#include "layer.h"
#include "node.h"
#include "ops.h"
#include "packed_weights.h"

namespace neuron_ext {

using at::Tensor;
using at::TensorList;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
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

bool kernels_take_stack(const Tensor& input, TensorList weights, TensorList biases) {
  if (biases.size() != weights.size()) return false;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!kernels_take(input, weights[i], biases[i])) return false;
  }
  return true;
}

/// Whether the layers plainly fit the input and each other.
bool stack_fits_plainly(const Tensor& input, TensorList weights, TensorList biases) {
  if (!has_plain_sizes(input) || input.dim() == 0) return false;
  std::int64_t features = input.sizes().back();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!fits_plainly(features, weights[i], biases[i])) return false;
    features = weights[i].sizes()[0];
  }
  return true;
}

/// Raises unless the layers' shapes agree with the input's and with each other.
void check_layers(const Tensor& input, TensorList weights, TensorList biases) {
  if (stack_fits_plainly(input, weights, biases)) return;
  check_layer({"mlp", 0}, input, weights[0], biases[0]);
  for (size_t i = 1; i < weights.size(); ++i) {
    const auto out_features = weights[i - 1].sym_size(0), in_features = weights[i].sym_size(1);
    TORCH_CHECK(same_size(out_features, in_features), "mlp, layer ", i, ": weight has shape ",
                shape_of(weights[i]), " and so takes in_features = ", in_features,
                ", but the weight of layer ", i - 1, " has shape ", shape_of(weights[i - 1]),
                " and so gives out_features = ", out_features);
    check_bias({"mlp", i}, biases[i], weights[i], input.dim());
  }
}

/// One layer through the operations of linear.cpp, which find their own way.
Tensor run_layer(size_t layer, size_t depth, const Tensor& input, const Tensor& weight,
                 const Tensor& bias, const Name& output_activation) {
  return with_context(
      [&] {
        return activation_of(layer, depth, output_activation) == Activation::kSigmoid
                   ? neuron_ext::linear_sigmoid(input, weight, bias)
                   : neuron_ext::linear(input, weight, bias);
      },
      [&] { return c10::str("mlp, layer ", layer); });
}

Tensor mlp_by_layers(const Tensor& input, TensorList weights, TensorList biases,
                     const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  Tensor h = input;
  for (size_t i = 0; i < weights.size(); ++i) {
    h = run_layer(i, weights.size(), h, weights[i], biases[i], output_activation);
  }
  return h;
}

OutputAndHidden mlp_forward_by_layers(const Tensor& input, TensorList weights, TensorList biases,
                                      const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  const size_t depth = weights.size();
  std::vector<Tensor> hidden;
  Tensor h = input;
  for (size_t i = 0; i < depth; ++i) {
    h = run_layer(i, depth, h, weights[i], biases[i], output_activation);
    if (i + 1 < depth) hidden.push_back(h.reshape({-1}));
  }
  return {h, hidden.empty() ? at::empty({0}, input.options()) : at::cat(hidden)};
}

// ---- kernels ------------------------------------------------------------------------------------

/// Memory for the time of a call, of `like`'s dtype and device: on the stack where it's little, as
/// a tensor costs what a small layer does.
class Scratch {
 public:
  Scratch(const Tensor& like, std::int64_t elements) {
    const std::int64_t bytes = elements * like.element_size();
    if (!like.is_cpu() || bytes > static_cast<std::int64_t>(sizeof(little_))) {
      much_ = new_empty(like, {elements});
    }
  }
  std::byte* data() {
    return much_.defined() ? static_cast<std::byte*>(much_.mutable_data_ptr()) : little_;
  }

 private:
  alignas(64) std::byte little_[4096];
  Tensor much_;
};

/// `rows` contiguous rows at `data`.
RowsView rows_at(const void* data, std::int64_t rows, std::int64_t columns) {
  return {Tensor(), data, rows, columns, columns, 1};
}

/// Layers that have `elements` of weights.
void run(at::ArrayRef<MlpLayer> layers, std::int64_t elements, const RowsView& input, DType dtype,
         c10::Device device) {
  const std::int64_t rows = batch_invariant() ? GemmDesc::kAnyBatch : input.rows;
  const Mlp mlp{.dtype = dtype,
                .precision = precision_for(
                    dtype, static_cast<double>(rows) * static_cast<double>(elements), device),
                .rows = input.rows,
                .input = input.data,
                .input_stride_row = input.row_stride,
                .input_stride_column = input.column_stride,
                .layers = {layers.data(), layers.size()},
                .batch_invariant = batch_invariant()};
  if constexpr (gpu::kIsBuilt) {
    if (device.is_cuda()) return gpu::mlp(mlp, device);
  }
  cpu::mlp_forward(mlp, at_parallel_for());
}

/// A stack of checked arguments. The hidden layers' outputs go to `hidden`, end to end, or, if that
/// is undefined, nowhere: then no gradient is in view.
Tensor run_stack(const Tensor& input, TensorList weights, TensorList biases,
                 const Name& output_activation, const RowsView& x, const Tensor& hidden) {
  const size_t depth = weights.size();
  Tensor output = empty_rows(input, weights.back().size(0));
  c10::SmallVector<MlpLayer, 8> layers(depth);
  c10::SmallVector<Tensor, 8> packed(depth);
  std::int64_t elements = 0;
  auto* next = hidden.defined() ? static_cast<char*>(hidden.mutable_data_ptr()) : nullptr;
  for (size_t i = 0; i < depth; ++i) {
    const Tensor& weight = weights[i];
    MlpLayer& layer = layers[i];
    elements += weight.numel();
    const auto sizes = weight.sizes(), strides = weight.strides();
    layer.in_features = sizes[1];
    layer.out_features = sizes[0];
    layer.activation = activation_of(i, depth, output_activation);
    layer.weight = weight.const_data_ptr();
    layer.weight_stride_out = strides[0];
    layer.weight_stride_in = strides[1];
    if (biases[i].defined()) {
      layer.bias = biases[i].const_data_ptr();
      layer.bias_stride = bias_stride(biases[i]);
    }
    if (i + 1 == depth) {
      layer.output = output.mutable_data_ptr();
    } else if (hidden.defined()) {
      layer.output = next;
      next += x.rows * layer.out_features * hidden.element_size();
    }
    if (!hidden.defined()) packed[i] = packed_weight(weight, x.rows);
    if (packed[i].defined()) layer.packed_weight = packed[i].const_data_ptr();
  }
  run(layers, elements, x, dtype_of(input), input.device());
  return output;
}

Tensor mlp_kernels(const Tensor& input, TensorList weights, TensorList biases,
                   const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  return run_stack(input, weights, biases, output_activation, as_rows(input), Tensor());
}

/// Of arguments that were checked.
OutputAndHidden compute_stack(const Tensor& input, TensorList weights, TensorList biases,
                              const Name& output_activation) {
  const RowsView x = as_rows(input);
  std::int64_t width = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) width += weights[i].size(0);
  Tensor hidden = new_empty(input, {x.rows * width});
  Tensor output = run_stack(input, weights, biases, output_activation, x, hidden);
  return {output, hidden};
}

OutputAndHidden mlp_forward_kernels(const Tensor& input, TensorList weights, TensorList biases,
                                    const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_forward_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  return compute_stack(input, weights, biases, output_activation);
}

/// mlp_backward's arguments: the same for every stage. Tensors that aren't there are undefined.
struct Backward {
  const Tensor& grad_output;
  const Tensor& input;
  TensorList weights;
  TensorList places;  // input, weights, biases
  const Tensor& output;
  const Tensor& hidden;
  c10::SymIntArrayRef hidden_features;
  const std::vector<bool>& mask;  // input, weights, biases

  size_t depth() const { return weights.size(); }
  bool wants_input() const { return mask[0]; }
  bool wants_weight(size_t layer) const { return mask[1 + layer]; }
  bool wants_bias(size_t layer) const { return mask[1 + depth() + layer]; }
  /// Whether any gradient before that of `layer`'s own parameters is wanted.
  bool wants_before(size_t layer) const {
    bool wanted = wants_input();
    for (size_t i = 0; i < layer; ++i) wanted = wanted || wants_weight(i) || wants_bias(i);
    return wanted;
  }
  c10::SymInt out_features(size_t layer) const {
    return layer + 1 < depth() ? hidden_features[layer] : grad_output.sym_size(-1);
  }
  Activation activation(size_t layer) const {
    return layer + 1 < depth() || output.defined() ? Activation::kSigmoid : Activation::kIdentity;
  }

  template <class F>
  void for_each_tensor(const F& f) const {
    f(grad_output);
    f(input);
    f(output);
    f(hidden);
    for (const Tensor& weight : weights) f(weight);
    for (const Tensor& place : places) f(place);
  }
  bool kernels_take() const {
    bool all = is_kernel_tensor(grad_output);
    for_each_tensor([&](const Tensor& t) { all = all && goes_with(grad_output, t); });
    return all;
  }
  void check() const;
};

void Backward::check() const {
  const char* where = "mlp_backward";
  const size_t n = depth();
  TORCH_CHECK_VALUE(n > 0 && hidden_features.size() == n - 1 && mask.size() == 1 + 2 * n &&
                        places.size() == mask.size(),
                    where, ": got ", n, " weights, ", hidden_features.size(),
                    " hidden_features, an output_mask of ", mask.size(), " and ", places.size(),
                    " places; expected n, n - 1, 1 + 2 n and 1 + 2 n, n at least 1");
  TORCH_CHECK(grad_output.dim() >= 1, where,
              ": grad_output has shape (), expected (*, out_features)");
  const auto fits = [](const Tensor& t, size_t dim, const c10::SymInt& size) {
    return same_size(t.sym_size(dim), size);
  };
  for (size_t i = 0; i < n; ++i) {
    if (!wants_before(i)) continue;
    const Tensor& w = weights[i];
    TORCH_CHECK(w.defined(), where, ": weights[", i, "] is None, but a wanted gradient takes it");
    TORCH_CHECK(
        w.dim() == 2 && fits(w, 0, out_features(i)) &&
            (i == 0 || fits(w, 1, hidden_features[i - 1])),
        where, ": weights[", i, "] has shape ", shape_of(w), ", expected (", out_features(i),
        i == 0 ? std::string(", in_features)") : c10::str(", ", hidden_features[i - 1], ")"));
  }
  if (wants_weight(0)) {
    TORCH_CHECK(input.defined(), where,
                ": input is None, but the first weight's gradient takes it");
    check_rows(where, "grad_output", grad_output, input, grad_output.sym_size(-1));
  }
  if (output.defined()) {
    check_rows(where, "output", output, grad_output, grad_output.sym_size(-1));
  }
  c10::SymInt size = 0;
  for (const auto& features : hidden_features) size += features;
  for (std::int64_t i = 0; i + 1 < grad_output.dim(); ++i) size *= grad_output.sym_size(i);
  TORCH_CHECK(hidden.dim() == 1 && fits(hidden, 0, size), where, ": hidden has shape ",
              shape_of(hidden), ", expected (", size, ",)");
}

std::vector<Tensor> mlp_backward_by_layers(const Backward& call);

void* data_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

/// The gradients of a stack on a GPU: dz goes down the stack as a stack of its own, which also sums
/// it where the parameters' products wouldn't on their way, then the layers' parameters get theirs.
std::vector<Tensor> run_stack_backward(const Backward& call) {
  const size_t depth = call.depth(), last = depth - 1;
  const RowsView dy = as_rows(call.grad_output);
  const std::int64_t rows = dy.rows;
  const Tensor hidden = call.hidden.contiguous();
  const DType dtype = dtype_of(hidden);
  const auto out_features = [&](size_t layer) { return call.out_features(layer).expect_int(); };

  Tensor owner;  // of the last layer's dz
  if (call.output.defined()) owner = neuron_ext::sigmoid_backward(call.grad_output, call.output);
  const RowsView last_dz = owner.defined() ? as_rows(owner) : dy;
  // Those of the hidden layers lie as their outputs do.
  const Tensor hidden_dz = new_empty(hidden, hidden.sizes());
  const auto place = [&](const Tensor& t, size_t layer) {
    std::int64_t offset = 0;
    for (size_t i = 0; i < layer; ++i) offset += rows * out_features(i);
    return static_cast<char*>(t.data_ptr()) + offset * t.element_size();
  };

  std::vector<Tensor> grads(call.mask.size());
  struct Parameters {
    RowsView dz;
    OptionalRows x = std::nullopt;
    void* dw = nullptr;
    void* db = nullptr;
  };
  const auto parameters_of = [&](size_t layer) {
    Tensor &dw = grads[1 + layer], &db = grads[1 + depth + layer];
    Parameters parameters{
        layer == last ? last_dz : rows_at(place(hidden_dz, layer), rows, out_features(layer))};
    if (call.wants_weight(layer)) {
      parameters.x = layer == 0 ? as_rows(call.input)
                                : rows_at(place(hidden, layer - 1), rows, out_features(layer - 1));
      dw = new_empty(hidden, {out_features(layer), parameters.x->columns});
    }
    if (call.wants_bias(layer)) db = new_empty(hidden, {out_features(layer)});
    parameters.dw = data_or_null(dw), parameters.db = data_or_null(db);
    return parameters;
  };

  if (call.wants_input()) grads[0] = empty_rows(call.grad_output, call.weights[0].size(1));
  c10::SmallVector<MlpLayer, 8> layers;
  c10::SmallVector<Parameters, 8> parameters{parameters_of(last)};  // from the last layer on
  std::int64_t elements = 0;
  for (size_t i = last; call.wants_before(i); --i) {
    const Tensor& weight = call.weights[i];
    elements += weight.numel();
    MlpLayer& layer = layers.emplace_back();
    layer.in_features = weight.size(0);
    layer.out_features = weight.size(1);
    layer.weight = weight.const_data_ptr();
    layer.weight_stride_out = weight.stride(1);
    layer.weight_stride_in = weight.stride(0);
    if (i == 0) {
      layer.output = grads[0].mutable_data_ptr();
      break;
    }
    layer.activation = Activation::kSigmoid;
    layer.saved = place(hidden, i - 1);
    layer.output = place(hidden_dz, i - 1);
    auto& [dz, x, dw, db] = parameters.emplace_back(parameters_of(i - 1));
    if (db != nullptr && sums_db_apart(dz, x, dw, db, dtype, hidden.device())) {
      layer.output_sum = std::exchange(db, nullptr);
    }
  }
  if (!layers.empty()) run(layers, elements, last_dz, dtype, hidden.device());
  for (const auto& [dz, x, dw, db] : parameters) {
    if (dw == nullptr && db == nullptr) continue;
    wgrad(dz, std::nullopt, x, dw, db, dtype, hidden.device());
  }
  return grads;
}

/// All gradients on the CPU, to where `grads` has room, if its kernels take the stack as a whole.
bool run_blocks_backward(const Backward& call, const Tensor& hidden, TensorList grads) {
  const size_t depth = call.depth();
  const RowsView dy = as_rows(call.grad_output);
  if (dy.rows <= cpu::kShortBatch) return false;
  const RowsView y = call.output.defined() ? as_rows(call.output) : RowsView{};
  const RowsView x = call.wants_weight(0) ? as_rows(call.input) : RowsView{};
  c10::SmallVector<MlpLayerBackward, 8> layers(depth);
  std::int64_t elements = 0;
  for (size_t i = 0; i < depth; ++i) {
    MlpLayerBackward& layer = layers[i];
    layer.in_features = i > 0                ? layers[i - 1].out_features
                        : call.wants_input() ? call.weights[0].size(1)
                                             : x.columns;
    layer.out_features = call.out_features(i).expect_int();
    layer.activation = call.activation(i);
    layer.wants_before = call.wants_before(i);
    if (layer.wants_before) {
      layer.weight = call.weights[i].const_data_ptr();
      layer.weight_stride_out = call.weights[i].stride(0);
      layer.weight_stride_in = call.weights[i].stride(1);
    }
    layer.grad_weight = data_or_null(grads[1 + i]);
    layer.grad_bias = data_or_null(grads[1 + depth + i]);
    elements += layer.in_features * layer.out_features;
  }
  const std::int64_t deciding = batch_invariant() ? GemmDesc::kAnyBatch : dy.rows;
  return cpu::mlp_backward(
      {.dtype = dtype_of(hidden),
       .precision = precision_for(dtype_of(hidden),
                                  static_cast<double>(deciding) * static_cast<double>(elements)),
       .rows = dy.rows,
       .grad_output = rows_of_batch(dy),
       .output = rows_of_batch(y),
       .input = rows_of_batch(x),
       .hidden = hidden.const_data_ptr(),
       .layers = {layers.data(), depth},
       .grad_input = data_or_null(grads[0]),
       .batch_invariant = batch_invariant()},
      at_parallel_for());
}

/// The same, product by product.
void run_layers_backward(const Backward& call, const Tensor& hidden, TensorList grads) {
  const size_t depth = call.depth();
  RowsView dy = as_rows(call.grad_output);
  OptionalRows y = call.output.defined() ? OptionalRows(as_rows(call.output)) : std::nullopt;
  const std::int64_t rows = dy.rows, size = hidden.element_size();
  const auto in_features = [&](size_t layer) {
    return call.hidden_features[layer - 1].expect_int();
  };

  // dz of the hidden layers, each the result of the product before, in two buffers that take turns.
  std::int64_t widest = 0;
  for (size_t i = 1; i < depth; ++i) widest = std::max(widest, in_features(i));
  const std::int64_t bytes = rows * widest * size;
  Scratch buffers(hidden, 2 * rows * widest);

  const auto* h_end = static_cast<const char*>(hidden.const_data_ptr()) + hidden.numel() * size;
  for (size_t i = depth; i-- > 0;) {
    OptionalRows x;
    if (i > 0) {
      h_end -= rows * in_features(i) * size;
      x = rows_at(h_end, rows, in_features(i));
    } else if (call.wants_weight(0)) {
      x = as_rows(call.input);
    }
    const Tensor &dw = grads[1 + i], &db = grads[1 + depth + i];
    if (dw.defined() || db.defined()) {
      wgrad(dy, y, x, data_or_null(dw), data_or_null(db), dtype_of(hidden), hidden.device());
    }
    if (!call.wants_before(i)) return;
    if (i == 0) return dgrad(dy, y, call.weights[0], data_or_null(grads[0]));
    void* const dz = buffers.data() + (i % 2) * bytes;
    dgrad(dy, y, call.weights[i], dz, x);
    dy = rows_at(dz, rows, in_features(i));
    y.reset();
  }
}

std::vector<Tensor> run_cpu_backward(const Backward& call) {
  const Tensor hidden = call.hidden.contiguous();
  const size_t depth = call.depth();
  std::vector<Tensor> grads(call.mask.size());
  for (size_t i = 0; i < depth; ++i) {
    const std::int64_t out = call.out_features(i).expect_int();
    if (call.wants_weight(i)) {
      const std::int64_t in = i > 0 ? call.out_features(i - 1).expect_int() : call.input.size(-1);
      grads[1 + i] = new_empty(hidden, {out, in});
    }
    if (call.wants_bias(i)) grads[1 + depth + i] = new_empty(hidden, {out});
  }
  if (call.wants_input()) grads[0] = empty_rows(call.grad_output, call.weights[0].size(1));
  if (!run_blocks_backward(call, hidden, grads)) run_layers_backward(call, hidden, grads);
  return grads;
}

std::vector<Tensor> mlp_backward_kernels(const Backward& call) {
  if (!call.kernels_take()) return mlp_backward_by_layers(call);
  call.check();
  std::vector<Tensor> grads =
      call.grad_output.is_cuda() ? run_stack_backward(call) : run_cpu_backward(call);
  std::vector<Tensor> wanted;
  wanted.reserve(grads.size());
  for (Tensor& grad : grads) {
    if (grad.defined()) wanted.push_back(std::move(grad));
  }
  return wanted;
}

// ---- Meta ---------------------------------------------------------------------------------------

Tensor mlp_meta(const Tensor& input, TensorList weights, TensorList biases,
                const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (!kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  check_layers(input, weights, biases);
  return empty_rows_symint(input, weights.back().sym_size(0));
}

OutputAndHidden mlp_forward_meta(const Tensor& input, TensorList weights, TensorList biases,
                                 const Name& output_activation) {
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

std::vector<Tensor> mlp_backward_meta(const Backward& call) {
  if (!call.kernels_take()) return mlp_backward_by_layers(call);
  call.check();
  const auto options = call.grad_output.options();
  std::vector<Tensor> grads;
  if (call.wants_input()) {
    grads.push_back(empty_rows_symint(call.grad_output, call.weights[0].sym_size(1)));
  }
  for (size_t i = 0; i < call.depth(); ++i) {
    if (!call.wants_weight(i)) continue;
    const auto in_features = i > 0 ? call.hidden_features[i - 1] : call.input.sym_size(-1);
    grads.push_back(at::empty_symint({call.out_features(i), in_features}, options));
  }
  for (size_t i = 0; i < call.depth(); ++i) {
    if (call.wants_bias(i)) grads.push_back(at::empty_symint({call.out_features(i)}, options));
  }
  return grads;
}

// ---- autograd -----------------------------------------------------------------------------------

/// The operation itself, through whichever stages there are to pass.
Tensor call_mlp(const Tensor& input, TensorList weights, TensorList biases,
                const Name& output_activation);
std::vector<Tensor> mlp_backward_autograd(const Backward& call);

bool any_tangent(const Tensor& input, TensorList weights, TensorList biases) {
  return has_tangent(input) || std::any_of(weights.begin(), weights.end(), has_tangent) ||
         std::any_of(biases.begin(), biases.end(), has_tangent);
}

bool any_needs_grad(const Tensor& input, TensorList weights, TensorList biases) {
  return needs_grad(input) || std::any_of(weights.begin(), weights.end(), needs_grad) ||
         std::any_of(biases.begin(), biases.end(), needs_grad);
}

/// A list of tensors as the dispatcher passes it, and back.
c10::List<OptionalTensor> boxed(TensorList tensors) {
  c10::List<OptionalTensor> list;
  for (const Tensor& t : tensors) list.push_back(optional(t));
  return list;
}
std::vector<Tensor> unboxed(const c10::List<OptionalTensor>& list) {
  std::vector<Tensor> tensors;
  for (const OptionalTensor& t : list.vec()) tensors.push_back(value_or_undefined(t));
  return tensors;
}

OutputAndHidden call_mlp_forward(const Tensor& input, TensorList weights, TensorList biases,
                                 const Name& output_activation) {
  static const auto op =
      find_operator<OutputAndHidden(const Tensor&, TensorList, const c10::List<OptionalTensor>&,
                                    Name)>("neuron_ext::mlp_forward");
  return op.call(input, weights, boxed(biases), output_activation);
}

std::vector<Tensor> call_mlp_backward(const Backward& call) {
  ShortcutOf shortcut;
  call.for_each_tensor([&](const Tensor& t) { shortcut.add(t); });
  const Shortcut to = shortcut.get();
  if (to == Shortcut::kKernels) return mlp_backward_kernels(call);
  if (to == Shortcut::kNode) return mlp_backward_autograd(call);
  static const auto op = find_operator<std::vector<Tensor>(
      const Tensor&, const OptionalTensor&, const c10::List<OptionalTensor>&,
      const c10::List<OptionalTensor>&, const OptionalTensor&, const Tensor&, c10::SymIntArrayRef,
      const c10::List<bool>&)>("neuron_ext::mlp_backward");
  c10::List<bool> mask;
  for (const bool wanted : call.mask) mask.push_back(wanted);
  return op.call(call.grad_output, optional(call.input), boxed(call.weights), boxed(call.places),
                 optional(call.output), call.hidden, call.hidden_features, mask);
}

/// The values of all layers' inputs.
std::vector<Tensor> layer_inputs(const Backward& call) {
  std::vector<Tensor> inputs{call.input};
  c10::SymInt offset = 0;
  for (size_t i = 0; i + 1 < call.depth(); ++i) {
    c10::SymDimVector sizes(call.grad_output.sym_sizes().begin(),
                            call.grad_output.sym_sizes().end());
    sizes.back() = call.hidden_features[i];
    c10::SymInt numel = 1;
    for (const auto& size : sizes) numel *= size;
    inputs.push_back(call.hidden.slice_symint(0, offset, offset + numel).view_symint(sizes));
    offset += numel;
  }
  return inputs;
}

/// Layer `layer`'s output, whose value is known, as a function of input, weight and bias.
Tensor known_output(const Backward& call, const Tensor& value, const Tensor& input, size_t layer) {
  const auto or_place = [&](const Tensor& t, size_t i) { return t.defined() ? t : call.places[i]; };
  const Tensor x = layer == 0 ? or_place(input, 0) : input;
  const Tensor w = or_place(call.weights[layer], 1 + layer);
  const Tensor& b = call.places[1 + call.depth() + layer];
  if (!needs_node(x, w, b)) return value;
  Tensor output = value.detach();
  record_sigmoid_layer(output, x, w, b);
  return output;
}

/// The gradients in terms of linear.cpp's operations, which can be differentiated further. The
/// derivative is the total one: hidden and output count as the functions of input, weights and
/// biases that they are.
std::vector<Tensor> mlp_backward_by_layers(const Backward& call) {
  const size_t depth = call.depth();
  std::vector<Tensor> inputs = layer_inputs(call);
  for (size_t i = 1; i < depth; ++i)
    inputs[i] = known_output(call, inputs[i], inputs[i - 1], i - 1);

  std::vector<Tensor> grads(call.mask.size());
  Tensor dy = call.grad_output;
  for (size_t i = depth; i-- > 0;) {
    const std::array<bool, 3> wanted{call.wants_before(i), call.wants_weight(i),
                                     call.wants_bias(i)};
    const Tensor x = wanted[1] ? inputs[i] : Tensor(), w = wanted[0] ? call.weights[i] : Tensor();
    if (call.activation(i) == Activation::kSigmoid) {
      const Tensor y =
          i + 1 < depth ? inputs[i + 1] : known_output(call, call.output.detach(), inputs[i], i);
      std::tie(dy, grads[1 + i], grads[1 + depth + i]) =
          neuron_ext::linear_sigmoid_backward(dy, x, w, y, wanted);
    } else {
      std::tie(dy, grads[1 + i], grads[1 + depth + i]) =
          neuron_ext::linear_backward(dy, x, w, wanted);
    }
    if (!wanted[0]) break;
  }
  grads[0] = dy;
  std::vector<Tensor> result;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (call.mask[i]) result.push_back(grads[i]);
  }
  return result;
}

/// The node of a stack. Its inputs are input, weights and biases; it saves input, output, hidden
/// and weights, those that wanted gradients take; its sizes are hidden_features.
struct MlpNode {
  static constexpr const char* kName = "MlpBackward";

  static variable_list gradients(const BackwardPass& pass) {
    variable_list result(pass.wanted.size());
    if (!pass.grads[0].defined()) return result;
    const TensorList saved = pass.saved;
    const Tensor &input = saved[0], &output = saved[1], &hidden = saved[2];
    const std::vector<Tensor> places = places_of(pass, hidden.options());
    std::vector<Tensor> wanted = call_mlp_backward(
        {pass.grads[0], input, saved.slice(3), places, output, hidden, pass.sizes, pass.wanted});
    for (size_t i = 0, next = 0; i < result.size(); ++i) {
      if (pass.wanted[i]) result[i] = std::move(wanted[next++]);
    }
    return result;
  }

 private:
  /// Tensors without values that stand where the inputs stood in the graph, whatever was done to
  /// those in place since. They matter only to gradients that are differentiated again.
  static std::vector<Tensor> places_of(const BackwardPass& pass, const at::TensorOptions& options) {
    std::vector<Tensor> places(pass.wanted.size());
    if (!at::GradMode::is_enabled()) return places;
    for (size_t i = 0; i < pass.inputs.size(); ++i) {
      if (!pass.inputs[i].is_valid()) continue;
      places[i] = at::empty({0}, options);
      torch::autograd::impl::set_gradient_edge(places[i], pass.inputs[i]);
    }
    return places;
  }
};

/// The stack and its node; `below` is mlp_forward below autograd.
template <class Below>
Tensor mlp_with_node(const Tensor& input, TensorList weights, TensorList biases,
                     const Name& output_activation, const Below& below) {
  check_stack(weights, biases.size(), output_activation);
  check_layers(input, weights, biases);
  const auto [output, hidden] = below(input, weights, biases, output_activation);
  const auto node = make_node<MlpNode>(1 + 2 * weights.size());
  node->add_input(input);
  for (const Tensor& weight : weights) node->add_input(weight);
  for (size_t i = 0; i < biases.size(); ++i) node->add_input(*as_vector(biases[i], weights[i]));
  for (size_t i = 0; i + 1 < weights.size(); ++i) node->sizes.push_back(weights[i].sym_size(0));
  node->set_results(output);
  node->save_if(needs_grad(weights[0]), input);
  node->save_result_if(output_activation.has_value(), output);
  node->save_if(true, hidden);
  bool before = needs_grad(input);
  for (size_t i = 0; i < weights.size(); ++i) {
    node->save_if(before, weights[i]);
    before = before || needs_grad(weights[i]) || needs_grad(biases[i]);
  }
  node->finish();
  return output;
}

Tensor mlp_autograd(const Tensor& input, TensorList weights, TensorList biases,
                    const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (transform_is_active() || any_tangent(input, weights, biases) ||
      !kernels_take_stack(input, weights, biases)) {
    return mlp_by_layers(input, weights, biases, output_activation);
  }
  if (!at::GradMode::is_enabled() || !any_needs_grad(input, weights, biases)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_mlp(input, weights, biases, output_activation);
  }
  return mlp_with_node(input, weights, biases, output_activation, [](const auto&... stack) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_mlp_forward(stack...);
  });
}

Tensor call_mlp(const Tensor& input, TensorList weights, TensorList biases,
                const Name& output_activation) {
  ShortcutOf call;
  call.add(input);
  for (const Tensor& weight : weights) call.add(weight);
  for (const Tensor& bias : biases) call.add(bias);
  const Shortcut to = call.get();
  if (to == Shortcut::kKernels) return mlp_kernels(input, weights, biases, output_activation);
  if (to == Shortcut::kNode) {
    return kernels_take_stack(input, weights, biases)
               ? mlp_with_node(input, weights, biases, output_activation, compute_stack)
               : mlp_by_layers(input, weights, biases, output_activation);
  }
  static const auto op =
      find_operator<Tensor(const Tensor&, TensorList, const c10::List<OptionalTensor>&, Name)>(
          "neuron_ext::mlp");
  return op.call(input, weights, boxed(biases), output_activation);
}

/// mlp_forward is what mlp_with_node calls below autograd. Called by itself, it is differentiated
/// as what it is made of.
OutputAndHidden mlp_forward_autograd(const Tensor& input, TensorList weights, TensorList biases,
                                     const Name& output_activation) {
  check_stack(weights, biases.size(), output_activation);
  if (transform_is_active() || any_tangent(input, weights, biases) ||
      (at::GradMode::is_enabled() && any_needs_grad(input, weights, biases))) {
    return mlp_forward_by_layers(input, weights, biases, output_activation);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_mlp_forward(input, weights, biases, output_activation);
}

std::vector<Tensor> mlp_backward_autograd(const Backward& call) {
  bool any_grad = false, any_tangent = false;
  call.for_each_tensor([&](const Tensor& t) {
    any_grad = any_grad || needs_grad(t);
    any_tangent = any_tangent || has_tangent(t);
  });
  if (transform_is_active() || any_tangent || (at::GradMode::is_enabled() && any_grad)) {
    call.check();
    return mlp_backward_by_layers(call);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_mlp_backward(call);
}

// ---- autocast -----------------------------------------------------------------------------------

template <at::DeviceType device>
Tensor mlp_autocast(const Tensor& input, TensorList weights, TensorList biases,
                    const Name& output_activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  std::vector<Tensor> cast_biases;
  for (const Tensor& bias : biases) {
    cast_biases.push_back(at::autocast::cached_cast(dtype, bias, device));
  }
  return call_mlp(at::autocast::cached_cast(dtype, input, device),
                  at::autocast::cached_cast(dtype, weights, device), cast_biases,
                  output_activation);
}

/// The operations as their schemas have them, with boxed lists and optional tensors.
template <class Result, Result (*stage)(const Tensor&, TensorList, TensorList, const Name&)>
Result mlp_stage(const Tensor& input, TensorList weights, const c10::List<OptionalTensor>& biases,
                 Name output_activation) {
  return stage(input, weights, unboxed(biases), output_activation);
}

template <std::vector<Tensor> (*stage)(const Backward&)>
std::vector<Tensor> mlp_backward_stage(const Tensor& grad_output, const OptionalTensor& input,
                                       const c10::List<OptionalTensor>& weights,
                                       const c10::List<OptionalTensor>& places,
                                       const OptionalTensor& output, const Tensor& hidden,
                                       c10::SymIntArrayRef hidden_features,
                                       const c10::List<bool>& mask) {
  return stage({grad_output, value_or_undefined(input), unboxed(weights), unboxed(places),
                value_or_undefined(output), hidden, hidden_features, mask.vec()});
}

template <class Function>
void impl(torch::Library& library, const char* name, Function composite, Function kernels,
          Function meta, Function autograd) {
  using c10::DispatchKey;
  library.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, composite));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, composite));
  library.impl(name, torch::dispatch(DispatchKey::Batched, composite));
  // torch's own kernels for these keys overlook the tensors in a list of optional ones.
  for (const auto key : {DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor,
                         DispatchKey::Tracer}) {
    library.impl(name, torch::dispatch(key, composite));
  }
  library.impl(name, torch::dispatch(DispatchKey::CPU, kernels));
  if (gpu::kIsBuilt) library.impl(name, torch::dispatch(DispatchKey::CUDA, kernels));
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
      "mlp_backward(Tensor grad_output, Tensor? input, Tensor?[] weights, Tensor?[] places, "
      "Tensor? output, Tensor hidden, SymInt[] hidden_features, bool[] output_mask) -> Tensor[]",
      tags);
  impl(library, "mlp", &mlp_stage<Tensor, mlp_by_layers>, &mlp_stage<Tensor, mlp_kernels>,
       &mlp_stage<Tensor, mlp_meta>, &mlp_stage<Tensor, mlp_autograd>);
  impl(library, "mlp_forward", &mlp_stage<OutputAndHidden, mlp_forward_by_layers>,
       &mlp_stage<OutputAndHidden, mlp_forward_kernels>,
       &mlp_stage<OutputAndHidden, mlp_forward_meta>,
       &mlp_stage<OutputAndHidden, mlp_forward_autograd>);
  impl(library, "mlp_backward", &mlp_backward_stage<mlp_backward_by_layers>,
       &mlp_backward_stage<mlp_backward_kernels>, &mlp_backward_stage<mlp_backward_meta>,
       &mlp_backward_stage<mlp_backward_autograd>);
  library.impl(
      "mlp", torch::dispatch(DispatchKey::AutocastCPU, mlp_stage<Tensor, mlp_autocast<at::kCPU>>));
  library.impl("mlp", torch::dispatch(DispatchKey::AutocastCUDA,
                                      mlp_stage<Tensor, mlp_autocast<at::kCUDA>>));
}

Tensor mlp(const Tensor& input, TensorList weights, TensorList biases,
           std::optional<std::string_view> output_activation) {
  if (!biases.empty()) return call_mlp(input, weights, biases, output_activation);
  const std::vector<Tensor> none(weights.size());
  return call_mlp(input, weights, none, output_activation);
}

}  // namespace neuron_ext
