// How the tensor cores' products cut D into tiles, which of two widths those have, and in which
// order blocks take them. Results are the same for any cut.
#pragma once

#include <cstdint>

#include "gemm_config.h"
#include "neuron_ext/cuda.h"
#include "neuron_ext/gemm.h"
#include "ptx/target.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kM = 128;  // rows of a tile

// Rows or columns of a matrix: with what the last tile adds, an int.
constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - 256;

/// Whether a matrix has rows of contiguous elements that begin at multiples of 16 bytes, and sizes
/// that an int holds.
inline bool has_aligned_rows(DType dtype, const void* base, std::int64_t rows, std::int64_t columns,
                             std::int64_t row_stride, std::int64_t column_stride) {
  return rows <= kLargest && columns <= kLargest &&
         cuda::has_aligned_rows(base, size_of(dtype), column_stride, row_stride);
}

struct TilePlace {
  int i, j;  // the first row and column
};

struct Cut {
  int tile_n;
  std::int64_t tiles_m, tiles_n, tiles;

  /// Tiles in the order in which blocks take them: down 16 rows of tiles, then the next column. The
  /// 132 that an H100 has under way then read 2048 rows and about as many columns, the fewest that
  /// can be, and those of A stay in L2 for the whole width.
  template <int kN>
  NEURON_EXT_DEVICE TilePlace place(std::int64_t tile) const {
    constexpr std::int64_t kBand = 16;
    const std::int64_t band = tile / (kBand * tiles_n), rest = tile % (kBand * tiles_n);
    const std::int64_t below = tiles_m - band * kBand;
    const std::int64_t height = below < kBand ? below : kBand;
    return {static_cast<int>(band * kBand + rest % height) * kM,
            static_cast<int>(rest / height) * kN};
  }
};

inline Cut make_cut(const GemmDesc& desc, int tile_n) {
  const std::int64_t tiles_m = divide_up(desc.m, kM), tiles_n = divide_up(desc.n, tile_n);
  return {tile_n, tiles_m, tiles_n, tiles_m * tiles_n};
}

/// Into tiles of `wide` columns, or of half as many where their rounds on all multiprocessors take
/// less time.
inline Cut choose_cut(const GemmDesc& desc, const Device& device, int wide) {
  // The time of a wide tile, in those of narrow ones: less than two, since each byte that is read
  // serves more products. Of 16 bits and for 256 columns it's 24 bytes a clock in place of 32 on an
  // A100, of the 47 that L2 has for each multiprocessor, and 48 in place of 64 on an H100, of the
  // 80 that are seen.
  constexpr double kWide = 1.75;
  const Cut narrow_cut = make_cut(desc, wide / 2), wide_cut = make_cut(desc, wide);
  const auto rounds = [&](const Cut& cut) {
    return static_cast<double>(divide_up(cut.tiles, device.sm_count));
  };
  return kWide * rounds(wide_cut) <= rounds(narrow_cut) ? wide_cut : narrow_cut;
}

}  // namespace
}  // namespace neuron_ext::cuda
