#include "layer.h"

#include <ATen/Context.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "packed_weights.h"

namespace neuron_ext {

namespace {

std::atomic<bool> is_batch_invariant{false};

/// What torch's own products of f32 go by: torch.set_float32_matmul_precision sets it, and
/// torch.backends.mkldnn.matmul.fp32_precision (or cuda's) by itself.
Precision precision_of_f32(c10::Device device) {
  if (f32_is_strict()) return Precision::kStrict;
  const auto backend = device.is_cuda() ? at::Float32Backend::CUDA : at::Float32Backend::MKLDNN;
  switch (at::globalContext().float32Precision(backend, at::Float32Op::MATMUL)) {
    case at::Float32Precision::BF16:
      return Precision::kMedium;
    case at::Float32Precision::TF32:
      return Precision::kHigh;
    default:
      return Precision::kHighest;
  }
}

RowsView transposed(const RowsView& view) {
  return {{}, view.data, view.columns, view.rows, view.column_stride, view.row_stride};
}

/// A product that is put together operand by operand.
struct Product {
  GemmDesc desc;
  GemmPointers at;

  /// A, and where there is a y, dz = dy y (1 - y) in its place.
  void set_a(const RowsView& a, const OptionalRows& y = std::nullopt) {
    desc.m = a.rows;
    desc.k = a.columns;
    desc.a_stride_m = a.row_stride;
    desc.a_stride_k = a.column_stride;
    at.a = a.data;
    if (!y.has_value()) return;
    desc.prologue = Activation::kSigmoid;
    desc.saved_stride_m = y->row_stride;
    desc.saved_stride_k = y->column_stride;
    at.saved = y->data;
  }

  RowsView a() const { return {{}, at.a, desc.m, desc.k, desc.a_stride_m, desc.a_stride_k}; }

  /// B, n columns of it, and D, contiguous.
  void set_b_and_d(const void* b, std::int64_t n, std::int64_t stride_k, std::int64_t stride_n,
                   void* d) {
    desc.n = n;
    desc.b_stride_k = stride_k;
    desc.b_stride_n = stride_n;
    desc.d_stride_m = n;
    at.b = b;
    at.d = d;
  }

  /// D times the sigmoid's gradient where its output is x, whose columns are contiguous.
  void set_epilogue_gradient(const RowsView& x) {
    desc.epilogue_gradient = Activation::kSigmoid;
    desc.d_saved_stride_m = x.row_stride;
    at.d_saved = x.data;
  }

  /// For a product whose rows are those of a batch.
  void set_whole_batch() { desc.whole_m = batch_invariant() ? GemmDesc::kAnyBatch : desc.m; }

  /// After all others.
  void set_dtype(DType dtype, c10::Device device) {
    desc.dtype = dtype;
    desc.precision = precision_for(dtype,
                                   static_cast<double>(desc.deciding_m()) *
                                       static_cast<double>(desc.n) * static_cast<double>(desc.k),
                                   device);
  }

  void run(c10::Device device) const {
    if constexpr (gpu::kIsBuilt) {
      if (device.is_cuda()) return gpu::gemm(desc, at, device);
    }
    cpu::gemm(desc, at, at_parallel_for());
  }
};

Product wgrad_of(const RowsView& dy, const OptionalRows& y, const OptionalRows& x, void* dw,
                 void* db, DType dtype, c10::Device device) {
  Product product;
  product.set_a(transposed(dy), y.has_value() ? OptionalRows(transposed(*y)) : std::nullopt);
  if (dw != nullptr) {
    product.set_b_and_d(x->data, x->columns, x->row_stride, x->column_stride, dw);
  }
  product.desc.has_a_sum = db != nullptr;
  product.at.a_sum = db;
  product.set_dtype(dtype, device);
  return product;
}

/// Large bf16 products round dz as they pack it, so that it may as well be formed once: both
/// gradients of 256 to 2048 cubed took 2 to 3 % less time on Zen 4. Smaller ones may take it
/// unrounded, in strips; f32 gained nothing, and lost where memory is the limit. Undefined, and
/// nothing done, where both products had better form it themselves.
at::Tensor form_dz(const RowsView& dy, const RowsView& y, std::int64_t in_features, DType dtype) {
  constexpr std::int64_t kLarge = 256;
  if (dtype != DType::kBFloat16 || batch_invariant() ||
      std::min({dy.rows, dy.columns, in_features}) < kLarge) {
    return {};
  }
  at::Tensor dz = empty_cpu({dy.rows, dy.columns}, at::kBFloat16);
  const auto* const dy_data = static_cast<const BFloat16*>(dy.data);
  const auto* const y_data = static_cast<const BFloat16*>(y.data);
  auto* const dz_data = static_cast<BFloat16*>(dz.mutable_data_ptr());
  constexpr double kElementTime = 0.1;  // nanoseconds
  const ParallelFor parallel_for = at_parallel_for();
  const std::int64_t grain =
      parallel_for.grain_for(dy.rows, static_cast<double>(dy.columns) * kElementTime);
  parallel_for(dy.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      cpu::activate_backward(Activation::kSigmoid, dtype, dy.columns, dy_data + i * dy.row_stride,
                             dy.column_stride, y_data + i * y.row_stride, y.column_stride,
                             dz_data + i * dy.columns, 1);
    }
  });
  return dz;
}

/// Both gradients of a long batch in blocks of rows, each of which forms dz once; else nothing is
/// done, and the result is false. For bf16 alone: see form_dz. Few features have so little dz that
/// blocks cost more (Zen 4: 10^6 x 3 → 2 lost 15 %, 10^5 x 8 → 8 gained 5).
bool run_in_blocks(const RowsView& dy, const RowsView& y, const RowsView& x,
                   const at::Tensor& weight, void* dx, void* dw, void* db) {
  constexpr std::int64_t kFewFeatures = 16;
  const DType dtype = dtype_of(weight);
  if (dtype != DType::kBFloat16 || batch_invariant() || x.columns + dy.columns < kFewFeatures) {
    return false;
  }
  const MlpLayerBackward layer{.in_features = x.columns,
                               .out_features = dy.columns,
                               .activation = Activation::kSigmoid,
                               .wants_before = true,
                               .weight = weight.const_data_ptr(),
                               .weight_stride_out = weight.stride(0),
                               .weight_stride_in = weight.stride(1),
                               .grad_weight = dw,
                               .grad_bias = db};
  return cpu::mlp_backward({.dtype = dtype,
                            .rows = dy.rows,
                            .grad_output = rows_of_batch(dy),
                            .output = rows_of_batch(y),
                            .input = rows_of_batch(x),
                            .layers = {&layer, 1},
                            .grad_input = dx},
                           at_parallel_for());
}

}  // namespace

bool f32_is_strict() {
  static const bool strict = [] {
    const char* value = std::getenv("NEURON_EXT_FP32");
    if (value == nullptr || *value == '\0') return false;
    if (std::string(value) == "strict") return true;
    throw std::invalid_argument("NEURON_EXT_FP32=" + std::string(value) +
                                ": strict is all it can be set to");
  }();
  return strict;
}

bool batch_invariant() { return is_batch_invariant.load(std::memory_order_relaxed); }
void set_batch_invariant(bool enabled) { is_batch_invariant = enabled; }

Precision precision_for(DType dtype, double work, c10::Device device) {
  // Below, nothing is gained by less precision, and asking for it takes time.
  constexpr double kAnyPrecision = 1 << 17;
  return dtype == DType::kFloat32 && work >= kAnyPrecision ? precision_of_f32(device)
                                                           : Precision::kHighest;
}

void fprop(Activation f, const RowsView& x, const at::Tensor& weight, const at::Tensor& bias,
           void* y, bool is_constant) {
  Product product;
  product.set_a(x);
  product.set_whole_batch();
  const auto strides = weight.strides();
  product.set_b_and_d(weight.const_data_ptr(), weight.sizes()[0], strides[1], strides[0], y);
  product.desc.epilogue = f;
  if (bias.defined()) {
    product.desc.has_bias = true;
    product.desc.bias_stride = bias_stride(bias);
    product.at.bias = bias.const_data_ptr();
  }
  const at::Tensor packed = is_constant ? packed_weight(weight, x.rows) : at::Tensor();
  if (packed.defined()) product.at.packed_b = packed.const_data_ptr();
  product.set_dtype(dtype_of(weight), weight.device());
  product.run(weight.device());
}

void dgrad(const RowsView& dy, const OptionalRows& y, const at::Tensor& weight, void* dx,
           const OptionalRows& x) {
  Product product;
  product.set_a(dy, y);
  product.set_whole_batch();
  const auto strides = weight.strides();
  product.set_b_and_d(weight.const_data_ptr(), weight.sizes()[1], strides[0], strides[1], dx);
  if (x.has_value()) product.set_epilogue_gradient(*x);
  product.set_dtype(dtype_of(weight), weight.device());
  product.run(weight.device());
}

void wgrad(const RowsView& dy, const OptionalRows& y, const OptionalRows& x, void* dw, void* db,
           DType dtype, c10::Device device) {
  wgrad_of(dy, y, x, dw, db, dtype, device).run(device);
}

bool sums_db_apart(const RowsView& dz, const OptionalRows& x, void* dw, void* db, DType dtype,
                   c10::Device device) {
  if constexpr (gpu::kIsBuilt) {
    const Product product = wgrad_of(dz, std::nullopt, x, dw, db, dtype, device);
    return device.is_cuda() && gpu::sums_a_apart(product.desc, product.at, device);
  }
  return false;
}

void dgrad_and_wgrad(const RowsView& dy, const OptionalRows& y, const OptionalRows& x,
                     const at::Tensor& weight, void* dx, void* dw, void* db) {
  const c10::Device device = weight.device();
  Product wgrad = wgrad_of(dy, y, x, dw, db, dtype_of(weight), device);
  at::Tensor dz;  // its memory
  if constexpr (gpu::kIsBuilt) {
    if (device.is_cuda()) dz = gpu::form_a(wgrad.desc, wgrad.at, device);
  }
  if (device.is_cpu() && y.has_value() && dw != nullptr) {
    if (run_in_blocks(dy, *y, *x, weight, dx, dw, db)) return;
    dz = form_dz(dy, *y, x->columns, dtype_of(weight));
    if (dz.defined()) {
      const RowsView rows{{}, dz.const_data_ptr(), dy.rows, dy.columns, dy.columns, 1};
      wgrad = wgrad_of(rows, std::nullopt, x, dw, db, dtype_of(weight), device);
    }
  }
  if (dz.defined()) {
    dgrad(transposed(wgrad.a()), std::nullopt, weight, dx);
  } else {
    dgrad(dy, y, weight, dx);
  }
  wgrad.run(device);
}

}  // namespace neuron_ext
