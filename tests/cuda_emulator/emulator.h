// What csrc/cuda/ptx calls when kernels are compiled for the emulator: CUDA's words that C++ lacks,
// and a function for each instruction. What each must do is written there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "neuron_ext/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace neuron_ext::emulator {

struct Index {
  unsigned x, y, z;
};

}  // namespace neuron_ext::emulator

// Of the thread that runs now.
extern neuron_ext::emulator::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace neuron_ext::emulator {

// ---- launch, memory -----------------------------------------------------------------------------

int launch(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes,
           const std::function<void()>& kernel);

void* static_shared(const void* identity, std::size_t bytes);
void* dynamic_shared(std::size_t bytes);
std::uint32_t shared_address(const void* shared);

void check_alignment(const void* address, int bytes);
std::uint32_t fetch_add(std::uint32_t* counter, std::uint32_t value);
void wait_for_at_least(const std::uint32_t* counter, std::uint32_t value);

// ---- barriers and exchange ----------------------------------------------------------------------

void barrier_sync(int id, int threads);  // 0 threads: all of the block
void barrier_arrive(int id, int threads);
bool block_all(bool vote);
void warp_sync(std::uint32_t lanes);
int lane();
std::uint32_t ballot(bool vote);
std::uint64_t shuffle_bits(std::uint64_t bits, int source);

template <class T>
__forceinline__ T shuffle(T value, int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- numbers ------------------------------------------------------------------------------------

float widen(Float16 x);
BFloat16 narrow_bf16(float x);
Float16 narrow_f16(float x);
std::uint32_t narrow_tf32(float x);

/// x, or as far from it as an approximation within `ulps` may be, if the settings say so.
float approximate(float x, int ulps);

// ---- asynchronous copies ------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int pending);

void mbarrier_init(void* barrier, int arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(void* barrier, std::uint32_t expected_bytes);
void mbarrier_wait(void* barrier, std::uint32_t parity);
void async_proxy_fence();

struct TensorMap {
  std::byte* base;
  std::int64_t rows, columns, row_bytes;  // row_bytes: from one row to the next
  int element_bytes, box_rows, box_columns;
  int span;  // of the swizzle, in bytes; 0 is none
};

int make_tensor_map(const void* base, int element_bytes, std::int64_t rows, std::int64_t columns,
                    std::int64_t row_bytes, int box_rows, int box_columns, int span,
                    TensorMap* map);
void tma_load(void* shared, const TensorMap& map, void* barrier, int row, int column);
void tma_store(const TensorMap& map, const void* shared, int row, int column);
void tma_store_commit();
void tma_store_wait_read(int pending);

// ---- tensor cores -------------------------------------------------------------------------------

void load_matrices(std::uint32_t* registers, int count, const void* row, bool transposed);
void store_matrices(void* row, int count, const std::uint32_t* registers, bool transposed);

void mma_16x8x16(DType dtype, float* d, const std::uint32_t* a, const std::uint32_t* b);
void mma_16x8x8_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b);
void mma_8x8x4(double* d, double a, double b);
void mma_16x8x16(double* d, const double* a, const double* b);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(int n, DType dtype, float* d, std::uint64_t a, bool a_is_mn_major, std::uint64_t b,
           bool b_is_mn_major, bool accumulate);
void wgmma(int n, DType dtype, float* d, const std::uint32_t* a, std::uint64_t b,
           bool b_is_mn_major, bool accumulate);

}  // namespace neuron_ext::emulator
