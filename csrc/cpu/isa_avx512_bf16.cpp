// Kernels for AVX-512 with BF16: products of bf16 in pairs, and of f32 rounded to bf16 where that
// is precise enough. All else is AVX-512's.
#if defined(__x86_64__)

#if defined(__clang__)
#include <immintrin.h>
#else
// See isa_avx512.cpp.
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
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

// clang-format off: the vectors build on what the kernels share
#include "kernels-inl.h"
#include "vector_avx512-inl.h"
#include "vector_avx512_bf16-inl.h"
// clang-format on

namespace neuron_ext::cpu {
namespace {

struct VectorPairs : VectorBf16 {
  using Careful = CarefulPairs<VectorPairs>;
  static constexpr int kTerms = 2;
  static constexpr std::int64_t kLongestSum = 256;  // of bf16, whose last store loses far more

  static Reg multiply_add(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  /// The first `count` <= 16 halves at p, each in a lower half, then zeros.
  static Words<VectorF32> load_halves(const BFloat16* p, std::int64_t count) {
    return reinterpret_cast<Words<VectorF32>>(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)));
  }
  /// The same with those at `high` in the upper halves.
  static Words<VectorF32> load_interleaved(const BFloat16* low, const BFloat16* high,
                                           std::int64_t count) {
    return interleaved(
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first(count), low)),
                           _mm256_maskz_loadu_epi16(first(count), high), 1));
  }

  /// What lowest_exponent needs to know of what has been seen: twice the magnitudes, less one, so
  /// that zeros, which are harmless, are the largest.
  static Words<VectorF32> lower_magnitudes(Words<VectorF32> lowest, Words<VectorF32> pairs) {
    const auto bits = reinterpret_cast<__m512i>(pairs);
    const __m512i key = _mm512_add_epi16(_mm512_add_epi16(bits, bits), _mm512_set1_epi16(-1));
    return reinterpret_cast<Words<VectorF32>>(
        _mm512_min_epu16(reinterpret_cast<__m512i>(lowest), key));
  }
  /// The lowest biased exponent of what isn't zero, far below any for subnormal numbers.
  static int lowest_exponent(Words<VectorF32> lowest) {
    const auto keys = reinterpret_cast<__m512i>(lowest);
    const auto lower = reinterpret_cast<__m512i>(lowest << 16 >> 16);
    const std::uint32_t key =
        _mm512_reduce_min_epu32(_mm512_min_epu32(lower, _mm512_srli_epi32(keys, 16)));
    const int exponent = static_cast<int>((key + 1) >> 8);
    return exponent == 0 ? kSubnormal : exponent;
  }
  static constexpr int kSubnormal = -1000;
  // Two biased exponents, of bf16 with 7 bits below the leading one, whose product's last bit is a
  // normal number: then sums of such products are zero or normal too, and the instruction is exact
  // in all that it would otherwise take for zero.
  static constexpr int kLowestExponents = 2 * 127 + 2 * 7 - 126;
};

constexpr Isa kIsa = Isa::kAvx512Bf16;
constexpr int kMr = 14, kNr = 2 * VectorPairs::kLanes;

/// The row with bf16 alone, whose functions are `functions`.
consteval GemmKernel for_bf16(GemmKernel kernel, const GemmFunctions& functions) {
  kernel.functions = {};
  kernel.functions[static_cast<int>(DType::kBFloat16)] = functions;
  return kernel;
}

consteval GemmKernel pairs_kernel() {
  GemmKernel kernel = blocked_kernel<VectorBf16, kMr>("gemm_bf16_14x32_avx512_bf16", kIsa);
  kernel.kr = 2;
  kernel.kc = 2 * kLongestBlock;
  // A's panel still fits the L1 cache, and no sums wait. Measured on Zen 4: products of 768 and
  // 1024 cubed and of 4096 x 1024 to 1024 1 to 5 % faster. With several blocks of that length,
  // those of 2048 cubed were between 3 % faster and 3 % slower.
  kernel.only_kc = 2 * kernel.kc;
  kernel.microkernel = Microkernels<VectorPairs, kMr, kNr>::run;
  kernel.careful_microkernel = Microkernels<VectorPairs::Careful, kMr, kNr>::run;
  kernel.lowest_exponents = VectorPairs::kLowestExponents;
  kernel.sum_panel = sum_panel<VectorPairs, kMr>;
  GemmFunctions functions = kernel.of(DType::kBFloat16);
  functions.pack_a = pack_pairs<VectorPairs, kMr>;
  functions.pack_b = pack_pairs<VectorPairs, kNr>;
  return for_bf16(kernel, functions);
}

/// What is lost by rounding while packing is gained from 64 k on (Zen 4); long batches of few
/// features would pack panels that are mostly empty.
bool is_medium(const GemmDesc& desc, Form form) {
  return desc.precision == Precision::kMedium && desc.k >= 64 && !is_streamed(desc, form) &&
         !is_long(desc, form);
}

constexpr GemmKernel kCareful = blocked_kernel<VectorF32, kCarefulMr>("f32", kIsa);

consteval GemmKernel rounded_kernel() {
  GemmKernel kernel = pairs_kernel();
  kernel.name = "gemm_f32_bf16_14x32_avx512_bf16";
  kernel.accepts = is_medium;
  kernel.known = kKnown;
  kernel.careful_microkernel = nullptr;
  kernel.lowest_exponents = 0;
  kernel.careful = &kCareful;
  kernel.take_careful = take_careful_pairs<VectorBf16, kMr, kNr>;
  kernel.sum_panel = sum_known_pairs<VectorBf16, kMr>;
  GemmFunctions functions = kCareful.of(DType::kFloat32);
  functions.pack_a = pack_rounded_pairs<VectorBf16, float, kMr>;
  functions.pack_b = pack_rounded_pairs<VectorBf16, float, kNr>;
  kernel.functions = {};
  kernel.functions[static_cast<int>(DType::kFloat32)] = functions;
  return kernel;
}

consteval GemmKernel narrow_pairs_kernel() {
  GemmKernel kernel = narrow_kernel<VectorBf16>("gemm_narrow_bf16_avx512_bf16", kIsa);
  kernel.kr = 2;
  kernel.sum_row = sum_row<VectorPairs>;
  GemmFunctions functions = kernel.of(DType::kBFloat16);
  functions.widen_row = pair_row<VectorPairs>;
  functions.multiply_narrow = multiply_narrow<VectorPairs, BFloat16>;
  return for_bf16(kernel, functions);
}

consteval GemmKernel strips_pairs_kernel() {
  GemmKernel kernel = strips_kernel<VectorBf16>("gemm_strips_bf16_avx512_bf16", kIsa);
  kernel.accepts = is_long_in_pairs;
  kernel.kr = 2;
  kernel.strips = {multiply_strip<VectorPairs, float>, multiply_strip<VectorPairs::Careful, float>};
  kernel.lowest_exponents = VectorPairs::kLowestExponents;
  kernel.sum_strip = sum_strip<VectorPairs>;
  GemmFunctions functions = kernel.of(DType::kBFloat16);
  functions.stage_rows = stage_rows<VectorPairs, BFloat16>;
  functions.stage_columns = stage_columns<VectorPairs, BFloat16>;
  functions.strips_to_d = {multiply_strip<VectorPairs, BFloat16>,
                           multiply_strip<VectorPairs::Careful, BFloat16>};
  return for_bf16(kernel, functions);
}

/// Whose sums are of f32 products.
consteval GemmKernel strips_f32_kernel() {
  const GemmKernel kernel = strips_kernel<VectorBf16>("gemm_strips_f32_avx512_bf16", kIsa);
  return for_bf16(kernel, kernel.of(DType::kBFloat16));
}

constexpr GemmKernel kGemm[] = {strips_pairs_kernel(), strips_f32_kernel(), narrow_pairs_kernel(),
                                pairs_kernel(), rounded_kernel()};

}  // namespace

IsaKernels avx512_bf16_kernels() { return {kGemm, nullptr}; }

}  // namespace neuron_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
