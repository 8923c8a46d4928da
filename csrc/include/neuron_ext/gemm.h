// What is asked of a matrix product. Which kernel answers is chosen behind cpu.h or cuda.h.
#pragma once

#include <cstdint>

#include "neuron_ext/activation.h"
#include "neuron_ext/types.h"

namespace neuron_ext {

/// D[i, j] = epilogue( sum over p < k of A'[i, p] B[p, j]  +  bias[j] )        i < m, j < n
///
/// A'[i, p] = A[i, p], or, with a prologue, A[i, p] times the prologue activation's gradient at
/// saved[i, p] (for the sigmoid: dz = dy y (1 - y), with A = dy and saved = y).
///
/// With an epilogue gradient, D[i, j] is the sum times that activation's gradient at d_saved[i, j]:
/// in a stack of layers dgrad then gives the dz of the layer before, whose output d_saved is.
///
/// The three products of a layer y = act(x Wᵀ + b), x (batch, in), W (out, in):
///
///   | product | m     | n   | k     | A        | B            | extra                       |
///   |---------|-------|-----|-------|----------|--------------|-----------------------------|
///   | fprop   | batch | out | in    | x        | Wᵀ           | bias, epilogue              |
///   | dgrad   | batch | in  | out   | dy (→dz) | W            | prologue, epilogue gradient |
///   | wgrad   | out   | in  | batch | dyᵀ(→dzᵀ)| x            | prologue, a_sum = db        |
///
/// Strides are in elements, may be zero or negative, and describe views: operands are never copied
/// outside packing. m, n and k may be 0; k = 0 gives epilogue(bias); n = 0 with a_sum computes only
/// a_sum. Sums are formed in f32 (f64 for f64) and rounded to the dtype once, when D is stored.
struct GemmDesc {
  std::int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kFloat32;  // of A, B, D, bias, saved and sums alike
  Precision precision = Precision::kHighest;

  std::int64_t a_stride_m = 0, a_stride_k = 1;
  std::int64_t b_stride_k = 1, b_stride_n = 0;
  std::int64_t d_stride_m = 0;  // rows of D; its columns are contiguous

  bool has_bias = false;
  std::int64_t bias_stride = 1;  // 0: one value for all columns
  Activation epilogue = Activation::kIdentity;

  // One whose gradient needs its output. With it there is neither a bias nor another epilogue.
  Activation epilogue_gradient = Activation::kIdentity;
  std::int64_t d_saved_stride_m = 0;  // rows of d_saved; its columns are contiguous

  // Also d_sum[j] = sum over i of D[i, j] as it is stored, contiguous: the db that goes with the dz
  // that an epilogue gradient gives. With such a gradient, and on CUDA alone.
  bool has_d_sum = false;

  Activation prologue = Activation::kIdentity;  // one whose gradient needs its output
  std::int64_t saved_stride_m = 0, saved_stride_k = 1;

  bool has_a_sum = false;  // also a_sum[i] = sum over p of A'[i, p], contiguous

  // D and a_sum hold sums (f32, f64 for f64), to which these are added as they are. With neither a
  // bias nor an epilogue, and on the CPU alone.
  bool adds = false;

  // D may be some rows of a larger product. Whatever decides in which order a sum is formed (the
  // kernel, the cuts of k) takes this for m, so that the rows get the bits they'd get there. 0: D
  // is all there is. kAnyBatch: the bits of a row are the same in every product.
  std::int64_t whole_m = 0;
  static constexpr std::int64_t kAnyBatch = std::int64_t{1} << 40;
  constexpr std::int64_t deciding_m() const { return whole_m == 0 ? m : whole_m; }

  constexpr bool has_epilogue_gradient() const {
    return epilogue_gradient != Activation::kIdentity;
  }
  /// Whether what is asked of the epilogue goes together.
  constexpr bool is_valid() const {
    if (has_d_sum && !has_epilogue_gradient()) return false;
    return (!has_epilogue_gradient() && !adds) ||
           (!has_bias && epilogue == Activation::kIdentity && !(has_epilogue_gradient() && adds));
  }
};

/// The addresses that go with a GemmDesc; those it doesn't ask for may be null. D and the sums
/// overlap nothing.
struct GemmPointers {
  const void* a = nullptr;
  const void* b = nullptr;
  void* d = nullptr;
  const void* bias = nullptr;
  const void* saved = nullptr;
  const void* d_saved = nullptr;
  void* a_sum = nullptr;
  void* d_sum = nullptr;
  // What cpu::pack_b made of B, of the same n, k and dtype: then its kernel runs, and b is read
  // only for values that the kernel leaves to another (none, if b has none that are special).
  const void* packed_b = nullptr;
};

}  // namespace neuron_ext
