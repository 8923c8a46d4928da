// The matrix product on sm_90a's tensor cores: bf16 and f16, operands of either order.
//
// A block stays on its multiprocessor for all of its tiles and has three warpgroups. A thread of
// the first tells the copy engine to fill a ring of stages with 64 k of A's and B's tiles. The
// other two multiply 64 of the tile's 128 rows each and store them. What they share is the ring
// alone, so one may be ahead of the other by all of its stages, and will be: while one is busy with
// its activations, the other has the tensor cores for itself. That hides a sigmoid about as long as
// the ring, whose 256 k take the tensor cores 2048 clocks for one of the two; the sigmoid of 64 x
// 256 elements takes the special functions' unit 2048.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "activation.cuh"
#include "gemm_config.h"
#include "gemm_sm90.cuh"
#include "prologue.h"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kColumns = 64;  // that a consumer stores at a time: a swizzle's span

/// Rows of D as they lie in shared memory, on their way to D.
template <class T>
using Part = T[kRows * kColumns];

/// Of the 227 KiB that a block may have, all that makes another stage.
template <class T, int kN>
struct alignas(1024) Shared {
  static constexpr int kStages = kN == 256 ? 4 : 6;
  T a[kStages][kM * kK];
  T b[kStages][kN * kK];
  Part<T> parts[kConsumers][2];
  float bias[kConsumers][kN];
  RingBarriers<kStages> barriers;
};
static_assert(sizeof(Shared<BFloat16, 256>) <= 227 << 10);
static_assert(sizeof(Shared<BFloat16, 128>) <= 227 << 10);

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  Cut cut;
  bool d_is_tiled;          // the copy engine can store it
  bool d_saved_is_vectors;  // of 16 bytes
};

// ---- sums on their way to D --------------------------------------------------------------------

/// A warpgroup's sums from `first` on, finished and rounded, as a swizzled box. Conflicts of banks
/// there are none.
template <class T, class F, int kSums>
NEURON_EXT_DEVICE void finish(const float (&sums)[kSums], int first, const float* bias,
                              Part<T>& part, int thread) {
  const int lane = ptx::lane_id(), t = lane % 4;
  T* const row = part + (thread / ptx::kWarp * 16 + lane % 16) * kColumns;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    std::uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float* const at = bias + 8 * (j + p / 2) + 2 * t;
      const int e = first + 4 * j + 2 * p;
      pairs[p] = ptx::narrow_pair<T>(F::template apply<T>(sums[e] + at[0]),
                                     F::template apply<T>(sums[e + 1] + at[1]));
    }
    ptx::store_matrices(row + ((j + lane / 16) ^ lane % 8) * 8, pairs);
  }
}

template <class T, int kSums>
NEURON_EXT_DEVICE void finish(Activation activation, const float (&sums)[kSums], int first,
                              const float* bias, Part<T>& part, int thread) {
  if (activation == Activation::kSigmoid) {
    finish<T, Sigmoid>(sums, first, bias, part, thread);
  } else {
    finish<T, Identity>(sums, first, bias, part, thread);
  }
}

/// The part of d_saved that a part of D is multiplied by, in its place: by all threads of the
/// warpgroup, vectors of a row by neighbours.
template <class T>
NEURON_EXT_DEVICE void load_saved(const Problem& problem, Part<T>& part, int i0, int j0,
                                  int thread) {
  constexpr int kVector = 16 / sizeof(T), kVectors = kColumns / kVector;
  const GemmDesc& desc = problem.desc;
#pragma unroll
  for (int v = thread; v < kRows * kVectors; v += ptx::kWarpgroup) {
    const int row = v / kVectors, vector = v % kVectors;
    const std::int64_t i = i0 + row, j = j0 + vector * kVector;
    const T* const from = static_cast<const T*>(problem.at.d_saved) + i * desc.d_saved_stride_m + j;
    T* const to = part + row * kColumns + (vector ^ row % 8) * kVector;
    if (problem.d_saved_is_vectors && i < desc.m && j + kVector <= desc.n) {
      *reinterpret_cast<ptx::Bytes16*>(to) = ptx::load_16_bytes(from);
    } else {  // beyond D something, too, since whole matrices are read
      for (int e = 0; e < kVector; ++e) to[e] = i < desc.m && j + e < desc.n ? from[e] : T{};
    }
  }
}

/// As finish, for sums that are multiplied by the gradient at what load_saved left in the part.
template <class T, int kSums>
NEURON_EXT_DEVICE void multiply_by_gradient(Activation activation, const float (&sums)[kSums],
                                            int first, Part<T>& part, int thread) {
  const int lane = ptx::lane_id();
  T* const row = part + (thread / ptx::kWarp * 16 + lane % 16) * kColumns;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    T* const matrices = row + ((j + lane / 16) ^ lane % 8) * 8;
    std::uint32_t pairs[4];
    ptx::load_matrices(pairs, matrices);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int e = first + 4 * j + 2 * p;
      const T low{static_cast<std::uint16_t>(pairs[p])};
      const T high{static_cast<std::uint16_t>(pairs[p] >> 16)};
      pairs[p] = ptx::narrow_pair<T>(gradient(activation, sums[e], ptx::widen(low)),
                                     gradient(activation, sums[e + 1], ptx::widen(high)));
    }
    ptx::store_matrices(matrices, pairs);
  }
}

/// A finished part goes to D: by all threads of the warpgroup, which then have another one's place
/// to write to. `barrier` is theirs.
template <class T>
NEURON_EXT_DEVICE void store_part(const Problem& problem, const ptx::TensorMap& d_map,
                                  const Part<T>& part, int i0, int j0, int thread, int barrier) {
  ptx::async_proxy_fence();
  ptx::barrier_sync(barrier, ptx::kWarpgroup);
  const GemmDesc& desc = problem.desc;
  if (problem.d_is_tiled) {
    if (thread == 0) {
      ptx::tma_store(d_map, part, i0, j0);
      ptx::tma_store_commit();
    }
    return;
  }
  // Rows whose beginnings aren't aligned: an element at a time, neighbours by neighbours.
  T* const d = static_cast<T*>(problem.at.d);
  for (int e = thread; e < kRows * kColumns; e += ptx::kWarpgroup) {
    const int row = e / kColumns, column = e % kColumns;
    const std::int64_t i = i0 + row, j = j0 + column;
    if (i >= desc.m || j >= desc.n) continue;
    d[i * desc.d_stride_m + j] = part[row * kColumns + (column ^ row % 8 * 8)];
  }
}

/// The sums of the columns of a finished part of D from (i0, j0) on, two of them by each lane of
/// the calling warp.
template <class T>
NEURON_EXT_DEVICE void sum_part(const Problem& problem, const Part<T>& part, int i0, int j0) {
  const GemmDesc& desc = problem.desc;
  const int column = 2 * ptx::lane_id();
  const std::int64_t rows = desc.m - i0 < kRows ? desc.m - i0 : kRows;
  float sums[2] = {};
#pragma unroll 8
  for (int row = 0; row < rows; ++row) {
    const union {
      std::uint32_t word;
      T elements[2];
    } pair = {
        *reinterpret_cast<const std::uint32_t*>(part + row * kColumns + (column ^ row % 8 * 8))};
#pragma unroll
    for (int c = 0; c < 2; ++c) sums[c] += ptx::widen(pair.elements[c]);
  }
  float* const to = static_cast<float*>(problem.at.d_sum) + i0 / kRows * desc.n;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const std::int64_t j = j0 + column + c;
    if (rows > 0 && j < desc.n) to[j] = sums[c];
  }
}

// ---- the product -------------------------------------------------------------------------------

template <class T, int kN, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ ptx::TensorMap a_map,
                     const __grid_constant__ ptx::TensorMap b_map,
                     const __grid_constant__ ptx::TensorMap d_map,
                     const __grid_constant__ Problem problem) {
#if NEURON_EXT_HAS_SM90A
  using S = Shared<T, kN>;
  constexpr DType kDType = std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
  S& shared = ptx::dynamic_shared<S>();
  const Cut& cut = problem.cut;
  const int warpgroup = static_cast<int>(threadIdx.x) / ptx::kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % ptx::kWarpgroup;

  set_up(shared.barriers, a_map, b_map);

  const int steps = static_cast<int>((problem.desc.k + kK - 1) / kK);
  if (warpgroup == 0) {
    fill_stages<kN>(shared.barriers, cut, steps, sizeof(shared.a[0]) + sizeof(shared.b[0]),
                    [&](int stage, ptx::Mbarrier& full, const TilePlace& place, int step) {
                      load_tile<kM, kMajorA>(shared.a[stage], a_map, full, place.i, step * kK);
                      load_tile<kN, kMajorB>(shared.b[stage], b_map, full, place.j, step * kK);
                    });
  } else {
    ptx::claim_registers<kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    Ring<S::kStages> ring;
    for (std::int64_t tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
      const TilePlace place = cut.place<kN>(tile);
      Bias<T, kN> bias;
      bias.load(problem.desc, problem.at.bias, place.j, thread);

      float sums[kN / 2];
      int before = 0;  // the stage of the step before
      for (int step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(shared.barriers.full[ring.stage], ring.parity);
        const std::uint64_t a = descriptor_of(shared.a[ring.stage] + consumer * kRows * kK);
        const std::uint64_t b = descriptor_of(shared.b[ring.stage]);
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < kK / 16; ++kk) {
          ptx::wgmma_64xNx16<kN, kDType, kMajorA, kMajorB>(
              sums, ptx::advance(a, kk * kStep<kMajorA>), ptx::advance(b, kk * kStep<kMajorB>),
              step > 0 || kk > 0);
        }
        ptx::wgmma_commit();
        // One step stays under way while the one before gives its stage back.
        ptx::wgmma_wait<1>();
        if (step > 0 && thread == 0) ptx::mbarrier_arrive(shared.barriers.empty[before]);
        before = ring.stage;
        ring.advance();
      }
      ptx::wgmma_wait<0>();
      if (thread == 0) ptx::mbarrier_arrive(shared.barriers.empty[before]);

      bias.store(shared.bias[consumer], thread);
#pragma unroll
      for (int c = 0; c < kN; c += kColumns) {
        Part<T>& part = shared.parts[consumer][c / kColumns % 2];
        if (thread == 0) ptx::tma_store_wait_read<1>();  // of the part's last content
        ptx::barrier_sync(warpgroup, ptx::kWarpgroup);
        if (problem.desc.has_epilogue_gradient()) {
          load_saved<T>(problem, part, place.i + consumer * kRows, place.j + c, thread);
          ptx::barrier_sync(warpgroup, ptx::kWarpgroup);
          multiply_by_gradient<T>(problem.desc.epilogue_gradient, sums, c / 2, part, thread);
        } else {
          finish<T>(problem.desc.epilogue, sums, c / 2, shared.bias[consumer] + c, part, thread);
        }
        store_part<T>(problem, d_map, part, place.i + consumer * kRows, place.j + c, thread,
                      warpgroup);
        // A warp for each part: none of them comes to lie behind the others.
        if (problem.desc.has_d_sum && thread / ptx::kWarp == c / kColumns) {
          sum_part<T>(problem, part, place.i + consumer * kRows, place.j + c);
        }
      }
    }
    if (thread == 0) ptx::tma_store_wait_read<0>();
  }
#endif
}

// ---- launch ------------------------------------------------------------------------------------

/// What the copy engine takes: contiguous one way, rows that don't overlap, multiples of 16 bytes.
bool is_tileable(const void* base, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                 std::int64_t column_stride) {
  constexpr std::int64_t kFurthest = (std::int64_t{1} << 40) / sizeof(BFloat16);
  return has_aligned_rows(DType::kBFloat16, base, rows, columns, row_stride, column_stride) &&
         row_stride >= columns && row_stride < kFurthest;
}

/// An operand's side as is_tileable wants it, whichever of its indices is contiguous.
struct Operand {
  const void* base;
  std::int64_t count, k, stride, stride_k;  // count: of rows of A, of columns of B

  bool is_along_k() const { return is_tileable(base, count, k, stride, stride_k); }
  bool is_across_k() const { return is_tileable(base, k, count, stride_k, stride); }

  int make_map(DType dtype, int tile, ptx::TensorMap* map) const {
    const bool along = is_along_k();
    return ptx::make_tensor_map({.base = base,
                                 .dtype = dtype,
                                 .rows = along ? count : k,
                                 .columns = along ? k : count,
                                 .row_stride = along ? stride : stride_k,
                                 .box_rows = along ? tile : kK,
                                 .box_columns = kK},
                                map);
  }
};

Operand a_of(const GemmDesc& desc, const GemmPointers& at) {
  return {at.a, desc.m, desc.k, desc.a_stride_m, desc.a_stride_k};
}
Operand b_of(const GemmDesc& desc, const GemmPointers& at) {
  return {at.b, desc.n, desc.k, desc.b_stride_n, desc.b_stride_k};
}

/// Whether tiles are so few that gemm_sm80 takes less time: its tensor cores' instructions take
/// twice as long, but it cuts k, of this length into four chunks or more.
bool leaves_gpu_idle(const GemmDesc& desc) {
  constexpr std::int64_t kFewTiles = 32, kLongK = 4096;
  return divide_up(desc.deciding_m(), kM) * divide_up(desc.n, kM) <= kFewTiles && desc.k >= kLongK;
}

bool accepts(const GemmDesc& desc, const GemmPointers& at, const Device&) {
  if (leaves_gpu_idle(desc)) return false;
  const Operand a = a_of(desc, at), b = b_of(desc, at);
  // With a prologue, A is rewritten.
  const bool takes_a = desc.prologue == Activation::kIdentity
                           ? a.is_along_k() || a.is_across_k()
                           : std::max(desc.m, desc.k) <= kLargest;
  return desc.n > 0 && desc.k > 0 && takes_a && (b.is_along_k() || b.is_across_k());
}

std::size_t workspace(const GemmDesc& desc, const Device&) { return prologue_workspace(desc); }

template <class T, int kN>
auto kernel_for(bool a_is_along_k, bool b_is_along_k) {
  constexpr Major kK = Major::kK, kMN = Major::kMN;
  if (a_is_along_k) {
    return b_is_along_k ? gemm_sm90_kernel<T, kN, kK, kK> : gemm_sm90_kernel<T, kN, kK, kMN>;
  }
  return b_is_along_k ? gemm_sm90_kernel<T, kN, kMN, kK> : gemm_sm90_kernel<T, kN, kMN, kMN>;
}

template <class T, int kN>
int run_as(const Problem& problem, const Device& device, Stream stream) {
  const GemmDesc& desc = problem.desc;
  const Operand a = a_of(desc, problem.at), b = b_of(desc, problem.at);
  ptx::TensorMap a_map, b_map, d_map = {};
  int error = a.make_map(desc.dtype, kM, &a_map);
  if (error != 0) return error;
  error = b.make_map(desc.dtype, kN, &b_map);
  if (error != 0) return error;
  if (problem.d_is_tiled) {
    error = ptx::make_tensor_map({.base = problem.at.d,
                                  .dtype = desc.dtype,
                                  .rows = desc.m,
                                  .columns = desc.n,
                                  .row_stride = desc.d_stride_m,
                                  .box_rows = kRows,
                                  .box_columns = kColumns},
                                 &d_map);
    if (error != 0) return error;
  }
  const auto blocks =
      static_cast<unsigned>(std::min<std::int64_t>(problem.cut.tiles, device.sm_count));
  return ptx::launch(kernel_for<T, kN>(a.is_along_k(), b.is_along_k()),
                     {dim3(blocks), dim3(kThreads), sizeof(Shared<T, kN>)}, stream, a_map, b_map,
                     d_map, problem);
}

int run(const GemmDesc& desc, const GemmPointers& at, void* workspace, const Device& device,
        Stream stream) {
  Problem problem{desc, at, choose_cut(desc, device, 256),
                  is_tileable(at.d, desc.m, desc.n, desc.d_stride_m, 1),
                  is_tileable(at.d_saved, desc.m, desc.n, desc.d_saved_stride_m, 1)};
  const int error = run_prologue(problem.desc, problem.at, workspace, stream);
  if (error != 0) return error;
  const auto run_dtype = [&]<class T>(T*) {
    return problem.cut.tile_n == 256 ? run_as<T, 256>(problem, device, stream)
                                     : run_as<T, 128>(problem, device, stream);
  };
  return desc.dtype == DType::kBFloat16 ? run_dtype(static_cast<BFloat16*>(nullptr))
                                        : run_dtype(static_cast<Float16*>(nullptr));
}

std::int64_t d_sum_rows(const GemmDesc&) { return kRows; }

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

const GemmKernel gemm_sm90 = {.name = "gemm_sm90",
                              .dtypes = kDTypes,
                              .lowest_sm = 90,
                              .highest_sm = 90,
                              .accepts = accepts,
                              .workspace = workspace,
                              .run = run,
                              .forms_a = true,
                              .takes_epilogue_gradient = true,
                              .d_sum_rows = d_sum_rows};

}  // namespace neuron_ext::cuda
