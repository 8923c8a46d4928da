// Products with few rows or few columns of D, by multiply-adds. One operand is a few vectors, the
// other a matrix whose bytes are the time that they take: each is read once, 16 at a time, straight
// into registers. Any strides and any alignment; what isn't contiguous and aligned is read element
// by element.
//
// A matrix whose lines run along k: a lane takes 16 bytes of k of a few lines, and multiplies them
// by the same k of each vector, which the multiprocessor's L1 has. A matrix whose lines run across
// k: a lane takes 16 bytes of neighbouring lines and keeps their sums, and one k of a vector after
// the other comes from shared memory. Either way lanes, warps and, in two kernels, blocks may share
// k; the sums meet in an order that the shape gives.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "activation.cuh"
#include "chunks.cuh"
#include "gemm_config.h"
#include "ptx/launch.cuh"
#include "ptx/sync.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * ptx::kWarp;

// Blocks on a multiprocessor, at least: 128 registers, and sums in no more than 64 of them. Loads
// of 64 bytes per thread that are on their way for the next step are 32 KiB then; the memory's
// bandwidth and latency ask for 20 to 40.
constexpr int kBlocks = 2, kSumBytes = 256;

// Vectors that are still free. A multiprocessor's share of the memory's bandwidth is 15 bytes a
// clock (H100: 3.35 TB/s), for which 8 vectors of 16-bit elements take half its multiply-adds, and
// a conversion for every fourth; 16 of f32 as much. 16 of f64 have no registers for their sums.
constexpr std::int64_t most_vectors(std::int64_t element_bytes) {
  return element_bytes == 4 ? 16 : 8;
}

// Of a warp's lanes those that take neighbouring lines that run across k: 128 bytes, whole sectors
// and cache lines, or 64 where there are few lines.
constexpr int kMostAcross = 8, kLeastAcross = 4;

constexpr int kStageBytes = 16 << 10;  // of vectors in shared memory

struct Operand {
  const void* base;
  const void* saved;  // null: no prologue
  // From one line to the next, and along k.
  std::int64_t stride, stride_k, saved_stride, saved_stride_k;
  bool is_aligned, saved_is_aligned;  // for vectors of k or of lines, whichever are read

  template <class T>
  NEURON_EXT_DEVICE const T* at(std::int64_t line, std::int64_t k) const {
    return static_cast<const T*>(base) + line * stride + k * stride_k;
  }
  template <class T>
  NEURON_EXT_DEVICE const T* saved_at(std::int64_t line, std::int64_t k) const {
    return static_cast<const T*>(saved) + line * saved_stride + k * saved_stride_k;
  }
};

/// How the work is cut: by the shape alone, so that results don't depend on the GPU.
struct Cut {
  int lanes_k, warps_k;          // of a warp, and of a block, that share k
  int block_lines;               // of the matrix
  std::int64_t blocks;           // that share the lines
  std::int64_t chunk_k, chunks;  // blocks that share k
};

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  bool few_are_columns;  // of D; else rows
  bool sums_few;         // a_sum is of the vectors
  bool has_ones;         // a_sum is of the matrix: its product with a last vector, of ones
  int few;               // vectors, with that of ones
  std::int64_t lines;    // of the matrix
  Operand matrix, vectors;
  Cut cut;
  ChunkSums sums;
};

/// Element k of a vector, that of ones included.
template <class T>
NEURON_EXT_DEVICE Accumulator<T> vector_element(const Problem& problem, int f, std::int64_t k) {
  const Operand& vectors = problem.vectors;
  if (problem.has_ones && f == problem.few - 1) return 1;
  const Accumulator<T> value = ptx::widen(*vectors.at<T>(f, k));
  return vectors.saved == nullptr
             ? value
             : gradient(problem.desc.prologue, value, ptx::widen(*vectors.saved_at<T>(f, k)));
}

// ---- sums on their way to D --------------------------------------------------------------------

/// Adds up what the lanes (whose numbers differ in bits from first_bit to end_bit) and warps that
/// share k have, and stores it. place(c): of a thread's cth line among the block's.
template <class T, int kFew, int kLines, class Place>
NEURON_EXT_DEVICE void store_sums(const Problem& problem,
                                  const Accumulator<T> (&sums)[kFew][kLines], int first_bit,
                                  int end_bit, const Place& place) {
  using S = Accumulator<T>;
  // A warp has lines for all of its lanes where k is short, and for 8 vectors where they are
  // across.
  constexpr int kMostLines = kWarps * std::max(ptx::kWarp * 4, kMostAcross * kVector<T>);
  NEURON_EXT_SHARED(S, parts, [2][kMostLines]);
  const Cut& cut = problem.cut;
  const int thread = static_cast<int>(threadIdx.x), lane = ptx::lane_id();
  const int warp_k = thread / ptx::kWarp % cut.warps_k;
  const bool is_first = (lane & (end_bit - first_bit)) == 0;
  const std::int64_t line0 = std::int64_t{cut.block_lines} * blockIdx.x;
#pragma unroll
  for (int f = 0; f < kFew; ++f) {
    if (f >= problem.few) continue;
    S* const part = parts[f % 2];
#pragma unroll
    for (int c = 0; c < kLines; ++c) {
      S sum = sums[f][c];
      for (int bit = first_bit; bit < end_bit; bit *= 2) sum += ptx::shuffle_xor(sum, bit);
      if (is_first) part[warp_k * cut.block_lines + place(c)] = sum;
    }
    ptx::block_sync();  // nobody writes to this part before the next
    for (int l = thread; l < cut.block_lines && line0 + l < problem.lines; l += kThreads) {
      S sum = part[l];
      for (int w = 1; w < cut.warps_k; ++w) sum += part[w * cut.block_lines + l];
      const std::int64_t line = line0 + l;
      if (problem.has_ones && f == problem.few - 1) {
        store_a_sum<T>(problem.desc, problem.at, problem.sums, blockIdx.y, line, sum);
      } else {
        store_sum<T>(problem.desc, problem.at, problem.sums, blockIdx.y,
                     problem.few_are_columns ? line : f, problem.few_are_columns ? f : line, sum);
      }
    }
  }
}

// ---- lines along k -----------------------------------------------------------------------------

/// Lines that a lane takes at once: four, or two where there are no registers for that.
constexpr int lines_along(std::int64_t few, std::int64_t sum_bytes, bool has_prologue) {
  return few * 4 * sum_bytes <= kSumBytes / (has_prologue ? 4 : 2) ? 4 : 2;
}

template <class T, int kFew, bool kHasPrologue>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gemv_along_kernel(const __grid_constant__ Problem problem) {
  using S = Accumulator<T>;
  constexpr int kLines = lines_along(kFew, sizeof(S), kHasPrologue);
  const Cut& cut = problem.cut;
  const Operand &matrix = problem.matrix, &vectors = problem.vectors;
  const int lane = ptx::lane_id(), warp = static_cast<int>(threadIdx.x) / ptx::kWarp;
  const int lanes = ptx::kWarp / cut.lanes_k;  // beside each other
  const int first = warp / cut.warps_k * kLines * lanes + lane / cut.lanes_k;
  const auto place = [&](int c) { return first + c * lanes; };
  const std::int64_t line0 = std::int64_t{cut.block_lines} * blockIdx.x;

  const std::int64_t chunk_end = cut.chunk_k * (blockIdx.y + 1);
  const std::int64_t k_end = chunk_end < problem.desc.k ? chunk_end : problem.desc.k;
  const std::int64_t step = std::int64_t{cut.warps_k * cut.lanes_k} * kVector<T>;
  std::int64_t k = cut.chunk_k * blockIdx.y +
                   (warp % cut.warps_k * cut.lanes_k + lane % cut.lanes_k) * kVector<T>;

  Vector<T> next[kLines], next_saved[kLines];
  const auto load = [&] {
#pragma unroll
    for (int c = 0; c < kLines; ++c) {
      // Beyond the last line that one again, whose sums aren't stored.
      const std::int64_t there = line0 + place(c);
      const std::int64_t line = there < problem.lines ? there : problem.lines - 1;
      next[c] = load_vector(matrix.at<T>(line, k), matrix.stride_k, matrix.is_aligned, k_end - k);
      if constexpr (kHasPrologue) {
        next_saved[c] = load_vector(matrix.saved_at<T>(line, k), matrix.saved_stride_k,
                                    matrix.saved_is_aligned, k_end - k);
      }
    }
  };

  S sums[kFew][kLines] = {};
  if (k < k_end) load();
  while (k < k_end) {
    S values[kLines][kVector<T>];
#pragma unroll
    for (int c = 0; c < kLines; ++c) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        values[c][e] = ptx::widen(next[c].elements[e]);
        if constexpr (kHasPrologue) {
          values[c][e] =
              gradient(problem.desc.prologue, values[c][e], ptx::widen(next_saved[c].elements[e]));
        }
      }
    }
    const std::int64_t here = k;
    k += step;
    if (k < k_end) load();
#pragma unroll
    for (int f = 0; f < kFew; ++f) {
      if (f >= problem.few) continue;
      const Vector<T> x = load_vector(vectors.at<T>(f, here), 1, vectors.is_aligned, k_end - here);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
#pragma unroll
        for (int c = 0; c < kLines; ++c) {
          sums[f][c] = ptx::fma(values[c][e], ptx::widen(x.elements[e]), sums[f][c]);
        }
      }
    }
  }
  store_sums<T>(problem, sums, 1, cut.lanes_k, place);
}

/// The vectors of a problem as gemv_along_kernel reads them best, `pitch` elements apart.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Problem problem, T* gathered, std::int64_t pitch) {
  const std::int64_t k = std::int64_t{kThreads} * blockIdx.x + threadIdx.x;
  if (k >= problem.desc.k) return;
  for (int f = 0; f < problem.few; ++f) {
    gathered[f * pitch + k] = ptx::narrow<T>(vector_element<T>(problem, f, k));
  }
}

// ---- lines across k ----------------------------------------------------------------------------

template <class T, int kFew, bool kHasPrologue>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gemv_across_kernel(const __grid_constant__ Problem problem) {
  using S = Accumulator<T>;
  constexpr int kLines = kVector<T>;
  constexpr int kBytes = kFew * kLines * sizeof(S);
  constexpr int kLoads = kBytes <= kSumBytes / 2 ? 4 : 2;
  constexpr int kUnroll = kHasPrologue ? kLoads / 2 : kLoads;
  constexpr int kStage = kStageBytes / (kFew * sizeof(S));
  static_assert(kStage % (kWarps * ptx::kWarp / kLeastAcross * kUnroll) == 0);
  constexpr int kGroup = kFew < 4 ? kFew : 4;  // vectors that are read at once
  NEURON_EXT_SHARED(S, x, [kStage][kFew]);

  const Cut& cut = problem.cut;
  const Operand& matrix = problem.matrix;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = ptx::lane_id(), warp = thread / ptx::kWarp;
  const int lanes = ptx::kWarp / cut.lanes_k;  // beside each other
  const int first = (warp / cut.warps_k * lanes + lane % lanes) * kLines;
  const std::int64_t line = std::int64_t{cut.block_lines} * blockIdx.x + first;

  const std::int64_t chunk_begin = cut.chunk_k * blockIdx.y;
  const std::int64_t chunk_end = chunk_begin + cut.chunk_k;
  const std::int64_t k_end = chunk_end < problem.desc.k ? chunk_end : problem.desc.k;
  const int parts = cut.warps_k * cut.lanes_k;
  std::int64_t k = chunk_begin + warp % cut.warps_k * cut.lanes_k + lane / lanes;

  Vector<T> next[kUnroll], next_saved[kUnroll];
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // Beyond the last k that one again, whose products aren't formed.
      const std::int64_t p = k + u * parts < k_end ? k + u * parts : k_end - 1;
      next[u] = load_vector(matrix.at<T>(line, p), matrix.stride, matrix.is_aligned,
                            problem.lines - line);
      if constexpr (kHasPrologue) {
        next_saved[u] = load_vector(matrix.saved_at<T>(line, p), matrix.saved_stride,
                                    matrix.saved_is_aligned, problem.lines - line);
      }
    }
  };

  // Sums of the vectors themselves: a warp's of every kWarps-th.
  constexpr int kWarpVectors = (kFew + kWarps - 1) / kWarps;
  const bool sums_few = problem.sums_few && blockIdx.x == 0;
  S few_sums[kWarpVectors] = {};

  S sums[kFew][kLines] = {};
  if (k < k_end) load();
  for (std::int64_t stage = chunk_begin; stage < k_end; stage += kStage) {
    const std::int64_t rest = k_end - stage;
    const int in_stage = rest < kStage ? static_cast<int>(rest) : kStage;
    ptx::block_sync();  // all are done with the stage before
    for (int p = thread; p < in_stage; p += kThreads) {
#pragma unroll
      for (int f0 = 0; f0 < kFew; f0 += kGroup) {
        S values[kGroup];
#pragma unroll
        for (int f = 0; f < kGroup; ++f) {
          values[f] = f0 + f < problem.few ? vector_element<T>(problem, f0 + f, stage + p) : S{};
        }
#pragma unroll
        for (int f = 0; f < kGroup; ++f) x[p][f0 + f] = values[f];
      }
    }
    ptx::block_sync();
    if (sums_few) {
#pragma unroll
      for (int v = 0; v < kWarpVectors; ++v) {
        const int f = warp + v * kWarps;
        if (f >= problem.few) continue;
        for (int p = lane; p < in_stage; p += ptx::kWarp) few_sums[v] += x[p][f];
      }
    }
    for (int step = 0; step < in_stage; step += parts * kUnroll) {
      Vector<T> now[kUnroll], now_saved[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) now[u] = next[u], now_saved[u] = next_saved[u];
      const int here = static_cast<int>(k - stage);
      k += parts * kUnroll;
      if (k < k_end) load();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int p = here + u * parts;
        if (p >= in_stage) continue;
        S values[kLines];
#pragma unroll
        for (int c = 0; c < kLines; ++c) {
          values[c] = ptx::widen(now[u].elements[c]);
          if constexpr (kHasPrologue) {
            values[c] =
                gradient(problem.desc.prologue, values[c], ptx::widen(now_saved[u].elements[c]));
          }
        }
#pragma unroll
        for (int f = 0; f < kFew; ++f) {
          if (f >= problem.few) continue;
          const S factor = x[p][f];
#pragma unroll
          for (int c = 0; c < kLines; ++c) sums[f][c] = ptx::fma(values[c], factor, sums[f][c]);
        }
      }
    }
  }
  if (sums_few) {
#pragma unroll
    for (int v = 0; v < kWarpVectors; ++v) {
      S sum = few_sums[v];
      for (int bit = 1; bit < ptx::kWarp; bit *= 2) sum += ptx::shuffle_xor(sum, bit);
      const int f = warp + v * kWarps;
      if (lane == 0 && f < problem.few) {
        store_a_sum<T>(problem.desc, problem.at, problem.sums, blockIdx.y, f, sum);
      }
    }
  }
  store_sums<T>(problem, sums, lanes, ptx::kWarp, [&](int c) { return first + c; });
}

// ---- launch ------------------------------------------------------------------------------------

/// Which operand is the matrix and how it lies; `few` is 0 where there are too many vectors. Counts
/// are those that decide (GemmDesc::deciding_m).
struct Form {
  bool few_are_columns, is_along;
  std::int64_t few, lines;
};

Form form_of(const GemmDesc& desc) {
  const std::int64_t most = most_vectors(size_of(desc.dtype));
  const std::int64_t m = desc.deciding_m(), columns = desc.n + (desc.has_a_sum ? 1 : 0);
  const bool rows_fit = m <= most, columns_fit = columns <= most;
  const bool few_are_columns = columns_fit && (!rows_fit || desc.has_a_sum || columns <= m);
  if (!rows_fit && !columns_fit) return {};
  const auto is_along = [](std::int64_t stride, std::int64_t stride_k) {
    return std::abs(stride_k) <= std::abs(stride);
  };
  if (!few_are_columns) {
    // Sums of the vectors come only beside lines across k, which the gradient of a weight has.
    return {false, !desc.has_a_sum && is_along(desc.b_stride_n, desc.b_stride_k), m, desc.n};
  }
  return {true,
          desc.prologue == Activation::kIdentity
              ? is_along(desc.a_stride_m, desc.a_stride_k)
              : is_along(desc.saved_stride_m, desc.saved_stride_k),
          columns, m};
}

/// How many vectors a kernel is compiled for: fewer than the largest only where it pays, for one
/// and for up to four.
int compiled_few(std::int64_t element_bytes, std::int64_t few) {
  return few == 1 ? 1 : few <= 4 ? 4 : static_cast<int>(most_vectors(element_bytes));
}

Cut cut_of(const GemmDesc& desc, const Form& form) {
  constexpr std::int64_t kWholeGpu = 128;  // blocks that occupy it, by one each
  const std::int64_t vector = 16 / size_of(desc.dtype);
  const std::int64_t sum_bytes = desc.dtype == DType::kFloat64 ? 8 : 4;
  const auto power_of_2 = [](std::int64_t at_least, std::int64_t most) {
    return static_cast<int>(
        std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(at_least, 1, most))));
  };
  Cut cut = {};
  std::int64_t shortest;  // k of a block that are worth adding its sums up
  if (form.is_along) {
    const std::int64_t vectors = divide_up(desc.k, vector);
    const int lines = lines_along(compiled_few(size_of(desc.dtype), form.few), sum_bytes,
                                  form.few_are_columns && desc.prologue != Activation::kIdentity);
    cut.lanes_k = power_of_2(vectors, ptx::kWarp);
    const int warp_lines = ptx::kWarp / cut.lanes_k * lines;
    // Two blocks of warps for each multiprocessor, as long as each lane has two vectors.
    const std::int64_t wanted =
        divide_up(2 * kWholeGpu * kWarps, divide_up(form.lines, warp_lines));
    cut.warps_k = power_of_2(std::min(wanted, vectors / (2 * ptx::kWarp)), kWarps);
    cut.block_lines = kWarps / cut.warps_k * warp_lines;
    shortest = std::int64_t{2} * cut.warps_k * cut.lanes_k * vector;
  } else {
    constexpr int kLeastTurns = 8;
    const std::int64_t wide = divide_up(form.lines, kMostAcross * vector);
    const int lanes = wide < kWholeGpu ? kLeastAcross : kMostAcross;
    cut.lanes_k = ptx::kWarp / lanes;
    cut.warps_k = power_of_2(divide_up(desc.k, cut.lanes_k * kLeastTurns), kWarps);
    cut.block_lines = kWarps / cut.warps_k * lanes * static_cast<int>(vector);
    shortest = std::int64_t{kLeastTurns} * cut.warps_k * cut.lanes_k;
  }
  const auto blocks_for = [&](std::int64_t lines) {
    return std::max<std::int64_t>(1, divide_up(lines, cut.block_lines));
  };
  cut.blocks = blocks_for(form.few_are_columns ? desc.m : desc.n);
  const std::int64_t whole = blocks_for(form.lines);
  // The second kernel costs about what half the multiprocessors take longer for a matrix of a few
  // megabytes.
  cut.chunks = whole * 2 >= kWholeGpu ? 1
                                      : std::clamp<std::int64_t>(desc.k / shortest, 1,
                                                                 divide_up(2 * kWholeGpu, whole));
  constexpr std::int64_t kGranule = 64;  // whole vectors, and lines that are aligned
  cut.chunk_k = std::max(kGranule, divide_up(divide_up(desc.k, cut.chunks), kGranule) * kGranule);
  cut.chunks = std::max<std::int64_t>(1, divide_up(desc.k, cut.chunk_k));
  return cut;
}

/// Whether the vectors are rewritten first.
bool gathers(const GemmDesc& desc, const Form& form) {
  if (!form.is_along) return false;
  const std::int64_t stride_k = form.few_are_columns ? desc.b_stride_k : desc.a_stride_k;
  const bool has_prologue = !form.few_are_columns && desc.prologue != Activation::kIdentity;
  return stride_k != 1 || has_prologue || (form.few_are_columns && desc.has_a_sum);
}

std::int64_t gathered_pitch(const GemmDesc& desc) { return divide_up(desc.k, 64) * 64; }

std::size_t gathered_bytes(const GemmDesc& desc, const Form& form) {
  return gathers(desc, form)
             ? static_cast<std::size_t>(form.few * gathered_pitch(desc) * size_of(desc.dtype))
             : 0;
}

bool accepts(const GemmDesc& desc, const GemmPointers&, const Device&) {
  const Form form = form_of(desc);
  return form.few > 0 && form.lines > 0;
}

std::size_t workspace(const GemmDesc& desc, const Device&) {
  const Form form = form_of(desc);
  return gathered_bytes(desc, form) + chunk_bytes(desc, cut_of(desc, form).chunks);
}

template <class T, int kFew>
int run_as(const Problem& problem, bool is_along, Stream stream) {
  const bool has_prologue = problem.matrix.saved != nullptr;
  const auto kernel =
      is_along ? has_prologue ? gemv_along_kernel<T, kFew, true> : gemv_along_kernel<T, kFew, false>
      : has_prologue ? gemv_across_kernel<T, kFew, true>
                     : gemv_across_kernel<T, kFew, false>;
  const dim3 grid(static_cast<unsigned>(problem.cut.blocks),
                  static_cast<unsigned>(problem.cut.chunks));
  const int error = ptx::launch(kernel, {grid, dim3(kThreads)}, stream, problem);
  if (error != 0) return error;
  return add_chunks(problem.desc, problem.at, problem.sums, stream);
}

template <class T>
int gather(Problem& problem, T* gathered, Stream stream) {
  const std::int64_t pitch = gathered_pitch(problem.desc);
  const auto blocks = static_cast<unsigned>(divide_up(problem.desc.k, kThreads));
  const int error = blocks == 0 ? 0
                                : ptx::launch(gather_kernel<T>, {dim3(blocks), dim3(kThreads)},
                                              stream, problem, gathered, pitch);
  problem.vectors = {gathered, nullptr, pitch, 1, 0, 0, true, false};
  return error;
}

int run(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device&,
        Stream stream) {
  const Form form = form_of(desc);
  const std::int64_t size = size_of(desc.dtype);
  const auto operand = [&](const void* base, std::int64_t stride, std::int64_t stride_k,
                           const void* saved, std::int64_t saved_stride,
                           std::int64_t saved_stride_k) {
    const auto is_aligned = [&](const void* at, std::int64_t stride, std::int64_t stride_k) {
      return form.is_along ? has_aligned_rows(at, size, stride_k, stride)
                           : has_aligned_rows(at, size, stride, stride_k);
    };
    return Operand{base,
                   saved,
                   stride,
                   stride_k,
                   saved_stride,
                   saved_stride_k,
                   is_aligned(base, stride, stride_k),
                   is_aligned(saved, saved_stride, saved_stride_k)};
  };
  const void* const saved = desc.prologue == Activation::kIdentity ? nullptr : at.saved;
  const Operand a = operand(at.a, desc.a_stride_m, desc.a_stride_k, saved, desc.saved_stride_m,
                            desc.saved_stride_k);
  const Operand b = operand(at.b, desc.b_stride_n, desc.b_stride_k, nullptr, 0, 0);

  Problem problem = {};
  problem.desc = desc;
  problem.at = at;
  problem.few_are_columns = form.few_are_columns;
  problem.sums_few = desc.has_a_sum && !form.few_are_columns;
  problem.has_ones = desc.has_a_sum && form.few_are_columns;
  problem.few = static_cast<int>(form.few_are_columns ? form.few : desc.m);
  problem.lines = form.few_are_columns ? desc.m : desc.n;
  problem.matrix = form.few_are_columns ? a : b;
  problem.vectors = form.few_are_columns ? b : a;
  problem.cut = cut_of(desc, form);
  if (problem.cut.chunks > 1) {
    problem.sums = {static_cast<std::byte*>(workspace) + gathered_bytes(desc, form),
                    problem.cut.chunks};
  }
  return visit_dtype(desc.dtype, [&]<class T>(T*) {
    const int error = gathers(desc, form) ? gather(problem, static_cast<T*>(workspace), stream) : 0;
    if (error != 0) return error;
    switch (compiled_few(size, form.few)) {
      case 1:
        return run_as<T, 1>(problem, form.is_along, stream);
      case 4:
        return run_as<T, 4>(problem, form.is_along, stream);
      default:
        return run_as<T, most_vectors(sizeof(T))>(problem, form.is_along, stream);
    }
  });
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

}  // namespace

const GemmKernel gemv = {.name = "gemv",
                         .dtypes = kDTypes,
                         .lowest_sm = kLowestSm,
                         .highest_sm = 999,
                         .accepts = accepts,
                         .workspace = workspace,
                         .run = run,
                         .takes_epilogue_gradient = true};

}  // namespace neuron_ext::cuda
