#include "neuron_ext/cpu.h"
#include "reference.h"

namespace neuron_ext::cpu {

std::vector<KernelInfo> kernels() {
  return {{"gemm_reference", Isa::kPortable,
           {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}, true}};
}
namespace { thread_local const char* last = ""; }
const char* last_kernel() { return last; }

void gemm(const GemmDesc& desc, const GemmPointers& at, const ParallelFor&) {
  last = "gemm_reference";
  const ReferenceGemm r = reference_gemm(desc, at);
  for (std::int64_t i = 0; i < desc.m; ++i) {
    for (std::int64_t j = 0; j < desc.n; ++j)
      reference_store(desc.dtype, at.d, i * desc.d_stride_m + j, r.d[i * desc.n + j]);
    if (desc.has_a_sum) reference_store(desc.dtype, at.a_sum, i, r.a_sum[i]);
  }
}

void activate(Activation f, DType dtype, std::int64_t n, const void* x, std::int64_t x_stride, void* y,
              std::int64_t y_stride) {
  for (std::int64_t i = 0; i < n; ++i)
    reference_store(dtype, y, i * y_stride, reference_activate(f, reference_load(dtype, x, i * x_stride)));
}

void activate_backward(Activation f, DType dtype, std::int64_t n, const void* dy,
                       std::int64_t dy_stride, const void* saved, std::int64_t saved_stride, void* dx,
                       std::int64_t dx_stride) {
  for (std::int64_t i = 0; i < n; ++i)
    reference_store(dtype, dx, i * dx_stride,
                    reference_activate_backward(f, reference_load(dtype, dy, i * dy_stride),
                                                reference_load(dtype, saved, i * saved_stride)));
}
}  // namespace neuron_ext::cpu
