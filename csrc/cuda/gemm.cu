// The CUDA matrix product, START HERE: which kernel is chosen. What the kernels do is in the
// gemm_*.cu files, one for each kind of GPU, and in gemv.cu.
#include <algorithm>
#include <iterator>

#include "gemm_config.h"
#include "mlp_kernels.h"
#include "neuron_ext/last_kernel.h"
#include "neuron_ext/log.h"
#include "prologue.h"

namespace neuron_ext::cuda {
namespace {

/// In the order in which they're tried; the last one takes everything.
constexpr const GemmKernel* kKernels[] = {
    &gemv, &gemm_narrow, &gemm_sm90, &gemm_sm90_f32, &gemm_sm80, &gemm_simt,
};

const GemmKernel& choose(const GemmDesc& desc, const GemmPointers& at, const Device& device) {
  for (const GemmKernel* kernel : kKernels) {
    if (kernel->lowest_sm <= device.sm && device.sm <= kernel->highest_sm &&
        std::ranges::find(kernel->dtypes, desc.dtype) != kernel->dtypes.end() &&
        kernel->accepts(desc, at, device)) {
      return *kernel;
    }
  }
  return *std::end(kKernels)[-1];
}

/// The epilogue gradient as a pass of its own, for a row whose product comes without.
int multiply_by_gradient(const GemmDesc& desc, const GemmPointers& at, const Device& device,
                         Stream stream) {
  const bool is_contiguous = desc.d_stride_m == desc.n && desc.d_saved_stride_m == desc.n;
  ElementwiseDesc pass;
  pass.f = desc.epilogue_gradient;
  pass.dtype = desc.dtype;
  pass.rank = is_contiguous ? 1 : 2;
  pass.sizes = {is_contiguous ? desc.m * desc.n : desc.n, desc.m};
  pass.in_strides = pass.out_strides = {1, desc.d_stride_m};
  pass.saved_strides = {1, desc.d_saved_stride_m};
  return activate_backward(pass, at.d, at.d_saved, at.d, device, stream).error;
}

/// The row's product, D complete.
int run_product(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                void* workspace, const Device& device, Stream stream) {
  if (!desc.has_epilogue_gradient() || kernel.takes_epilogue_gradient) {
    return kernel.run(desc, at, workspace, device, stream);
  }
  GemmDesc product = desc;
  product.epilogue_gradient = Activation::kIdentity;
  const int error = kernel.run(product, at, workspace, device, stream);
  return error != 0 ? error : multiply_by_gradient(desc, at, device, stream);
}

/// Blocks of D's rows whose sums the row forms; 0 where it forms none, or has D not complete.
std::int64_t sum_blocks(const GemmKernel& kernel, const GemmDesc& desc) {
  if (!kernel.takes_epilogue_gradient || kernel.d_sum_rows == nullptr) return 0;
  const std::int64_t rows = kernel.d_sum_rows(desc);
  return rows == 0 ? 0 : divide_up(desc.m, rows);
}

/// The sums of D's columns as those of an A's rows.
GemmDesc sums_of_d(const GemmDesc& desc) {
  GemmDesc sums;
  sums.m = desc.n;
  sums.k = desc.m;
  sums.dtype = desc.dtype;
  sums.a_stride_m = 1;
  sums.a_stride_k = desc.d_stride_m;
  sums.has_a_sum = true;
  return sums;
}

bool is_empty(const GemmDesc& desc) {
  return (desc.m == 0 && !desc.has_d_sum) || (desc.n == 0 && !desc.has_a_sum);
}

}  // namespace

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> infos;
  const auto add = [&](const auto& kernel) {
    infos.push_back({kernel.name,
                     {kernel.dtypes.begin(), kernel.dtypes.end()},
                     kernel.lowest_sm,
                     kernel.highest_sm});
  };
  for (const GemmKernel* kernel : kKernels) add(*kernel);
  for (const MlpKernel* kernel : kMlpKernels) add(*kernel);
  return infos;
}

std::size_t row_workspace(const GemmKernel& kernel, const GemmDesc& desc, const Device& device) {
  const std::size_t product = kernel.workspace(desc, device);
  if (!desc.has_d_sum || desc.n == 0) return product;
  const std::int64_t blocks = sum_blocks(kernel, desc);
  return aligned(product) + (blocks == 0 && desc.m > 0
                                 ? prologue_workspace(sums_of_d(desc))
                                 : column_sums_workspace(desc.dtype, blocks, desc.n));
}

int run_row(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at, void* workspace,
            const Device& device, Stream stream) {
  if (!desc.has_d_sum || desc.n == 0) {
    return run_product(kernel, desc, at, workspace, device, stream);
  }
  const std::int64_t blocks = sum_blocks(kernel, desc);
  void* const sums = static_cast<std::byte*>(workspace) + aligned(kernel.workspace(desc, device));
  GemmDesc product = desc;
  GemmPointers product_at = at;
  product.has_d_sum = blocks > 0;
  product_at.d_sum = sums;
  const int error =
      desc.m == 0 ? 0 : run_product(kernel, product, product_at, workspace, device, stream);
  if (error != 0) return error;
  if (blocks == 0 && desc.m > 0) {
    GemmDesc of_d = sums_of_d(desc);
    GemmPointers at_d{.a = at.d, .a_sum = at.d_sum};
    return run_prologue(of_d, at_d, sums, stream);
  }
  return add_column_sums(desc.dtype, blocks, desc.n, sums, at.d_sum, stream);
}

std::size_t gemm_workspace(const GemmDesc& desc, const GemmPointers& at, const Device& device) {
  return is_empty(desc) ? 0 : row_workspace(choose(desc, at, device), desc, device);
}

Status gemm(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device& device,
            Stream stream) {
  if (is_empty(desc)) return {};
  const GemmKernel& kernel = choose(desc, at, device);
  constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
  if (!desc.is_valid() || desc.adds) return {kInvalidValue, kernel.name};
  if (log_is_on()) log_choice(kernel.name, desc);
  const int error = run_row(kernel, desc, at, workspace, device, stream);
  last_kernel() = kernel.name;
  return {error, kernel.name};
}

bool sums_a_apart(const GemmDesc& desc, const GemmPointers& at, const Device& device) {
  return desc.has_a_sum && !is_empty(desc) && choose(desc, at, device).forms_a;
}

bool forms_a(const GemmDesc& desc, const GemmPointers& at, const Device& device) {
  return desc.prologue != Activation::kIdentity && !is_empty(desc) &&
         choose(desc, at, device).forms_a;
}

std::size_t form_a_memory(const GemmDesc& desc) { return prologue_workspace(desc); }

Status form_a(GemmDesc& desc, GemmPointers& at, void* memory, Stream stream) {
  return {run_prologue(desc, at, memory, stream), "prologue"};
}

}  // namespace neuron_ext::cuda
