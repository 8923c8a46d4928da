// Kernels for AMX: products of bf16 in tiles, and of f32 and f16 as several of them. All else is
// AVX-512's.
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
#include <cstdint>
#include <type_traits>
#include <utility>

#include "registry.h"
#include "scalar.h"

// Up to the end of the file, after all headers: see isa_avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl," \
                          "avx512bf16,amx-tile,amx-bf16"))),                  \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

// clang-format off: each builds on those before it
#include "kernels-inl.h"
#include "tiles-inl.h"
#include "vector_avx512-inl.h"
#include "vector_avx512_bf16-inl.h"
// clang-format on

namespace neuron_ext::cpu {
namespace {

/// All eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, first_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTileConfig;

/// Tiles 0 to 3 are sums, 4 and 5 are A's, 6 and 7 are B's.
struct AmxTiles {
  static constexpr std::int64_t kRowBytes = 64;

  static void configure() { _tile_loadconfig(&kTileConfig); }
  /// A thread whose tiles are in use takes longer to switch to and from.
  static void release() { _tile_release(); }

  static void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static void load(const float* sums, std::int64_t stride) {
    // GCC's loads don't say that they read memory.
    __asm__ volatile("" ::: "memory");
    const std::int64_t row_bytes = stride * std::int64_t{sizeof(float)};
    _tile_loadd(0, sums, row_bytes);
    _tile_loadd(1, sums + 16, row_bytes);
    _tile_loadd(2, sums + 16 * stride, row_bytes);
    _tile_loadd(3, sums + 16 * stride + 16, row_bytes);
  }
  template <int kRows, int kColumns>
  static void store(float* sums, std::int64_t stride) {
    const std::int64_t row_bytes = stride * std::int64_t{sizeof(float)};
    _tile_stored(0, sums, row_bytes);
    if constexpr (kColumns == 2) _tile_stored(1, sums + 16, row_bytes);
    if constexpr (kRows == 2) _tile_stored(2, sums + 16 * stride, row_bytes);
    if constexpr (kRows == 2 && kColumns == 2) {
      _tile_stored(3, sums + 16 * stride + 16, row_bytes);
    }
  }
  template <int kRows, int kColumns>
  static void multiply_add(const float* a, const float* b) {
    _tile_loadd(4, a, kRowBytes);
    _tile_loadd(6, b, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b + kTileWords, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a + kTileWords, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
  }
};

constexpr Isa kIsa = Isa::kAmx;
constexpr GemmKernel kCareful = blocked_kernel<VectorBf16, kCarefulMr>("f32", kIsa);
constexpr auto kGemm = tiles_kernels<VectorBf16, AmxTiles>(&kCareful);

}  // namespace

IsaKernels amx_kernels() { return {kGemm, nullptr}; }

}  // namespace neuron_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
