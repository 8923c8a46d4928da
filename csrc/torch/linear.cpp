// linear and linear_sigmoid: y = f(x Wᵀ + b), f the identity or the sigmoid, and their gradients.
//
// START HERE to see how an operation meets torch. A call passes, in this order,
//
//   autocast   casts the arguments                               layer_autocast
//   autograd   decides who differentiates, and records a node    layer_autograd, LayerNode
//   a device   CPU, and CUDA if built: the kernels               layer_kernels
//              Meta: shapes only                                 layer_meta
//              all others: ATen                                  layer_aten
//
// and its node's backward calls layer_backward, an operation that passes the same stages and has a
// derivative of its own, written in these very operations: so every order of derivative exists.

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>

#include "glue.h"
#include "layer.h"
#include "node.h"
#include "ops.h"

namespace neuron_ext {

using at::Tensor;
using torch::autograd::variable_list;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;
using Mask = std::array<bool, 3>;

namespace {

constexpr const char* op_name(Activation f) {
  return f == Activation::kSigmoid ? "linear_sigmoid" : "linear";
}

/// The operations themselves, through whichever stages there are to pass (end of file).
template <Activation f>
Tensor layer(const Tensor& input, const Tensor& weight, const Tensor& bias);

/// `output` is undefined for the identity.
template <Activation f>
Gradients layer_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                         const Tensor& output, Mask mask);

// ---- ATen ---------------------------------------------------------------------------------------

template <Activation f>
Tensor layer_aten(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  warn_of_cuda(input);
  return with_context(
      [&] {
        const Tensor z = at::linear(input, weight, optional(bias));
        return f == Activation::kSigmoid ? at::sigmoid(z) : z;
      },
      [&] {
        return c10::str(op_name(f), ": input is ", describe(input), ", weight is ",
                        describe(weight), ", bias is ", describe(bias));
      });
}

void check_layer_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          const Tensor& output, Mask mask) {
  const char* where = output.defined() ? "linear_sigmoid_backward" : "linear_backward";
  TORCH_CHECK(grad_output.dim() >= 1, where,
              ": grad_output has shape (), expected (*, out_features)");
  const auto out_features = grad_output.sym_size(-1);
  if (mask[0]) {
    TORCH_CHECK(weight.defined(), where, ": weight is None, but the gradient of input takes it");
    TORCH_CHECK(weight.dim() == 2 &&
                    weight.sym_size(0).sym_eq(out_features).expect_true(__FILE__, __LINE__),
                where, ": weight has shape ", shape_of(weight), ", expected (", out_features,
                ", in_features), because grad_output has shape ", shape_of(grad_output));
  }
  if (mask[1]) {
    TORCH_CHECK(input.defined(), where, ": input is None, but the gradient of weight takes it");
    TORCH_CHECK(input.dim() >= 1, where, ": input has shape (), expected (*, in_features)");
    check_rows(where, "grad_output", grad_output, input, out_features);
  }
  if (output.defined()) check_rows(where, "output", output, grad_output, out_features);
}

Gradients layer_backward_aten(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& output, Mask mask) {
  check_layer_backward(grad_output, input, weight, output, mask);
  const Tensor dz = output.defined() ? at::sigmoid_backward(grad_output, output) : grad_output;
  const auto rows = [](const Tensor& t) { return t.reshape_symint({-1, t.sym_size(-1)}); };
  Gradients grads;
  if (mask[0]) std::get<0>(grads) = at::matmul(dz, weight);
  if (mask[1]) std::get<1>(grads) = at::matmul(rows(dz).t(), rows(input));
  if (mask[2]) std::get<2>(grads) = rows(dz).sum(0);
  return grads;
}

// ---- kernels ------------------------------------------------------------------------------------

bool kernels_take_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const Tensor& output) {
  return is_kernel_tensor(grad_output) && goes_with(grad_output, input) &&
         goes_with(grad_output, weight) && goes_with(grad_output, output);
}

/// Of arguments that were checked.
template <Activation f>
Tensor compute_layer(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  Tensor output = empty_rows(input, weight.sizes()[0]);
  fprop(f, as_rows(input), weight, bias, output.mutable_data_ptr(),
        !needs_node(input, weight, bias));
  return output;
}

template <Activation f>
Tensor layer_kernels(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (!kernels_take(input, weight, bias)) return layer_aten<f>(input, weight, bias);
  check_layer({op_name(f)}, input, weight, bias);
  return compute_layer<f>(input, weight, bias);
}

Gradients layer_backward_kernels(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& weight, const Tensor& output, Mask mask) {
  if (!kernels_take_backward(grad_output, input, weight, output)) {
    return layer_backward_aten(grad_output, input, weight, output, mask);
  }
  check_layer_backward(grad_output, input, weight, output, mask);
  const std::int64_t out_features = grad_output.size(-1);
  const RowsView dy = as_rows(grad_output);
  const OptionalRows y = output.defined() ? OptionalRows(as_rows(output)) : std::nullopt;
  const OptionalRows x = mask[1] ? OptionalRows(as_rows(input)) : std::nullopt;
  Gradients grads;
  auto& [dx, dw, db] = grads;
  if (mask[0]) dx = empty_rows(grad_output, weight.size(1));
  if (mask[1]) dw = new_empty(grad_output, {out_features, input.size(-1)});
  if (mask[2]) db = new_empty(grad_output, {out_features});
  void* const dw_data = mask[1] ? dw.mutable_data_ptr() : nullptr;
  void* const db_data = mask[2] ? db.mutable_data_ptr() : nullptr;
  if (mask[0] && (mask[1] || mask[2])) {
    dgrad_and_wgrad(dy, y, x, weight, dx.mutable_data_ptr(), dw_data, db_data);
  } else if (mask[0]) {
    dgrad(dy, y, weight, dx.mutable_data_ptr());
  } else if (mask[1] || mask[2]) {
    wgrad(dy, y, x, dw_data, db_data, dtype_of(grad_output), grad_output.device());
  }
  return grads;
}

// ---- Meta ---------------------------------------------------------------------------------------

template <Activation f>
Tensor layer_meta(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (!kernels_take(input, weight, bias)) return layer_aten<f>(input, weight, bias);
  check_layer({op_name(f)}, input, weight, bias);
  return empty_rows_symint(input, weight.sym_size(0));
}

Gradients layer_backward_meta(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                              const Tensor& output, Mask mask) {
  if (!kernels_take_backward(grad_output, input, weight, output)) {
    return layer_backward_aten(grad_output, input, weight, output, mask);
  }
  check_layer_backward(grad_output, input, weight, output, mask);
  const auto out_features = grad_output.sym_size(-1);
  const auto options = grad_output.options();
  Gradients grads;
  if (mask[0]) std::get<0>(grads) = empty_rows_symint(grad_output, weight.sym_size(1));
  if (mask[1]) std::get<1>(grads) = at::empty_symint({out_features, input.sym_size(-1)}, options);
  if (mask[2]) std::get<2>(grads) = at::empty_symint({out_features}, options);
  return grads;
}

// ---- autograd -----------------------------------------------------------------------------------

/// dz = dy f'(y); dx = dz W; dW = dzᵀ x; db = Σ dz: the node of a layer. Saved is what the wanted
/// gradients take, as torch does it, so that a frozen weight doesn't keep the input alive and may
/// be changed in place: x for W's, W for x's and, if f needs it, y for all.
template <Activation f>
struct LayerNode {
  static constexpr const char* kName =
      f == Activation::kSigmoid ? "LinearSigmoidBackward" : "LinearBackward";

  static variable_list gradients(const BackwardPass& pass) {
    variable_list result(3);
    if (!pass.grads[0].defined()) return result;
    std::tie(result[0], result[1], result[2]) =
        layer_backward<f>(pass.grads[0], pass.saved[0], pass.saved[1], pass.saved[2],
                          {pass.wanted[0], pass.wanted[1], pass.wanted[2]});
    return result;
  }
};

/// Puts `output`, a new tensor, into the graph as a layer's result. Of the bias, a vector if it is
/// there, only its place in the graph is looked at.
template <Activation f>
void record_layer(const Tensor& output, const Tensor& input, const Tensor& weight,
                  const Tensor& bias) {
  const auto node = make_node<LayerNode<f>>(3);
  for (const Tensor* t : {&input, &weight, &bias}) node->add_input(*t);
  node->save_if(needs_grad(weight), input);
  node->save_if(needs_grad(input), weight);
  node->set_results(output);
  node->save_result_if(gradient_needs(f) == GradientNeeds::kOutput, output);
  node->finish();
}

/// The node of a layer's gradients, which takes dy, x, W and y.
template <Activation f>
struct LayerBackwardNode {
  static constexpr const char* kName =
      f == Activation::kSigmoid ? "LinearSigmoidBackwardBackward" : "LinearBackwardBackward";

  /// With u, v, s the gradients that come for dx, dW, db:
  ///   for dz: g = u Wᵀ + x vᵀ + s        for x: dz v        for W: dzᵀ u
  /// and then, dz being dy y (1 - y):     for dy: g y (1 - y)    for y: g dy (1 - 2y).
  /// u comes only if there was a W to compute dx, v only if there was an x.
  static variable_list gradients(const BackwardPass& pass) {
    const Tensor &u = pass.grads[0], &v = pass.grads[1], &s = pass.grads[2];
    const Tensor &dy = pass.saved[0], &x = pass.saved[1], &w = pass.saved[2], &y = pass.saved[3];
    variable_list result(4);
    if (!u.defined() && !v.defined() && !s.defined()) return result;
    const bool for_dy = pass.wanted[0], for_x = pass.wanted[1] && v.defined();
    const bool for_w = pass.wanted[2] && u.defined(), for_y = pass.wanted[3];
    if (for_dy || for_y) {
      Tensor g = u.defined() ? neuron_ext::linear(u, w) : Tensor();
      if (v.defined() || s.defined()) {
        const Tensor term =
            v.defined() ? neuron_ext::linear(x, v, s) : s.expand_symint(dy.sym_sizes());
        g = g.defined() ? g + term : term;
      }
      if (for_dy) result[0] = f == Activation::kSigmoid ? neuron_ext::sigmoid_backward(g, y) : g;
      if (for_y) result[3] = g * dy * (1 - 2 * y);
    }
    if (for_x || for_w) {
      std::tie(result[1], result[2], std::ignore) =
          layer_backward<f>(dy, u, v, y, {for_x, for_w, false});
    }
    return result;
  }
};

/// The layer and its node; `below` computes it below autograd.
template <Activation f, class Below>
Tensor layer_with_node(const Tensor& input, const Tensor& weight, const Tensor& bias,
                       const Below& below) {
  check_layer({op_name(f)}, input, weight, bias);
  Tensor output = below(input, weight, bias);
  record_layer<f>(output, input, weight, *as_vector(bias, weight));
  return output;
}

template <Activation f>
Tensor layer_autograd(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (transform_is_active() || has_tangent(input) || has_tangent(weight) || has_tangent(bias) ||
      !kernels_take(input, weight, bias)) {
    return layer_aten<f>(input, weight, bias);
  }
  const auto below = [](const Tensor& x, const Tensor& w, const Tensor& b) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer<f>(x, w, b);
  };
  return needs_node(input, weight, bias) ? layer_with_node<f>(input, weight, bias, below)
                                         : below(input, weight, bias);
}

template <Activation f>
Gradients layer_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& weight, const Tensor& output, Mask mask) {
  if (transform_is_active() || has_tangent(grad_output) || has_tangent(input) ||
      has_tangent(weight) || has_tangent(output) ||
      !kernels_take_backward(grad_output, input, weight, output)) {
    return layer_backward_aten(grad_output, input, weight, output, mask);
  }
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer_backward<f>(grad_output, input, weight, output, mask);
  };
  if (!needs_node(grad_output, input, weight, output)) return below();
  check_layer_backward(grad_output, input, weight, output, mask);
  const auto node = make_node<LayerBackwardNode<f>>(4);
  for (const Tensor* t : {&grad_output, &input, &weight, &output}) {
    node->add_input(*t);
    node->save_if(true, *t);
  }
  const Gradients grads = below();
  std::apply([&](const auto&... grad) { node->set_results(grad...); }, grads);
  node->finish();
  return grads;
}

// ---- autocast -----------------------------------------------------------------------------------

template <Activation f, at::DeviceType device>
Tensor layer_autocast(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return layer<f>(at::autocast::cached_cast(dtype, input, device),
                  at::autocast::cached_cast(dtype, weight, device),
                  at::autocast::cached_cast(dtype, bias, device));
}

// ---- registration -------------------------------------------------------------------------------

/// The operations as their schemas have them: with optional tensors, and no output for
/// linear_backward.
template <Tensor (*stage)(const Tensor&, const Tensor&, const Tensor&)>
Tensor of_layer(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return stage(input, weight, value_or_undefined(bias));
}

using Backward = Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Mask);

template <Backward* backward>
Gradients of_linear(const Tensor& grad_output, const OptionalTensor& input,
                    const OptionalTensor& weight, Mask mask) {
  return backward(grad_output, value_or_undefined(input), value_or_undefined(weight), Tensor(),
                  mask);
}

template <Backward* backward>
Gradients of_linear_sigmoid(const Tensor& grad_output, const OptionalTensor& input,
                            const OptionalTensor& weight, const Tensor& output, Mask mask) {
  return backward(grad_output, value_or_undefined(input), value_or_undefined(weight), output, mask);
}

template <Activation f>
void register_layer(torch::Library& library, const char* name) {
  using c10::DispatchKey;
  library.impl(name,
               torch::dispatch(DispatchKey::CompositeExplicitAutograd, of_layer<layer_aten<f>>));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, of_layer<layer_aten<f>>));
  library.impl(name, torch::dispatch(DispatchKey::Batched, of_layer<layer_aten<f>>));
  library.impl(name, torch::dispatch(DispatchKey::CPU, of_layer<layer_kernels<f>>));
  if (gpu::kIsBuilt) {
    library.impl(name, torch::dispatch(DispatchKey::CUDA, of_layer<layer_kernels<f>>));
  }
  library.impl(name, torch::dispatch(DispatchKey::Meta, of_layer<layer_meta<f>>));
  library.impl(name, torch::dispatch(DispatchKey::Autograd, of_layer<layer_autograd<f>>));
  library.impl(name,
               torch::dispatch(DispatchKey::AutocastCPU, of_layer<layer_autocast<f, at::kCPU>>));
  library.impl(name,
               torch::dispatch(DispatchKey::AutocastCUDA, of_layer<layer_autocast<f, at::kCUDA>>));
}

template <class Function>
void impl_backward(torch::Library& library, const char* name, Function aten, Function kernels,
                   Function meta, Function autograd) {
  using c10::DispatchKey;
  library.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, aten));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, aten));
  library.impl(name, torch::dispatch(DispatchKey::Batched, aten));
  library.impl(name, torch::dispatch(DispatchKey::CPU, kernels));
  if (gpu::kIsBuilt) library.impl(name, torch::dispatch(DispatchKey::CUDA, kernels));
  library.impl(name, torch::dispatch(DispatchKey::Meta, meta));
  library.impl(name, torch::dispatch(DispatchKey::Autograd, autograd));
}

// ---- the operations -----------------------------------------------------------------------------

template <Activation f>
Tensor layer(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const Shortcut to = shortcut_for(input, weight, bias);
  if (to == Shortcut::kKernels) return layer_kernels<f>(input, weight, bias);
  if (to == Shortcut::kNode) {
    return kernels_take(input, weight, bias)
               ? layer_with_node<f>(input, weight, bias, compute_layer<f>)
               : layer_aten<f>(input, weight, bias);
  }
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
      f == Activation::kSigmoid ? "neuron_ext::linear_sigmoid" : "neuron_ext::linear");
  return op.call(input, weight, optional(bias));
}

template <Activation f>
Gradients layer_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                         const Tensor& output, Mask mask) {
  const Shortcut to = shortcut_for(grad_output, input, weight, output);
  if (to == Shortcut::kKernels) {
    return layer_backward_kernels(grad_output, input, weight, output, mask);
  }
  if (to == Shortcut::kNode) {
    return layer_backward_autograd<f>(grad_output, input, weight, output, mask);
  }
  if constexpr (f == Activation::kSigmoid) {
    static const auto op =
        find_operator<Gradients(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, Mask)>("neuron_ext::linear_sigmoid_backward");
    return op.call(grad_output, optional(input), optional(weight), output, mask);
  } else {
    static const auto op =
        find_operator<Gradients(const Tensor&, const OptionalTensor&, const OptionalTensor&, Mask)>(
            "neuron_ext::linear_backward");
    return op.call(grad_output, optional(input), optional(weight), mask);
  }
}

}  // namespace

void register_linear(torch::Library& library) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  library.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags);
  library.def("linear_sigmoid(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags);
  library.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  library.def(
      "linear_sigmoid_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor output, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  register_layer<Activation::kIdentity>(library, "linear");
  register_layer<Activation::kSigmoid>(library, "linear_sigmoid");
  impl_backward(library, "linear_backward", &of_linear<layer_backward_aten>,
                &of_linear<layer_backward_kernels>, &of_linear<layer_backward_meta>,
                &of_linear<layer_backward_autograd<Activation::kIdentity>>);
  impl_backward(library, "linear_sigmoid_backward", &of_linear_sigmoid<layer_backward_aten>,
                &of_linear_sigmoid<layer_backward_kernels>, &of_linear_sigmoid<layer_backward_meta>,
                &of_linear_sigmoid<layer_backward_autograd<Activation::kSigmoid>>);
}

void record_sigmoid_layer(const Tensor& output, const Tensor& input, const Tensor& weight,
                          const Tensor& bias) {
  record_layer<Activation::kSigmoid>(output, input, weight, bias);
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return layer<Activation::kIdentity>(input, weight, bias);
}

Tensor linear_sigmoid(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return layer<Activation::kSigmoid>(input, weight, bias);
}

Gradients linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          Mask output_mask) {
  return layer_backward<Activation::kIdentity>(grad_output, input, weight, Tensor(), output_mask);
}

Gradients linear_sigmoid_backward(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& weight, const Tensor& output, Mask output_mask) {
  return layer_backward<Activation::kSigmoid>(grad_output, input, weight, output, output_mask);
}

}  // namespace neuron_ext
