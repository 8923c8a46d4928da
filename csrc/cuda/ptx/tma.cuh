// sm_90's copy engine: boxes of a matrix in global memory, to and from shared memory.
#pragma once

#include "mbarrier.cuh"
#include "target.cuh"

#ifndef NEURON_EXT_CUDA_EMULATOR
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace neuron_ext::cuda::ptx {

/// How a box's rows lie in shared memory: in each row's span of 32, 64 or 128 bytes, 16-byte pieces
/// change places, piece p of row r with piece p xor r (r counted modulo 2, 4 or 8), so that neither
/// rows nor columns of pieces fall into the same banks. The box begins at a multiple of 8 spans.
enum class Swizzle : std::uint8_t { kNone, k32Bytes, k64Bytes, k128Bytes };

/// A matrix as the copy engine sees it. Its base and its row stride are multiples of 16 bytes, its
/// columns contiguous.
struct TiledMatrix {
  const void* base = nullptr;
  DType dtype = DType::kBFloat16;
  std::int64_t rows = 0, columns = 0, row_stride = 0;  // in elements
  int box_rows = 0, box_columns = 0;  // at most 256; a row of the box fits in the swizzle's span
  Swizzle swizzle = Swizzle::k128Bytes;
};

#ifdef NEURON_EXT_CUDA_EMULATOR
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

/// On the host; the kernel takes the map as `const __grid_constant__ TensorMap`.
inline int make_tensor_map(const TiledMatrix& matrix, TensorMap* map) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  const std::int64_t size = size_of(matrix.dtype);
  constexpr int kSpans[] = {0, 32, 64, 128};
  return emulator::make_tensor_map(matrix.base, static_cast<int>(size), matrix.rows, matrix.columns,
                                   matrix.row_stride * size, matrix.box_rows, matrix.box_columns,
                                   kSpans[static_cast<int>(matrix.swizzle)], map);
#else
  static const auto encode = [] {  // from the driver, without linking to it
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr CUtensorMapDataType kTypes[] = {
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_128B};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.row_stride * size_of(matrix.dtype))};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(matrix.box_columns),
                            static_cast<cuuint32_t>(matrix.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, kTypes[static_cast<int>(matrix.dtype)], 2, const_cast<void*>(matrix.base), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kSwizzles[static_cast<int>(matrix.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

/// By one thread, early: the map is fetched while others still prepare.
NEURON_EXT_DEVICE void prefetch_tensor_map(const TensorMap& map) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  static_cast<void>(map);
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

/// By one thread: the box whose first element is (row, column) comes to `shared`, with zeros for
/// what lies outside the matrix; then its bytes, all of them, count for the barrier's phase.
NEURON_EXT_DEVICE void tma_load(void* shared, const TensorMap& map, Mbarrier& barrier, int row,
                                int column) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::tma_load(shared, map, &barrier, row, column);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
#endif
}

/// By one thread, after async_proxy_fence by those who wrote the box, and a barrier: the part of
/// the box that lies inside the matrix goes there.
NEURON_EXT_DEVICE void tma_store(const TensorMap& map, const void* shared, int row, int column) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::tma_store(map, shared, row, column);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(column), "r"(row)
      : "memory");
#endif
}

/// Ends a group: this thread's tma_stores since the last.
NEURON_EXT_DEVICE void tma_store_commit() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::tma_store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// Waits until all but this thread's kPending last groups have read shared memory, which may then
/// be written again. Needed before the thread ends, too.
template <int kPending>
NEURON_EXT_DEVICE void tma_store_wait_read() {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::tma_store_wait_read(kPending);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace neuron_ext::cuda::ptx
