// Kernels for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)

#if defined(__clang__)
#include <immintrin.h>
#else
// The header's _mm512_undefined_ps() reads an uninitialised variable on purpose; GCC 12 warns.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "registry.h"
#include "scalar.h"

// Up to the end of the file, after all headers: see isa_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

// clang-format off: the vectors build on what the kernels share
#include "kernels-inl.h"
#include "vector_avx512-inl.h"
// clang-format on

namespace neuron_ext::cpu {
namespace {

constexpr Isa kIsa = Isa::kAvx512;
constexpr GemmKernel kGemm[] = {
    strips_kernel<VectorF32>("gemm_strips_f32_avx512", kIsa),
    strips_kernel<VectorF64>("gemm_strips_f64_avx512", kIsa),
    narrow_kernel<VectorF32>("gemm_narrow_f32_avx512", kIsa),
    narrow_kernel<VectorF64>("gemm_narrow_f64_avx512", kIsa),
    blocked_kernel<VectorF32, 14>("gemm_f32_14x32_avx512", kIsa),
    blocked_kernel<VectorF64, 14>("gemm_f64_14x16_avx512", kIsa),
};
constexpr ElementwiseKernel kElementwise =
    elementwise_kernel<VectorF32, VectorF64>("elementwise_avx512", kIsa);

}  // namespace

IsaKernels avx512_kernels() { return {kGemm, &kElementwise}; }

}  // namespace neuron_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
