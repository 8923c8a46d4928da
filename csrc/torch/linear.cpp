// linear and linear_sigmoid: y = f(x Wᵀ + b), f the identity or the sigmoid, and their gradients.
//
// START HERE to see how an operation meets torch. A call passes, in this order,
//
//   autocast   casts the arguments                               layer_autocast
//   autograd   decides who differentiates, and records a node    layer_autograd, LayerFunction
//   a device   CPU: the kernels                                  layer_cpu
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
#include <torch/csrc/autograd/custom_function.h>

#include "glue.h"
#include "layer.h"
#include "ops.h"

namespace neuron_ext {

using at::Tensor;
using torch::autograd::AutogradContext;
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
Tensor layer(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

/// `input` and `weight` may be undefined, here and below (ops.h says when); `output`
/// is, for the identity.
template <Activation f>
Gradients layer_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                         const Tensor& output, Mask mask);

// ---- ATen ---------------------------------------------------------------------------------------

template <Activation f>
Tensor layer_aten(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  warn_of_cuda(input);
  return with_context(
      [&] {
        const Tensor z = at::linear(input, weight, bias);
        return f == Activation::kSigmoid ? at::sigmoid(z) : z;
      },
      [&] {
        return c10::str(op_name(f), ": input is ", describe(input), ", weight is ",
                        describe(weight), ", bias is ", describe(value_or_undefined(bias)));
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

// ---- CPU ----------------------------------------------------------------------------------------

bool kernels_take_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const Tensor& output) {
  return is_kernel_tensor(grad_output) && goes_with(grad_output, input) &&
         goes_with(grad_output, weight) && goes_with(grad_output, output);
}

template <Activation f>
Tensor layer_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& optional_bias) {
  const Tensor& bias = value_or_undefined(optional_bias);
  if (!kernels_take(input, weight, bias)) return layer_aten<f>(input, weight, optional_bias);
  check_layer(op_name(f), input, weight, bias);
  const RowsView x = as_rows(input);
  Tensor output = empty_rows(input, weight.size(0));
  fprop(f, x, weight, bias.defined() ? as_vector(bias, weight.sym_size(0)) : bias,
        output.mutable_data_ptr());
  return output;
}

Gradients layer_backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor& output, Mask mask) {
  if (!kernels_take_backward(grad_output, input, weight, output)) {
    return layer_backward_aten(grad_output, input, weight, output, mask);
  }
  check_layer_backward(grad_output, input, weight, output, mask);
  const std::int64_t out_features = grad_output.size(-1);
  const RowsView dy = as_rows(grad_output);
  const OptionalRows y = output.defined() ? OptionalRows(as_rows(output)) : std::nullopt;
  Gradients grads;
  auto& [dx, dw, db] = grads;
  if (mask[0]) {
    dx = empty_rows(grad_output, weight.size(1));
    dgrad(dy, y, weight, dx.mutable_data_ptr());
  }
  if (mask[1]) dw = empty_cpu({out_features, input.size(-1)}, grad_output.scalar_type());
  if (mask[2]) db = empty_cpu({out_features}, grad_output.scalar_type());
  if (mask[1] || mask[2]) {
    wgrad(dy, y, mask[1] ? OptionalRows(as_rows(input)) : std::nullopt,
          mask[1] ? dw.mutable_data_ptr() : nullptr, mask[2] ? db.mutable_data_ptr() : nullptr,
          dtype_of(grad_output));
  }
  return grads;
}

// ---- Meta ---------------------------------------------------------------------------------------

template <Activation f>
Tensor layer_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& optional_bias) {
  const Tensor& bias = value_or_undefined(optional_bias);
  if (!kernels_take(input, weight, bias)) return layer_aten<f>(input, weight, optional_bias);
  check_layer(op_name(f), input, weight, bias);
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

/// dz = dy f'(y); dx = dz W; dW = dzᵀ x; db = Σ dz: the gradients of a layer, and the node of their
/// own gradients. Saves dy, x, W and y.
template <Activation f>
class LayerBackwardFunction : public torch::autograd::Function<LayerBackwardFunction<f>> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& grad_output,
                               const OptionalTensor& input, const OptionalTensor& weight,
                               const OptionalTensor& output, Mask mask) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor &x = value_or_undefined(input), &w = value_or_undefined(weight);
    const Tensor& y = value_or_undefined(output);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({grad_output, x, w, y});
    ctx->saved_data["has_dx"] = mask[0];
    ctx->saved_data["has_dw"] = mask[1];
    const auto [dx, dw, db] = layer_backward<f>(grad_output, x, w, y, mask);
    variable_list defined;  // a Function can't return an undefined tensor
    for (const Tensor& grad : {dx, dw, db}) {
      if (grad.defined()) defined.push_back(grad);
    }
    return defined;
  }

  /// With u, v, s the gradients that come for dx, dW, db:
  ///   for dz: g = u Wᵀ + x vᵀ + s        for x: dz v        for W: dzᵀ u
  /// and then, dz being dy y (1 - y):     for dy: g y (1 - y)    for y: g dy (1 - 2y).
  /// u comes only if there was a W to compute dx, v only if there was an x.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1], &w = saved[2], &y = saved[3];
    size_t outputs = 0;
    const auto incoming = [&](bool there) {
      return there && outputs < grads.size() ? grads[outputs++] : Tensor();
    };
    const Tensor u = incoming(ctx->saved_data["has_dx"].toBool());
    const Tensor v = incoming(ctx->saved_data["has_dw"].toBool());
    const Tensor s = incoming(true);
    variable_list result(5);  // for dy, x, W, y and the mask
    if (!u.defined() && !v.defined() && !s.defined()) return result;

    // torch numbers only the arguments that were there.
    size_t edges = 0;
    const auto wanted = [&](const Tensor& argument) {
      return argument.defined() && ctx->needs_input_grad(edges++);
    };
    const bool for_dy = wanted(dy), for_x = wanted(x) && v.defined();
    const bool for_w = wanted(w) && u.defined(), for_y = wanted(y);
    if (for_dy || for_y) {
      Tensor g = u.defined() ? neuron_ext::linear(u, w) : Tensor();
      if (v.defined() || s.defined()) {
        const Tensor term =
            v.defined() ? neuron_ext::linear(x, v, optional(s)) : s.expand_symint(dy.sym_sizes());
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

/// y = f(x Wᵀ + b). Saves what the wanted gradients take, as torch does, so that a frozen weight
/// doesn't keep the input alive and may be changed in place: W for x's, x for W's and, if f needs
/// it, y for all.
template <Activation f, bool has_bias>
class LayerFunction : public torch::autograd::Function<LayerFunction<f, has_bias>> {
 public:
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor output = layer<f>(input, weight, bias);
    ctx->set_materialize_grads(false);
    constexpr bool saves_output = gradient_needs(f) == GradientNeeds::kOutput;
    ctx->save_for_backward({needs_grad(weight) ? input : Tensor(),
                            needs_grad(input) ? weight : Tensor(),
                            saves_output ? output : Tensor()});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    std::tie(result[0], result[1], result[2]) = layer_backward<f>(
        grads[0], saved[0], saved[1], saved[2],
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2)});
    return result;
  }
};

template <Activation f>
Tensor layer_autograd(const Tensor& input, const Tensor& weight,
                      const OptionalTensor& optional_bias) {
  const Tensor& bias = value_or_undefined(optional_bias);
  if (transform_is_active() || has_tangent(input) || has_tangent(weight) || has_tangent(bias) ||
      !kernels_take(input, weight, bias)) {
    return layer_aten<f>(input, weight, optional_bias);
  }
  if (!at::GradMode::is_enabled() ||
      !(needs_grad(input) || needs_grad(weight) || needs_grad(bias))) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer<f>(input, weight, optional_bias);
  }
  check_layer(op_name(f), input, weight, bias);
  if (!bias.defined()) return LayerFunction<f, false>::apply(input, weight, OptionalTensor());
  return LayerFunction<f, true>::apply(input, weight,
                                       OptionalTensor(as_vector(bias, weight.sym_size(0))));
}

template <Activation f>
Gradients layer_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& weight, const Tensor& output, Mask mask) {
  if (transform_is_active() || has_tangent(grad_output) || has_tangent(input) ||
      has_tangent(weight) || has_tangent(output) ||
      !kernels_take_backward(grad_output, input, weight, output)) {
    return layer_backward_aten(grad_output, input, weight, output, mask);
  }
  if (!at::GradMode::is_enabled() ||
      !(needs_grad(grad_output) || needs_grad(input) || needs_grad(weight) || needs_grad(output))) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer_backward<f>(grad_output, input, weight, output, mask);
  }
  check_layer_backward(grad_output, input, weight, output, mask);
  const variable_list defined = LayerBackwardFunction<f>::apply(
      grad_output, OptionalTensor(input), OptionalTensor(weight), OptionalTensor(output), mask);
  auto next = defined.begin();
  Gradients grads;
  if (mask[0]) std::get<0>(grads) = *next++;
  if (mask[1]) std::get<1>(grads) = *next++;
  if (mask[2]) std::get<2>(grads) = *next++;
  return grads;
}

// ---- autocast -----------------------------------------------------------------------------------

template <Activation f, at::DeviceType device>
Tensor layer_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return layer<f>(at::autocast::cached_cast(dtype, input, device),
                  at::autocast::cached_cast(dtype, weight, device),
                  at::autocast::cached_cast(dtype, bias, device));
}

// ---- registration -------------------------------------------------------------------------------

/// The backward operations as their schemas have them: optional arguments, and no output for
/// linear's.
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
  library.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, layer_aten<f>));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, layer_aten<f>));
  library.impl(name, torch::dispatch(DispatchKey::Batched, layer_aten<f>));
  library.impl(name, torch::dispatch(DispatchKey::CPU, layer_cpu<f>));
  library.impl(name, torch::dispatch(DispatchKey::Meta, layer_meta<f>));
  library.impl(name, torch::dispatch(DispatchKey::Autograd, layer_autograd<f>));
  library.impl(name, torch::dispatch(DispatchKey::AutocastCPU, layer_autocast<f, at::kCPU>));
  library.impl(name, torch::dispatch(DispatchKey::AutocastCUDA, layer_autocast<f, at::kCUDA>));
}

template <class Function>
void impl_backward(torch::Library& library, const char* name, Function aten, Function cpu,
                   Function meta, Function autograd) {
  using c10::DispatchKey;
  library.impl(name, torch::dispatch(DispatchKey::CompositeExplicitAutograd, aten));
  library.impl(name, torch::dispatch(DispatchKey::FuncTorchBatched, aten));
  library.impl(name, torch::dispatch(DispatchKey::Batched, aten));
  library.impl(name, torch::dispatch(DispatchKey::CPU, cpu));
  library.impl(name, torch::dispatch(DispatchKey::Meta, meta));
  library.impl(name, torch::dispatch(DispatchKey::Autograd, autograd));
}

// ---- the operations -----------------------------------------------------------------------------

template <Activation f>
Tensor layer(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Shortcut to = shortcut_for(input, weight, value_or_undefined(bias));
  if (to == Shortcut::kAutograd) return layer_autograd<f>(input, weight, bias);
  if (to == Shortcut::kCpu) return layer_cpu<f>(input, weight, bias);
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
      f == Activation::kSigmoid ? "neuron_ext::linear_sigmoid" : "neuron_ext::linear");
  return op.call(input, weight, bias);
}

template <Activation f>
Gradients layer_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                         const Tensor& output, Mask mask) {
  const Shortcut to = shortcut_for(grad_output, input, weight, output);
  if (to == Shortcut::kAutograd) {
    return layer_backward_autograd<f>(grad_output, input, weight, output, mask);
  }
  if (to == Shortcut::kCpu) return layer_backward_cpu(grad_output, input, weight, output, mask);
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
                &of_linear<layer_backward_cpu>, &of_linear<layer_backward_meta>,
                &of_linear<layer_backward_autograd<Activation::kIdentity>>);
  impl_backward(library, "linear_sigmoid_backward", &of_linear_sigmoid<layer_backward_aten>,
                &of_linear_sigmoid<layer_backward_cpu>, &of_linear_sigmoid<layer_backward_meta>,
                &of_linear_sigmoid<layer_backward_autograd<Activation::kSigmoid>>);
}

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return layer<Activation::kIdentity>(input, weight, bias);
}

Tensor linear_sigmoid(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return layer<Activation::kSigmoid>(input, weight, bias);
}

Gradients linear_backward(const Tensor& grad_output, const OptionalTensor& input,
                          const OptionalTensor& weight, Mask output_mask) {
  return layer_backward<Activation::kIdentity>(grad_output, value_or_undefined(input),
                                               value_or_undefined(weight), Tensor(), output_mask);
}

Gradients linear_sigmoid_backward(const Tensor& grad_output, const OptionalTensor& input,
                                  const OptionalTensor& weight, const Tensor& output,
                                  Mask output_mask) {
  return layer_backward<Activation::kSigmoid>(grad_output, value_or_undefined(input),
                                              value_or_undefined(weight), output, output_mask);
}

}  // namespace neuron_ext
