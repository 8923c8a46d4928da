#include <algorithm>
#include <cstdint>

#include "chunks.cuh"
#include "ptx/launch.cuh"
#include "ptx/sync.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kThreads = 256;

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  ChunkSums sums;
  int parts;  // threads that share an element's chunks
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const __grid_constant__ Problem problem) {
  using S = Accumulator<T>;
  NEURON_EXT_SHARED(S, part_sums, [kThreads]);
  const GemmDesc& desc = problem.desc;
  const std::int64_t elements = desc.m * desc.n;
  const std::int64_t all = elements + (desc.has_a_sum ? desc.m : 0);
  const int thread = static_cast<int>(threadIdx.x);
  const int width = kThreads / problem.parts, part = thread / width;
  for (std::int64_t first = std::int64_t{width} * blockIdx.x; first < all;
       first += std::int64_t{width} * gridDim.x) {
    const std::int64_t e = first + thread % width;
    const bool is_row = e >= elements;
    const std::int64_t stride = is_row ? desc.m : elements;
    const std::int64_t begin = is_row ? problem.sums.chunks * elements + (e - elements) : e;
    S sum = 0;
    if (e < all) {
#pragma unroll 8
      for (std::int64_t chunk = part; chunk < problem.sums.chunks; chunk += problem.parts) {
        sum += static_cast<const S*>(problem.sums.base)[begin + chunk * stride];
      }
    }
    part_sums[thread] = sum;
    ptx::block_sync();
    if (part == 0 && e < all) {
      for (int p = 1; p < problem.parts; ++p) sum += part_sums[thread + p * width];
      if (is_row) {
        static_cast<T*>(problem.at.a_sum)[e - elements] = ptx::narrow<T>(sum);
      } else {
        finish<T>(desc, problem.at, e / desc.n, e % desc.n, sum);
      }
    }
    ptx::block_sync();
  }
}

}  // namespace

std::size_t chunk_bytes(const GemmDesc& desc, std::int64_t chunks) {
  const std::int64_t sum_bytes = desc.dtype == DType::kFloat64 ? 8 : 4;
  const std::int64_t rows = desc.has_a_sum ? desc.m : 0;
  return chunks == 1 ? 0 : static_cast<std::size_t>(chunks * (desc.m * desc.n + rows) * sum_bytes);
}

int add_chunks(const GemmDesc& desc, const GemmPointers& at, const ChunkSums& sums, Stream stream) {
  if (sums.base == nullptr) return 0;
  // Of many chunks a thread would wait for one after the other.
  const Problem problem{desc, at, sums, sums.chunks >= 32 ? 8 : 1};
  const std::int64_t width = kThreads / problem.parts;
  constexpr std::int64_t kMostBlocks = 1 << 16;
  const std::int64_t blocks = (desc.m * (desc.n + 1) + width - 1) / width;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMostBlocks)));
  return visit_dtype(desc.dtype, [&]<class T>(T*) {
    return ptx::launch(add_chunks_kernel<T>, {grid, dim3(kThreads)}, stream, problem);
  });
}

}  // namespace neuron_ext::cuda
