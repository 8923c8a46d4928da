// The tensor cores' instructions that a warp executes together: products of fragments held in
// registers, and what brings fragments from shared memory and back.
//
// A fragment's element, with lane = 4 g + t:
//
//   16-bit, A 16 x 16   register r, half h    row g + 8 (r % 2), column 2 t + h + 8 (r / 2)
//   16-bit, B 16 x 8    register r, half h    row 2 t + h + 8 r, column g
//   f32 or f64 D        element e             row g + 8 (e / 2), column 2 t + e % 2
//   tf32,   A 16 x 8    register r            row g + 8 (r % 2), column t + 4 (r / 2)
//   tf32,   B 8 x 8     register r            row t + 4 r,       column g
//   f64,    A 8 x 4, B 4 x 8, D 8 x 8         A (g, t), B (t, g), D (g, 2 t + e)
//   f64,    A 16 x 4    element e             row g + 8 e, column t
//   f64,    A 16 x 16   element e             row g + 8 (e % 2), column t + 4 (e / 2)
//   f64,    B 16 x 8    element e             row t + 4 e,       column g
#pragma once

#include "target.cuh"

namespace neuron_ext::cuda::ptx {

// ---- ldmatrix, stmatrix ------------------------------------------------------------------------
// 8 x 8 matrices of 16-bit elements. Lane l names the address of row l % 8 of matrix l / 8, aligned
// to 16 bytes. Register i of lane 4 g + t holds elements (g, 2 t) and (g, 2 t + 1) of matrix i, or,
// where transposed, (2 t, g) and (2 t + 1, g).

template <bool kTransposed = false>
NEURON_EXT_DEVICE void load_matrices(std::uint32_t (&registers)[4], const void* row) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::load_matrices(registers, 4, row, kTransposed);
#else
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

/// Lanes 0 to 15 name addresses.
template <bool kTransposed = false>
NEURON_EXT_DEVICE void load_matrices(std::uint32_t (&registers)[2], const void* row) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::load_matrices(registers, 2, row, kTransposed);
#else
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
#endif
}

/// sm_90.
template <bool kTransposed = false>
NEURON_EXT_DEVICE void store_matrices(void* row, const std::uint32_t (&registers)[4]) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::store_matrices(row, 4, registers, kTransposed);
#else
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
                 : "memory");
  }
#endif
}

// ---- mma.sync: D += A B ------------------------------------------------------------------------

/// T is BFloat16 or Float16.
template <class T>
NEURON_EXT_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[2]);
template <>
NEURON_EXT_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_16x8x16(DType::kBFloat16, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
template <>
NEURON_EXT_DEVICE void mma_16x8x16<Float16>(float (&d)[4], const std::uint32_t (&a)[4],
                                            const std::uint32_t (&b)[2]) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_16x8x16(DType::kFloat16, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// Operands from narrow_tf32; of other floats the last 13 bits are ignored.
NEURON_EXT_DEVICE void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_16x8x8_tf32(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

NEURON_EXT_DEVICE void mma_8x8x4(double (&d)[2], double a, double b) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_8x8x4(d, a, b);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
#endif
}

/// One instruction from sm_90 on, before that two.
NEURON_EXT_DEVICE void mma_16x8x4(double (&d)[4], const double (&a)[2], double b) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_8x8x4(d, a[0], b);
  emulator::mma_8x8x4(d + 2, a[1], b);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64"
      " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(b));
#else
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[2 * e]), "+d"(d[2 * e + 1])
                 : "d"(a[e]), "d"(b));
  }
#endif
}

/// sm_90.
NEURON_EXT_DEVICE void mma_16x8x16(double (&d)[4], const double (&a)[8], const double (&b)[4]) {
#ifdef NEURON_EXT_CUDA_EMULATOR
  emulator::mma_16x8x16(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15},"
      " {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]),
        "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
#endif
}

}  // namespace neuron_ext::cuda::ptx
