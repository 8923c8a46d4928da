// Stacks of layers, START HERE: which layers go through one kernel. Between narrow ones nothing
// leaves the multiprocessor, so that what a stack of them reads and writes is its input and its
// output, and what is to be kept.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "gemm_config.h"
#include "mlp_kernels.h"
#include "neuron_ext/last_kernel.h"
#include "neuron_ext/log.h"
#include "prologue.h"

namespace neuron_ext::cuda {
namespace {

std::int64_t width_of(const MlpLayer& layer) {
  return std::max(layer.in_features, layer.out_features);
}

const MlpKernel& kernel_for(const Mlp& mlp, const Device& device) {
  return **std::ranges::find_if(kMlpKernels, [&](const MlpKernel* kernel) {
    return std::ranges::find(kernel->dtypes, mlp.dtype) != kernel->dtypes.end() &&
           kernel->lowest_sm <= device.sm && device.sm <= kernel->highest_sm &&
           (mlp.precision != Precision::kStrict || kernel->takes_strict);
  });
}

/// The widest layer to go together with others. Where a tensor core takes a layer by itself, but
/// not the stack, it makes up from there on for what the layers then read and write.
std::int64_t widest_layer(const Mlp& mlp, const Device& device) {
  const bool is_tf32 = mlp.dtype == DType::kFloat32 && mlp.precision > Precision::kHighest;
  const bool layers_have_tensor_cores = mlp.dtype == DType::kFloat64 || is_tf32;
  return &kernel_for(mlp, device) == &mlp_simt && layers_have_tensor_cores ? 64 : kWidestLayer;
}

/// How many layers go together, the first of these and those after it.
std::size_t layers_of_step(std::span<const MlpLayer> layers, std::int64_t widest) {
  const std::size_t most = std::min<std::size_t>(layers.size(), kMostLayers);
  const auto is_wide = [&](const MlpLayer& layer) { return width_of(layer) > widest; };
  const auto wide = std::ranges::find_if(layers.first(most), is_wide);
  return std::max<std::size_t>(1, static_cast<std::size_t>(wide - layers.begin()));
}

/// For the widest output that is between two steps and that no layer keeps.
std::size_t passing_bytes(const Mlp& mlp, const Device& device) {
  const std::int64_t widest_together = widest_layer(mlp, device);
  std::int64_t widest = 0;
  auto layers = mlp.layers;
  for (std::size_t count; (count = layers_of_step(layers, widest_together)) < layers.size();
       layers = layers.subspan(count)) {
    const MlpLayer& last = layers[count - 1];
    if (last.output == nullptr) widest = std::max(widest, last.out_features);
  }
  return aligned(static_cast<std::size_t>(mlp.rows * widest * size_of(mlp.dtype)));
}

/// Calls f(part, output) for the steps in order: a stack of layers that go together, and where the
/// last one's output belongs. Outputs that pass take turns in two places at `passing`.
template <class F>
void for_each_step(const Mlp& mlp, const Device& device, std::byte* passing, const F& f) {
  const std::size_t bytes = passing_bytes(mlp, device);
  Mlp part = mlp;
  auto rest = mlp.layers;
  for (std::size_t turn = 0; !rest.empty(); ++turn) {
    part.layers = rest.first(layers_of_step(rest, widest_layer(mlp, device)));
    rest = rest.subspan(part.layers.size());
    const MlpLayer& last = part.layers.back();
    void* const output = last.output == nullptr ? passing + turn % 2 * bytes : last.output;
    f(part, output);
    part.input = output;
    part.input_stride_row = last.out_features;
    part.input_stride_column = 1;
  }
}

GemmPointers pointers_of(const Mlp& part, void* output) {
  GemmPointers at;
  at.a = part.input;
  at.b = part.layers[0].weight;
  at.bias = part.layers[0].bias;
  at.d_saved = part.layers[0].saved;
  at.d = output;
  at.d_sum = part.layers[0].output_sum;
  return at;
}

/// Blocks of rows of which a kernel gives the sums of a layer's output.
std::int64_t sum_blocks(const Mlp& part, const Device& device) {
  return divide_up(part.rows, kernel_for(part, device).sum_rows);
}

/// For those sums.
std::size_t sum_bytes(const Mlp& part, const MlpLayer& layer, const Device& device) {
  return layer.output_sum == nullptr
             ? 0
             : aligned(
                   column_sums_workspace(part.dtype, sum_blocks(part, device), layer.out_features));
}

Status run_together(const Mlp& part, void* output, std::byte* workspace, const Device& device,
                    Stream stream) {
  const MlpKernel& kernel = kernel_for(part, device);
  last_kernel() = kernel.name;
  if (log_is_on()) {
    for (const MlpLayer& layer : part.layers) log_choice(kernel.name, product_of(part, layer));
  }
  Stack stack = {};
  stack.rows = part.rows;
  stack.input = part.input;
  stack.stride_row = part.input_stride_row;
  stack.stride_column = part.input_stride_column;
  stack.depth = static_cast<int>(part.layers.size());
  stack.widest = static_cast<int>(width_of(*std::ranges::max_element(part.layers, {}, width_of)));
  stack.precision = part.precision;
  std::ranges::copy(part.layers, stack.layers);
  stack.layers[stack.depth - 1].output = output;
  std::byte* sums = workspace;
  for (MlpLayer& layer : std::span(stack.layers).first(part.layers.size())) {
    if (layer.output_sum != nullptr) layer.output_sum = sums;
    sums += sum_bytes(part, layer, device);
  }
  int error = part.rows == 0 ? 0 : kernel.run(stack, part.dtype, device, stream);
  for (std::size_t i = 0; i < part.layers.size() && error == 0; ++i) {
    const MlpLayer& layer = part.layers[i];
    if (layer.output_sum == nullptr || layer.out_features == 0) continue;
    error = add_column_sums(part.dtype, sum_blocks(part, device), layer.out_features,
                            stack.layers[i].output_sum, layer.output_sum, stream);
  }
  return {error, kernel.name};
}

}  // namespace

std::size_t mlp_workspace(const Mlp& mlp, const Device& device) {
  // In the workspace's place, for its alignment: what kernels accept depends on it.
  auto* const anywhere = reinterpret_cast<std::byte*>(kAlignment);
  std::size_t most = 0;
  for_each_step(mlp, device, anywhere, [&](const Mlp& part, void* output) {
    std::size_t bytes = 0;
    if (part.layers.size() > 1) {
      for (const MlpLayer& layer : part.layers) bytes += sum_bytes(part, layer, device);
    } else {
      bytes = gemm_workspace(product_of(part, part.layers[0]), pointers_of(part, output), device);
    }
    most = std::max(most, bytes);
  });
  return 2 * passing_bytes(mlp, device) + most;
}

Status mlp(const Mlp& mlp, void* workspace, const Device& device, Stream stream) {
  auto* const passing = static_cast<std::byte*>(workspace);
  std::byte* const rest = workspace == nullptr ? nullptr : passing + 2 * passing_bytes(mlp, device);
  Status status;
  for_each_step(mlp, device, passing, [&](const Mlp& part, void* output) {
    if (!status.ok()) return;
    status = part.layers.size() > 1 ? run_together(part, output, rest, device, stream)
                                    : gemm(product_of(part, part.layers[0]),
                                           pointers_of(part, output), rest, device, stream);
  });
  return status;
}

}  // namespace neuron_ext::cuda
