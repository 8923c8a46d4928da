// The product of a matrix with up to 64 rows of A, by sm_80's tensor cores: bf16 and f16.
//
// It takes as long as the bytes of B do, each of which is read once, 16 at a time, straight into
// the registers that the tensor cores read: no copy through shared memory holds it up. That takes a
// fragment's k in an order of its own, which a sum over k leaves open as long as both operands
// agree on it: of 32 k, lane 4 g + t has those from 8 t to 8 t + 7. A is read in the same way, by
// all warps, so most of it comes from L1.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "chunks.cuh"
#include "gemm_config.h"
#include "prologue.h"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * ptx::kWarp;
constexpr std::int64_t kLeastRows = 9;  // gemv takes fewer
constexpr int kVectorK = kVector<BFloat16>;
constexpr int kFragmentK = 4 * kVectorK;  // of the vectors that a warp reads side by side

// Vectors of B that a thread has on their way for the next step: 32 KiB on a multiprocessor with
// one block. The memory's bandwidth and latency ask for 20 to 40.
constexpr int kLoads = 8;

/// How the work is cut: by the shape alone, so that results don't depend on the GPU.
struct Cut {
  int warps_n, warps_k;  // of a block
  std::int64_t blocks_n;
  std::int64_t chunk_k, chunks;
};

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  Cut cut;
  ChunkSums sums;
};

/// 8 elements, or zeros beyond the last k.
NEURON_EXT_DEVICE ptx::Bytes16 load(const void* base, std::int64_t offset, bool is_inside) {
  if (!is_inside) return {};
  return ptx::load_16_bytes(static_cast<const BFloat16*>(base) + offset);
}

/// Row i of A from k on; beyond the last row that one again, whose sums aren't stored.
NEURON_EXT_DEVICE ptx::Bytes16 load_a(const Problem& problem, int i, std::int64_t k,
                                      std::int64_t k_end) {
  const std::int64_t row = i < problem.desc.m ? i : problem.desc.m - 1;
  return load(problem.at.a, row * problem.desc.a_stride_m + k, k < k_end);
}

/// Adds up what the warps that share k have of kRows rows of D from i0 on and kColumns columns, and
/// stores it. part: a warp's own, which it has filled.
template <class T, int kRows, int kColumns>
NEURON_EXT_DEVICE void store_sums(const Problem& problem,
                                  const float (&parts)[kWarps][kRows][kColumns], int i0) {
  const Cut& cut = problem.cut;
  const int width = cut.warps_n * kColumns;
  ptx::block_sync();
  for (int e = static_cast<int>(threadIdx.x); e < kRows * width; e += kThreads) {
    const int row = e / width, column = e % width;
    const std::int64_t i = i0 + row, j = std::int64_t{width} * blockIdx.x + column;
    if (i >= problem.desc.m || j >= problem.desc.n) continue;
    const int warp = column / kColumns * cut.warps_k;
    float sum = 0;
    for (int w = 0; w < cut.warps_k; ++w) sum += parts[warp + w][row][column % kColumns];
    store_sum<T>(problem.desc, problem.at, problem.sums, blockIdx.y, i, j, sum);
  }
  ptx::block_sync();
}

// ---- B along k: its columns are the tensor cores' rows -----------------------------------------

constexpr int kColumnsAlong = 16;
constexpr int kVectors = kLoads / 2, kStepAlong = kVectors * kFragmentK;

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_narrow_along_kernel(const __grid_constant__ Problem problem) {
  NEURON_EXT_SHARED(float, parts, [kWarps][8][kColumnsAlong]);
  const GemmDesc& desc = problem.desc;
  const Cut& cut = problem.cut;
  const int lane = ptx::lane_id(), warp = static_cast<int>(threadIdx.x) / ptx::kWarp;
  const int g = lane / 4, t = lane % 4;
  const std::int64_t j0 =
      (std::int64_t{cut.warps_n} * blockIdx.x + warp / cut.warps_k) * kColumnsAlong;
  const std::int64_t chunk_end = cut.chunk_k * (blockIdx.y + 1);
  const std::int64_t k_end = chunk_end < desc.k ? chunk_end : desc.k;
  std::int64_t k = cut.chunk_k * blockIdx.y + warp % cut.warps_k * kStepAlong;

  // (vector of the step, half of the columns)
  ptx::Bytes16 next[kVectors][2];
  const auto load_b = [&] {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::int64_t there = j0 + g + 8 * c;
      const std::int64_t j = there < desc.n ? there : desc.n - 1;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t at = k + v * kFragmentK + t * kVectorK;
        next[v][c] = load(problem.at.b, j * desc.b_stride_n + at, at < k_end);
      }
    }
  };

  float sums[kRows / 8][4] = {};
  if (k < k_end) load_b();
  while (k < k_end) {
    ptx::Bytes16 b[kVectors][2];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) b[v][0] = next[v][0], b[v][1] = next[v][1];
    const std::int64_t here = k + t * kVectorK;
    k += cut.warps_k * kStepAlong;
    if (k < k_end) load_b();
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const ptx::Bytes16 a = load_a(problem, 8 * r + g, here + v * kFragmentK, k_end);
#pragma unroll
        for (int q = 0; q < 4; q += 2) {
          const std::uint32_t rows[4] = {b[v][0].words[q], b[v][1].words[q], b[v][0].words[q + 1],
                                         b[v][1].words[q + 1]};
          const std::uint32_t columns[2] = {a.words[q], a.words[q + 1]};
          ptx::mma_16x8x16<T>(sums[r], rows, columns);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
#pragma unroll
    for (int e = 0; e < 4; ++e) parts[warp][2 * t + e % 2][g + 8 * (e / 2)] = sums[r][e];
    store_sums<T>(problem, parts, 8 * r);
  }
}

// ---- B across k: its columns are the tensor cores' columns -------------------------------------

constexpr int kColumnsAcross = 64;  // eight lanes' vectors
static_assert(kLoads == kVectorK);  // a lane's rows of B are the k of its vectors of A

/// Elements c of two rows, as a register of a fragment has them.
NEURON_EXT_DEVICE std::uint32_t pair(const ptx::Bytes16& low, const ptx::Bytes16& high, int c) {
  const std::uint32_t l = low.words[c / 2], h = high.words[c / 2];
  return c % 2 == 0 ? (l & 0xffffu) | h << 16 : l >> 16 | (h & 0xffff0000u);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_narrow_across_kernel(const __grid_constant__ Problem problem) {
  NEURON_EXT_SHARED(float, parts, [kWarps][16][kColumnsAcross]);
  const GemmDesc& desc = problem.desc;
  const Cut& cut = problem.cut;
  const int lane = ptx::lane_id(), warp = static_cast<int>(threadIdx.x) / ptx::kWarp;
  const int g = lane / 4, t = lane % 4;
  const std::int64_t there =
      (std::int64_t{cut.warps_n} * blockIdx.x + warp / cut.warps_k) * kColumnsAcross + g * kVectorK;
  // Beyond the last columns those again, whose sums aren't stored.
  const std::int64_t j = there < desc.n ? there : desc.n - kVectorK;
  const std::int64_t chunk_end = cut.chunk_k * (blockIdx.y + 1);
  const std::int64_t k_end = chunk_end < desc.k ? chunk_end : desc.k;
  std::int64_t k = cut.chunk_k * blockIdx.y + warp % cut.warps_k * kFragmentK;

  ptx::Bytes16 next[kLoads];
  const auto load_b = [&] {
#pragma unroll
    for (int p = 0; p < kLoads; ++p) {
      const std::int64_t at = k + t * kVectorK + p;
      next[p] = load(problem.at.b, at * desc.b_stride_k + j, at < k_end);
    }
  };

  // (rows, element of the lanes' vectors, of a fragment)
  float sums[kRows / 16][kVectorK][4] = {};
  if (k < k_end) load_b();
  while (k < k_end) {
    ptx::Bytes16 b[kLoads];
#pragma unroll
    for (int p = 0; p < kLoads; ++p) b[p] = next[p];
    const std::int64_t here = k + t * kVectorK;
    k += cut.warps_k * kFragmentK;
    if (k < k_end) load_b();
    ptx::Bytes16 a[kRows / 16][2];
#pragma unroll
    for (int r = 0; r < kRows / 16; ++r) {
      a[r][0] = load_a(problem, 16 * r + g, here, k_end);
      a[r][1] = load_a(problem, 16 * r + g + 8, here, k_end);
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int c = 0; c < kVectorK; ++c) {
        const std::uint32_t columns[2] = {pair(b[4 * q], b[4 * q + 1], c),
                                          pair(b[4 * q + 2], b[4 * q + 3], c)};
#pragma unroll
        for (int r = 0; r < kRows / 16; ++r) {
          const std::uint32_t rows[4] = {a[r][0].words[2 * q], a[r][1].words[2 * q],
                                         a[r][0].words[2 * q + 1], a[r][1].words[2 * q + 1]};
          ptx::mma_16x8x16<T>(sums[r][c], rows, columns);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows / 16; ++r) {
#pragma unroll
    for (int c = 0; c < kVectorK; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        parts[warp][g + 8 * (e / 2)][(2 * t + e % 2) * kVectorK + c] = sums[r][c][e];
      }
    }
    store_sums<T>(problem, parts, 16 * r);
  }
}

// ---- launch ------------------------------------------------------------------------------------

/// Rows that a kernel is compiled for.
int compiled_rows(std::int64_t m) { return m <= 16 ? 16 : m <= 32 ? 32 : 64; }

bool is_along(const GemmDesc& desc) { return desc.b_stride_k == 1; }

Cut cut_of(const GemmDesc& desc) {
  constexpr std::int64_t kWholeGpu = 128;  // blocks that occupy it, by one each
  Cut cut = {};
  // A block reads at least twice as many columns of B as rows of A, which come from L2.
  const int rows = compiled_rows(desc.deciding_m());
  cut.warps_n = is_along(desc) ? rows / 8 : rows == 64 ? 2 : 1;
  cut.warps_k = kWarps / cut.warps_n;
  const int columns = cut.warps_n * (is_along(desc) ? kColumnsAlong : kColumnsAcross);
  const std::int64_t step = cut.warps_k * (is_along(desc) ? kStepAlong : kFragmentK);
  cut.blocks_n = divide_up(desc.n, columns);
  const std::int64_t chunks =
      std::clamp<std::int64_t>(desc.k / (2 * step), 1, divide_up(kWholeGpu, cut.blocks_n));
  cut.chunk_k = divide_up(divide_up(desc.k, chunks), step) * step;
  cut.chunks = divide_up(desc.k, cut.chunk_k);
  return cut;
}

bool accepts(const GemmDesc& desc, const GemmPointers& at, const Device&) {
  constexpr std::int64_t kMostRows = 64, kSize = sizeof(BFloat16);
  if (desc.deciding_m() < kLeastRows || desc.deciding_m() > kMostRows || desc.has_a_sum ||
      desc.n == 0 || desc.k == 0 || desc.k % kVectorK != 0) {
    return false;
  }
  // With a prologue, A is rewritten: its rows, if their elements are closer together than they are.
  const bool takes_a = desc.prologue == Activation::kIdentity
                           ? has_aligned_rows(at.a, kSize, desc.a_stride_k, desc.a_stride_m)
                           : std::abs(desc.a_stride_k) <= std::abs(desc.a_stride_m);
  return takes_a &&
         (is_along(desc) ? has_aligned_rows(at.b, kSize, desc.b_stride_k, desc.b_stride_n)
                         : desc.n % kVectorK == 0 &&
                               has_aligned_rows(at.b, kSize, desc.b_stride_n, desc.b_stride_k));
}

std::size_t workspace(const GemmDesc& desc, const Device&) {
  return prologue_workspace(desc) + chunk_bytes(desc, cut_of(desc).chunks);
}

template <class T, int kRows>
int run_as(const Problem& problem, Stream stream) {
  const auto kernel = is_along(problem.desc) ? gemm_narrow_along_kernel<T, kRows>
                                             : gemm_narrow_across_kernel<T, kRows>;
  const dim3 grid(static_cast<unsigned>(problem.cut.blocks_n),
                  static_cast<unsigned>(problem.cut.chunks));
  const int error = ptx::launch(kernel, {grid, dim3(kThreads)}, stream, problem);
  if (error != 0) return error;
  return add_chunks(problem.desc, problem.at, problem.sums, stream);
}

int run(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device&,
        Stream stream) {
  Problem problem{desc, at, cut_of(desc), {}};
  if (problem.cut.chunks > 1) {
    problem.sums = {static_cast<std::byte*>(workspace) + prologue_workspace(desc),
                    problem.cut.chunks};
  }
  const int error = run_prologue(problem.desc, problem.at, workspace, stream);
  if (error != 0) return error;
  const auto run_dtype = [&]<class T>(T*) {
    switch (compiled_rows(desc.deciding_m())) {
      case 16:
        return run_as<T, 16>(problem, stream);
      case 32:
        return run_as<T, 32>(problem, stream);
      default:
        return run_as<T, 64>(problem, stream);
    }
  };
  return desc.dtype == DType::kBFloat16 ? run_dtype(static_cast<BFloat16*>(nullptr))
                                        : run_dtype(static_cast<Float16*>(nullptr));
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

const GemmKernel gemm_narrow = {.name = "gemm_narrow",
                                .dtypes = kDTypes,
                                .lowest_sm = kLowestSm,
                                .highest_sm = 999,
                                .accepts = accepts,
                                .workspace = workspace,
                                .run = run,
                                .forms_a = true,
                                .takes_epilogue_gradient = true};

}  // namespace neuron_ext::cuda
