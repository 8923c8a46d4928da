// The vectors of AVX-512 F, BW, DQ and VL, for every file whose instruction set includes them.
#pragma once

namespace neuron_ext::cpu {
namespace {

struct VectorF32 {
  using Scalar = float;
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  using Reg = __m512;

  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return fma(a, b, c); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Words<VectorF32> lookup(const std::uint32_t (&table)[8], Words<VectorF32> i) {
    const __m512i twice =
        _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    return reinterpret_cast<Words<VectorF32>>(
        _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(i), twice));
  }
  static Reg widen(Halves<VectorF32> h) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h)); }
  static Halves<VectorF32> narrow(Reg x) {
    return reinterpret_cast<Halves<VectorF32>>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Reg load_partial(const float* p, std::int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), p);
  }
  static void store_partial(float* p, Reg x, std::int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), x);
  }
  static Halves<VectorF32> load_partial(const std::uint16_t* p, std::int64_t count) {
    return reinterpret_cast<Halves<VectorF32>>(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store_partial(std::uint16_t* p, Halves<VectorF32> h, std::int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), reinterpret_cast<__m256i>(h));
  }
  static __mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

struct VectorF64 {
  using Scalar = double;
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 32;
  using Reg = __m512d;

  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg multiply_add(Reg a, Reg b, Reg c) { return fma(a, b, c); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Words<VectorF64> lookup(const std::uint64_t (&table)[8], Words<VectorF64> i) {
    return reinterpret_cast<Words<VectorF64>>(
        _mm512_permutexvar_epi64(reinterpret_cast<__m512i>(i), _mm512_loadu_si512(table)));
  }
  static Reg load_partial(const double* p, std::int64_t count) {
    return _mm512_maskz_loadu_pd(first(count), p);
  }
  static void store_partial(double* p, Reg x, std::int64_t count) {
    _mm512_mask_storeu_pd(p, first(count), x);
  }
  static __mmask8 first(std::int64_t count) { return static_cast<__mmask8>((1u << count) - 1); }
};

}  // namespace
}  // namespace neuron_ext::cpu
