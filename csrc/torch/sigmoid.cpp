// sigmoid: y = 1 / (1 + exp(-x)) and its gradient. The stages are those of linear.cpp.

#include <ATen/TensorIterator.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward.h>

#include <array>
#include <numeric>

#include "glue.h"
#include "neuron_ext/cpu.h"
#include "node.h"
#include "ops.h"

namespace neuron_ext {

using at::Tensor;
using torch::autograd::variable_list;

namespace {

/// Nanoseconds that an element takes. Measured on Zen 4: f32 0.35, f64 0.8, bf16 0.28; gradients
/// less, but from beyond the caches more.
double time_of_element(DType dtype) { return 0.1 * static_cast<double>(size_of(dtype)); }

/// An uninitialised tensor like `t`, with the strides torch gives the result of an elementwise
/// operation: those of t where they are dense, else contiguous in the order of t's dimensions by
/// stride.
Tensor empty_elementwise(const Tensor& t) {
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    if (t.is_contiguous(format)) return at::empty_symint(t.sym_sizes(), t.options(), format);
  }
  if (t.is_non_overlapping_and_dense()) {
    return at::empty_strided_symint(t.sym_sizes(), t.sym_strides(), t.options());
  }
  const auto sizes = t.sym_sizes();
  const auto strides = t.sym_strides();
  // From the innermost dimension outwards; a dimension of stride 0 stays where it is.
  std::vector<std::int64_t> order(t.dim());
  std::iota(order.rbegin(), order.rend(), std::int64_t{0});
  const auto belongs_further_in = [&](std::int64_t a, std::int64_t b) -> std::optional<bool> {
    if (strides[a] == 0 || strides[b] == 0) return std::nullopt;
    if (strides[a] != strides[b]) return strides[a] < strides[b];
    return sizes[a] < sizes[b] ? std::optional(true) : std::nullopt;
  };
  for (size_t i = 1; i < order.size(); ++i) {
    for (size_t at = i, j = i; j-- > 0;) {
      const auto further_in = belongs_further_in(order[at], order[j]);
      if (!further_in.has_value()) continue;
      if (!*further_in) break;
      std::swap(order[at], order[j]);
      at = j;
    }
  }
  c10::SymDimVector dense(t.dim());
  c10::SymInt stride = 1;
  for (const auto dim : order) {
    dense[dim] = stride;
    stride *= sizes[dim];
  }
  return at::empty_strided_symint(sizes, dense, t.options());
}

/// The same for a CPU tensor, past the dispatcher where that can be.
Tensor empty_elementwise_cpu(const Tensor& t) {
  return t.is_contiguous() ? empty_cpu(t.sizes(), t.scalar_type())
                           : with_large_pages(empty_elementwise(t));
}

bool kernels_take(const Tensor& input) {
  return is_kernel_tensor(input) && (!input.is_cuda() || gpu::takes_rank(input));
}

bool kernels_take(const Tensor& grad_output, const Tensor& output) {
  return kernels_take(output) && goes_with(output, grad_output);
}

Tensor sigmoid_aten(const Tensor& input) {
  warn_of_cuda(input);
  return with_context([&] { return at::sigmoid(input); },
                      [&] { return c10::str("sigmoid: input is ", describe(input)); });
}

Tensor sigmoid_backward_aten(const Tensor& grad_output, const Tensor& output) {
  return at::sigmoid_backward(grad_output, output);
}

/// Calls f(addresses, strides in elements, n) for runs of elements that cover the iterator's
/// tensors. (torch's loop around a one-dimensional body makes g++ 12 warn of an uninitialised
/// variable.)
template <int kTensors, class F>
void for_each_run(at::TensorIterator& iterator, DType dtype, const F& f) {
  iterator.for_each(
      [&](char** data, const std::int64_t* strides, std::int64_t n, std::int64_t runs) {
        std::array<char*, kTensors> at;
        std::array<std::int64_t, kTensors> inner;
        for (int t = 0; t < kTensors; ++t) {
          at[t] = data[t];
          inner[t] = strides[t] / size_of(dtype);
        }
        for (std::int64_t run = 0; run < runs; ++run) {
          f(at.data(), inner.data(), n);
          for (int t = 0; t < kTensors; ++t) at[t] += strides[kTensors + t];
        }
      },
      at_parallel_for().grain_for(iterator.numel(), time_of_element(dtype)));
}

Tensor sigmoid_cpu(const Tensor& input) {
  Tensor output = empty_elementwise_cpu(input);
  const DType dtype = dtype_of(input);
  if (input.is_non_overlapping_and_dense()) {
    const auto* x = static_cast<const char*>(input.const_data_ptr());
    auto* y = static_cast<char*>(output.mutable_data_ptr());
    const ParallelFor parallel_for = at_parallel_for();
    const std::int64_t n = input.numel();
    const std::int64_t grain = parallel_for.grain_for(n, time_of_element(dtype));
    parallel_for(n, grain, [=](std::int64_t begin, std::int64_t end) {
      const std::int64_t offset = begin * size_of(dtype);
      cpu::activate(Activation::kSigmoid, dtype, end - begin, x + offset, 1, y + offset, 1);
    });
    return output;
  }
  auto iterator = at::TensorIteratorConfig().add_output(output).add_const_input(input).build();
  for_each_run<2>(iterator, dtype, [dtype](char** at, const std::int64_t* strides, std::int64_t n) {
    cpu::activate(Activation::kSigmoid, dtype, n, at[1], strides[1], at[0], strides[0]);
  });
  return output;
}

void check_sigmoid_backward(const Tensor& grad_output, const Tensor& output) {
  bool fits = grad_output.dim() == output.dim();
  for (std::int64_t i = 0; fits && i < output.dim(); ++i) {
    fits = grad_output.sym_size(i).sym_eq(output.sym_size(i)).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK(fits, "sigmoid_backward: grad_output has shape ", shape_of(grad_output),
              ", expected that of output, ", shape_of(output));
}

Tensor sigmoid_backward_cpu(const Tensor& grad_output, const Tensor& output) {
  Tensor grad_input = empty_elementwise_cpu(output);
  const DType dtype = dtype_of(output);
  if (output.is_non_overlapping_and_dense() && grad_output.strides() == output.strides()) {
    const auto* dy = static_cast<const char*>(grad_output.const_data_ptr());
    const auto* y = static_cast<const char*>(output.const_data_ptr());
    auto* dx = static_cast<char*>(grad_input.mutable_data_ptr());
    const ParallelFor parallel_for = at_parallel_for();
    const std::int64_t n = output.numel();
    const std::int64_t grain = parallel_for.grain_for(n, time_of_element(dtype));
    parallel_for(n, grain, [=](std::int64_t begin, std::int64_t end) {
      const std::int64_t offset = begin * size_of(dtype);
      cpu::activate_backward(Activation::kSigmoid, dtype, end - begin, dy + offset, 1, y + offset,
                             1, dx + offset, 1);
    });
    return grad_input;
  }
  auto iterator = at::TensorIteratorConfig()
                      .add_output(grad_input)
                      .add_const_input(grad_output)
                      .add_const_input(output)
                      .build();
  for_each_run<3>(iterator, dtype, [dtype](char** at, const std::int64_t* strides, std::int64_t n) {
    cpu::activate_backward(Activation::kSigmoid, dtype, n, at[1], strides[1], at[2], strides[2],
                           at[0], strides[0]);
  });
  return grad_input;
}

Tensor sigmoid_kernels(const Tensor& input) {
  if (!kernels_take(input)) return sigmoid_aten(input);
  if constexpr (gpu::kIsBuilt) {
    if (input.is_cuda()) {
      Tensor output = empty_elementwise(input);
      gpu::activate(Activation::kSigmoid, input, output);
      return output;
    }
  }
  return sigmoid_cpu(input);
}

Tensor sigmoid_backward_kernels(const Tensor& grad_output, const Tensor& output) {
  if (!kernels_take(grad_output, output)) return sigmoid_backward_aten(grad_output, output);
  check_sigmoid_backward(grad_output, output);
  if constexpr (gpu::kIsBuilt) {
    if (output.is_cuda()) {
      Tensor grad_input = empty_elementwise(output);
      gpu::activate_backward(Activation::kSigmoid, grad_output, output, grad_input);
      return grad_input;
    }
  }
  return sigmoid_backward_cpu(grad_output, output);
}

Tensor sigmoid_meta(const Tensor& input) {
  return kernels_take(input) ? empty_elementwise(input) : sigmoid_aten(input);
}

Tensor sigmoid_backward_meta(const Tensor& grad_output, const Tensor& output) {
  if (!kernels_take(grad_output, output)) return sigmoid_backward_aten(grad_output, output);
  check_sigmoid_backward(grad_output, output);
  return empty_elementwise(output);
}

/// dx = dy y (1 - y): the node of a sigmoid, which saves y.
struct SigmoidNode {
  static constexpr const char* kName = "SigmoidBackward";

  static variable_list gradients(const BackwardPass& pass) {
    const Tensor& dy = pass.grads[0];
    return {dy.defined() ? neuron_ext::sigmoid_backward(dy, pass.saved[0]) : Tensor()};
  }
};

/// The node of that gradient: for dy: u y (1 - y), for y: u dy (1 - 2y).
struct SigmoidBackwardNode {
  static constexpr const char* kName = "SigmoidBackwardBackward";

  static variable_list gradients(const BackwardPass& pass) {
    const Tensor &u = pass.grads[0], &dy = pass.saved[0], &y = pass.saved[1];
    variable_list result(2);
    if (!u.defined()) return result;
    if (pass.wanted[0]) result[0] = neuron_ext::sigmoid_backward(u, y);
    if (pass.wanted[1]) result[1] = u * dy * (1 - 2 * y);
    return result;
  }
};

/// `output`, a new tensor, with its node.
Tensor with_node(Tensor output, const Tensor& input) {
  const auto node = make_node<SigmoidNode>(1);
  node->add_input(input);
  node->set_results(output);
  node->save_result_if(true, output);
  node->finish();
  return output;
}

Tensor sigmoid_autograd(const Tensor& input) {
  if (transform_is_active() || has_tangent(input) || !kernels_take(input)) {
    return sigmoid_aten(input);
  }
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return neuron_ext::sigmoid(input);
  };
  return needs_node(input) ? with_node(below(), input) : below();
}

Tensor sigmoid_backward_autograd(const Tensor& grad_output, const Tensor& output) {
  if (transform_is_active() || has_tangent(grad_output) || has_tangent(output) ||
      !kernels_take(grad_output, output)) {
    return sigmoid_backward_aten(grad_output, output);
  }
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return neuron_ext::sigmoid_backward(grad_output, output);
  };
  if (!needs_node(grad_output, output)) return below();
  const auto node = make_node<SigmoidBackwardNode>(2);
  for (const Tensor* t : {&grad_output, &output}) {
    node->add_input(*t);
    node->save_if(true, *t);
  }
  const Tensor grad_input = below();
  node->set_results(grad_input);
  node->finish();
  return grad_input;
}

}  // namespace

void register_sigmoid(torch::Library& library) {
  using c10::DispatchKey;
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  library.def("sigmoid(Tensor input) -> Tensor", tags);
  library.impl("sigmoid", torch::dispatch(DispatchKey::CompositeExplicitAutograd, sigmoid_aten));
  library.impl("sigmoid", torch::dispatch(DispatchKey::FuncTorchBatched, sigmoid_aten));
  library.impl("sigmoid", torch::dispatch(DispatchKey::Batched, sigmoid_aten));
  library.impl("sigmoid", torch::dispatch(DispatchKey::CPU, sigmoid_kernels));
  if (gpu::kIsBuilt) library.impl("sigmoid", torch::dispatch(DispatchKey::CUDA, sigmoid_kernels));
  library.impl("sigmoid", torch::dispatch(DispatchKey::Meta, sigmoid_meta));
  library.impl("sigmoid", torch::dispatch(DispatchKey::Autograd, sigmoid_autograd));

  const char* backward = "sigmoid_backward";
  library.def("sigmoid_backward(Tensor grad_output, Tensor output) -> Tensor", tags);
  library.impl(backward,
               torch::dispatch(DispatchKey::CompositeExplicitAutograd, sigmoid_backward_aten));
  library.impl(backward, torch::dispatch(DispatchKey::FuncTorchBatched, sigmoid_backward_aten));
  library.impl(backward, torch::dispatch(DispatchKey::Batched, sigmoid_backward_aten));
  library.impl(backward, torch::dispatch(DispatchKey::CPU, sigmoid_backward_kernels));
  if (gpu::kIsBuilt) {
    library.impl(backward, torch::dispatch(DispatchKey::CUDA, sigmoid_backward_kernels));
  }
  library.impl(backward, torch::dispatch(DispatchKey::Meta, sigmoid_backward_meta));
  library.impl(backward, torch::dispatch(DispatchKey::Autograd, sigmoid_backward_autograd));
}

Tensor sigmoid(const Tensor& input) {
  const Shortcut to = shortcut_for(input);
  if (to == Shortcut::kKernels) return sigmoid_kernels(input);
  if (to == Shortcut::kNode) {
    return kernels_take(input) ? with_node(sigmoid_kernels(input), input) : sigmoid_aten(input);
  }
  static const auto op = find_operator<Tensor(const Tensor&)>("neuron_ext::sigmoid");
  return op.call(input);
}

Tensor sigmoid_backward(const Tensor& grad_output, const Tensor& output) {
  const Shortcut to = shortcut_for(grad_output, output);
  if (to == Shortcut::kKernels) return sigmoid_backward_kernels(grad_output, output);
  if (to == Shortcut::kNode) return sigmoid_backward_autograd(grad_output, output);
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&)>("neuron_ext::sigmoid_backward");
  return op.call(grad_output, output);
}

}  // namespace neuron_ext
