// The CUDA kernels' public face: torch-free, and without CUDA's headers, so that a caller can be
// compiled where there are none.
//
// Every function launches on `stream`, a stream of the current device, and returns at once: it
// allocates nothing, waits for nothing and so can be captured in a CUDA graph. All memory is the
// device's. Results are bitwise the same from run to run.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "neuron_ext/activation.h"
#include "neuron_ext/gemm.h"
#include "neuron_ext/mlp.h"
#include "neuron_ext/types.h"

namespace neuron_ext::cuda {

/// A cudaStream_t.
using Stream = void*;

inline constexpr int kLowestSm = 80;  // older GPUs have no kernels

/// What the choice of a kernel depends on besides the problem.
struct Device {
  int sm = 0;        // compute capability as in sm_90: 90
  int sm_count = 0;  // streaming multiprocessors
};

/// How a call ended. A kernel runs later than its call: an error is one of preparing or launching
/// it, or left behind by an earlier kernel.
struct [[nodiscard]] Status {
  int error = 0;            // a cudaError_t; 0 is success
  const char* kernel = "";  // the one that was to run

  bool ok() const { return error == 0; }
};

/// CUDA's words for Status::error.
const char* error_text(int error);

/// Fills in `device` for the GPU of this number.
Status query_device(int ordinal, Device& device);

// ---- what there is and what ran -----------------------------------------------------------------

struct KernelInfo {
  std::string name;  // e.g. "gemm_nt_bf16_128x256x64_s4_sm90a"
  std::vector<DType> dtypes;
  int lowest_sm, highest_sm;  // the compute capabilities that run it
};

std::vector<KernelInfo> kernels();  // in the order in which they're tried; see also last_kernel.h

// ---- matrix products ----------------------------------------------------------------------------

/// Bytes of scratch memory that gemm() with the same arguments needs, which may be none. Its
/// content needs no preparation, and it may be reused as soon as the stream has come past the call.
std::size_t gemm_workspace(const GemmDesc& desc, const GemmPointers& at, const Device& device);

/// See GemmDesc; unless desc.is_valid(), the error is cudaErrorInvalidValue. `workspace` is aligned
/// to 256 bytes; null where gemm_workspace() is 0.
Status gemm(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device& device,
            Stream stream);

/// Whether gemm() would read A by itself to form a_sum, rather than as it multiplies. Where A is
/// the D of a product with an epilogue gradient, that one's d_sum costs less.
bool sums_a_apart(const GemmDesc& desc, const GemmPointers& at, const Device& device);

// ---- the first operand by itself ----------------------------------------------------------------

/// Whether gemm() would write A' to its workspace before it multiplies. If form_a() does so
/// instead, other products can take the same A': so dgrad and wgrad share dz.
bool forms_a(const GemmDesc& desc, const GemmPointers& at, const Device& device);

/// Bytes of memory, aligned to 256 bytes, for form_a().
std::size_t form_a_memory(const GemmDesc& desc);

/// Writes a_sum, and A' to `memory`, rounded to the dtype. `desc` and `at` become those of the
/// product that is left.
Status form_a(GemmDesc& desc, GemmPointers& at, void* memory, Stream stream);

// ---- stacks of layers ---------------------------------------------------------------------------

/// As gemm_workspace(), for mlp() with the same arguments.
std::size_t mlp_workspace(const Mlp& mlp, const Device& device);

/// The layers one after the other, narrow ones that follow each other in one kernel. A row's bits
/// are the same in every batch that goes through the same kernels, and whichever outputs are kept.
Status mlp(const Mlp& mlp, void* workspace, const Device& device, Stream stream);

// ---- elementwise --------------------------------------------------------------------------------

inline constexpr int kMaxRank = 8;
using Dims = std::array<std::int64_t, kMaxRank>;

/// Elements of tensors of the same sizes, dimension 0 the innermost. Strides are in elements and
/// may be 0 (not the output's). What is contiguous, or merely dense and in the same order
/// everywhere, is one dimension of stride 1: the caller merges dimensions that can be. Any size may
/// be 0.
struct ElementwiseDesc {
  Activation f = Activation::kIdentity;
  DType dtype = DType::kFloat32;
  int rank = 1;
  Dims sizes{};
  Dims in_strides{};     // of x, or of dy
  Dims saved_strides{};  // of the backward's saved output
  Dims out_strides{};    // of y, or of dx
};

/// y = f(x), element by element; an element's result depends on its value alone.
Status activate(const ElementwiseDesc& desc, const void* x, void* y, const Device& device,
                Stream stream);

/// dx = dy f'(at saved), where saved is f's output (all activations here need their output). dx may
/// be dy, of the same strides.
Status activate_backward(const ElementwiseDesc& desc, const void* dy, const void* saved, void* dx,
                         const Device& device, Stream stream);

}  // namespace neuron_ext::cuda
