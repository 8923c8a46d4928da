// A stack of narrow layers by multiply-adds (mlp_simt.cuh): f32 and f64.
#include <algorithm>
#include <cstdint>

#include "mlp_simt.cuh"
#include "ptx/launch.cuh"

namespace neuron_ext::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, T::kBlocks)
    mlp_simt_kernel(const __grid_constant__ Stack stack) {
  T& tile = ptx::dynamic_shared<T>();
  const int tiles = static_cast<int>((stack.rows + T::kRows - 1) / T::kRows);
  for (int index = static_cast<int>(blockIdx.x); index < tiles;
       index += static_cast<int>(gridDim.x)) {
    run_tile(tile, stack, index);
  }
}

// ---- launch ------------------------------------------------------------------------------------

template <class T>
std::int64_t tiles_of(const Stack& stack) {
  return (stack.rows + T::kRows - 1) / T::kRows;
}

template <class T>
int run_in(const Stack& stack, const Device& device, Stream stream) {
  const auto blocks = static_cast<unsigned>(
      std::min<std::int64_t>(tiles_of<T>(stack), std::int64_t{T::kBlocks} * device.sm_count));
  return ptx::launch(mlp_simt_kernel<T>, {dim3(blocks), dim3(kThreads), sizeof(T)}, stream, stack);
}

template <class S, int kWidth>
int run_as(const Stack& stack, const Device& device, Stream stream) {
  using Flat = Tile<S, kWidth, false>;
  // A flat tile takes about half a tall one's time.
  return tiles_of<Flat>(stack) <= Flat::kBlocks * device.sm_count
             ? run_in<Flat>(stack, device, stream)
             : run_in<Tile<S, kWidth, true>>(stack, device, stream);
}

int run(const Stack& stack, DType dtype, const Device& device, Stream stream) {
  if (dtype == DType::kFloat64) return run_as<double, 64>(stack, device, stream);
  return stack.widest <= 64 ? run_as<float, 64>(stack, device, stream)
                            : run_as<float, kWidestLayer>(stack, device, stream);
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64};

}  // namespace

const MlpKernel mlp_simt = {.name = "mlp_simt",
                            .dtypes = kDTypes,
                            .lowest_sm = kLowestSm,
                            .highest_sm = 999,
                            .takes_strict = true,
                            .sum_rows = kSumRows,
                            .run = run};

}  // namespace neuron_ext::cuda
