// The matrix product of f32 on sm_90a's tensor cores, as products of bf16.
//
// split.cuh tells how. A kernel of its own splits A and B into planes, so that the product's blocks
// find what the copy engine can take: any strides will do, and k is padded with zeros.
//
// Tensor cores don't round sums as f32 arithmetic does. So no sum grows long: after each 64 k,
// small products first, it is added to a total in other registers.
//
// Where an x doesn't split, its block of A or B is flagged, and gemm_simt computes what it touches
// again.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "activation.cuh"
#include "column_sums.cuh"
#include "gemm_config.h"
#include "gemm_sm90.cuh"
#include "prologue.h"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/sync.cuh"
#include "split.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kN = 128;  // of a tile: twice 64 sums and totals per thread
constexpr int kSplitThreads = 256;
constexpr int kBlock = kFlagBlock;  // rows (or columns) and k that a block splits

std::int64_t padded_k(const GemmDesc& desc) { return divide_up(desc.k, kBlock) * kBlock; }

// ---- planes ------------------------------------------------------------------------------------

/// An operand, rows of it or columns, and its planes: (plane, count, padded k).
struct Split {
  const float* from;
  std::int64_t count, k, stride, stride_k;
  std::uint16_t* planes;
  std::uint32_t* flags;  // (block of count, block of k)
  std::int64_t blocks_k;
};

template <int kPlanes>
__global__ void __launch_bounds__(kSplitThreads) split_kernel(const __grid_constant__ Split split) {
  NEURON_EXT_SHARED(float, tile, [kBlock][kBlock + 1]);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block_k = blockIdx.x % split.blocks_k, block = blockIdx.x / split.blocks_k;
  const std::int64_t i0 = block * kBlock, k0 = block_k * kBlock;

  bool all_split = true;
  const bool along_k = split.stride_k == 1;
#pragma unroll 8
  for (int e = thread; e < kBlock * kBlock; e += kSplitThreads) {
    const int i = along_k ? e / kBlock : e % kBlock, k = along_k ? e % kBlock : e / kBlock;
    const bool inside = i0 + i < split.count && k0 + k < split.k;
    const float x = inside ? split.from[(i0 + i) * split.stride + (k0 + k) * split.stride_k] : 0.0f;
    all_split &= splits(x);
    tile[i][k] = x;
  }
  all_split = ptx::block_all(all_split);
  if (thread == 0) split.flags[blockIdx.x] = all_split ? 0 : 1;

  // Eight k of a row at a time: 16 bytes of each plane.
  const std::int64_t pitch = split.blocks_k * kBlock;
  for (int e = thread; e < kBlock * kBlock / 8; e += kSplitThreads) {
    const int i = e / (kBlock / 8), k = e % (kBlock / 8) * 8;
    if (i0 + i >= split.count) continue;
    float left[8];
#pragma unroll
    for (int p = 0; p < 8; ++p) left[p] = tile[i][k + p];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      ptx::Bytes16 parts;
#pragma unroll
      for (int p = 0; p < 8; p += 2) parts.words[p / 2] = take_parts(left[p], left[p + 1]);
      ptx::store_16_bytes(split.planes + (plane * split.count + i0 + i) * pitch + k0 + k, parts);
    }
  }
}

// ---- the product -------------------------------------------------------------------------------

/// As many stages as fit.
template <int kPlanes>
struct alignas(1024) Shared {
  static constexpr int kStages = 6 / kPlanes;
  BFloat16 a[kStages][kPlanes][kM * kK];
  BFloat16 b[kStages][kPlanes][kN * kK];
  float bias[kConsumers][kN];
  float column_sums[kConsumers][ptx::kWarpgroup / ptx::kWarp][kN];
  RingBarriers<kStages> barriers;
};
static_assert(sizeof(Shared<3>) <= 227 << 10);

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  Cut cut;
};

/// The sums of the columns that a warp has 16 rows of.
template <int kColumns>
NEURON_EXT_DEVICE void store_column_sums(const float (&elements)[kColumns / 2],
                                         float (&columns)[kColumns]) {
  float sums[kColumns / 4];  // of the lane's two rows: pairs of columns, 8 from one to the next
#pragma unroll
  for (int c = 0; c < kColumns / 4; ++c) {
    sums[c] = elements[c / 2 * 4 + c % 2] + elements[c / 2 * 4 + 2 + c % 2];
  }
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  sum_over_rows(sums, lane);
#pragma unroll
  for (int s = 0; s < kColumns / 32; ++s) {
    const int c = g * (kColumns / 32) + s;
    columns[c / 2 * 8 + 2 * t + c % 2] = sums[s];
  }
}

template <int kPlanes>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_f32_kernel(const __grid_constant__ ptx::TensorMap a_map,
                         const __grid_constant__ ptx::TensorMap b_map,
                         const __grid_constant__ Problem problem) {
#if NEURON_EXT_HAS_SM90A
  using S = Shared<kPlanes>;
  S& shared = ptx::dynamic_shared<S>();
  const GemmDesc& desc = problem.desc;
  const Cut& cut = problem.cut;
  const int warpgroup = static_cast<int>(threadIdx.x) / ptx::kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % ptx::kWarpgroup;

  set_up(shared.barriers, a_map, b_map);

  const int steps = static_cast<int>((desc.k + kK - 1) / kK);
  if (warpgroup == 0) {
    fill_stages<kN>(
        shared.barriers, cut, steps, sizeof(shared.a[0]) + sizeof(shared.b[0]),
        [&](int stage, ptx::Mbarrier& full, const TilePlace& place, int step) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            // Where a plane ends, another's rows follow: they end in sums that nobody stores.
            load_tile<kM, Major::kK>(shared.a[stage][plane], a_map, full,
                                     plane * static_cast<int>(desc.m) + place.i, step * kK);
            load_tile<kN, Major::kK>(shared.b[stage][plane], b_map, full,
                                     plane * static_cast<int>(desc.n) + place.j, step * kK);
          }
        });
  } else {
    ptx::claim_registers<kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    Ring<S::kStages> ring;
    for (std::int64_t tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
      const TilePlace place = cut.place<kN>(tile);
      Bias<float, kN> bias;
      bias.load(desc, problem.at.bias, place.j, thread);

      float totals[kN / 2] = {};
      for (int step = 0; step < steps; ++step) {
        float sums[kN / 2];
        ptx::mbarrier_wait(shared.barriers.full[ring.stage], ring.parity);
        ptx::wgmma_fence();
        bool is_first = true;
#pragma unroll
        for (int order = kPlanes - 1; order >= 0; --order) {
#pragma unroll
          for (int plane = 0; plane <= order; ++plane) {
            const std::uint64_t a =
                descriptor_of(shared.a[ring.stage][plane] + consumer * kRows * kK);
            const std::uint64_t b = descriptor_of(shared.b[ring.stage][order - plane]);
#pragma unroll
            for (int kk = 0; kk < kK / 16; ++kk) {
              ptx::wgmma_64xNx16<kN, DType::kBFloat16>(sums, ptx::advance(a, kk * kStep<Major::kK>),
                                                       ptx::advance(b, kk * kStep<Major::kK>),
                                                       !is_first);
              is_first = false;
            }
          }
        }
        ptx::wgmma_commit();
        // Meanwhile the tensor cores have the other consumer's.
        ptx::wgmma_wait<0>();
        if (thread == 0) ptx::mbarrier_arrive(shared.barriers.empty[ring.stage]);
        ring.advance();
#pragma unroll
        for (int e = 0; e < kN / 2; ++e) totals[e] += sums[e];
      }

      ptx::barrier_sync(warpgroup, ptx::kWarpgroup);  // the last tile's bias has been read
      bias.store(shared.bias[consumer], thread);
      ptx::barrier_sync(warpgroup, ptx::kWarpgroup);
      // A warp stores 8 rows of 32 bytes at a time, sectors of memory.
      const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
      const std::int64_t i0 = place.i + consumer * kRows + thread / ptx::kWarp * 16 + g;
      float* const d = static_cast<float*>(problem.at.d);
      const float* const saved = static_cast<const float*>(problem.at.d_saved);
#pragma unroll
      for (int e = 0; e < kN / 2; ++e) {
        const int column = e / 4 * 8 + 2 * t + e % 2;
        const std::int64_t i = i0 + e / 2 % 2 * 8, j = place.j + column;
        const float sum = totals[e] + shared.bias[consumer][column];
        totals[e] = 0;
        if (i < desc.m && j < desc.n) {
          totals[e] = desc.has_epilogue_gradient() ? gradient(desc.epilogue_gradient, sum,
                                                              saved[i * desc.d_saved_stride_m + j])
                                                   : apply<float>(desc.epilogue, sum);
          d[i * desc.d_stride_m + j] = totals[e];
        }
      }
      if (desc.has_d_sum) {
        auto& column_sums = shared.column_sums[consumer];
        store_column_sums(totals, column_sums[thread / ptx::kWarp]);
        ptx::barrier_sync(warpgroup, ptx::kWarpgroup);
        const std::int64_t i = place.i + consumer * kRows, j = place.j + thread;
        static_assert(kN == ptx::kWarpgroup);
        if (i < desc.m && j < desc.n) {
          float sum = 0;
          for (const auto& of_warp : column_sums) sum += of_warp[thread];
          static_cast<float*>(problem.at.d_sum)[i / kRows * desc.n + j] = sum;
        }
      }
    }
  }
#endif
}

// ---- launch ------------------------------------------------------------------------------------

/// Where in the workspace, in bytes, what begins; each at a multiple of 256.
struct Layout {
  std::int64_t a_planes, b_planes, a_flags, b_flags, end;
};

Layout layout_of(const GemmDesc& desc) {
  Layout layout;
  std::int64_t next = 0;
  const auto place = [&](std::int64_t bytes) {
    const std::int64_t at = next;
    next += divide_up(bytes, 256) * 256;
    return at;
  };
  place(static_cast<std::int64_t>(prologue_workspace(desc)));
  const std::int64_t row = planes_for(desc.precision) * padded_k(desc) * 2;
  const std::int64_t blocks_k = padded_k(desc) / kBlock;
  layout.a_planes = place(desc.m * row);
  layout.b_planes = place(desc.n * row);
  layout.a_flags = place(divide_up(desc.m, kBlock) * blocks_k * 4);
  layout.b_flags = place(divide_up(desc.n, kBlock) * blocks_k * 4);
  layout.end = next;
  return layout;
}

/// Whether few tiles on tensor cores take no longer than what gemm_simt makes of the product, which
/// occupies a GPU with smaller tiles and chunks of k.
bool is_worth_tensor_cores(const GemmDesc& desc) {
  constexpr std::int64_t kWholeGpu = 128, kSide = 64, kChunk = 512;
  constexpr std::int64_t kGain = 4;  // of six products to one, at 60 % of the multiply-adds' peak
  const auto tiles = [&](std::int64_t side) {
    return divide_up(desc.deciding_m(), side) * divide_up(desc.n, side);
  };
  const std::int64_t others = tiles(kSide) * std::max<std::int64_t>(1, desc.k / kChunk);
  return tiles(kM) * kGain >= std::min(kWholeGpu, others);
}

bool accepts(const GemmDesc& desc, const GemmPointers&, const Device&) {
  // Below, splitting costs more than it gains.
  constexpr std::int64_t kLeast = 128, kLeastK = 256;
  constexpr std::int64_t kMost = kLargest / 3;  // rows of all planes
  const std::int64_t blocks = divide_up(std::max(desc.m, desc.n), kBlock);
  return desc.precision != Precision::kStrict && desc.deciding_m() >= kLeast && desc.n >= kLeast &&
         desc.k >= kLeastK && std::max(desc.m, desc.n) <= kMost && desc.k <= kLargest &&
         blocks * (padded_k(desc) / kBlock) <= kLargest && is_worth_tensor_cores(desc);
}

std::size_t workspace(const GemmDesc& desc, const Device&) {
  return static_cast<std::size_t>(layout_of(desc).end);
}

template <int kPlanes>
int run_as(const GemmDesc& desc, const GemmPointers& at, const Split& a, const Split& b,
           const Device& device, Stream stream) {
  ptx::TensorMap maps[2];
  for (const Split* split : {&a, &b}) {
    const auto blocks = divide_up(split->count, kBlock) * split->blocks_k;
    int error =
        ptx::launch(split_kernel<kPlanes>,
                    {dim3(static_cast<unsigned>(blocks)), dim3(kSplitThreads)}, stream, *split);
    if (error != 0) return error;
    error = ptx::make_tensor_map({.base = split->planes,
                                  .dtype = DType::kBFloat16,
                                  .rows = kPlanes * split->count,
                                  .columns = split->blocks_k * kBlock,
                                  .row_stride = split->blocks_k * kBlock,
                                  .box_rows = split == &a ? kM : kN,
                                  .box_columns = kK},
                                 &maps[split == &a ? 0 : 1]);
    if (error != 0) return error;
  }
  const Problem problem{desc, at, make_cut(desc, kN)};
  const auto blocks =
      static_cast<unsigned>(std::min<std::int64_t>(problem.cut.tiles, device.sm_count));
  const int error = ptx::launch(gemm_sm90_f32_kernel<kPlanes>,
                                {dim3(blocks), dim3(kThreads), sizeof(Shared<kPlanes>)}, stream,
                                maps[0], maps[1], problem);
  if (error != 0) return error;
  return run_simt_where(desc, at, {a.flags, b.flags, a.blocks_k}, stream);
}

int run(const GemmDesc& whole_desc, const GemmPointers& whole_at, void* workspace,
        const Device& device, Stream stream) {
  const Layout layout = layout_of(whole_desc);
  GemmDesc desc = whole_desc;
  GemmPointers at = whole_at;
  const int error = run_prologue(desc, at, workspace, stream);
  if (error != 0) return error;
  const auto split = [&](const void* from, std::int64_t count, std::int64_t stride,
                         std::int64_t stride_k, std::int64_t planes, std::int64_t flags) {
    std::byte* const bytes = static_cast<std::byte*>(workspace);
    return Split{static_cast<const float*>(from),
                 count,
                 desc.k,
                 stride,
                 stride_k,
                 reinterpret_cast<std::uint16_t*>(bytes + planes),
                 reinterpret_cast<std::uint32_t*>(bytes + flags),
                 padded_k(desc) / kBlock};
  };
  const Split a =
      split(at.a, desc.m, desc.a_stride_m, desc.a_stride_k, layout.a_planes, layout.a_flags);
  const Split b =
      split(at.b, desc.n, desc.b_stride_n, desc.b_stride_k, layout.b_planes, layout.b_flags);
  switch (planes_for(desc.precision)) {
    case 1:
      return run_as<1>(desc, at, a, b, device, stream);
    case 2:
      return run_as<2>(desc, at, a, b, device, stream);
    default:
      return run_as<3>(desc, at, a, b, device, stream);
  }
}

std::int64_t d_sum_rows(const GemmDesc&) {
  static_assert(kRows == kFlagBlock);  // so that run_simt_where writes whole sums
  return kRows;
}

constexpr DType kDTypes[] = {DType::kFloat32};

}  // namespace

const GemmKernel gemm_sm90_f32 = {.name = "gemm_sm90_f32",
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
