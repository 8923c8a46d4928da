// Calls on a GPU: the kernels of neuron_ext/cuda.h on torch's current stream, with scratch memory
// of torch's allocator. Needs no CUDA header. Without NEURON_EXT_WITH_CUDA nothing here is defined,
// and nothing of it is called.
#pragma once

#include <ATen/core/Tensor.h>

#include "neuron_ext/cuda.h"
#include "neuron_ext/gemm.h"
#include "neuron_ext/mlp.h"

namespace neuron_ext::gpu {

#ifdef NEURON_EXT_WITH_CUDA
inline constexpr bool kIsBuilt = true;
#else
inline constexpr bool kIsBuilt = false;
#endif

/// Whether the kernels run on this GPU. One that can't be asked, since it's that of a fake tensor
/// on a machine without any, counts as one that does.
bool has_kernels(c10::Device gpu);

/// Whether one of the GPUs here has a compute capability of these.
bool is_runnable(int lowest_sm, int highest_sm);

/// See GemmDesc; the addresses are those of tensors on `gpu`.
void gemm(const GemmDesc& desc, const GemmPointers& at, c10::Device gpu);

/// See cuda.h.
bool sums_a_apart(const GemmDesc& desc, const GemmPointers& at, c10::Device gpu);

/// See Mlp; likewise.
void mlp(const Mlp& mlp, c10::Device gpu);

/// Forms A' of a product by itself, with a_sum, in memory that the result holds; what is left is a
/// product of it. Undefined, and nothing done, where gemm() forms A' as it reads A.
at::Tensor form_a(GemmDesc& desc, GemmPointers& at, c10::Device gpu);

/// Whether the following take a tensor of so many dimensions.
inline bool takes_rank(const at::Tensor& t) { return t.dim() <= cuda::kMaxRank; }

/// y = f(x), and dx = dy f'(at saved). The tensors have the same sizes, y and dx no overlap.
void activate(Activation f, const at::Tensor& x, const at::Tensor& y);
void activate_backward(Activation f, const at::Tensor& dy, const at::Tensor& saved,
                       const at::Tensor& dx);

}  // namespace neuron_ext::gpu
