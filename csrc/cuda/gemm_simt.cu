// The matrix product without tensor cores: any strides, any size, every dtype, and exact f32. What
// no other kernel takes ends here.
//
// 256 threads form a square of 16 x 16; each holds a square of sums in registers. Both operands'
// tiles lie in shared memory as sums are formed from them, widened, with the prologue applied, k by
// k. While one pair of tiles is multiplied, the next is on its way in registers.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "activation.cuh"
#include "chunks.cuh"
#include "gemm_config.h"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/sync.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kSide = 16, kThreads = kSide * kSide;

// f32 terms are summed 128 at a time, then those sums are added: with one running sum the error
// would grow with k. A multiple of a tile's.
constexpr int kSumK = 128;

/// The tile of D of a block: kGroups squares of 16 bytes per thread and side, which lie kSide x 16
/// bytes apart, so that neighbouring threads read neighbouring 16 bytes of shared memory.
template <class T, int kGroups>
struct Tile {
  using S = Accumulator<T>;
  static constexpr int kVector = sizeof(ptx::Bytes16) / sizeof(S);
  static constexpr int kThread = kVector * kGroups;  // rows and columns of a thread
  static constexpr int kSize = kSide * kThread;      // rows and columns of the tile
  static constexpr int kK = 16;
  static constexpr int kPitch = kSize + kVector;        // of a row of one k in shared memory
  static constexpr int kLoads = kSize * kK / kThreads;  // elements of an operand per thread

  /// Row r (or column) of a thread's, as one of the tile's.
  static NEURON_EXT_DEVICE int place(int r, int side) {
    return r / kVector * (kSide * kVector) + side * kVector + r % kVector;
  }
};

/// How k is cut where D has too few tiles to occupy a GPU. Given by the shape, so that results
/// don't depend on the GPU.
struct Cut {
  int groups;  // of Tile
  std::int64_t tiles_m, tiles_n;
  std::int64_t chunk_k, chunks;
};

/// Rows and columns of a tile of one group.
int side_of(DType dtype) {
  return dtype == DType::kFloat64 ? Tile<double, 1>::kSize : Tile<float, 1>::kSize;
}

Cut cut_of(const GemmDesc& desc) {
  constexpr std::int64_t kWholeGpu = 128;  // blocks that occupy it
  constexpr std::int64_t kShortestChunk = 512;
  const int side = side_of(desc.dtype);
  // Without rows or columns one tile is left: A may have row sums, and an empty grid is an error.
  const auto tiles_for = [&](std::int64_t count, int groups) {
    return std::max<std::int64_t>(1, divide_up(count, groups * side));
  };
  Cut cut = {};
  cut.groups = tiles_for(desc.m, 2) * tiles_for(desc.n, 2) >= kWholeGpu ? 2 : 1;
  cut.tiles_m = tiles_for(desc.m, cut.groups);
  cut.tiles_n = tiles_for(desc.n, cut.groups);
  const std::int64_t whole = tiles_for(desc.deciding_m(), cut.groups) * cut.tiles_n;
  const std::int64_t wanted =
      std::clamp<std::int64_t>(desc.k / kShortestChunk, 1, divide_up(2 * kWholeGpu, whole));
  cut.chunk_k = std::max<std::int64_t>(kSumK, divide_up(divide_up(desc.k, wanted), kSumK) * kSumK);
  cut.chunks = std::max<std::int64_t>(1, divide_up(desc.k, cut.chunk_k));
  return cut;
}

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  Cut cut;
  ChunkSums sums;
  Flags flags;  // none: everything is computed
};

// ---- an operand on its way to shared memory ----------------------------------------------------

/// Elements (mn, k) of a tile, in the order in which memory has them: neighbouring threads take
/// neighbours along k, or along m or n.
template <class T, int kGroups>
struct Place {
  using C = Tile<T, kGroups>;
  bool along_k;

  NEURON_EXT_DEVICE int mn(int load) const {
    const int thread = static_cast<int>(threadIdx.x);
    return along_k ? thread / C::kK + load * (kThreads / C::kK) : thread % C::kSize;
  }
  NEURON_EXT_DEVICE int k(int load) const {
    const int thread = static_cast<int>(threadIdx.x);
    return along_k ? thread % C::kK : thread / C::kSize + load * (kThreads / C::kSize);
  }
};

template <class T, int kGroups, int kLoads>
NEURON_EXT_DEVICE void load_tile(T (&elements)[kLoads], const Place<T, kGroups>& place,
                                 const void* base, std::int64_t stride_mn, std::int64_t stride_k,
                                 std::int64_t mn0, std::int64_t mn_end, std::int64_t k0,
                                 std::int64_t k_end) {
  const T* const first = static_cast<const T*>(base) + mn0 * stride_mn + k0 * stride_k;
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const int mn = place.mn(l), k = place.k(l);
    const bool inside = mn0 + mn < mn_end && k0 + k < k_end;
    elements[l] = inside ? first[mn * stride_mn + k * stride_k] : T{};
  }
}

// ---- the product -------------------------------------------------------------------------------

/// Whether a tile of kFlagBlock has a flag; asked by all threads of the block.
NEURON_EXT_DEVICE bool is_flagged(const Flags& flags, std::int64_t i0, std::int64_t j0) {
  const std::uint32_t* const a = flags.a + i0 / kFlagBlock * flags.blocks_k;
  const std::uint32_t* const b = flags.b + j0 / kFlagBlock * flags.blocks_k;
  bool found = false;
  for (std::int64_t k = threadIdx.x; k < flags.blocks_k; k += kThreads) {
    found |= a[k] != 0 || b[k] != 0;
  }
  return !ptx::block_all(!found);
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads)
    gemm_simt_kernel(const __grid_constant__ Problem problem) {
  using C = Tile<T, kGroups>;
  using S = typename C::S;
  NEURON_EXT_SHARED(S, a_tiles, [2][C::kK][C::kPitch]);
  NEURON_EXT_SHARED(S, b_tiles, [2][C::kK][C::kPitch]);

  const GemmDesc& desc = problem.desc;
  const Cut& cut = problem.cut;
  const int thread = static_cast<int>(threadIdx.x);
  const int ty = thread / kSide, tx = thread % kSide;
  const Place<T, kGroups> a_place{desc.a_stride_k == 1}, b_place{desc.b_stride_k == 1};
  const bool has_prologue = desc.prologue != Activation::kIdentity;

  const std::int64_t tiles = cut.tiles_m * cut.tiles_n;
  for (std::int64_t task = blockIdx.x; task < tiles * cut.chunks; task += gridDim.x) {
    const std::int64_t chunk = task / tiles, tile = task % tiles;
    const std::int64_t i0 = tile % cut.tiles_m * C::kSize, j0 = tile / cut.tiles_m * C::kSize;
    const std::int64_t k_begin = chunk * cut.chunk_k;
    const std::int64_t k_end = k_begin + cut.chunk_k < desc.k ? k_begin + cut.chunk_k : desc.k;
    if constexpr (C::kSize == kFlagBlock) {
      if (problem.flags.a != nullptr && !is_flagged(problem.flags, i0, j0)) continue;
    }
    const bool sums_a = desc.has_a_sum && j0 == 0 && thread < C::kSize;

    T a_next[C::kLoads], b_next[C::kLoads], saved_next[C::kLoads];
    const auto load = [&](std::int64_t k0) {
      load_tile(a_next, a_place, problem.at.a, desc.a_stride_m, desc.a_stride_k, i0, desc.m, k0,
                k_end);
      load_tile(b_next, b_place, problem.at.b, desc.b_stride_n, desc.b_stride_k, j0, desc.n, k0,
                k_end);
      if (!has_prologue) return;
      load_tile(saved_next, a_place, problem.at.saved, desc.saved_stride_m, desc.saved_stride_k, i0,
                desc.m, k0, k_end);
    };
    const auto store = [&](int buffer) {
#pragma unroll
      for (int l = 0; l < C::kLoads; ++l) {
        S a = ptx::widen(a_next[l]);
        if (has_prologue) a = gradient(desc.prologue, a, ptx::widen(saved_next[l]));
        a_tiles[buffer][a_place.k(l)][a_place.mn(l)] = a;
        b_tiles[buffer][b_place.k(l)][b_place.mn(l)] = ptx::widen(b_next[l]);
      }
    };

    S sums[C::kThread][C::kThread] = {}, totals[C::kThread][C::kThread] = {};
    S a_sum = 0, a_total = 0;
    if (k_begin < k_end) {
      load(k_begin);
      store(0);
    }
    ptx::block_sync();
    int buffer = 0;
    for (std::int64_t k0 = k_begin; k0 < k_end; k0 += C::kK) {
      const bool has_next = k0 + C::kK < k_end;
      if (has_next) load(k0 + C::kK);
#pragma unroll
      for (int k = 0; k < C::kK; ++k) {
        union Fragment {
          ptx::Bytes16 vectors[kGroups];
          S elements[C::kThread];
        } a, b;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          a.vectors[g] = ptx::load_16_bytes(&a_tiles[buffer][k][C::place(g * C::kVector, ty)]);
          b.vectors[g] = ptx::load_16_bytes(&b_tiles[buffer][k][C::place(g * C::kVector, tx)]);
        }
#pragma unroll
        for (int r = 0; r < C::kThread; ++r) {
#pragma unroll
          for (int c = 0; c < C::kThread; ++c) {
            sums[r][c] = ptx::fma(a.elements[r], b.elements[c], sums[r][c]);
          }
        }
      }
      if (sums_a) {
        S sum = 0;
#pragma unroll
        for (int k = 0; k < C::kK; ++k) sum += a_tiles[buffer][k][thread];
        a_sum += sum;
      }
      if (!has_next || (k0 - k_begin + C::kK) % kSumK == 0) {
        a_total += a_sum;
        a_sum = 0;
#pragma unroll
        for (int r = 0; r < C::kThread; ++r) {
#pragma unroll
          for (int c = 0; c < C::kThread; ++c) {
            totals[r][c] += sums[r][c];
            sums[r][c] = 0;
          }
        }
      }
      buffer ^= 1;
      if (has_next) store(buffer);  // nobody has read it since the last barrier
      ptx::block_sync();
    }

    S column_sums[C::kThread] = {};
#pragma unroll
    for (int r = 0; r < C::kThread; ++r) {
      const std::int64_t i = i0 + C::place(r, ty);
#pragma unroll
      for (int c = 0; c < C::kThread; ++c) {
        const std::int64_t j = j0 + C::place(c, tx);
        if (i >= desc.m || j >= desc.n) continue;
        column_sums[c] += store_sum<T>(desc, problem.at, problem.sums, chunk, i, j, totals[r][c]);
      }
    }
    if (desc.has_d_sum) {
      auto& sums_of_rows = a_tiles[0];  // (ty, column): nobody reads A any more
      static_assert(C::kK == kSide);
#pragma unroll
      for (int c = 0; c < C::kThread; ++c) sums_of_rows[ty][C::place(c, tx)] = column_sums[c];
      ptx::block_sync();
      if (thread < C::kSize && j0 + thread < desc.n) {
        S sum = 0;
        for (int y = 0; y < kSide; ++y) sum += sums_of_rows[y][thread];
        static_cast<S*>(problem.at.d_sum)[i0 / C::kSize * desc.n + j0 + thread] = sum;
      }
      ptx::block_sync();
    }
    if (sums_a && i0 + thread < desc.m) {
      store_a_sum<T>(desc, problem.at, problem.sums, chunk, i0 + thread, a_total);
    }
  }
}

// ---- launch ------------------------------------------------------------------------------------

dim3 grid_for(std::int64_t blocks) {
  constexpr std::int64_t kLimit = 0x7fffffff;
  return dim3(static_cast<unsigned>(std::min(blocks, kLimit)));
}

template <class T>
int run_as(const Problem& problem, Stream stream) {
  const Cut& cut = problem.cut;
  const auto kernel = cut.groups == 2 ? gemm_simt_kernel<T, 2> : gemm_simt_kernel<T, 1>;
  const int error = ptx::launch(
      kernel, {grid_for(cut.tiles_m * cut.tiles_n * cut.chunks), dim3(kThreads)}, stream, problem);
  if (error != 0) return error;
  return add_chunks(problem.desc, problem.at, problem.sums, stream);
}

bool accepts(const GemmDesc&, const GemmPointers&, const Device&) { return true; }

std::size_t workspace(const GemmDesc& desc, const Device&) {
  return chunk_bytes(desc, cut_of(desc).chunks);
}

int run(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device&,
        Stream stream) {
  const Cut cut = cut_of(desc);
  const ChunkSums sums{cut.chunks == 1 ? nullptr : workspace, cut.chunks};
  const Problem problem{desc, at, cut, sums, {}};
  return visit_dtype(desc.dtype, [&]<class T>(T*) { return run_as<T>(problem, stream); });
}

std::int64_t d_sum_rows(const GemmDesc& desc) {
  const Cut cut = cut_of(desc);
  return cut.chunks > 1 ? 0 : cut.groups * side_of(desc.dtype);
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

}  // namespace

int run_simt_where(const GemmDesc& desc, const GemmPointers& at, const Flags& flags,
                   Stream stream) {
  // One chunk: this is too rare for a workspace.
  const Cut cut{1, divide_up(desc.m, kFlagBlock), divide_up(desc.n, kFlagBlock), desc.k, 1};
  return run_as<float>({desc, at, cut, {}, flags}, stream);
}

const GemmKernel gemm_simt = {.name = "gemm_simt",
                              .dtypes = kDTypes,
                              .lowest_sm = kLowestSm,
                              .highest_sm = 999,
                              .accepts = accepts,
                              .workspace = workspace,
                              .run = run,
                              .takes_epilogue_gradient = true,
                              .d_sum_rows = d_sum_rows};

}  // namespace neuron_ext::cuda
