// Kernels for AVX2 with FMA and F16C. The instruction sets are asked for in the source, so that any
// build of these files, with any flags, has all kernels.
#if defined(__x86_64__)

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "registry.h"
#include "scalar.h"

// From here to the end of the file, and therefore after all headers with functions that other files
// may share: one compiled for AVX2 and kept by the linker would stop older CPUs.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels-inl.h"

namespace neuron_ext::cpu {
namespace {

struct VectorF32 {
  using Scalar = float;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  using Reg = __m256;

  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return fma(a, b, c); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Words<VectorF32> lookup(const std::uint32_t (&table)[8], Words<VectorF32> i) {
    return reinterpret_cast<Words<VectorF32>>(_mm256_permutevar8x32_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)), reinterpret_cast<__m256i>(i)));
  }
  static Reg widen(Halves<VectorF32> h) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h)); }
  static Halves<VectorF32> narrow(Reg x) {
    return reinterpret_cast<Halves<VectorF32>>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct VectorF64 {
  using Scalar = double;
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  using Reg = __m256d;

  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return fma(a, b, c); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Words<VectorF64> lookup(const std::uint64_t (&table)[8], Words<VectorF64> i) {
    // Four of the table at a time, by the places of their halves.
    const Words<VectorF64> low = (i & 3) << 1;
    const auto halves = reinterpret_cast<__m256i>(low | low << 32 | std::uint64_t{1} << 32);
    const auto* const quarters = reinterpret_cast<const __m256i*>(table);
    const __m256i first = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(quarters), halves);
    const __m256i second = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(quarters + 1), halves);
    return reinterpret_cast<Words<VectorF64>>(_mm256_blendv_pd(reinterpret_cast<__m256d>(first),
                                                               reinterpret_cast<__m256d>(second),
                                                               reinterpret_cast<__m256d>(i << 61)));
  }
};

constexpr Isa kIsa = Isa::kAvx2;
constexpr GemmKernel kGemm[] = {
    strips_kernel<VectorF32>("gemm_strips_f32_avx2", kIsa),
    strips_kernel<VectorF64>("gemm_strips_f64_avx2", kIsa),
    narrow_kernel<VectorF32>("gemm_narrow_f32_avx2", kIsa),
    narrow_kernel<VectorF64>("gemm_narrow_f64_avx2", kIsa),
    blocked_kernel<VectorF32, 6>("gemm_f32_6x16_avx2", kIsa),
    blocked_kernel<VectorF64, 6>("gemm_f64_6x8_avx2", kIsa),
};
constexpr ElementwiseKernel kElementwise =
    elementwise_kernel<VectorF32, VectorF64>("elementwise_avx2", kIsa);

}  // namespace

IsaKernels avx2_kernels() { return {kGemm, &kElementwise}; }

}  // namespace neuron_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
