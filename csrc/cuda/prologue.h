// A product's prologue and its sums of A's rows as a step of their own, for kernels whose operands
// go from global memory to the tensor cores as they are; and the last step of sums of D's columns.
// Host code only.
#pragma once

#include <cstddef>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

/// Bytes that run_prologue wants.
std::size_t prologue_workspace(const GemmDesc& desc);

/// Writes a_sum, and, where there is a prologue, A' to the workspace, rounded to the dtype, with
/// rows (or columns, whichever of A's are closer together) that are contiguous and begin at
/// multiples of 16 bytes. `desc` and `at` become those of the product that is left.
int run_prologue(GemmDesc& desc, GemmPointers& at, void* workspace, Stream stream);

/// Bytes for the sums of so many blocks of rows, and for what add_column_sums makes of them.
std::size_t column_sums_workspace(DType dtype, std::int64_t blocks, std::int64_t columns);

/// sums[j], of the dtype, from those of blocks of rows that the workspace begins with: (blocks,
/// columns), in the type of sums.
int add_column_sums(DType dtype, std::int64_t blocks, std::int64_t columns, void* workspace,
                    void* sums, Stream stream);

}  // namespace neuron_ext::cuda
