#include "layer.h"

namespace neuron_ext {

void fprop(Activation f, const RowsView& x, const at::Tensor& weight, const at::Tensor& bias,
           void* y) {
  GemmDesc desc;
  desc.m = x.rows;
  desc.n = weight.size(0);
  desc.k = x.columns;
  desc.dtype = dtype_of(weight);
  desc.a_stride_m = x.row_stride;
  desc.a_stride_k = x.column_stride;
  desc.b_stride_k = weight.stride(1);
  desc.b_stride_n = weight.stride(0);
  desc.d_stride_m = desc.n;
  desc.epilogue = f;
  GemmPointers at;
  at.a = x.data;
  at.b = weight.const_data_ptr();
  at.d = y;
  if (bias.defined()) {
    desc.has_bias = true;
    desc.bias_stride = bias.stride(0);
    at.bias = bias.const_data_ptr();
  }
  cpu::gemm(desc, at, at_parallel_for());
}

void dgrad(const RowsView& dy, const OptionalRows& y, const at::Tensor& weight, void* dx) {
  GemmDesc desc;
  desc.m = dy.rows;
  desc.n = weight.size(1);
  desc.k = dy.columns;
  desc.dtype = dtype_of(weight);
  desc.a_stride_m = dy.row_stride;
  desc.a_stride_k = dy.column_stride;
  desc.b_stride_k = weight.stride(0);
  desc.b_stride_n = weight.stride(1);
  desc.d_stride_m = desc.n;
  GemmPointers at;
  at.a = dy.data;
  at.b = weight.const_data_ptr();
  at.d = dx;
  if (y.has_value()) {
    desc.prologue = Activation::kSigmoid;
    desc.saved_stride_m = y->row_stride;
    desc.saved_stride_k = y->column_stride;
    at.saved = y->data;
  }
  cpu::gemm(desc, at, at_parallel_for());
}

void wgrad(const RowsView& dy, const OptionalRows& y, const OptionalRows& x, void* dw, void* db,
           DType dtype) {
  GemmDesc desc;
  desc.m = dy.columns;
  desc.k = dy.rows;
  desc.dtype = dtype;
  desc.a_stride_m = dy.column_stride;
  desc.a_stride_k = dy.row_stride;
  desc.has_a_sum = db != nullptr;
  GemmPointers at;
  at.a = dy.data;
  if (dw != nullptr) {
    desc.n = x->columns;
    desc.b_stride_k = x->row_stride;
    desc.b_stride_n = x->column_stride;
    desc.d_stride_m = x->columns;
    at.b = x->data;
    at.d = dw;
  }
  at.a_sum = db;
  if (y.has_value()) {
    desc.prologue = Activation::kSigmoid;
    desc.saved_stride_m = y->column_stride;
    desc.saved_stride_k = y->row_stride;
    at.saved = y->data;
  }
  cpu::gemm(desc, at, at_parallel_for());
}

}  // namespace neuron_ext
