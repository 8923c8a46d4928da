// One layer on the kernels of its device: its three products, of tensors that were checked.
// The table in neuron_ext/gemm.h says which operand is what.
#pragma once

#include "glue.h"
#include "neuron_ext/cpu.h"
#include "tensor_view.h"

namespace neuron_ext {

using OptionalRows = std::optional<RowsView>;

/// As the CPU's mlp_backward takes them.
inline MlpBackward::Rows rows_of_batch(const RowsView& view) {
  return {view.data, view.row_stride, view.column_stride};
}

/// Whether the kernels compute this layer; else ATen does, or finds the words for what is wrong
/// with it.
inline bool kernels_take(const at::Tensor& input, const at::Tensor& weight,
                         const at::Tensor& bias) {
  return is_kernel_tensor(input) && goes_with(input, weight) && goes_with(input, bias) &&
         weight.dim() == 2 && (!bias.defined() || is_row_bias(bias, input));
}

/// Whether NEURON_EXT_FP32=strict asks for products of f32 as f32 multiply-adds, whatever torch's
/// precision is set to. Throws std::invalid_argument where it's set to something else.
bool f32_is_strict();

/// The precision of products of `work` multiply-adds.
Precision precision_for(DType dtype, double work, c10::Device device = at::kCPU);

/// The step from column to column of a bias that kernels take; 0 where one value is for all.
inline std::int64_t bias_stride(const at::Tensor& bias) {
  return bias.dim() == 0 || bias.sizes().back() == 1 ? 0 : bias.strides().back();
}

/// y = f(x Wᵀ + b), y contiguous. `is_constant`: no gradient is in view, so that the weight may be
/// one of the packed ones.
void fprop(Activation f, const RowsView& x, const at::Tensor& weight, const at::Tensor& bias,
           void* y, bool is_constant);

/// dx = dz W, contiguous; dz = dy y (1 - y) where there is a y, else dy. With x, the layer's input
/// and a sigmoid's output, of contiguous columns, what is left behind that sigmoid: dx x (1 - x).
void dgrad(const RowsView& dy, const OptionalRows& y, const at::Tensor& weight, void* dx,
           const OptionalRows& x = std::nullopt);

/// dw = dzᵀ x and db = Σ dz, contiguous; either may be null. Only dw takes x.
void wgrad(const RowsView& dy, const OptionalRows& y, const OptionalRows& x, void* dw, void* db,
           DType dtype, c10::Device device = at::kCPU);

/// Whether wgrad of these would read dz once more for db. Where dz comes from a stack's backward,
/// so had better db (MlpLayer::output_sum).
bool sums_db_apart(const RowsView& dz, const OptionalRows& x, void* dw, void* db, DType dtype,
                   c10::Device device);

/// Both: dz is formed once where that is faster.
void dgrad_and_wgrad(const RowsView& dy, const OptionalRows& y, const OptionalRows& x,
                     const at::Tensor& weight, void* dx, void* dw, void* db);

/// Puts `output`, a new tensor, into the graph as a sigmoid layer's result (linear.cpp). Of the
/// bias, a vector if it is there, only its place in the graph is looked at.
void record_sigmoid_layer(const at::Tensor& output, const at::Tensor& input,
                          const at::Tensor& weight, const at::Tensor& bias);

}  // namespace neuron_ext
