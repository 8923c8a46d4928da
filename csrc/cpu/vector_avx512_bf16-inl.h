// What AVX512-BF16 adds to AVX-512's vectors of f32.
#pragma once

namespace neuron_ext::cpu {
namespace {

struct VectorBf16 : VectorF32 {
  /// Rounds to bf16 by an instruction, which takes subnormal numbers for zeros.
  static Halves<VectorF32> to_bf16(Reg x) {
    constexpr int kSubnormalClass = 0x20;
    if (_mm512_fpclass_ps_mask(x, kSubnormalClass) != 0) [[unlikely]] {
      return nearest_bf16<VectorF32>(x);
    }
    return reinterpret_cast<Halves<VectorF32>>(_mm512_cvtneps_pbh(x));
  }

  /// The first `count` <= 32 halves at p, then zeros.
  static Words<VectorF32> load_pairs(const BFloat16* p, std::int64_t count) {
    const auto first = static_cast<__mmask32>((std::uint64_t{1} << count) - 1);
    return reinterpret_cast<Words<VectorF32>>(_mm512_maskz_loadu_epi16(first, p));
  }

  /// In each place the bf16 nearest to `even`, and above it that nearest to `odd`; zeros for
  /// subnormal numbers.
  static Words<VectorF32> nearest_pairs(Reg even, Reg odd) {
    return interleaved(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }

  /// The 16 halves in the lower half of x, each below that in the upper half.
  static Words<VectorF32> interleaved(__m512i x) {
    typedef std::uint16_t Indices __attribute__((vector_size(64)));
    constexpr Indices kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<Words<VectorF32>>(
        _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kOrder), x));
  }
};

}  // namespace
}  // namespace neuron_ext::cpu
