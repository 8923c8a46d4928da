// Kernels for any machine: vectors of 16 bytes, which every compiler maps to what the baseline has.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "registry.h"
#include "scalar.h"
// Last: see isa_avx2.cpp.
#include "kernels-inl.h"

namespace neuron_ext::cpu {
namespace {

template <class S>
struct Vector {
  using Scalar = S;
  static constexpr int kLanes = 16 / sizeof(S);
  static constexpr int kRegisters = 16;
  typedef S Reg __attribute__((vector_size(16)));

  static Reg set1(S x) {
    Reg lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = x;
    return lanes;
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
  static Reg multiply_add(Reg a, Reg b, Reg c) {
#if defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  template <class Word, class Indices>
  static Indices lookup(const Word (&table)[8], Indices i) {
    for (int lane = 0; lane < kLanes; ++lane) i[lane] = table[i[lane] % 8];
    return i;
  }
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
};

struct VectorF32 : Vector<float> {
  typedef std::uint16_t Halves __attribute__((vector_size(8)));

  static Reg widen(Halves h) {
    Reg lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = cpu::widen(Float16{h[i]});
    return lanes;
  }
  static Halves narrow(Reg x) {
    Halves lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = cpu::narrow<Float16>(x[i]).bits;
    return lanes;
  }
};
using VectorF64 = Vector<double>;

constexpr Isa kIsa = Isa::kPortable;
constexpr GemmKernel kGemm[] = {
    strips_kernel<VectorF32>("gemm_strips_f32_portable", kIsa),
    strips_kernel<VectorF64>("gemm_strips_f64_portable", kIsa),
    narrow_kernel<VectorF32>("gemm_narrow_f32_portable", kIsa),
    narrow_kernel<VectorF64>("gemm_narrow_f64_portable", kIsa),
    blocked_kernel<VectorF32, 4>("gemm_f32_4x8_portable", kIsa),
    blocked_kernel<VectorF64, 4>("gemm_f64_4x4_portable", kIsa),
};
constexpr ElementwiseKernel kElementwise =
    elementwise_kernel<VectorF32, VectorF64>("elementwise_portable", kIsa);

}  // namespace

IsaKernels portable_kernels() { return {kGemm, &kElementwise}; }

}  // namespace neuron_ext::cpu
