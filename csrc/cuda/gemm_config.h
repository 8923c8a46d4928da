// The CUDA matrix products as rows of data. Host code only: nothing here needs a compiler for GPUs.
#pragma once

#include <cstddef>
#include <span>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

inline std::int64_t divide_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

/// What workspaces, and their parts that kernels read by vectors, begin at multiples of.
inline constexpr std::size_t kAlignment = 256;
inline std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct GemmKernel {
  const char* name;
  std::span<const DType> dtypes;
  int lowest_sm, highest_sm;
  /// Beyond dtype and device, which the choice has compared by then: layout, size, alignment.
  bool (*accepts)(const GemmDesc& desc, const GemmPointers& at, const Device& device);
  std::size_t (*workspace)(const GemmDesc& desc, const Device& device);  // bytes
  /// Returns a cudaError_t: that of what it launched.
  int (*run)(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device& device,
             Stream stream);
  bool forms_a = false;  // calls run_prologue (prologue.h), rather than form A' as it reads A
  /// Whether run() multiplies by an epilogue gradient; else run_row does so, in a pass over D.
  bool takes_epilogue_gradient = false;
  /// For each so many rows of D, run() writes the sums of its columns, as they were stored, to
  /// at.d_sum: (blocks of rows, n), in the type of sums. 0, or null: it doesn't, and run_row reads
  /// D once more.
  std::int64_t (*d_sum_rows)(const GemmDesc& desc) = nullptr;
};

extern const GemmKernel gemv;
extern const GemmKernel gemm_narrow;
extern const GemmKernel gemm_sm90;
extern const GemmKernel gemm_sm90_f32;
extern const GemmKernel gemm_sm80;
extern const GemmKernel gemm_simt;

/// A row's product, and what the row leaves of it, in a workspace of so many bytes.
std::size_t row_workspace(const GemmKernel& kernel, const GemmDesc& desc, const Device& device);
int run_row(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at, void* workspace,
            const Device& device, Stream stream);

/// What another kernel couldn't compute: the elements of D that come from blocks of A or B,
/// kFlagBlock rows (or columns) by as many k, of which one has a flag other than 0.
inline constexpr int kFlagBlock = 64;
struct Flags {
  const std::uint32_t *a = nullptr, *b = nullptr;  // (block of m or n, block of k)
  std::int64_t blocks_k = 0;
};

/// gemm_simt's product where there are flags, of a product without prologue and a_sum. Of at.d_sum,
/// which has sums of kFlagBlock rows, those that such an element is part of are written again.
int run_simt_where(const GemmDesc& desc, const GemmPointers& at, const Flags& flags, Stream stream);

}  // namespace neuron_ext::cuda
