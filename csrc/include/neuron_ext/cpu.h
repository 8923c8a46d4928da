// The CPU kernels' public face: torch-free, exception types are those of <stdexcept>.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "neuron_ext/activation.h"
#include "neuron_ext/gemm.h"
#include "neuron_ext/mlp.h"
#include "neuron_ext/parallel.h"
#include "neuron_ext/types.h"

namespace neuron_ext::cpu {

// ---- instruction sets ---------------------------------------------------------------------------

/// In order of preference, worst first: an ISA's rows may be used on a machine that has it and
/// whatever stands before it.
enum class Isa : std::uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* name_of(Isa isa);  // "portable", "avx2", "avx512", "avx512_bf16", "amx"
std::optional<Isa> parse_isa(std::string_view name);  // the inverse; nullopt for anything else
std::vector<Isa> supported_isas();                    // what this CPU and operating system can run

/// The best ISA whose kernels may be chosen now. At first: NEURON_EXT_CPU_ISA if set, else the best
/// supported. Throws std::invalid_argument when that variable names no ISA or one this CPU can't
/// run.
Isa active_isa();

/// For the whole process, at once, for calls that start afterwards.
/// Throws std::invalid_argument when this CPU can't run it.
void set_active_isa(Isa isa);

// ---- what there is and what ran -----------------------------------------------------------------

struct KernelInfo {
  std::string name;  // e.g. "gemm_f32_14x32_avx512"
  Isa isa;
  std::vector<DType> dtypes;
  bool runnable;  // this CPU has the ISA
};

std::vector<KernelInfo> kernels();  // in the order in which they're tried; see also last_kernel.h

// ---- kernels ------------------------------------------------------------------------------------

struct GemmKernel;  // a row of the table

/// See GemmDesc. Bitwise the same result for any ParallelFor. Throws std::invalid_argument unless
/// desc.is_valid().
void gemm(const GemmDesc& desc, const GemmPointers& at, const ParallelFor& parallel_for);

/// B in the form in which a kernel reads it, for a B that many products share.
struct Packing {
  const GemmKernel* kernel;
  std::int64_t bytes;
};

/// How the B of this product would be packed, by the best kernel that packs it. Of `desc`, only n,
/// k, b's strides, the dtype, the precision and, for the choice of the kernel, m matter.
Packing packing_of(const GemmDesc& desc);

/// Packs b into `packed`, of packing.bytes and aligned to a cache line, for GemmPointers::packed_b.
void pack_b(const Packing& packing, const GemmDesc& desc, const void* b, void* packed,
            const ParallelFor& parallel_for);

/// The layers one after the other. Bitwise the same result for any ParallelFor, and as from a call
/// of gemm for each layer.
void mlp_forward(const Mlp& mlp, const ParallelFor& parallel_for);

/// All gradients of a stack, where a long batch is better taken through it in blocks of rows; else
/// nothing is done, and the result is false: the layers' products are better called one by one.
/// Bitwise the same for any ParallelFor. grad_input has the bits that those products give, of bf16
/// those that they give if the last layer's dz is formed, and so rounded, before them.
bool mlp_backward(const MlpBackward& mlp, const ParallelFor& parallel_for);

/// Of a batch of so many rows or fewer it does nothing; its description needn't be made.
constexpr std::int64_t kShortBatch = 7 * 1024;

/// y[i] = f(x[i]) for i < n on the calling thread; strides in elements. An element's result depends
/// on its value alone, not on its place or on n. x and y may be the same memory with the same
/// stride.
void activate(Activation f, DType dtype, std::int64_t n, const void* x, std::int64_t x_stride,
              void* y, std::int64_t y_stride);

/// dx[i] = dy[i] f'(at saved[i]), where saved is f's output (all activations here need their
/// output).
void activate_backward(Activation f, DType dtype, std::int64_t n, const void* dy,
                       std::int64_t dy_stride, const void* saved, std::int64_t saved_stride,
                       void* dx, std::int64_t dx_stride);

}  // namespace neuron_ext::cpu
