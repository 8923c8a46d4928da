// The emulated kernels as a shared library: the functions of neuron_ext/cuda.h, on ordinary memory,
// and C functions for ctypes.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "control.h"
#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

// In the place of csrc/cuda/device.cu.
const char* error_text(int) { return emulator::last_error().c_str(); }

namespace {
Device emulated_device = {90, 3};
}

Status query_device(int, Device& device) {
  device = emulated_device;
  return {};
}

/// The GPU that is emulated from now on, as in Device::sm.
void set_sm(int sm) { emulated_device.sm = sm; }

}  // namespace neuron_ext::cuda

using namespace neuron_ext;

extern "C" {

/// What was wrong with the last call that returned an error.
const char* neuron_ext_error() { return emulator::last_error().c_str(); }

void neuron_ext_set(int order, bool late_copies, bool late_products, int approximation, int sm,
                    unsigned seed) {
  cuda::set_sm(sm);
  emulator::settings() = {static_cast<emulator::Order>(order), late_copies, late_products,
                          approximation, seed};
}

/// GemmDesc and GemmPointers, as they are for ctypes: sizes m, n, k; strides of A (m, k), B (k, n),
/// D (m), the bias, and the saved output (m, k). A null bias, saved or a_sum isn't asked for.
int neuron_ext_gemm(int dtype, const std::int64_t* sizes, const std::int64_t* strides,
                    bool applies_sigmoid, const void* a, const void* b, const void* bias,
                    const void* saved, void* d, void* a_sum) {
  GemmDesc desc;
  desc.dtype = static_cast<DType>(dtype);
  desc.m = sizes[0], desc.n = sizes[1], desc.k = sizes[2];
  desc.a_stride_m = strides[0], desc.a_stride_k = strides[1];
  desc.b_stride_k = strides[2], desc.b_stride_n = strides[3];
  desc.d_stride_m = strides[4];
  desc.has_bias = bias != nullptr;
  desc.bias_stride = strides[5];
  desc.saved_stride_m = strides[6], desc.saved_stride_k = strides[7];
  if (applies_sigmoid) desc.epilogue = Activation::kSigmoid;
  if (saved != nullptr) desc.prologue = Activation::kSigmoid;
  desc.has_a_sum = a_sum != nullptr;
  GemmPointers at;
  at.a = a, at.b = b, at.bias = bias, at.saved = saved, at.d = d, at.a_sum = a_sum;
  cuda::Device device;
  if (!cuda::query_device(0, device).ok()) return 1;
  std::vector<std::byte> workspace(cuda::gemm_workspace(desc, at, device));
  return cuda::gemm(desc, at, workspace.data(), device, nullptr).error;
}

/// Mlp, of so many layers: rows and the features before, between and after layers; strides of the
/// input (row, column), then of each layer its weight's (out, in) and its bias's. A null bias or
/// saved output isn't there, a null output isn't kept, and null sums aren't formed.
int neuron_ext_mlp(int dtype, int depth, const std::int64_t* sizes, const std::int64_t* strides,
                   bool ends_in_sigmoid, const void* input, const void* const* weights,
                   const void* const* biases, const void* const* saved, void* const* outputs,
                   void* const* output_sums) {
  std::vector<MlpLayer> layers(static_cast<std::size_t>(depth));
  for (int i = 0; i < depth; ++i) {
    const std::int64_t* const stride = strides + 2 + 3 * i;
    layers[i] = {.in_features = sizes[1 + i],
                 .out_features = sizes[2 + i],
                 .activation = i + 1 < depth || ends_in_sigmoid ? Activation::kSigmoid
                                                                : Activation::kIdentity,
                 .weight = weights[i],
                 .weight_stride_out = stride[0],
                 .weight_stride_in = stride[1],
                 .bias = biases[i],
                 .bias_stride = stride[2],
                 .saved = saved[i],
                 .output = outputs[i],
                 .output_sum = output_sums[i]};
  }
  const Mlp mlp{.dtype = static_cast<DType>(dtype),
                .rows = sizes[0],
                .input = input,
                .input_stride_row = strides[0],
                .input_stride_column = strides[1],
                .layers = layers};
  cuda::Device device;
  if (!cuda::query_device(0, device).ok()) return 1;
  std::vector<std::byte> workspace(cuda::mlp_workspace(mlp, device));
  return cuda::mlp(mlp, workspace.data(), device, nullptr).error;
}

/// ElementwiseDesc: the sigmoid, or, where `saved` isn't null, its gradient.
int neuron_ext_sigmoid(int dtype, int rank, const std::int64_t* sizes,
                       const std::int64_t* in_strides, const std::int64_t* saved_strides,
                       const std::int64_t* out_strides, const void* in, const void* saved,
                       void* out) {
  cuda::ElementwiseDesc desc;
  desc.f = Activation::kSigmoid;
  desc.dtype = static_cast<DType>(dtype);
  desc.rank = rank;
  std::copy_n(sizes, rank, desc.sizes.begin());
  std::copy_n(in_strides, rank, desc.in_strides.begin());
  std::copy_n(saved_strides, rank, desc.saved_strides.begin());
  std::copy_n(out_strides, rank, desc.out_strides.begin());
  cuda::Device device;
  if (!cuda::query_device(0, device).ok()) return 1;
  return (saved == nullptr ? cuda::activate(desc, in, out, device, nullptr)
                           : cuda::activate_backward(desc, in, saved, out, device, nullptr))
      .error;
}

}  // extern "C"
