// The matrix product on the tensor cores that sm_80 and all later GPUs have: bf16 and f16, f32 as
// tf32 where the precision allows it, and f64; operands of either order.
//
// A block's warps form two rows; each warp holds 64 rows of the tile's sums. Copies fill a ring of
// stages with 64 bytes along k of A's and B's tiles, three stages ahead. A warp's fragments of the
// next 32 bytes are on their way from shared memory while it multiplies those of the last.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "chunks.cuh"
#include "gemm_config.h"
#include "gemm_tiles.cuh"
#include "prologue.h"
#include "ptx/copy.cuh"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/numbers.cuh"
#include "ptx/sync.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kPieceBytes = sizeof(ptx::Bytes16);  // what is copied, loaded and stored at a time
constexpr int kRowBytes = 64;                      // of a tile's k
constexpr int kHalves = 2;                         // of those, 32 bytes: what an mma takes
constexpr unsigned kStages = 4;

/// Of a type whose sums are `Sum`s.
template <class T>
struct Shape {
  static constexpr int kPiece = kPieceBytes / sizeof(T);
  static constexpr int kK = kRowBytes / sizeof(T);
  static constexpr int kHalfK = kK / kHalves;
  // A warp's 64 columns of f64 would be 256 registers of sums.
  static constexpr int kWarpRows = 64, kWarpColumns = sizeof(T) == 8 ? 32 : 64;
  // Whether a half's fragments are loaded while the half before is multiplied. Those of f32, which
  // are converted on the way, would spill some registers.
  static constexpr int kAhead = sizeof(T) == 4 ? 0 : 1;
};

constexpr int kWarpsM = 2, kWideWarpsN = 4, kNarrowWarpsN = 2;
constexpr int kSumRows = Shape<float>::kWarpRows;  // of which a warp sums D's columns
static_assert(kM == kWarpsM * kSumRows);

/// 96 KiB for wide tiles, which a block may have on any GPU, and 64 for narrow ones, so that there
/// are two blocks on an A100's multiprocessor.
template <class T, int kN>
struct alignas(128) Shared {
  static constexpr int kStageA = kM * Shape<T>::kK, kStageB = kN * Shape<T>::kK;
  T a[kStages * kStageA];
  T b[kStages * kStageB];
};
static_assert(sizeof(Shared<BFloat16, 256>) <= 99 << 10);

/// An operand as rows of contiguous elements: its own along k, or one for each k.
struct Matrix {
  const void* base;
  std::int64_t stride;
  int rows, columns;
};

struct Problem {
  GemmDesc desc;
  GemmPointers at;
  Cut cut;
  Matrix a, b;
  bool d_is_aligned;     // so that pieces of its rows can be stored
  unsigned chunk_steps;  // of a ring's stages: of a block, which has one of the chunks of k
  ChunkSums sums;
};

// ---- operands ----------------------------------------------------------------------------------

enum class Side { kA, kB };

/// 16 rows of A, or columns of B, by an mma's k, in blocks of 8 by 16 bytes (f64: by all of them).
/// Register r has of block (mn, k) what the mma takes; of B, each 8 columns are an operand of their
/// own.
template <Side kSide, class T>
struct Fragment {
  using Register = std::conditional_t<sizeof(T) == 8, double, std::uint32_t>;
  static constexpr int kBlocksK = sizeof(T) == 8 ? 1 : 2, kCount = 2 * kBlocksK;
  Register registers[kCount];

  static NEURON_EXT_DEVICE int mn(int r) { return kSide == Side::kA ? r % 2 : r / kBlocksK; }
  static NEURON_EXT_DEVICE int k(int r) { return kSide == Side::kA ? r / 2 : r % kBlocksK; }
};

/// kCount rows (or columns) of an operand by kK in shared memory, as rows of pieces, which change
/// places with others of their row so that what is read at once lies in different banks.
template <Side kSide, class T, int kCount, bool kAlongK>
struct Tile {
  using S = Shape<T>;
  using F = Fragment<kSide, T>;
  static constexpr int kColumns = kAlongK ? S::kK : kCount;
  static constexpr int kRows = kAlongK ? kCount : S::kK;
  static constexpr int kPieces = kColumns / S::kPiece;  // of a row

  // Whether fragments are loaded as matrices of 8 rows of a piece; those of larger elements can't
  // be transposed on the way, nor 64 bits be dealt out.
  static constexpr bool kHasMatrices = sizeof(T) == 2 || (sizeof(T) == 4 && kAlongK);

  static NEURON_EXT_DEVICE int place(int row, int piece) {
    // All banks are 8 pieces wide: two rows of 4, or part of a longer one. Eight rows are read at
    // once at one place, or, element by element, four at two neighbouring places.
    constexpr int kWidth = kPieces < 8 ? kPieces : 8;
    const int line = row * kWidth / 8;
    const int turn = (kHasMatrices ? line : 2 * line) % kWidth;
    return (row * kPieces + (piece ^ turn)) * S::kPiece;
  }
  static NEURON_EXT_DEVICE int element(int row, int column) {
    return place(row, column / S::kPiece) + column % S::kPiece;
  }

  /// Begins to copy the tile whose first element is (row0, column0) of the matrix, by all of
  /// kThreads threads; zeros for what lies outside.
  template <int kThreads>
  static NEURON_EXT_DEVICE void copy(T* tile, const Matrix& matrix, int row0, int column0) {
    constexpr int kRowsAtOnce = kThreads / kPieces;
    static_assert(kThreads % kPieces == 0 && kRows % kRowsAtOnce == 0);
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    const int column = column0 + piece * S::kPiece, left = matrix.columns - column;
    const int elements = left < 0 ? 0 : left < S::kPiece ? left : S::kPiece;
    const T* const base = static_cast<const T*>(matrix.base);
    const T* from = base + (row0 + row) * matrix.stride + column;
#pragma unroll
    for (int r = 0; r < kRows; r += kRowsAtOnce) {
      const bool inside = row0 + row + r < matrix.rows && elements > 0;
      ptx::copy_part_async<kPieceBytes>(tile + place(row + r, piece), inside ? from : base,
                                        inside ? elements * static_cast<int>(sizeof(T)) : 0);
      from += kRowsAtOnce * matrix.stride;
    }
  }

  /// The fragment of the 16 from mn0 on, of one half of the tile's k.
  static NEURON_EXT_DEVICE void load(F& fragment, const T* tile, int mn0, int half) {
    const int lane = ptx::lane_id();
    if constexpr (kHasMatrices) {
      const int mn = F::mn(lane / 8), k = F::k(lane / 8), row = lane % 8;
      const T* const from =
          tile + (kAlongK ? place(mn0 + 8 * mn + row, half * kPieces / kHalves + k)
                          : place(half * S::kHalfK + 8 * k + row, mn0 / S::kPiece + mn));
      ptx::load_matrices<!kAlongK>(fragment.registers, from);
    } else {
#pragma unroll
      for (int r = 0; r < F::kCount; ++r) {
        const int mn = mn0 + 8 * F::mn(r) + lane / 4;
        const int k = half * S::kHalfK + 4 * F::k(r) + lane % 4;
        const T x = tile[kAlongK ? element(mn, k) : element(k, mn)];
        if constexpr (sizeof(T) == 8) {
          fragment.registers[r] = x;
        } else {
          fragment.registers[r] = ptx::bits_of(x);
        }
      }
    }
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (std::uint32_t& x : fragment.registers) x = ptx::narrow_tf32(ptx::float_of(x));
    }
  }
};

/// Adds the product of 16 rows and of half h of 16 columns.
template <class T>
NEURON_EXT_DEVICE void multiply(Accumulator<T> (&sums)[4], const Fragment<Side::kA, T>& a,
                                const Fragment<Side::kB, T>& b, int h) {
  if constexpr (sizeof(T) == 8) {
    ptx::mma_16x8x4(sums, a.registers, b.registers[h]);
  } else {
    const std::uint32_t half[2] = {b.registers[2 * h], b.registers[2 * h + 1]};
    if constexpr (sizeof(T) == 4) {
      ptx::mma_16x8x8_tf32(sums, a.registers, half);
    } else {
      ptx::mma_16x8x16<T>(sums, a.registers, half);
    }
  }
}

// ---- sums on their way to D --------------------------------------------------------------------

/// 16 rows of a warp's part of D in shared memory, where rows are pieces that change places.
template <class T>
struct Part {
  static constexpr int kRows = 16, kColumns = Shape<T>::kWarpColumns;
  static constexpr int kPiece = Shape<T>::kPiece, kPieces = kColumns / kPiece;

  static NEURON_EXT_DEVICE int element(int row, int column) {
    // What a warp writes at once, 8 columns of 8 rows, lies in different banks.
    constexpr int kPiecesAtOnce = 8 / kPiece;
    return (row * kPieces + (column / kPiece ^ row * kPiecesAtOnce % 8)) * kPiece + column % kPiece;
  }

  static NEURON_EXT_DEVICE void write(T* part, int row, int column, Accumulator<T> first,
                                      Accumulator<T> second) {
    T* const at = part + element(row, column);
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<std::uint32_t*>(at) = ptx::narrow_pair<T>(first, second);
    } else {
      struct alignas(2 * sizeof(T)) Pair {
        T elements[2];
      };
      *reinterpret_cast<Pair*>(at) = {{first, second}};
    }
  }

  /// To D, of which it is what begins at (i0, j0).
  static NEURON_EXT_DEVICE void store(const Problem& problem, const T* part, int i0, int j0) {
    const GemmDesc& desc = problem.desc;
    const auto for_each = [&](int columns, const auto& f) {
#pragma unroll 1
      for (int e = ptx::lane_id() * columns; e < kRows * kColumns; e += ptx::kWarp * columns) {
        const int row = e / kColumns, column = e % kColumns;
        const std::int64_t i = i0 + row, j = j0 + column;
        if (i >= desc.m || j >= desc.n) continue;
        f(static_cast<T*>(problem.at.d) + i * desc.d_stride_m + j, part + element(row, column));
      }
    };
    if (problem.d_is_aligned) {
      for_each(kPiece,
               [](T* to, const T* from) { ptx::store_16_bytes(to, ptx::load_16_bytes(from)); });
    } else {
      for_each(1, [](T* to, const T* from) { *to = *from; });
    }
  }
};

/// Sums of the columns of a warp's parts of D, one below the other: a lane has neighbours.
template <class T>
struct ColumnSums {
  static constexpr int kCount = Part<T>::kColumns / ptx::kWarp;
  Accumulator<T> sums[kCount] = {};

  NEURON_EXT_DEVICE void add(const T* part) {
    struct alignas(kCount * sizeof(T)) Neighbours {
      T elements[kCount];
    };
#pragma unroll
    for (int row = 0; row < Part<T>::kRows; ++row) {
      const T* const at = part + Part<T>::element(row, kCount * ptx::lane_id());
      const Neighbours x = *reinterpret_cast<const Neighbours*>(at);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[c] += ptx::widen(x.elements[c]);
    }
  }
  /// Of D from (i0, j0) on.
  NEURON_EXT_DEVICE void store(const Problem& problem, int i0, int j0) const {
    const GemmDesc& desc = problem.desc;
    Accumulator<T>* const to =
        static_cast<Accumulator<T>*>(problem.at.d_sum) + i0 / kSumRows * desc.n;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const std::int64_t j = j0 + kCount * ptx::lane_id() + c;
      if (i0 < desc.m && j < desc.n) to[j] = sums[c];
    }
  }
};

/// What becomes of a sum before it's rounded: bias and activation. Columns are the lane's: c of 8,
/// and e of two.
template <class T, class F>
struct Activated {
  static constexpr bool kHasColumnSums = false;
  static constexpr int kColumns = Shape<T>::kWarpColumns / 8;
  Accumulator<T> bias[kColumns][2];

  NEURON_EXT_DEVICE Activated(const Problem& problem, int, int j0) {
    const GemmDesc& desc = problem.desc;
#pragma unroll
    for (int c = 0; c < 2 * kColumns; ++c) {
      const std::int64_t j = j0 + c / 2 * 8 + c % 2;
      const bool reads = desc.has_bias && j < desc.n;
      bias[c / 2][c % 2] =
          reads ? ptx::widen(static_cast<const T*>(problem.at.bias)[j * desc.bias_stride]) : 0;
    }
  }
  NEURON_EXT_DEVICE Accumulator<T> operator()(Accumulator<T> sum, int, int c, int e) const {
    return F::template apply<T>(sum + bias[c][e]);
  }
};

/// Or the activation's gradient where its output is d_saved.
template <class T>
struct Differentiated {
  static constexpr bool kHasColumnSums = true;
  const Problem& problem;
  int i0, j0;

  NEURON_EXT_DEVICE Accumulator<T> operator()(Accumulator<T> sum, int row, int c, int e) const {
    const GemmDesc& desc = problem.desc;
    const std::int64_t i = i0 + row, j = j0 + 8 * c + e;
    if (i >= desc.m || j >= desc.n) return 0;
    const T* const saved = static_cast<const T*>(problem.at.d_saved);
    return gradient(desc.epilogue_gradient, sum, ptx::widen(saved[i * desc.d_saved_stride_m + j]));
  }
};

/// All of a warp's sums: finished, rounded, and by way of its part of shared memory to D, from
/// (i0, j0) on.
template <class T, class Finish, int kRows, int kColumns>
NEURON_EXT_DEVICE void store(const Problem& problem,
                             const Accumulator<T> (&sums)[kRows][kColumns][4], T* part, int i0,
                             int j0) {
  const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
  const Finish finish{problem, i0 + g, j0 + 2 * t};
  ColumnSums<T> column_sums;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * r + 8 * h;
        Part<T>::write(part, g + 8 * h, 8 * c + 2 * t, finish(sums[r][c][2 * h], row, c, 0),
                       finish(sums[r][c][2 * h + 1], row, c, 1));
      }
    }
    ptx::warp_sync();
    Part<T>::store(problem, part, i0 + 16 * r, j0);
    if (Finish::kHasColumnSums && problem.desc.has_d_sum) column_sums.add(part);
    ptx::warp_sync();
  }
  if (Finish::kHasColumnSums && problem.desc.has_d_sum) column_sums.store(problem, i0, j0);
}

/// All of a warp's sums of a chunk of k, as they are.
template <class T, int kRows, int kColumns>
NEURON_EXT_DEVICE void store_chunk(const Problem& problem,
                                   const Accumulator<T> (&sums)[kRows][kColumns][4], int i0,
                                   int j0) {
  const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t i = i0 + 16 * r + g + e / 2 * 8, j = j0 + 8 * c + 2 * t + e % 2;
        if (i >= problem.desc.m || j >= problem.desc.n) continue;
        chunk_sum<T>(problem.desc, problem.sums, blockIdx.y, i, j) = sums[r][c][e];
      }
    }
  }
}

// ---- the product -------------------------------------------------------------------------------

template <class T, int kWarpsN, bool kAAlongK, bool kBAlongK>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * ptx::kWarp, kWideWarpsN / kWarpsN)
    gemm_sm80_kernel(const __grid_constant__ Problem problem) {
  using S = Shape<T>;
  constexpr int kThreads = kWarpsM * kWarpsN * ptx::kWarp, kN = kWarpsN * S::kWarpColumns;
  constexpr int kFragmentsM = S::kWarpRows / 16, kFragmentsN = S::kWarpColumns / 16;
  using ATile = Tile<Side::kA, T, kM, kAAlongK>;
  using BTile = Tile<Side::kB, T, kN, kBAlongK>;
  using Memory = Shared<T, kN>;
  Memory& shared = ptx::dynamic_shared<Memory>();
  const int warp = static_cast<int>(threadIdx.x) / ptx::kWarp;
  const int i_warp = warp % kWarpsM * S::kWarpRows, j_warp = warp / kWarpsM * S::kWarpColumns;
  const TilePlace place = problem.cut.place<kN>(blockIdx.x);
  const auto all_steps = static_cast<unsigned>((problem.desc.k + S::kK - 1) / S::kK);
  const unsigned first_step = blockIdx.y * problem.chunk_steps, rest = all_steps - first_step;
  const unsigned steps = rest < problem.chunk_steps ? rest : problem.chunk_steps;

  // Every step ends a group of copies, be it empty, so that those to come are counted alike.
  const auto copy = [&](unsigned step) {
    if (step < steps) {
      T* const a = shared.a + step % kStages * Memory::kStageA;
      T* const b = shared.b + step % kStages * Memory::kStageB;
      const int k = static_cast<int>(first_step + step) * S::kK;
      ATile::template copy<kThreads>(a, problem.a, kAAlongK ? place.i : k, kAAlongK ? k : place.i);
      BTile::template copy<kThreads>(b, problem.b, kBAlongK ? place.j : k, kBAlongK ? k : place.j);
    }
    ptx::copy_async_commit();
  };
  struct Fragments {
    Fragment<Side::kA, T> a[kFragmentsM];
    Fragment<Side::kB, T> b[kFragmentsN];
  } fragments[1 + S::kAhead];
  const auto load = [&](Fragments& to, unsigned step, int half) {
    if (half == 0) {
      ptx::copy_async_wait<kStages - 2>();
      ptx::block_sync();
      copy(step + kStages - 1);  // to the stage of the step before, which all have read
    }
    const T* const a = shared.a + step % kStages * Memory::kStageA;
    const T* const b = shared.b + step % kStages * Memory::kStageB;
#pragma unroll
    for (int f = 0; f < kFragmentsM; ++f) ATile::load(to.a[f], a, i_warp + 16 * f, half);
#pragma unroll
    for (int f = 0; f < kFragmentsN; ++f) BTile::load(to.b[f], b, j_warp + 16 * f, half);
  };

  Accumulator<T> sums[kFragmentsM][2 * kFragmentsN][4] = {};
  for (unsigned step = 0; step < kStages - 1; ++step) copy(step);
#pragma unroll
  for (int half = 0; half < S::kAhead; ++half) load(fragments[half], 0, half);
#pragma unroll 1
  for (unsigned step = 0; step < steps; ++step) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      // Beyond the last step it's once more, for nothing: a branch would cost moves of registers.
      const int next = half + S::kAhead;
      const unsigned next_step = step + next / kHalves;
      load(fragments[next % (1 + S::kAhead)], next_step < steps ? next_step : steps - 1,
           next % kHalves);
      const Fragments& now = fragments[half % (1 + S::kAhead)];
#pragma unroll
      for (int r = 0; r < kFragmentsM; ++r) {
#pragma unroll
        for (int c = 0; c < 2 * kFragmentsN; ++c) {
          multiply<T>(sums[r][c], now.a[r], now.b[c / 2], c % 2);
        }
      }
    }
  }

  // When nobody reads the ring any more, it's a place for results.
  ptx::copy_async_wait<0>();
  ptx::block_sync();
  static_assert(kWarpsM * kWarpsN * sizeof(T[Part<T>::kRows][Part<T>::kColumns]) <=
                sizeof(shared.a));
  T* const part = shared.a + warp * Part<T>::kRows * Part<T>::kColumns;
  const int i0 = place.i + i_warp, j0 = place.j + j_warp;
  if (problem.sums.base != nullptr) {
    store_chunk<T>(problem, sums, i0, j0);
  } else if (problem.desc.has_epilogue_gradient()) {
    store<T, Differentiated<T>>(problem, sums, part, i0, j0);
  } else if (problem.desc.epilogue == Activation::kSigmoid) {
    store<T, Activated<T, Sigmoid>>(problem, sums, part, i0, j0);
  } else {
    store<T, Activated<T, Identity>>(problem, sums, part, i0, j0);
  }
}

// ---- launch ------------------------------------------------------------------------------------

/// One that the kernel takes: contiguous along k, or across it.
struct Operand {
  DType dtype;
  const void* base;
  std::int64_t count, k, stride, stride_k;  // count: of rows of A, of columns of B

  bool is_along_k() const { return has_aligned_rows(dtype, base, count, k, stride, stride_k); }
  bool is_across_k() const { return has_aligned_rows(dtype, base, k, count, stride_k, stride); }
  Matrix matrix() const {
    const int rows = static_cast<int>(count), columns = static_cast<int>(k);
    return is_along_k() ? Matrix{base, stride, rows, columns}
                        : Matrix{base, stride_k, columns, rows};
  }
};

Operand a_of(const GemmDesc& desc, const GemmPointers& at) {
  return {desc.dtype, at.a, desc.m, desc.k, desc.a_stride_m, desc.a_stride_k};
}
Operand b_of(const GemmDesc& desc, const GemmPointers& at) {
  return {desc.dtype, at.b, desc.n, desc.k, desc.b_stride_n, desc.b_stride_k};
}

int wide_of(DType dtype) {
  return kWideWarpsN *
         (dtype == DType::kFloat64 ? Shape<double>::kWarpColumns : Shape<float>::kWarpColumns);
}

/// How k is cut where D has too few tiles to occupy a GPU: by the shape alone, so that results
/// don't depend on the GPU.
struct Chunks {
  std::int64_t steps, count;
};

constexpr std::int64_t kWholeGpu = 128;  // blocks that occupy it, by one each

std::int64_t narrow_tiles(const GemmDesc& desc) {
  return divide_up(desc.deciding_m(), kM) * divide_up(desc.n, wide_of(desc.dtype) / 2);
}

Chunks chunks_of(const GemmDesc& desc) {
  // Several turns of the ring for each, so that filling it and adding the sums up are little
  // beside.
  constexpr std::int64_t kLeastSteps = 8 * kStages;
  const std::int64_t steps = divide_up(desc.k, kRowBytes / size_of(desc.dtype));
  const std::int64_t wanted =
      std::clamp<std::int64_t>(steps / kLeastSteps, 1, divide_up(kWholeGpu, narrow_tiles(desc)));
  const std::int64_t chunk = divide_up(steps, wanted);
  return {chunk, divide_up(steps, chunk)};
}

/// Whether few tiles on tensor cores take no longer than what gemm_simt makes of the product, which
/// occupies a GPU with smaller tiles and chunks.
bool is_worth_tensor_cores(const GemmDesc& desc) {
  constexpr std::int64_t kChunk = 512;
  // Products per clock, in those of multiply-adds: of an A100, 1024, 512 and 64 for 64 and 32.
  const std::int64_t gain = desc.dtype == DType::kFloat64   ? 2
                            : desc.dtype == DType::kFloat32 ? 8
                                                            : 16;
  const std::int64_t side = desc.dtype == DType::kFloat64 ? 32 : 64;
  const std::int64_t others = divide_up(desc.deciding_m(), side) * divide_up(desc.n, side) *
                              std::max<std::int64_t>(1, desc.k / kChunk);
  return narrow_tiles(desc) * chunks_of(desc).count * gain >= std::min(kWholeGpu, others);
}

bool accepts(const GemmDesc& desc, const GemmPointers& at, const Device&) {
  if (desc.dtype == DType::kFloat32 && desc.precision < Precision::kHigh) return false;
  const Operand a = a_of(desc, at), b = b_of(desc, at);
  // With a prologue, A is rewritten.
  const bool takes_a = desc.prologue == Activation::kIdentity
                           ? a.is_along_k() || a.is_across_k()
                           : std::max(desc.m, desc.k) <= kLargest;
  return desc.n > 0 && desc.k > 0 && takes_a && (b.is_along_k() || b.is_across_k()) &&
         make_cut(desc, wide_of(desc.dtype) / 2).tiles <= kLargest && is_worth_tensor_cores(desc);
}

std::size_t workspace(const GemmDesc& desc, const Device&) {
  return prologue_workspace(desc) + chunk_bytes(desc, chunks_of(desc).count);
}

template <class T, int kWarpsN>
int run_as(const Problem& problem, Stream stream) {
  const bool a_along = a_of(problem.desc, problem.at).is_along_k();
  const bool b_along = b_of(problem.desc, problem.at).is_along_k();
  const auto kernel = a_along ? (b_along ? gemm_sm80_kernel<T, kWarpsN, true, true>
                                         : gemm_sm80_kernel<T, kWarpsN, true, false>)
                              : (b_along ? gemm_sm80_kernel<T, kWarpsN, false, true>
                                         : gemm_sm80_kernel<T, kWarpsN, false, false>);
  return ptx::launch(
      kernel,
      {dim3(static_cast<unsigned>(problem.cut.tiles), static_cast<unsigned>(problem.sums.chunks)),
       dim3(kWarpsM * kWarpsN * ptx::kWarp), sizeof(Shared<T, kWarpsN * Shape<T>::kWarpColumns>)},
      stream, problem);
}

int run(const GemmDesc& whole_desc, const GemmPointers& whole_at, void* workspace,
        const Device& device, Stream stream) {
  GemmDesc desc = whole_desc;
  GemmPointers at = whole_at;
  int error = run_prologue(desc, at, workspace, stream);
  if (error != 0) return error;
  const Chunks chunks = chunks_of(desc);
  ChunkSums sums;
  if (chunks.count > 1) {
    sums = {static_cast<std::byte*>(workspace) + prologue_workspace(whole_desc), chunks.count};
  }
  const int wide = wide_of(desc.dtype);
  const std::int64_t piece = kPieceBytes / size_of(desc.dtype);
  const Problem problem{
      desc,
      at,
      choose_cut(desc, device, wide),
      a_of(desc, at).matrix(),
      b_of(desc, at).matrix(),
      desc.n % piece == 0 && has_aligned_rows(desc.dtype, at.d, desc.m, desc.n, desc.d_stride_m, 1),
      static_cast<unsigned>(chunks.steps),
      sums};
  error = visit_dtype(desc.dtype, [&]<class T>(T*) {
    return problem.cut.tile_n == wide ? run_as<T, kWideWarpsN>(problem, stream)
                                      : run_as<T, kNarrowWarpsN>(problem, stream);
  });
  return error != 0 ? error : add_chunks(desc, at, sums, stream);
}

std::int64_t d_sum_rows(const GemmDesc& desc) { return chunks_of(desc).count > 1 ? 0 : kSumRows; }

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

}  // namespace

const GemmKernel gemm_sm80 = {.name = "gemm_sm80",
                              .dtypes = kDTypes,
                              .lowest_sm = kLowestSm,
                              .highest_sm = 999,
                              .accepts = accepts,
                              .workspace = workspace,
                              .run = run,
                              .forms_a = true,
                              .takes_epilogue_gradient = true,
                              .d_sum_rows = d_sum_rows};

}  // namespace neuron_ext::cuda
