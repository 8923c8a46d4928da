#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "activation.cuh"
#include "chunks.h"
#include "gemm_config.h"
#include "prologue.h"
#include "ptx/launch.cuh"
#include "ptx/sync.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

// A block's 16 bytes side by side, and the rows of them that it takes at once.
constexpr int kLanes = 8, kRows = 32, kThreads = kLanes * kRows;

// On a multiprocessor at once: their loads are 32 KiB, twice what its share of the memory's
// bandwidth and latency asks for.
constexpr int kBlocks = 4;

/// A or saved, as `outer` rows of `inner` elements: A's rows or its columns.
struct Source {
  const void* base;
  std::int64_t stride_inner, stride_outer;
  bool is_aligned;  // rows are contiguous and begin at multiples of 16 bytes
};

struct Step {
  Activation f;
  std::int64_t inner, outer;
  Source a, saved;
  void* result;  // null: only sums
  std::int64_t result_stride;
  // Rows are summed in slabs, slab by slab in blocks of their own, then those sums in order. One
  // slab's sums are the result: a launch less, of the few that a small layer's time is.
  std::int64_t slab, slabs;
  void* slab_sums;  // (slab, inner)
  void* sums;       // of the only slab; both null: none are asked for
};

template <class T>
NEURON_EXT_DEVICE Vector<T> load(const Source& source, std::int64_t x, std::int64_t y,
                                 std::int64_t inner) {
  const T* const first =
      static_cast<const T*>(source.base) + x * source.stride_inner + y * source.stride_outer;
  return load_vector(first, source.stride_inner, source.is_aligned, inner - x);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    prologue_kernel(const __grid_constant__ Step step) {
  using S = Accumulator<T>;
  constexpr int kWidth = kLanes * kVector<T>;
  NEURON_EXT_SHARED(S, row_sums, [kRows][kWidth]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, row = thread / kLanes;
  const std::int64_t x0 = std::int64_t{kWidth} * blockIdx.x, x = x0 + lane * kVector<T>;
  const std::int64_t begin = step.slab * blockIdx.y;
  const std::int64_t end = begin + step.slab < step.outer ? begin + step.slab : step.outer;

  S sums[kVector<T>] = {};
  for (std::int64_t y = begin + row; y < end; y += kRows) {
    if (x >= step.inner) continue;
    const Vector<T> a = load<T>(step.a, x, y, step.inner);
    Vector<T> saved = {}, result;
    if (step.f != Activation::kIdentity) saved = load<T>(step.saved, x, y, step.inner);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const S value = gradient(step.f, ptx::widen(a.elements[e]), ptx::widen(saved.elements[e]));
      sums[e] += value;
      result.elements[e] = ptx::narrow<T>(value);
    }
    if (step.result != nullptr) {
      ptx::store_16_bytes(static_cast<T*>(step.result) + y * step.result_stride + x, result.bytes);
    }
  }

  if (step.slab_sums == nullptr && step.sums == nullptr) return;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) row_sums[row][lane * kVector<T> + e] = sums[e];
  ptx::block_sync();
  if (thread >= kWidth || x0 + thread >= step.inner) return;
  S sum = 0;
  for (int r = 0; r < kRows; ++r) sum += row_sums[r][thread];
  if (step.sums != nullptr) {
    static_cast<T*>(step.sums)[x0 + thread] = ptx::narrow<T>(sum);
  } else {
    static_cast<S*>(step.slab_sums)[blockIdx.y * step.inner + x0 + thread] = sum;
  }
}

/// Sums need rows that run across k, however A lies.
bool runs_across_k(const GemmDesc& desc) {
  return desc.has_a_sum || std::abs(desc.a_stride_m) < std::abs(desc.a_stride_k);
}

std::size_t result_bytes(const Step& step, DType dtype) {
  return aligned(static_cast<std::size_t>(step.outer * step.result_stride * size_of(dtype)));
}

constexpr std::int64_t kMostSlabs = 256;

Step step_of(const GemmDesc& desc) {
  const bool across_k = runs_across_k(desc);
  const std::int64_t vector = 16 / size_of(desc.dtype);
  Step step = {};
  step.f = desc.prologue;
  step.inner = across_k ? desc.m : desc.k;
  step.outer = across_k ? desc.k : desc.m;
  step.result_stride =
      desc.prologue == Activation::kIdentity ? 0 : divide_up(step.inner, vector) * vector;
  // Enough blocks for a GPU, of 8 turns or more. What is left to add up afterwards is small.
  constexpr std::int64_t kWholeGpu = 1024, kLeastTurns = 8;
  const std::int64_t blocks = divide_up(step.inner, kLanes * vector);
  const std::int64_t slabs =
      std::clamp<std::int64_t>(divide_up(step.outer, kLeastTurns * kRows), 1,
                               std::min(kMostSlabs, divide_up(kWholeGpu, blocks)));
  step.slab = divide_up(divide_up(step.outer, slabs), kRows) * kRows;
  step.slabs = divide_up(step.outer, step.slab);
  return step;
}

template <class T>
int launch_step(const Step& step, Stream stream) {
  const auto blocks = static_cast<unsigned>(divide_up(step.inner, kLanes * kVector<T>));
  return ptx::launch(prologue_kernel<T>,
                     {dim3(blocks, static_cast<unsigned>(step.slabs)), dim3(kThreads)}, stream,
                     step);
}

/// Sums of blocks of rows, as A's whose rows are summed.
GemmDesc block_sums(DType dtype, std::int64_t blocks, std::int64_t columns) {
  GemmDesc desc;
  desc.m = columns;
  desc.k = blocks;
  desc.dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  desc.has_a_sum = true;
  return desc;
}

std::size_t block_bytes(const GemmDesc& desc) {
  // There is a place for sums even if there are none.
  const std::int64_t blocks = std::max<std::int64_t>(1, desc.k);
  return aligned(static_cast<std::size_t>(blocks * desc.m * size_of(desc.dtype)));
}

}  // namespace

std::size_t prologue_workspace(const GemmDesc& desc) {
  if (desc.prologue == Activation::kIdentity && !desc.has_a_sum) return 0;
  const Step step = step_of(desc);
  constexpr std::int64_t kLargestSum = 8;
  const bool has_slab_sums = desc.has_a_sum && step.slabs > 1;
  const std::int64_t sums = has_slab_sums ? step.slabs * step.inner * kLargestSum : 0;
  return result_bytes(step, desc.dtype) + static_cast<std::size_t>(sums);
}

int run_prologue(GemmDesc& desc, GemmPointers& at, void* workspace, Stream stream) {
  const bool has_prologue = desc.prologue != Activation::kIdentity;
  if (!has_prologue && !desc.has_a_sum) return 0;
  Step step = step_of(desc);
  const bool across_k = runs_across_k(desc);
  const auto source = [&](const void* base, std::int64_t stride_m, std::int64_t stride_k) {
    if (across_k) std::swap(stride_m, stride_k);
    return Source{base, stride_k, stride_m,
                  has_aligned_rows(base, size_of(desc.dtype), stride_k, stride_m)};
  };
  step.a = source(at.a, desc.a_stride_m, desc.a_stride_k);
  step.saved = source(at.saved, desc.saved_stride_m, desc.saved_stride_k);
  if (has_prologue) step.result = workspace;
  if (desc.has_a_sum && step.slabs == 1) {
    step.sums = at.a_sum;
  } else if (desc.has_a_sum) {
    step.slab_sums = static_cast<std::byte*>(workspace) + result_bytes(step, desc.dtype);
  }
  int error = visit_dtype(desc.dtype, [&]<class T>(T*) { return launch_step<T>(step, stream); });
  if (error == 0 && desc.has_a_sum) {
    GemmDesc sums = desc;
    sums.n = 0;
    error = add_chunks(sums, at, {step.slab_sums, step.slabs}, stream);
  }

  desc.has_a_sum = false;
  desc.prologue = Activation::kIdentity;
  at.a_sum = nullptr;
  if (has_prologue) {
    at.a = workspace;
    at.saved = nullptr;
    desc.a_stride_m = across_k ? 1 : step.result_stride;
    desc.a_stride_k = across_k ? step.result_stride : 1;
  }
  return error;
}

std::size_t column_sums_workspace(DType dtype, std::int64_t blocks, std::int64_t columns) {
  const GemmDesc desc = block_sums(dtype, blocks, columns);
  const std::int64_t slabs = blocks > kMostSlabs ? step_of(desc).slabs : 0;
  return block_bytes(desc) + static_cast<std::size_t>(slabs * columns * size_of(desc.dtype));
}

int add_column_sums(DType dtype, std::int64_t blocks, std::int64_t columns, void* workspace,
                    void* sums, Stream stream) {
  GemmDesc desc = block_sums(dtype, blocks, columns);
  ChunkSums chunks{workspace, blocks};
  // Few are added as they are. More become slabs first, in as many blocks as occupy a GPU.
  if (blocks > kMostSlabs) {
    Step step = step_of(desc);
    step.a = {workspace, 1, columns, has_aligned_rows(workspace, size_of(desc.dtype), 1, columns)};
    step.slab_sums = static_cast<std::byte*>(workspace) + block_bytes(desc);
    chunks = {step.slab_sums, step.slabs};
    const int error = desc.dtype == DType::kFloat64 ? launch_step<double>(step, stream)
                                                    : launch_step<float>(step, stream);
    if (error != 0) return error;
  }
  desc.dtype = dtype;
  return add_chunks(desc, {.a_sum = sums}, chunks, stream);
}

}  // namespace neuron_ext::cuda
