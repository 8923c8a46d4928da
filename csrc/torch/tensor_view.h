// From tensors to what the kernels take: which tensors they take at all, the checks and their
// messages, and the (pointer, stride) views. All the glue's questions about a tensor are asked
// here.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/MaybeOwned.h>

#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "gpu.h"
#include "neuron_ext/gemm.h"

namespace neuron_ext {

// ---- which tensors kernels take -----------------------------------------------------------------

inline bool is_kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

/// Whether there are kernels for the device; meta stands for one.
inline bool has_kernels(c10::Device device) {
  if constexpr (gpu::kIsBuilt) {
    if (device.is_cuda()) return gpu::has_kernels(device);
  }
  return device.is_cpu() || device.is_meta();
}

inline bool is_dense(const at::Tensor& t) { return t.layout() == at::kStrided && !t.is_nested(); }

/// Dense, of a kernel's dtype, and on a device with kernels.
inline bool is_kernel_tensor(const at::Tensor& t) {
  return is_kernel_dtype(t.scalar_type()) && is_dense(t) && has_kernels(t.device());
}

/// A tensor that kernels take together with `first`, which they take, or no tensor at all.
inline bool goes_with(const at::Tensor& first, const at::Tensor& t) {
  return !t.defined() ||
         (t.scalar_type() == first.scalar_type() && is_dense(t) && t.device() == first.device());
}

/// Undefined for both kinds of nothing, so that callers ask one question.
inline const at::Tensor& value_or_undefined(const std::optional<at::Tensor>& t) {
  static const at::Tensor undefined;
  return t.has_value() ? *t : undefined;
}

inline std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

DType dtype_of(const at::Tensor& t);

// ---- what differentiation is asked of a call ----------------------------------------------------

/// Whether a functorch transform is running or the tensor carries a forward-mode tangent. Such
/// calls are computed by ATen operations, which have every rule.
inline bool transform_is_active() {
  // On the way down a transform's interpreter is run by the front mode, its kernels under the back
  // mode.
  return c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

inline bool has_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}

inline bool needs_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }

/// Whether an operation on these goes into the graph.
template <class... Tensors>
bool needs_node(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_grad(tensors) || ...);
}

// ---- checks -------------------------------------------------------------------------------------

/// "(2, 3)", symbolic sizes included.
std::string shape_of(const at::Tensor& t);

/// "float32 of shape (2, 3)", or "None".
std::string describe(const at::Tensor& t);

/// Whether two sizes are numbers, and the same.
inline bool same_number(const c10::SymInt& a, const c10::SymInt& b) {
  const auto x = a.maybe_as_int();
  return x.has_value() && x == b.maybe_as_int();
}

/// Whether two sizes are the same, which a compiler may rely on from there on.
inline bool same_size(const c10::SymInt& a, const c10::SymInt& b) {
  return same_number(a, b) || a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

/// Whether the sizes are plain numbers.
inline bool has_plain_sizes(const at::Tensor& t) {
  return !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

/// Whether a layer plainly fits its input: a look at plain sizes, where the checks below ask
/// symbolic ones, which would cost one neuron a tenth of its time.
inline bool fits_plainly(std::int64_t in_features, const at::Tensor& weight,
                         const at::Tensor& bias) {
  if (!has_plain_sizes(weight) || weight.dim() != 2 || weight.sizes()[1] != in_features) {
    return false;
  }
  return !bias.defined() ||
         (has_plain_sizes(bias) && bias.dim() == 1 && bias.sizes()[0] == weight.sizes()[0]);
}

/// What an error is about: "linear", or "mlp, layer 2".
struct Where {
  const char* operation;
  std::optional<size_t> layer = std::nullopt;
};
std::ostream& operator<<(std::ostream& out, const Where& where);

/// Raises RuntimeError, naming the argument, unless weight is a matrix (or a vector, which only
/// torch takes), the features agree and the bias can be added to the result. Works on symbolic
/// sizes.
void check_layer(const Where& where, const at::Tensor& input, const at::Tensor& weight,
                 const at::Tensor& bias);

/// The part of check_layer that is about the bias of a layer with a two-dimensional weight.
void check_bias(const Where& where, const at::Tensor& bias, const at::Tensor& weight,
                std::int64_t input_dim);

/// Raises RuntimeError unless `t` has the sizes of `input` with `features` in place of the last
/// one.
void check_rows(const char* where, const char* name, const at::Tensor& t, const at::Tensor& input,
                const c10::SymInt& features);

/// Whether a bias is one value, one row of values, or a vector: what kernels take. torch also takes
/// a bias with a value for each element of a 2-D output.
bool is_row_bias(const at::Tensor& bias, const at::Tensor& input);

/// A row bias as a vector (out_features,): itself or a differentiable view; undefined for none.
c10::MaybeOwned<at::Tensor> as_vector(const at::Tensor& bias, const at::Tensor& weight);

// ---- views --------------------------------------------------------------------------------------

/// A tensor (*, columns), which must outlive it, as a matrix.
struct RowsView {
  at::Tensor owner;  // of a copy, where no two strides describe the tensor
  const void* data;
  std::int64_t rows, columns, row_stride, column_stride;
};

RowsView as_rows(const at::Tensor& t);

/// An uninitialised, contiguous CPU tensor of a kernel's dtype. Not at::empty, which passes the
/// dispatcher.
at::Tensor empty_cpu(at::IntArrayRef sizes, at::ScalarType dtype);

/// A CPU tensor that is about to be filled: memory that malloc takes from the system for it comes
/// in large pages, if the system has them on request. Measured for 64 MiB: 27 ms for the page
/// faults that filling it meets become 7.
at::Tensor with_large_pages(at::Tensor result);

/// An uninitialised, contiguous tensor like `like` but for its sizes.
at::Tensor new_empty(const at::Tensor& like, at::IntArrayRef sizes);

/// (sizes of input but the last, features), uninitialised, contiguous, where input is.
at::Tensor empty_rows(const at::Tensor& input, std::int64_t features);
at::Tensor empty_rows_symint(const at::Tensor& input, const c10::SymInt& features);

}  // namespace neuron_ext
