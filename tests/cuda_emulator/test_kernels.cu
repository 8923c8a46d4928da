#include <cstddef>

#include "ptx/copy.cuh"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/numbers.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "test_kernels.h"

namespace neuron_ext::emulator_tests {
namespace {

namespace ptx = cuda::ptx;

unsigned blocks_for(int count, int size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

// ---- simt --------------------------------------------------------------------------------------

constexpr int kSimtTile = 16, kSimtK = 8;

__global__ void __launch_bounds__(kSimtTile* kSimtTile)
    multiply_simt_kernel(const float* a, const float* b, float* d, int m, int n, int k,
                         Mistake mistake) {
  NEURON_EXT_SHARED(float, a_tile, [kSimtTile][kSimtK + 1]);
  NEURON_EXT_SHARED(float, b_tile, [kSimtTile][kSimtK + 1]);
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int i = static_cast<int>(blockIdx.y) * kSimtTile + ty;
  const int j = static_cast<int>(blockIdx.x) * kSimtTile + tx;
  if (mistake == Mistake::kSimtEarlyReturn && (i >= m || j >= n)) return;
  float sum = mistake == Mistake::kSimtReadsItsOutput && i < m && j < n ? d[i * n + j] : 0;
  for (int k0 = 0; k0 < k; k0 += kSimtK) {
    if (tx < kSimtK) {
      const int p = k0 + tx, column = static_cast<int>(blockIdx.x) * kSimtTile + ty;
      const bool in_k = p < k || mistake == Mistake::kSimtReadsPastK;
      const int row = mistake == Mistake::kSimtTileOverrun && ty == kSimtTile - 1 ? ty + 1 : ty;
      if (mistake != Mistake::kSimtNoZeroFill || p < k) {
        a_tile[row][tx] = i < m && in_k ? a[i * k + p] : 0;
        b_tile[ty][tx] = column < n && p < k ? b[column * k + p] : 0;
      }
    }
    if (mistake == Mistake::kSimtBarrierInBranch) {
      if (tx % 2 == 0) ptx::block_sync();
    } else if (mistake != Mistake::kSimtNoBarrierAfterFill) {
      ptx::block_sync();
    }
    for (int p = 0; p < kSimtK; ++p) {
      const float* const b_row =
          mistake == Mistake::kSimtWrongPitch ? &b_tile[0][0] + tx * kSimtK : &b_tile[tx][0];
      sum = ptx::fma(a_tile[ty][p], b_row[p], sum);
    }
    if (mistake != Mistake::kSimtNoBarrierBeforeRefill) ptx::block_sync();
  }
  const int stored = mistake == Mistake::kSimtTwoWriters && tx == 1 ? j - 1 : j;
  if (i < m && (stored < n || (mistake == Mistake::kSimtWritesPastN && stored == n))) {
    d[i * n + stored] = sum;
  }
}

// ---- mma ---------------------------------------------------------------------------------------

constexpr int kMmaTile = 32, kMmaK = 32, kMmaStages = 3;
constexpr int kMmaPitch = kMmaK + 8;  // rows of 80 bytes: the 8 of a matrix lie in different banks

/// 4 warps, each with 16 x 16 of the tile.
__global__ void __launch_bounds__(128)
    multiply_mma_kernel(const BFloat16* a, const BFloat16* b, float* d, int m, int n, int k,
                        bool b_is_kn, Mistake mistake) {
  NEURON_EXT_SHARED(BFloat16, a_tiles, [kMmaStages][kMmaTile][kMmaPitch]);
  NEURON_EXT_SHARED(BFloat16, b_tiles, [kMmaStages][kMmaTile][kMmaPitch]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int i0 = static_cast<int>(blockIdx.y) * kMmaTile;
  const int j0 = static_cast<int>(blockIdx.x) * kMmaTile;
  const int wi = warp / 2 * 16, wj = warp % 2 * 16;
  const int steps = (k + kMmaK - 1) / kMmaK;
  const int row = thread / 4, column = thread % 4 * 8;  // 32 rows of 4 pieces of 8 elements
  const int pitch = (k + 7) / 8 * 8;

  const auto load = [&](int stage, int k0) {
    const bool a_valid = i0 + row < m && k0 + column < k;
    const bool reads_anyway = mistake == Mistake::kMmaCopyOutOfBounds;
    const int shift = mistake == Mistake::kMmaCopyMisaligned ? 4 : 0;
    const int left = mistake == Mistake::kMmaCopiesPastK ? 8 : k - k0 - column;
    const int bytes = left < 8 ? 2 * left : 16;
    ptx::copy_part_async<16>(&a_tiles[stage][row][column + shift],
                             a_valid || reads_anyway ? a + (i0 + row) * pitch + k0 + column : a,
                             a_valid        ? bytes
                             : reads_anyway ? 16
                                            : 0);
    if (b_is_kn) {  // rows are k
      const bool valid = k0 + row < k && j0 + column < n;
      ptx::copy_async<16>(&b_tiles[stage][row][column],
                          valid ? b + (k0 + row) * n + j0 + column : b, valid);
    } else {
      const bool valid = j0 + row < n && k0 + column < k;
      ptx::copy_part_async<16>(&b_tiles[stage][row][column],
                               valid ? b + (j0 + row) * pitch + k0 + column : b, valid ? bytes : 0);
    }
  };
  const auto commit = [&] {
    if (mistake != Mistake::kMmaNoCommit) ptx::copy_async_commit();
  };

  float sums[2][4] = {};
  for (int stage = 0; stage < kMmaStages - 1; ++stage) {
    if (stage < steps) load(stage, stage * kMmaK);
    commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (mistake == Mistake::kMmaWaitsForOneTooFew) {
      ptx::copy_async_wait<kMmaStages - 1>();
    } else if (mistake != Mistake::kMmaNoWait) {
      ptx::copy_async_wait<kMmaStages - 2>();
    }
    if (mistake != Mistake::kMmaNoBarrierAfterWait) ptx::block_sync();
    const int stage = step % kMmaStages;
    const int next = step + kMmaStages - (mistake == Mistake::kMmaRefillsTooEarly ? 3 : 1);
    if (mistake == Mistake::kMmaRefillsTooEarly) {
      if (next + kMmaStages < steps) load(next % kMmaStages, (next + kMmaStages) * kMmaK);
    } else if (next < steps) {
      load(next % kMmaStages, next * kMmaK);  // the stage that was read one step ago
    }
    commit();
    for (int kk = 0; kk < kMmaK; kk += 16) {
      // Matrices 0 to 3 of A: rows 0-7 and 8-15, then the same of the next 8 k.
      int a_row = wi + lane % 16, a_column = kk + lane / 16 * 8;
      if (mistake == Mistake::kMmaRowsExchanged) a_row = wi + (lane % 16 + 8) % 16;
      if (mistake == Mistake::kMmaRowMisaligned) a_column += 4;
      const int a_stage = mistake == Mistake::kMmaRowOutOfBounds ? kMmaStages : stage;
      std::uint32_t a_registers[4], b_registers[4];
      ptx::load_matrices(a_registers,
                         &a_tiles[0][0][0] + (a_stage * kMmaTile + a_row) * kMmaPitch + a_column);
      if (b_is_kn) {
        const BFloat16* const b_row = &b_tiles[stage][kk + lane % 16][wj + lane / 16 * 8];
        if (mistake == Mistake::kMmaNotTransposed) {
          ptx::load_matrices(b_registers, b_row);
        } else {
          ptx::load_matrices<true>(b_registers, b_row);
        }
      } else {
        ptx::load_matrices(b_registers,
                           &b_tiles[stage][wj + lane / 16 * 8 + lane % 8][kk + lane / 8 % 2 * 8]);
      }
      for (int j = 0; j < 2; ++j) {
        std::uint32_t b_fragment[2] = {b_registers[2 * j], b_registers[2 * j + 1]};
        if (mistake == Mistake::kMmaRegistersExchanged) b_fragment[0] = b_registers[2 * j + 1];
        if (mistake != Mistake::kMmaInBranch || lane < 16) {
          ptx::mma_16x8x16<BFloat16>(sums[j], a_registers, b_fragment);
        }
      }
    }
  }
  if (mistake == Mistake::kMmaNeverWaitsForLast) {
    ptx::copy_async<16>(&a_tiles[0][row][column], a, false);
    ptx::copy_async_commit();
  } else {
    ptx::copy_async_wait<0>();
  }
  for (int j = 0; j < 2; ++j) {
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + wi + lane / 4 + e / 2 * 8,
                column_d = j0 + wj + 8 * j + lane % 4 * 2 + e % 2;
      if (i < m && column_d < n) d[i * n + column_d] = sums[j][e];
    }
  }
}

// ---- wgmma -------------------------------------------------------------------------------------

constexpr int kWgmmaTile = 64, kWgmmaK = 64, kWgmmaStages = 3;

struct alignas(1024) WgmmaShared {
  BFloat16 a[kWgmmaStages][kWgmmaTile * kWgmmaK];
  BFloat16 b[kWgmmaStages][kWgmmaTile * kWgmmaK];
  BFloat16 d[kWgmmaTile * kWgmmaTile];
  ptx::Mbarrier full[kWgmmaStages], empty[kWgmmaStages];
};

/// A persistent block of two warpgroups: the first loads, the second multiplies and stores.
template <ptx::Major kMajorA, ptx::Major kMajorB>
__global__ void __launch_bounds__(2 * ptx::kWarpgroup, 1)
    multiply_wgmma_kernel(const __grid_constant__ ptx::TensorMap a_map,
                          const __grid_constant__ ptx::TensorMap b_map,
                          const __grid_constant__ ptx::TensorMap d_map, int m, int n, int k,
                          bool doubles_a, Mistake mistake) {
#if NEURON_EXT_HAS_SM90A
  WgmmaShared& shared = ptx::dynamic_shared<WgmmaShared>();
  const int thread = static_cast<int>(threadIdx.x) % ptx::kWarpgroup;
  const bool is_producer = static_cast<int>(threadIdx.x) < ptx::kWarpgroup;
  const int tiles_n = (n + kWgmmaTile - 1) / kWgmmaTile;
  const int tiles = tiles_n * ((m + kWgmmaTile - 1) / kWgmmaTile);
  const int steps = (k + kWgmmaK - 1) / kWgmmaK;
  // Where a stage begins, in elements.
  const int shift = mistake == Mistake::kWgmmaStageMisaligned ? 256 : 0;

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(a_map);
    for (int stage = 0; stage < kWgmmaStages; ++stage) {
      ptx::mbarrier_init(shared.full[stage], 1);
      ptx::mbarrier_init(shared.empty[stage], mistake == Mistake::kWgmmaTooFewArrivals ? 2 : 1);
    }
    if (mistake != Mistake::kWgmmaNoInitFence) ptx::mbarrier_init_fence();
  }
  if (mistake != Mistake::kWgmmaNoBarrierAfterInit) ptx::block_sync();

  int stage = 0;
  std::uint32_t parity = 0;
  const auto advance_stage = [&] {
    if (++stage < kWgmmaStages) return;
    stage = 0;
    if (mistake != Mistake::kWgmmaParityNotFlipped) parity ^= 1;
  };

  if (is_producer) {
    ptx::release_registers<40>();
    if (thread == 0) {
      for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
           tile += static_cast<int>(gridDim.x)) {
        const int i0 = tile / tiles_n * kWgmmaTile, j0 = tile % tiles_n * kWgmmaTile;
        for (int step = 0; step < steps; ++step) {
          const int p0 = step * kWgmmaK;
          if (mistake != Mistake::kWgmmaNoWaitForEmpty) {
            ptx::mbarrier_wait(shared.empty[stage], parity ^ 1);
          }
          std::uint32_t bytes = sizeof(shared.a[0]) + sizeof(shared.b[0]);
          if (mistake == Mistake::kWgmmaExpectsTooFewBytes) bytes -= sizeof(shared.b[0]);
          if (mistake == Mistake::kWgmmaExpectsTooManyBytes) bytes += sizeof(shared.b[0]);
          ptx::mbarrier_arrive_expecting(shared.full[stage], bytes);
          const int a_row = i0 + (mistake == Mistake::kWgmmaWrongBox ? 8 : 0);
          if constexpr (kMajorA == ptx::Major::kK) {
            ptx::tma_load(shared.a[stage] + shift, a_map, shared.full[stage], a_row, p0);
          } else {
            ptx::tma_load(shared.a[stage] + shift, a_map, shared.full[stage], p0, a_row);
          }
          if constexpr (kMajorB == ptx::Major::kK) {
            ptx::tma_load(shared.b[stage], b_map, shared.full[stage], j0, p0);
          } else {
            ptx::tma_load(shared.b[stage], b_map, shared.full[stage], p0, j0);
          }
          advance_stage();
        }
      }
    }
  } else {
    ptx::claim_registers<232>();
    const auto release = [&](int released) {
      if (thread == 0 || mistake == Mistake::kWgmmaTooManyArrivals) {
        ptx::mbarrier_arrive(shared.empty[released]);
      }
    };
    // From one step of 16 k to the next: 32 bytes along a row, or 16 rows.
    constexpr int kStepA = kMajorA == ptx::Major::kK ? 32 : 16 * 128;
    constexpr int kStepB = kMajorB == ptx::Major::kK ? 32 : 16 * 128;
    const int block_stride = mistake == Mistake::kWgmmaWrongBlockStride ? 512 : 1024;
    const ptx::Swizzle swizzle =
        mistake == Mistake::kWgmmaWrongSwizzle ? ptx::Swizzle::k64Bytes : ptx::Swizzle::k128Bytes;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const int i0 = tile / tiles_n * kWgmmaTile, j0 = tile % tiles_n * kWgmmaTile;
      float sums[kWgmmaTile / 2];
      int previous = -1;
      for (int step = 0; step < steps; ++step) {
        if (mistake != Mistake::kWgmmaNoWaitForFull) {
          const bool other = mistake == Mistake::kWgmmaWrongParity;
          ptx::mbarrier_wait(shared.full[stage], parity ^ (other ? 1 : 0));
        }
        if (doubles_a) {
          for (int e = thread; e < kWgmmaTile * kWgmmaK; e += ptx::kWarpgroup) {
            BFloat16& x = shared.a[stage][e];
            x = ptx::narrow<BFloat16>(2 * ptx::widen(x));
          }
          if (mistake != Mistake::kWgmmaNoProxyFence) ptx::async_proxy_fence();
          if (mistake != Mistake::kWgmmaNoBarrierAfterRewrite) {
            ptx::barrier_sync(1, ptx::kWarpgroup);
          }
        }
        const std::uint64_t a =
            ptx::matrix_descriptor(shared.a[stage] + shift, block_stride, 0, swizzle);
        const std::uint64_t b =
            ptx::matrix_descriptor(shared.b[stage], 1024, 0, ptx::Swizzle::k128Bytes);
        if (mistake != Mistake::kWgmmaNoProductFence) ptx::wgmma_fence();
        for (int kk = 0; kk < kWgmmaK / 16; ++kk) {
          const int a_step = mistake == Mistake::kWgmmaWrongStep ? kStepA / 2 : kStepA;
          const std::uint64_t a_step_descriptor = ptx::advance(a, kk * a_step);
          const std::uint64_t b_step_descriptor = ptx::advance(b, kk * kStepB);
          const bool accumulate = step > 0 || kk > 0;
          if (mistake == Mistake::kWgmmaWrongMajor) {
            ptx::wgmma_64xNx16<kWgmmaTile, DType::kBFloat16, ptx::Major::kMN, kMajorB>(
                sums, ptx::advance(a, kk * 2048), b_step_descriptor, accumulate);
          } else {
            ptx::wgmma_64xNx16<kWgmmaTile, DType::kBFloat16, kMajorA, kMajorB>(
                sums, a_step_descriptor, b_step_descriptor, accumulate);
          }
        }
        ptx::wgmma_commit();
        if (mistake == Mistake::kWgmmaReleasesTooEarly) {
          release(stage);
        } else {
          ptx::wgmma_wait<1>();
          if (previous >= 0) release(previous);
          previous = stage;
        }
        advance_stage();
      }
      if (mistake != Mistake::kWgmmaReadsSumsTooEarly &&
          mistake != Mistake::kWgmmaNeverWaitsForProducts) {
        ptx::wgmma_wait<0>();
      }
      // The box of the tile before has been read by now, or is waited for.
      if (thread == 0 && mistake != Mistake::kWgmmaRewritesStoredBox) {
        ptx::tma_store_wait_read<0>();
      }
      ptx::barrier_sync(1, ptx::kWarpgroup);
      const int lane = thread % 32, warp = thread / 32;
      for (int j = 0; j < kWgmmaTile / 16; ++j) {
        std::uint32_t registers[4];  // rows 0-7 and 8-15 of 8 columns, then of the next 8
        for (int r = 0; r < 4; ++r) {
          const int e = 4 * (2 * j + r / 2) + 2 * (r % 2);
          registers[r] = ptx::narrow_pair<BFloat16>(sums[e], sums[e + 1]);
        }
        const int row = 16 * warp + lane % 16, column = 16 * j + lane / 16 * 8;
        ptx::store_matrices(shared.d + row * kWgmmaTile + column, registers);
      }
      if (mistake == Mistake::kWgmmaReadsSumsTooEarly) ptx::wgmma_wait<0>();
      if (steps > 0 && mistake != Mistake::kWgmmaReleasesTooEarly) release(previous);
      if (mistake != Mistake::kWgmmaNoProxyFenceBeforeStore) ptx::async_proxy_fence();
      if (mistake != Mistake::kWgmmaNoBarrierBeforeStore) ptx::barrier_sync(1, ptx::kWarpgroup);
      if (thread == 0) {
        ptx::tma_store(d_map, shared.d, i0, j0);
        ptx::tma_store_commit();
      }
    }
    if (thread == 0 && mistake != Mistake::kWgmmaNeverWaitsForStore) {
      ptx::tma_store_wait_read<0>();
    }
  }
#endif
}

// ---- sums --------------------------------------------------------------------------------------

__global__ void sum_split_kernel(const float* x, int n, bool first_waits, float* parts,
                                 std::uint32_t* counter, float* y, Mistake mistake) {
  NEURON_EXT_SHARED(float, sums, [32]);
  NEURON_EXT_SHARED(bool, is_last, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  float sum = 0;
  for (int i = block * 32 + thread; i < n; i += blocks * 32) sum += x[i];
  sums[thread] = sum;
  ptx::block_sync();
  if (thread == 0) {
    float part = 0;
    for (int i = 0; i < 32; ++i) part += sums[i];
    std::uint32_t before = 0;
    if (mistake == Mistake::kSplitCountsBeforeWriting) before = ptx::fetch_add(counter, 1);
    parts[block] = part;
    if (mistake != Mistake::kSplitCountsBeforeWriting) before = ptx::fetch_add(counter, 1);
    is_last[0] = first_waits ? block == 0 : before == gridDim.x - 1;
    if (mistake == Mistake::kSplitNoWaitForParts) is_last[0] = block == blocks - 1;
    if (first_waits && block == 0) {
      ptx::wait_for_at_least(counter,
                             gridDim.x + (mistake == Mistake::kSplitCounterNeverReached ? 1u : 0u));
    }
  }
  ptx::block_sync();
  if (is_last[0] && thread == 31) {  // another thread than the one that counted
    float total = 0;
    for (int i = 0; i < blocks; ++i) total += parts[i];
    y[0] = total;
  }
}

__global__ void sum_warps_kernel(const float* x, float* y, Mistake mistake) {
  NEURON_EXT_SHARED(float, values, [32][32]);
  const int thread = static_cast<int>(threadIdx.x), lane = ptx::lane_id_now(), warp = thread / 32;
  values[warp][lane] = x[thread];
  if (mistake != Mistake::kWarpNoSync) ptx::warp_sync();
  float sum = values[warp][31 - lane];
  if (mistake == Mistake::kWarpShuffleInBranch) {
    if (lane < 16) sum += ptx::shuffle_xor(sum, 16);
  } else {
    sum += ptx::shuffle_xor(sum, 16);
  }
  sum += ptx::shuffle_down(sum, 8);
  sum += ptx::shuffle_down(sum, 4);
  sum += ptx::shuffle_down(sum, 2);
  sum += ptx::shuffle_down(sum, 1);
  const float first = ptx::shuffle(sum, 0);
  const bool all_agree = ptx::ballot(first == first) == ptx::kAllLanes;
  if (ptx::block_all(all_agree) && lane == 5) y[warp] = first;
}

// ---- single instructions -----------------------------------------------------------------------

template <class T>
__device__ std::uint32_t pair_of(double low, double high) {
  return ptx::narrow_pair<T>(static_cast<float>(low), static_cast<float>(high));
}

template <class T>
__global__ void multiply_warp_16_bits(const double* a, const double* b, double* d) {
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  std::uint32_t a_registers[4], b_registers[2];
  for (int r = 0; r < 4; ++r) {
    const double* const pair = a + (g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2);
    a_registers[r] = pair_of<T>(pair[0], pair[1]);
  }
  for (int r = 0; r < 2; ++r) {
    const double* const pair = b + (2 * t + 8 * r) * 8 + g;
    b_registers[r] = pair_of<T>(pair[0], pair[8]);
  }
  float sums[4];
  for (int e = 0; e < 4; ++e) {
    sums[e] = static_cast<float>(d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2]);
  }
  ptx::mma_16x8x16<T>(sums, a_registers, b_registers);
  for (int e = 0; e < 4; ++e) d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = sums[e];
}

__global__ void multiply_warp_tf32(const double* a, const double* b, double* d) {
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  std::uint32_t a_registers[4], b_registers[2];
  for (int r = 0; r < 4; ++r) {
    a_registers[r] =
        ptx::narrow_tf32(static_cast<float>(a[(g + 8 * (r % 2)) * 8 + t + 4 * (r / 2)]));
  }
  for (int r = 0; r < 2; ++r) {
    b_registers[r] = ptx::narrow_tf32(static_cast<float>(b[(t + 4 * r) * 8 + g]));
  }
  float sums[4];
  for (int e = 0; e < 4; ++e) {
    sums[e] = static_cast<float>(d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2]);
  }
  ptx::mma_16x8x8_tf32(sums, a_registers, b_registers);
  for (int e = 0; e < 4; ++e) d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = sums[e];
}

__global__ void multiply_warp_f64_narrow(const double* a, const double* b, double* d) {
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  double sums[2] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1]};
  ptx::mma_8x8x4(sums, a[g * 4 + t], b[t * 8 + g]);
  for (int e = 0; e < 2; ++e) d[g * 8 + 2 * t + e] = sums[e];
}

__global__ void multiply_warp_f64_tall(const double* a, const double* b, double* d) {
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  double a_elements[2], sums[4];
  for (int e = 0; e < 2; ++e) a_elements[e] = a[(g + 8 * e) * 4 + t];
  for (int e = 0; e < 4; ++e) sums[e] = d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2];
  ptx::mma_16x8x4(sums, a_elements, b[t * 8 + g]);
  for (int e = 0; e < 4; ++e) d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = sums[e];
}

__global__ void multiply_warp_f64_wide(const double* a, const double* b, double* d) {
#if NEURON_EXT_HAS_SM90A
  const int lane = ptx::lane_id(), g = lane / 4, t = lane % 4;
  double a_elements[8], b_elements[4], sums[4];
  for (int e = 0; e < 8; ++e) a_elements[e] = a[(g + 8 * (e % 2)) * 16 + t + 4 * (e / 2)];
  for (int e = 0; e < 4; ++e) b_elements[e] = b[(t + 4 * e) * 8 + g];
  for (int e = 0; e < 4; ++e) sums[e] = d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2];
  ptx::mma_16x8x16(sums, a_elements, b_elements);
  for (int e = 0; e < 4; ++e) d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = sums[e];
#endif
}

template <bool kLoadTransposed, bool kStoreTransposed>
__global__ void move_matrices_kernel(const std::uint16_t* x, std::uint16_t* y,
                                     std::uint32_t* registers_out) {
#if NEURON_EXT_HAS_SM90A
  NEURON_EXT_SHARED(std::uint16_t, rows, [32][8]);
  NEURON_EXT_SHARED(std::uint16_t, moved, [32][8]);
  const int lane = ptx::lane_id();
  for (int e = 0; e < 8; ++e) rows[lane][e] = x[8 * lane + e];
  ptx::warp_sync();
  std::uint32_t registers[4];
  ptx::load_matrices<kLoadTransposed>(registers, rows[lane]);
  for (int r = 0; r < 4; ++r) registers_out[4 * lane + r] = registers[r];
  std::uint32_t first_two[2];
  ptx::load_matrices<kLoadTransposed>(first_two, rows[lane]);
  if (first_two[0] != registers[0] || first_two[1] != registers[1]) registers[0] = ~0u;
  ptx::store_matrices<kStoreTransposed>(moved[lane], registers);
  ptx::warp_sync();
  for (int e = 0; e < 8; ++e) y[8 * lane + e] = moved[lane][e];
#endif
}

struct alignas(1024) OneTileShared {
  std::uint16_t a[4 * 64 * 64];  // the parts of an operand along its contiguous index
  std::uint16_t b[256 * 64];
  ptx::Mbarrier loaded;
};

template <int kN, DType kDType, ptx::Major kMajorA, ptx::Major kMajorB, bool kAInRegisters>
__global__ void __launch_bounds__(ptx::kWarpgroup, 1)
    multiply_one_tile_kernel(const __grid_constant__ ptx::TensorMap a_map,
                             const __grid_constant__ ptx::TensorMap b_map,
                             const std::uint16_t* a_global, int span, float* d) {
#if NEURON_EXT_HAS_SM90A
  constexpr int kM = 64, kK = 64;
  // Boxes lie one after the other along the contiguous index, each with all of the other's rows.
  constexpr int kRowsA = kMajorA == ptx::Major::kK ? kM : kK;
  constexpr int kRowsB = kMajorB == ptx::Major::kK ? kN : kK;
  constexpr int kColumnsA = kM * kK / kRowsA, kColumnsB = kN * kK / kRowsB;
  OneTileShared& shared = ptx::dynamic_shared<OneTileShared>();
  const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
  const int width = span / 2;  // elements of a span
  const ptx::Swizzle swizzle = span == 128  ? ptx::Swizzle::k128Bytes
                               : span == 64 ? ptx::Swizzle::k64Bytes
                                            : ptx::Swizzle::k32Bytes;
  if (thread == 0) {
    ptx::mbarrier_init(shared.loaded, 1);
    ptx::mbarrier_init_fence();
  }
  ptx::block_sync();
  if (thread == 0) {
    // A box is as wide as the span even where B has fewer columns: the rest is zeros.
    const int boxes_b = (kColumnsB + width - 1) / width;
    ptx::mbarrier_arrive_expecting(
        shared.loaded, static_cast<std::uint32_t>(2 * (kM * kK + boxes_b * width * kRowsB)));
    for (int c = 0; c < kColumnsA; c += width) {
      ptx::tma_load(shared.a + c * kRowsA, a_map, shared.loaded, 0, c);
    }
    for (int c = 0; c < kColumnsB; c += width) {
      ptx::tma_load(shared.b + c * kRowsB, b_map, shared.loaded, 0, c);
    }
  }
  std::uint32_t fragments[kK / 16][4];
  if constexpr (kAInRegisters) {
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = thread / 32 * 16 + g + 8 * (r % 2);
        const std::uint16_t* const pair = a_global + row * kK + 16 * kk + 2 * t + 8 * (r / 2);
        fragments[kk][r] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
      }
    }
  }
  ptx::mbarrier_wait(shared.loaded, 0);
  float sums[kN / 2];
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kK / 16; ++kk) {
    // Along K, 16 k are 32 bytes, in the box that has them; else 16 rows.
    const int k0 = 16 * kk;
    const int along = k0 % width, box = k0 - along;
    const std::uint64_t b = ptx::matrix_descriptor(
        shared.b + (kMajorB == ptx::Major::kK ? box * kRowsB + along : k0 * width), 8 * span,
        span * kRowsB, swizzle);
    if constexpr (kAInRegisters) {
      ptx::wgmma_64xNx16<kN, kDType, kMajorB>(sums, fragments[kk], b, kk > 0);
    } else {
      const std::uint64_t a = ptx::matrix_descriptor(
          shared.a + (kMajorA == ptx::Major::kK ? box * kRowsA + along : k0 * width), 8 * span,
          span * kRowsA, swizzle);
      ptx::wgmma_64xNx16<kN, kDType, kMajorA, kMajorB>(sums, a, b, kk > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int e = 0; e < kN / 2; ++e) {
    d[(thread / 32 * 16 + g + 8 * (e / 2 % 2)) * kN + e / 4 * 8 + 2 * t + e % 2] = sums[e];
  }
#endif
}

struct alignas(1024) BoxShared {
  float box[8 * 32];
  ptx::Mbarrier loaded;
};

__global__ void load_box_kernel(const __grid_constant__ ptx::TensorMap map, int elements, int row,
                                int column, float* y) {
#if NEURON_EXT_HAS_SM90A
  BoxShared& shared = ptx::dynamic_shared<BoxShared>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared.loaded, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expecting(shared.loaded, static_cast<std::uint32_t>(4 * elements));
    ptx::tma_load(shared.box, map, shared.loaded, row, column);
  }
  ptx::block_sync();
  ptx::mbarrier_wait(shared.loaded, 0);
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += 32) y[i] = shared.box[i];
#endif
}

ptx::Swizzle swizzle_of(int bytes) {
  return bytes == 128  ? ptx::Swizzle::k128Bytes
         : bytes == 64 ? ptx::Swizzle::k64Bytes
         : bytes == 32 ? ptx::Swizzle::k32Bytes
                       : ptx::Swizzle::kNone;
}

}  // namespace

int multiply_simt(const Product& p, Mistake mistake, void* stream) {
  return ptx::launch(
      multiply_simt_kernel,
      {dim3(blocks_for(p.n, kSimtTile), blocks_for(p.m, kSimtTile)), dim3(kSimtTile, kSimtTile)},
      stream, static_cast<const float*>(p.a), static_cast<const float*>(p.b),
      static_cast<float*>(p.d), p.m, p.n, p.k, mistake);
}

int multiply_mma(const Product& p, bool b_is_kn, Mistake mistake, void* stream) {
  return ptx::launch(multiply_mma_kernel,
                     {dim3(blocks_for(p.n, kMmaTile), blocks_for(p.m, kMmaTile)), dim3(128)},
                     stream, static_cast<const BFloat16*>(p.a), static_cast<const BFloat16*>(p.b),
                     static_cast<float*>(p.d), p.m, p.n, p.k, b_is_kn, mistake);
}

int multiply_wgmma(const Product& p, const WgmmaVariant& variant, Mistake mistake, void* stream) {
  const auto map_of = [](const void* base, int rows, int columns, ptx::Swizzle swizzle,
                         ptx::TensorMap* map) {
    return ptx::make_tensor_map({.base = base,
                                 .dtype = DType::kBFloat16,
                                 .rows = rows,
                                 .columns = columns,
                                 .row_stride = columns,
                                 .box_rows = kWgmmaTile,
                                 .box_columns = kWgmmaTile,
                                 .swizzle = swizzle},
                                map);
  };
  constexpr ptx::Swizzle k128 = ptx::Swizzle::k128Bytes;
  ptx::TensorMap a, b, d;
  int error = variant.a_is_km ? map_of(p.a, p.k, p.m, k128, &a) : map_of(p.a, p.m, p.k, k128, &a);
  if (error != 0) return error;
  error = variant.b_is_kn ? map_of(p.b, p.k, p.n, k128, &b) : map_of(p.b, p.n, p.k, k128, &b);
  if (error != 0) return error;
  error = map_of(p.d, p.m, p.n, ptx::Swizzle::kNone, &d);
  if (error != 0) return error;
  constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  const auto kernel =
      variant.a_is_km
          ? (variant.b_is_kn ? multiply_wgmma_kernel<kMN, kMN> : multiply_wgmma_kernel<kMN, kK>)
          : (variant.b_is_kn ? multiply_wgmma_kernel<kK, kMN> : multiply_wgmma_kernel<kK, kK>);
  return ptx::launch(kernel, {dim3(2), dim3(2 * ptx::kWarpgroup), sizeof(WgmmaShared)}, stream, a,
                     b, d, p.m, p.n, p.k, variant.doubles_a, mistake);
}

int sum_split(const float* x, int n, int blocks, bool first_waits, float* parts,
              std::uint32_t* counter, float* y, Mistake mistake, void* stream) {
  return ptx::launch(sum_split_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(32)}, stream, x,
                     n, first_waits, parts, counter, y, mistake);
}

int sum_warps(const float* x, int warps, float* y, Mistake mistake, void* stream) {
  return ptx::launch(sum_warps_kernel, {dim3(1), dim3(static_cast<unsigned>(32 * warps))}, stream,
                     x, y, mistake);
}

WarpShape shape_of(WarpMma mma) {
  switch (mma) {
    case WarpMma::kTf32:
      return {16, 8, 8};
    case WarpMma::kFloat64Narrow:
      return {8, 8, 4};
    case WarpMma::kFloat64Tall:
      return {16, 8, 4};
    default:
      return {16, 8, 16};
  }
}

int multiply_warp(WarpMma mma, const double* a, const double* b, double* d, void* stream) {
  const auto kernel = [&] {
    switch (mma) {
      case WarpMma::kBFloat16:
        return multiply_warp_16_bits<BFloat16>;
      case WarpMma::kFloat16:
        return multiply_warp_16_bits<Float16>;
      case WarpMma::kTf32:
        return multiply_warp_tf32;
      case WarpMma::kFloat64Narrow:
        return multiply_warp_f64_narrow;
      case WarpMma::kFloat64Tall:
        return multiply_warp_f64_tall;
      case WarpMma::kFloat64Wide:
        break;
    }
    return multiply_warp_f64_wide;
  }();
  return ptx::launch(kernel, {dim3(1), dim3(32)}, stream, a, b, d);
}

int move_matrices(bool load_transposed, bool store_transposed, const std::uint16_t* x,
                  std::uint16_t* y, std::uint32_t* registers, void* stream) {
  const auto kernel = load_transposed ? (store_transposed ? move_matrices_kernel<true, true>
                                                          : move_matrices_kernel<true, false>)
                                      : (store_transposed ? move_matrices_kernel<false, true>
                                                          : move_matrices_kernel<false, false>);
  return ptx::launch(kernel, {dim3(1), dim3(32)}, stream, x, y, registers);
}

namespace {

template <int kN, DType kDType>
int multiply_one_tile_of(const WgmmaCase& shape, const void* a, const void* b, float* d,
                         void* stream) {
  const auto map_of = [&](const void* base, int rows, int columns, ptx::TensorMap* map) {
    return ptx::make_tensor_map({.base = base,
                                 .dtype = kDType,
                                 .rows = rows,
                                 .columns = columns,
                                 .row_stride = columns,
                                 .box_rows = rows,
                                 .box_columns = shape.swizzle_bytes / 2,
                                 .swizzle = swizzle_of(shape.swizzle_bytes)},
                                map);
  };
  ptx::TensorMap a_map, b_map;
  int error = map_of(a, 64, 64, &a_map);
  if (error != 0) return error;
  error = shape.b_is_kn ? map_of(b, 64, kN, &b_map) : map_of(b, kN, 64, &b_map);
  if (error != 0) return error;
  constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  const auto kernel = [&] {
    if (shape.a_in_registers) {
      return shape.b_is_kn ? multiply_one_tile_kernel<kN, kDType, kK, kMN, true>
                           : multiply_one_tile_kernel<kN, kDType, kK, kK, true>;
    }
    if (shape.a_is_km) {
      return shape.b_is_kn ? multiply_one_tile_kernel<kN, kDType, kMN, kMN, false>
                           : multiply_one_tile_kernel<kN, kDType, kMN, kK, false>;
    }
    return shape.b_is_kn ? multiply_one_tile_kernel<kN, kDType, kK, kMN, false>
                         : multiply_one_tile_kernel<kN, kDType, kK, kK, false>;
  }();
  return ptx::launch(kernel, {dim3(1), dim3(ptx::kWarpgroup), sizeof(OneTileShared)}, stream, a_map,
                     b_map, static_cast<const std::uint16_t*>(a), shape.swizzle_bytes, d);
}

template <int kN>
int multiply_one_tile_of(const WgmmaCase& shape, const void* a, const void* b, float* d,
                         void* stream) {
  return shape.dtype == DType::kBFloat16
             ? multiply_one_tile_of<kN, DType::kBFloat16>(shape, a, b, d, stream)
             : multiply_one_tile_of<kN, DType::kFloat16>(shape, a, b, d, stream);
}

}  // namespace

int multiply_one_tile(const WgmmaCase& shape, const void* a, const void* b, float* d,
                      void* stream) {
  switch (shape.n) {
    case 8:
      return multiply_one_tile_of<8>(shape, a, b, d, stream);
    case 16:
      return multiply_one_tile_of<16>(shape, a, b, d, stream);
    case 32:
      return multiply_one_tile_of<32>(shape, a, b, d, stream);
    case 64:
      return multiply_one_tile_of<64>(shape, a, b, d, stream);
    case 96:
      return multiply_one_tile_of<96>(shape, a, b, d, stream);
    case 128:
      return multiply_one_tile_of<128>(shape, a, b, d, stream);
    case 192:
      return multiply_one_tile_of<192>(shape, a, b, d, stream);
    default:
      return multiply_one_tile_of<256>(shape, a, b, d, stream);
  }
}

int load_box(const float* x, int rows, int columns, int swizzle_bytes, int row, int column,
             float* y, void* stream) {
  const int box_columns = swizzle_bytes == 0 ? 32 : swizzle_bytes / 4;
  ptx::TensorMap map;
  const int error = ptx::make_tensor_map({.base = x,
                                          .dtype = DType::kFloat32,
                                          .rows = rows,
                                          .columns = columns,
                                          .row_stride = columns,
                                          .box_rows = 8,
                                          .box_columns = box_columns,
                                          .swizzle = swizzle_of(swizzle_bytes)},
                                         &map);
  if (error != 0) return error;
  return ptx::launch(load_box_kernel, {dim3(1), dim3(32), sizeof(BoxShared)}, stream, map,
                     8 * box_columns, row, column, y);
}

}  // namespace neuron_ext::emulator_tests
