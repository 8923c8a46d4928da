// Products on a matrix engine (AMX), whose instructions multiply tiles: 16 rows of 64 bytes, for A
// 16 x 32 bf16, for B 16 pairs of k x 16 columns, for sums 16 x 16 f32. V is a vector of 16 f32;
// Tiles, which isa_amx.cpp makes of instructions and the tests of plain C++, has
//
//   configure(), release()        around all else, per thread
//   zero(), load(sums, stride), store<kRows, kColumns>(sums, stride)
//                                 2 x 2 tiles of sums
//   multiply_add<kRows, kColumns>(a, b)
//                                 adds the product of kRows tiles of A, one after the other in
//                                 memory, and kColumns of B
//
// A panel of 32 rows (or columns) is its planes, one after the other; a plane is for each 32 k two
// tiles. After them comes what is known of its rows (split-inl.h).
//
//   plane 0, of x0               plane 1, of x1        ...
//   k 0..31        k 32..63
//   [tile][tile]   [tile][tile]  ...
//   rows    rows
//   0..15   16..31
#pragma once

namespace neuron_ext::cpu {
namespace {

constexpr int kTileRows = 16, kTileWords = kTileRows * 16;  // of 32 bits
constexpr int kTileK = 32;                                  // bf16 in a row of A's tiles
constexpr int kPanelRows = 2 * kTileRows;

// Longest block of k. Of several products, so that a panel's plane of 16 KiB stays in the L1 cache
// while another passes. Of one, longer: sums are read and written for every block, which for 256 k
// takes half as long as the products.
template <class Products>
constexpr std::int64_t kBlockOfTiles = Products::kPlanes == 1 ? 512 : 256;

struct PlaneProduct {
  int a, b;
};

/// The products of planes that make up a product, small ones first, so that only the last meet
/// sums of full size; from one to the next a plane stays in the L1 cache. Those left out of six are
/// below 2^-24 of |a| |b| in all, those left out of three below 2^-15; four are exact.
struct OneProduct {
  static constexpr int kPlanes = 1;
  static constexpr PlaneProduct kOrder[] = {{0, 0}};
};
struct ThreeProducts {
  static constexpr int kPlanes = 2;
  static constexpr PlaneProduct kOrder[] = {{1, 0}, {0, 1}, {0, 0}};
};
struct FourProducts {
  static constexpr int kPlanes = 2;
  static constexpr PlaneProduct kOrder[] = {{1, 0}, {1, 1}, {0, 1}, {0, 0}};
};
struct SixProducts {
  static constexpr int kPlanes = 3;
  static constexpr PlaneProduct kOrder[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
};

template <class Products>
constexpr std::int64_t kProducts = sizeof(Products::kOrder) / sizeof(PlaneProduct);

/// The length of a plane.
constexpr std::int64_t plane_words(std::int64_t steps) { return steps * 2 * kTileWords; }

// ---- packing ------------------------------------------------------------------------------------

/// Parts of x, in the same place of each plane.
template <class V, int kPlanes>
[[gnu::always_inline]] inline void store_parts(Pairs<V> x, Scalar<V>* place, std::int64_t plane) {
#pragma GCC unroll 3
  for (int part = 0; part < kPlanes; ++part) {
    const Words<V> nearest = nearest_pairs<V>(x);
    store<V>(place + part * plane, reinterpret_cast<Reg<V>>(nearest));
    if (part + 1 < kPlanes) x = {x.even - lower<V>(nearest), x.odd - upper<V>(nearest)};
  }
}

template <class V>
void transpose_tile(Scalar<V>* tile) {
  Reg<V> row[V::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) row[i] = load<V>(tile + i * V::kLanes);
  transpose<V>(row);
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) store<V>(tile + i * V::kLanes, row[i]);
}

/// A panel's planes, and notes of its rows. Where k is contiguous a tile is read row by row of the
/// operand, else pair by pair of k; A's have the former for their rows, B's the latter, so one of
/// them is transposed.
template <class V, int kPlanes, bool kIsA, class Source>
void pack_planes(const SourcePairs<V, Source>& pairs, std::int64_t mn, std::int64_t count,
                 std::int64_t k, std::int64_t steps, Scalar<V>* panel,
                 Notes<V, kPanelRows>& notes) {
  static_assert(V::kLanes == kTileRows);
  const std::int64_t plane = plane_words(steps);
  if (pairs.unit_k()) {
    // Row by row, as memory likes it; the tiles then come from L2.
    constexpr int kLinePairs = 8;  // of f32
    for (int i = 0; i < kPanelRows && i < count; ++i) {
      for (std::int64_t p = k / 2; 2 * p < pairs.end; p += kLinePairs) pairs.prefetch(mn + i, p);
    }
  }
  for (int first = 0; first < kPanelRows && first < count; first += kTileRows) {
    const std::int64_t rows = count - first < kTileRows ? count - first : kTileRows;
    for (std::int64_t step = 0; step < steps; ++step) {
      Scalar<V>* const tile = panel + step * 2 * kTileWords + first / kTileRows * kTileWords;
      const std::int64_t p = (k + step * kTileK) / 2;
      for (int row = 0; row < kTileRows; ++row) {
        Pairs<V> x = {};
        if (!pairs.unit_k()) {
          if (2 * (p + row) < pairs.end) x = pairs.along_mn(mn + first, p + row, rows);
          notes.note_lanes(first, x);
        } else if (row < rows) {
          x = pairs.along_k(mn + first + row, p, V::kLanes);
          notes.note_row(first + row, x);
        }
        store_parts<V, kPlanes>(x, tile + row * V::kLanes, plane);
      }
      if (pairs.unit_k() == kIsA) continue;
      for (int part = 0; part < kPlanes; ++part) transpose_tile<V>(tile + part * plane);
    }
  }
}

/// As pack_panel, in tiles. Returns the least margin of a row.
template <class V, class T, class Products, bool kIsA>
int pack_tiles(const Operand& operand, std::int64_t mn, std::int64_t count, std::int64_t k,
               std::int64_t kc, void* panel) {
  constexpr int kPlanes = Products::kPlanes;
  const std::int64_t steps = (kc + kTileK - 1) / kTileK;
  auto* const words = static_cast<Scalar<V>*>(panel);
  Notes<V, kPanelRows> notes;
  visit_source<V, T>(operand, [&]<class Source>(const Source& source) {
    pack_planes<V, kPlanes, kIsA>(SourcePairs<V, Source>{source, k + kc}, mn, count, k, steps,
                                  words, notes);
  });
  return notes.template describe<bits_of_planes(kPlanes)>(words + kPlanes * plane_words(steps));
}

template <class V, class Products>
void sum_known_tiles(std::int64_t steps, const void* panel, void* sums) {
  const std::int64_t known = Products::kPlanes * plane_words(steps);
  sum_known<V, kPanelRows>(static_cast<const Scalar<V>*>(panel) + known, sums);
}

template <class V, class Products>
void take_careful_tiles(std::int64_t rows, std::int64_t steps, const void* a, const void* b,
                        const void* careful, void* tile) {
  const std::int64_t known = Products::kPlanes * plane_words(steps);
  take_careful<V, kPanelRows>(
      rows, static_cast<const Scalar<V>*>(a) + known, static_cast<const Scalar<V>*>(b) + known,
      static_cast<const Scalar<V>*>(careful), static_cast<Scalar<V>*>(tile));
}

// ---- the mainloop -------------------------------------------------------------------------------

/// tile[i][j] (+)= the sum of the products of planes, for kRows x kColumns of its 2 x 2 tiles.
///
/// An instruction adds up 32 k from zero, and then to its sums. So one product goes on from what is
/// there: 32 k to a rounding is as accurate as anything f32. Several would add their small parts to
/// sums of full size; they start from zero, and are added in the end.
template <class V, class Tiles, class Products, int kRows, int kColumns>
void multiply_tiles(std::int64_t steps, const Scalar<V>* a, const Scalar<V>* b, Scalar<V>* tile,
                    bool add) {
  constexpr bool kGoesOn = kProducts<Products> == 1;
  if (kGoesOn && add) {
    Tiles::load(tile, kPanelRows);
  } else {
    Tiles::zero();
  }
  const std::int64_t plane = plane_words(steps);
  for (const PlaneProduct& product : Products::kOrder) {
    const Scalar<V>* a_tiles = a + product.a * plane;
    const Scalar<V>* b_tiles = b + product.b * plane;
    for (std::int64_t step = 0; step < steps; ++step) {
      Tiles::template multiply_add<kRows, kColumns>(a_tiles, b_tiles);
      a_tiles += 2 * kTileWords;
      b_tiles += 2 * kTileWords;
    }
  }
  if (kGoesOn || !add) return Tiles::template store<kRows, kColumns>(tile, kPanelRows);
  alignas(64) Scalar<V> sums[kPanelRows * kPanelRows];
  Tiles::template store<kRows, kColumns>(sums, kPanelRows);
  for (int i = 0; i < kRows * kTileRows; ++i) {
    for (int j = 0; j < kColumns * kTileRows; j += V::kLanes) {
      const int place = i * kPanelRows + j;
      store<V>(tile + place, load<V>(tile + place) + load<V>(sums + place));
    }
  }
}

/// Of as many tiles as hold the rows and columns.
template <class V, class Tiles, class Products>
void multiply_panels(std::int64_t rows, std::int64_t columns, std::int64_t steps, const void* a,
                     const void* b, void* tile, bool add) {
  const auto multiply = rows > kTileRows
                            ? (columns > kTileRows ? multiply_tiles<V, Tiles, Products, 2, 2>
                                                   : multiply_tiles<V, Tiles, Products, 2, 1>)
                            : (columns > kTileRows ? multiply_tiles<V, Tiles, Products, 1, 2>
                                                   : multiply_tiles<V, Tiles, Products, 1, 1>);
  multiply(steps, static_cast<const Scalar<V>*>(a), static_cast<const Scalar<V>*>(b),
           static_cast<Scalar<V>*>(tile), add);
}

// ---- rows ---------------------------------------------------------------------------------------

/// Whether the engine makes up for the zeros that fill its tiles, and for taking several products
/// for one. It does kGain multiply-adds in the time of one of the vectors'.
template <class Products, int kGain>
bool fills_tiles(const GemmDesc& desc, Form form) {
  const auto filled = [](std::int64_t count, int whole) {
    const std::int64_t tiles = (count + whole - 1) / whole;
    return tiles == 0 ? 1 : static_cast<double>(count) / static_cast<double>(tiles * whole);
  };
  return !is_streamed(desc, form) && filled(desc.deciding_m(), kTileRows) *
                                             filled(desc.n, kTileRows) * filled(desc.k, kTileK) *
                                             kGain >=
                                         static_cast<double>(kProducts<Products>);
}

template <class Products, int kGain, Precision kPrecision>
bool fills_tiles_at(const GemmDesc& desc, Form form) {
  return desc.precision == kPrecision && fills_tiles<Products, kGain>(desc, form);
}

template <class V, class Tiles, class T, DType kDType, class Products>
consteval GemmKernel tiles_kernel(const char* name, bool (*accepts)(const GemmDesc&, Form),
                                  const GemmKernel* careful) {
  GemmFunctions functions = careful->of(kDType);
  functions.pack_a = pack_tiles<V, T, Products, true>;
  functions.pack_b = pack_tiles<V, T, Products, false>;
  GemmKernel kernel = *careful;
  kernel.name = name;
  kernel.accepts = accepts;
  kernel.mr = kPanelRows;
  kernel.nr = kPanelRows;
  kernel.kr = kTileK;
  kernel.places = Products::kPlanes * kTileK / 2;
  kernel.known = kKnown;
  kernel.kc = kBlockOfTiles<Products>;
  kernel.prepare = Tiles::configure;
  kernel.release = Tiles::release;
  kernel.microkernel = multiply_panels<V, Tiles, Products>;
  kernel.careful = careful;
  kernel.take_careful = take_careful_tiles<V, Products>;
  kernel.sum_panel = sum_known_tiles<V, Products>;
  kernel.functions = {};
  kernel.functions[static_cast<int>(kDType)] = functions;
  return kernel;
}

/// All rows. `careful`: a row of V's that takes every dtype.
template <class V, class Tiles>
consteval std::array<GemmKernel, 5> tiles_kernels(const GemmKernel* careful) {
  // In Sapphire Rapids a tile's instruction does 512 multiply-adds a cycle, vectors do 32 of f32 or
  // 64 of bf16.
  constexpr int kGain = 16, kGainOfBf16 = 8;
  return {
      tiles_kernel<V, Tiles, BFloat16, DType::kBFloat16, OneProduct>(
          "gemm_bf16_32x32_amx", fills_tiles<OneProduct, kGainOfBf16>, careful),
      tiles_kernel<V, Tiles, Float16, DType::kFloat16, FourProducts>(
          "gemm_f16_bf16x4_32x32_amx", fills_tiles<FourProducts, kGain>, careful),
      tiles_kernel<V, Tiles, float, DType::kFloat32, SixProducts>(
          "gemm_f32_bf16x6_32x32_amx", fills_tiles_at<SixProducts, kGain, Precision::kHighest>,
          careful),
      tiles_kernel<V, Tiles, float, DType::kFloat32, ThreeProducts>(
          "gemm_f32_bf16x3_32x32_amx", fills_tiles_at<ThreeProducts, kGain, Precision::kHigh>,
          careful),
      tiles_kernel<V, Tiles, float, DType::kFloat32, OneProduct>(
          "gemm_f32_bf16_32x32_amx", fills_tiles_at<OneProduct, kGain, Precision::kMedium>,
          careful),
  };
}

}  // namespace
}  // namespace neuron_ext::cpu
