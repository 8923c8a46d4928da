// The kernels that take stacks of narrow layers as a whole. Host code only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

inline constexpr int kWidestLayer = 128;  // in and out; of f64, 64

// In one kernel: its parameters may be 4 KiB.
inline constexpr int kMostLayers = 32;

/// A stack as kernels get it: an Mlp, the last of whose layers has an output. A layer's output_sum
/// has a place for the sums of each MlpKernel::sum_rows rows: (blocks of rows, out_features), in
/// the type of sums.
struct Stack {
  std::int64_t rows;
  const void* input;
  std::int64_t stride_row, stride_column;
  int depth, widest;  // layers; in or out features of them all
  Precision precision;
  MlpLayer layers[kMostLayers];
};
static_assert(sizeof(Stack) <= 4096 - 64);

/// Whether layers multiply by the gradients of saved outputs.
inline bool has_gradients(const Stack& stack) {
  return std::any_of(stack.layers, stack.layers + stack.depth,
                     [](const MlpLayer& layer) { return layer.saved != nullptr; });
}

/// What the tensor cores' kernels get.
struct StackLaunch {
  Stack stack;
  int tiles;         // of a kernel's rows: in an int, since there is no memory for 2^36 rows
  bool is_resident;  // all weights are in shared memory
};

struct MlpKernel {
  const char* name;
  std::span<const DType> dtypes;
  int lowest_sm, highest_sm;
  bool takes_strict;  // Precision::kStrict
  int sum_rows;       // whose outputs have a sum in Stack
  /// Returns a cudaError_t.
  int (*run)(const Stack& stack, DType dtype, const Device& device, Stream stream);
};

extern const MlpKernel mlp_sm90_f32;  // by tensor cores, from parts in bf16
extern const MlpKernel mlp_sm80;      // by tensor cores: bf16 and f16
extern const MlpKernel mlp_simt;  // by multiply-adds: the bits that gemm_simt gives layer by layer

inline constexpr const MlpKernel* kMlpKernels[] = {&mlp_sm90_f32, &mlp_sm80, &mlp_simt};

}  // namespace neuron_ext::cuda
