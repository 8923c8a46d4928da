// The kernels there are, as data. A row can be listed, chosen, and tested against all others.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "forms.h"
#include "neuron_ext/cpu.h"

namespace neuron_ext::cpu {

/// A or B as packing sees it: "mn" is the index that survives the product. With a prologue, an
/// element is base's times the activation's gradient at saved's.
struct Operand {
  const void* base;
  std::int64_t stride_mn, stride_k;
  Activation prologue = Activation::kIdentity;
  const void* saved = nullptr;
  std::int64_t saved_stride_mn = 0, saved_stride_k = 0;
};

/// The few rows of a narrow product, as widen_row leaves them. Those that meet in registers (groups
/// of `together`, a power of two, then of half as many) take turns, vector by vector: one place in
/// memory is read on and on, where each row by itself would be one more.
struct FewRows {
  const void* data;
  std::int64_t count, stride;    // stride: what a row takes, in elements
  std::int64_t lanes, together;  // in a vector, in a group

  /// Whether the product with b takes dot products along k. Else rows are used element by element,
  /// each by itself; adding up lanes takes as long as collecting the columns of a few k.
  static bool are_dotted(const Operand& b, std::int64_t k) { return b.stride_k == 1 && k > 4; }

  /// How many accumulators row i's vectors are apart, and where the first one is.
  std::int64_t step(std::int64_t i) const { return group(i) * lanes; }
  std::int64_t place(std::int64_t i) const {
    const std::int64_t within = i % group(i);
    return (i - within) * stride + within * lanes;
  }

 private:
  std::int64_t group(std::int64_t i) const {
    std::int64_t size = together;
    while (i / size * size + size > count) size /= 2;
    return size;
  }
};

using PackPanel = int (*)(const Operand& operand, std::int64_t mn, std::int64_t count,
                          std::int64_t k, std::int64_t kc, void* panel);

/// As multiply_strip in strips-inl.h.
using StripKernel = void (*)(std::int64_t m, std::int64_t n, std::int64_t k, const void* a,
                             std::int64_t a_stride_m, std::int64_t a_stride_k, const void* b,
                             std::int64_t b_stride, const void* start, std::int64_t start_stride,
                             void* tile, std::int64_t tile_stride);

/// The second is for operands whose lowest exponents don't add up to the row's.
struct StripKernels {
  StripKernel multiply = nullptr, multiply_carefully = nullptr;
};

/// The functions of a row for one storage type; null where the row doesn't take it. Panels, tiles,
/// rows, sums and bias rows are in the accumulator type. What each does is said at its definition.
struct GemmFunctions {
  // pack-inl.h, pairs-inl.h, split-inl.h, tiles-inl.h
  PackPanel pack_a = nullptr, pack_b = nullptr;
  int (*widen_row)(const Operand& a, std::int64_t i, std::int64_t k, void* row,
                   std::int64_t step) = nullptr;
  // narrow-inl.h
  void (*multiply_narrow)(std::int64_t k, const FewRows& rows, int lowest_in_rows, const Operand& b,
                          std::int64_t column, std::int64_t columns, void* tile,
                          std::int64_t tile_stride) = nullptr;
  // strips-inl.h
  int (*stage_rows)(const Operand& operand, std::int64_t mn, std::int64_t rows, std::int64_t k,
                    void* strip) = nullptr;
  int (*stage_columns)(const Operand& operand, std::int64_t mn, std::int64_t rows, std::int64_t k,
                       std::int64_t kc, void* strip) = nullptr;
  StripKernels strips_to_d = {};  // whose results are rounded to the storage type
  // epilogue-inl.h
  void (*widen_bias)(const void* bias, std::int64_t stride, std::int64_t n, void* row);
  void (*epilogue)(Activation activation, std::int64_t rows, std::int64_t columns, const void* tile,
                   std::int64_t tile_stride, const void* bias, void* d, std::int64_t d_stride);
  void (*gradient_epilogue)(Activation activation, std::int64_t rows, std::int64_t columns,
                            const void* tile, std::int64_t tile_stride, const void* saved,
                            std::int64_t saved_stride, void* d, std::int64_t d_stride);
  void (*narrow_row)(std::int64_t n, const void* row, void* out);
};

/// `depth` is the length of a panel: kc / kr, rounded up.
using Microkernel = void (*)(std::int64_t rows, std::int64_t columns, std::int64_t depth,
                             const void* a, const void* b, void* tile, bool add);

struct GemmKernel {
  const char* name;
  Isa isa;
  bool (*accepts)(const GemmDesc& desc, Form form);
  void (*run)(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
              const ParallelFor& parallel_for);  // a driver

  std::int64_t lanes;           // accumulators in a vector: rows and buffers hold whole vectors
  std::int64_t mr = 0, nr = 0;  // the register tile
  std::int64_t kr = 1;          // consecutive k of a row or column that are packed together,
  std::int64_t places = 1;      // into places of this many accumulators
  std::int64_t known = 0;    // accumulators after a panel with what is known of each row or column
  std::int64_t kc = 0;       // longest block of k where there are several,
  std::int64_t only_kc = 0;  // and where there is one, if it may be longer
  // What a thread does before its first call of the micro-kernel and after its last, if anything.
  void (*prepare)() = nullptr;
  void (*release)() = nullptr;
  Microkernel microkernel = nullptr;
  // What the micro-kernel would get wrong goes through another one: panels whose lowest exponents,
  // as packing returns them, add up to less than this. Null where there are none such.
  Microkernel careful_microkernel = nullptr;
  int lowest_exponents = 0;
  // Or through another row, of the same nr, that packs the operands again. The elements of its sums
  // that are needed then replace those in the tile. Null where there are no such.
  const GemmKernel* careful = nullptr;
  void (*take_careful)(std::int64_t rows, std::int64_t depth, const void* a, const void* b,
                       const void* careful, void* tile) = nullptr;
  void (*sum_panel)(std::int64_t depth, const void* panel, void* sums) = nullptr;
  void (*sum_row)(std::int64_t k, const void* row, std::int64_t step, void* sum) = nullptr;
  // strips-inl.h
  StripKernels strips = {};
  void (*sum_strip)(std::int64_t rows, std::int64_t columns, const void* strip,
                    void* sums) = nullptr;
  std::array<GemmFunctions, kDTypeCount> functions;  // by DType

  constexpr const GemmFunctions& of(DType dtype) const {
    return functions[static_cast<int>(dtype)];
  }
  bool takes(DType dtype) const { return of(dtype).epilogue != nullptr; }
  bool packs_b(DType dtype) const { return of(dtype).pack_b != nullptr; }
  /// What a row or column of a panel of kc takes, in accumulators.
  std::int64_t row_size(std::int64_t kc) const { return (kc + kr - 1) / kr * places + known; }
};

struct ElementwiseKernel {
  const char* name;
  Isa isa;
  // As in cpu.h, by DType.
  std::array<void (*)(Activation, std::int64_t, const void*, std::int64_t, void*, std::int64_t),
             kDTypeCount>
      activate;
  std::array<void (*)(Activation, std::int64_t, const void*, std::int64_t, const void*,
                      std::int64_t, void*, std::int64_t),
             kDTypeCount>
      activate_backward;
};

/// What one isa_*.cpp contributes: the rows of its ISA, best first.
struct IsaKernels {
  std::span<const GemmKernel> gemm;
  const ElementwiseKernel* elementwise;  // null where the ISA before it has the best one
};

/// The drivers (gemm.cpp, narrow.cpp, strips.cpp), and what their rows accept (forms.cpp).
void run_strips(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                const ParallelFor& parallel_for);
void run_narrow(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                const ParallelFor& parallel_for);
void run_blocked(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                 const ParallelFor& parallel_for);
bool is_long(const GemmDesc& desc, Form form);
bool is_long_in_pairs(const GemmDesc& desc, Form form);
bool is_narrow(const GemmDesc& desc, Form form);
bool is_streamed(const GemmDesc& desc, Form form);
bool is_any(const GemmDesc& desc, Form form);

IsaKernels portable_kernels();
#if defined(__x86_64__)
IsaKernels avx2_kernels();
IsaKernels avx512_kernels();
IsaKernels avx512_bf16_kernels();
IsaKernels amx_kernels();
#endif

/// The first row, of the active ISA or one before it, that accepts the product; last_kernel() then
/// names it.
const GemmKernel& choose_gemm(const GemmDesc& desc);
/// The first of them that packs B.
const GemmKernel& choose_packing(const GemmDesc& desc);
/// last_kernel() names this one.
const GemmKernel& note_choice(const GemmKernel& kernel);
const ElementwiseKernel& choose_elementwise();

}  // namespace neuron_ext::cpu
