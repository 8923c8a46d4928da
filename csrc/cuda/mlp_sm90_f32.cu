// A stack of narrow layers on sm_90a's tensor cores: f32, as products of bf16 (split.cuh).
//
// A warpgroup takes 64 rows through all layers by itself. What a layer gives stays in its
// registers: the sums of a product, finished in f32 and split into parts, are A of the next one,
// since wgmma's D and A have their elements in the same lanes. Weights are in shared memory in
// parts, all of them where they fit, so that a block splits them once for all of its rows; else two
// layers' at a time, one that is multiplied with and the next.
//
// A block's two warpgroups take turns with the tensor cores: while they multiply one's rows, the
// other finishes what it got, which takes about as long.
//
// Features are numbered so that each 16 of them give a lane 4 neighbours, 16 bytes of a row in
// global memory: feature 4 t + 2 p + e is column 8 p + 2 t + e of D, and so of A and of both sides
// of the weight. Lane 4 g + t has rows g and g + 8 of its warp's 16.
//
// A row splits if its largest does. Smaller numbers' low parts may then be lost, less than 2^-126
// of each: a quarter of the last place of what is 2^-100, and the row's largest is no less. Rows
// that don't split are taken through all layers once more, by multiply-adds, when the block is done
// with the others, and all of them are where a weight doesn't.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "activation.cuh"
#include "column_sums.cuh"
#include "mlp_simt.cuh"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"
#include "split.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kPiece = 16;  // features: a step of wgmma's k
constexpr int kSpan = 64;   // features of a weight's row that lie side by side in shared memory
constexpr int kWarps = kThreads / ptx::kWarp;
constexpr int kRows = kSumRows * kWarps;  // of a block, in one turn: 16 of a warp

/// Blocks on a multiprocessor, whose threads may have 128 or 255 registers: beside the sums, A in
/// parts takes one and a half times as many as it's wide.
template <int kWidth>
constexpr int kBlocks = kWidth == 64 ? 2 : 1;

/// A layer's weight in parts, each as wgmma reads it: rows of a span, whose pieces of 16 bytes are
/// swapped by their row's number.
template <int kWidth, int kParts>
struct alignas(1024) Weight {
  BFloat16 parts[kParts][kWidth / kSpan][kWidth][kSpan];
};

/// A lane's part of 16 columns: 4 of each of two rows.
using Piece = Vector<float>[2];

/// The rows of a warpgroup, as A of products.
template <int kWidth, int kParts>
using Rows = std::uint32_t[kWidth / kPiece][kParts][4];

struct Matrix {
  const void* base;
  std::int64_t rows, columns, stride_row, stride_column;
};

/// The first of a lane's two rows. To be called anew where they are needed, since products leave no
/// registers to keep it in.
[[maybe_unused]] NEURON_EXT_DEVICE std::int64_t row_of(int tile) {
  return std::int64_t{kRows} * tile + kSumRows * static_cast<int>(threadIdx.x / ptx::kWarp) +
         ptx::lane_id_now() / 4;
}

/// A lane's part of columns from `column` on, with zeros beyond the matrix.
[[maybe_unused]] NEURON_EXT_DEVICE void load(Piece& piece, const Matrix& matrix, std::int64_t row,
                                             int column) {
  const bool is_whole =
      matrix.stride_column == 1 && matrix.stride_row % 4 == 0 && is_aligned(matrix.base);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t i = row + 8 * r, left = i < matrix.rows ? matrix.columns - column : 0;
    const std::int64_t offset =
        left > 0 ? i * matrix.stride_row + column * matrix.stride_column : 0;
    piece[r] = load_vector(static_cast<const float*>(matrix.base) + offset, matrix.stride_column,
                           is_whole, left);
  }
}

/// To a layer's output.
[[maybe_unused]] NEURON_EXT_DEVICE void store(const Piece& piece, const MlpLayer& layer,
                                              std::int64_t row, int column, std::int64_t count) {
  const int out = static_cast<int>(layer.out_features);
  const bool is_whole = out % 4 == 0 && is_aligned(layer.output);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t i = row + 8 * r;
    if (i >= count || column >= out) continue;
    store_vector(static_cast<float*>(layer.output) + i * out + column, piece[r], is_whole,
                 out - column);
  }
}

/// A block's threads split a layer's weight, with zeros beyond it. Returns whether this thread's
/// part of it splits. Then async_proxy_fence and a barrier have to follow.
template <int kWidth, int kParts>
NEURON_EXT_DEVICE bool load(Weight<kWidth, kParts>& weight, const MlpLayer& layer) {
  constexpr int kQuads = kWidth / 4;   // 4 neighbours of a row each
  constexpr int kAhead = kWidth / 32;  // on their way: what registers there are
  static_assert(kWidth * kQuads % (kThreads * kAhead) == 0);
  const std::int64_t stride_out = layer.weight_stride_out, stride_in = layer.weight_stride_in;
  // Neighbouring threads read neighbours.
  const bool along_rows = stride_in == 1;
  const bool is_whole = along_rows && stride_out % 4 == 0 && is_aligned(layer.weight);
  const auto row_of = [&](int q) { return along_rows ? q / kQuads : q % kWidth; };
  const auto k_of = [&](int q) { return 4 * (along_rows ? q % kQuads : q / kWidth); };
  bool all_split = true;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < kWidth * kQuads;
       first += kThreads * kAhead) {
    Vector<float> quads[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int q = first + kThreads * a, row = row_of(q), k = k_of(q);
      const std::int64_t left = row < layer.out_features ? layer.in_features - k : 0;
      const std::int64_t offset = left > 0 ? row * stride_out + k * stride_in : 0;
      quads[a] =
          load_vector(static_cast<const float*>(layer.weight) + offset, stride_in, is_whole, left);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int q = first + kThreads * a, row = row_of(q), k = k_of(q);
#pragma unroll
      for (const float x : quads[a].elements) all_split &= splits(x);
      const int place = row / kPiece * kPiece + row / 2 % 2 * 8 + row / 4 % 4 * 2 + row % 2;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        auto& span = weight.parts[part][k / kSpan][place];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const pair = &quads[a].elements[2 * half];
          const int column = (k / kPiece * 2 + half) % 8 * 8 + k / 4 % 4 * 2;
          *reinterpret_cast<std::uint32_t*>(&span[column ^ place % 8 * 8]) =
              take_parts(pair[0], pair[1]);
        }
      }
    }
  }
  return all_split;
}

/// The largest magnitudes of a lane's two rows, as bits: those of nan are larger than inf's.
using Largest = std::uint32_t[2];

[[maybe_unused]] NEURON_EXT_DEVICE void include(const Piece& piece, Largest& largest) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      largest[r] = std::max(largest[r], ptx::bits_of(piece[r].elements[e]) & 0x7fffffffu);
    }
  }
}

/// Whether both rows split. All lanes take part.
[[maybe_unused]] NEURON_EXT_DEVICE bool both_split(const Largest& largest) {
  bool both_split = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    std::uint32_t bits = largest[r];
    bits = std::max(bits, ptx::shuffle_xor(bits, 1));
    bits = std::max(bits, ptx::shuffle_xor(bits, 2));
    both_split &= splits(ptx::float_of(bits));
  }
  return both_split;
}

template <int kParts>
NEURON_EXT_DEVICE void split(Piece piece, std::uint32_t (&parts)[kParts][4]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float* const pair = &piece[r % 2].elements[r / 2 * 2];
      parts[part][r] = take_parts(pair[0], pair[1]);
    }
  }
}

/// A tile of the stack's input. Returns whether the lane's rows split.
template <int kWidth, int kParts>
NEURON_EXT_DEVICE bool load(Rows<kWidth, kParts>& rows, const Matrix& matrix, int tile) {
  constexpr int kPieces = kWidth / kPiece;
  const int t = ptx::lane_id_now() % 4;
  const std::int64_t row = row_of(tile);
  Piece pieces[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) load(pieces[p], matrix, row, kPiece * p + 4 * t);
  Largest largest = {};
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    include(pieces[p], largest);
    split<kParts>(pieces[p], rows[p]);
  }
  return both_split(largest);
}

/// A warp's note, unless all that its lanes had split.
[[maybe_unused]] NEURON_EXT_DEVICE void note(bool lane_splits, std::uint32_t& notes, int bit = 0) {
  if (ptx::ballot(!lane_splits) != 0 && ptx::lane_id() == 0) notes |= 1u << bit;
}

/// Starts a layer's products, the smallest first.
template <int kWidth, int kParts>
NEURON_EXT_DEVICE void multiply(const Rows<kWidth, kParts>& rows,
                                const Weight<kWidth, kParts>& weight, float (&sums)[kWidth / 2]) {
  constexpr int kPitch = kSpan * sizeof(BFloat16);
  ptx::wgmma_fence();
  bool is_first = true;
#pragma unroll
  for (int order = kParts - 1; order >= 0; --order) {
#pragma unroll
    for (int part = 0; part <= order; ++part) {
#pragma unroll
      for (int p = 0; p < kWidth / kPiece; ++p) {
        const auto& span = weight.parts[order - part][kPiece * p / kSpan];
        const std::uint64_t b =
            ptx::matrix_descriptor(span, 8 * kPitch, 0, ptx::Swizzle::k128Bytes);
        ptx::wgmma_64xNx16<kWidth, DType::kBFloat16>(
            sums, rows[p][part], ptx::advance(b, kPiece * p % kSpan * sizeof(BFloat16)), !is_first);
        is_first = false;
      }
    }
  }
  ptx::wgmma_commit();
}

/// The sums of two neighbouring pieces' columns over the warp's rows go to where the layer has
/// them.
[[maybe_unused]] NEURON_EXT_DEVICE void store_column_sums(float (&sums)[8], const MlpLayer& layer,
                                                          std::int64_t row, int first_column,
                                                          std::int64_t count) {
  const int lane = ptx::lane_id_now(), g = lane / 4, t = lane % 4;
  sum_over_rows(sums, lane);
  const std::int64_t out = layer.out_features, block = row / kSumRows;
  const int column = first_column + g / 4 * kPiece + 4 * t + g % 4;
  if (column >= out || block * kSumRows >= count) return;
  static_cast<float*>(layer.output_sum)[block * out + column] = sums[0];
}

/// A layer's sums become its output, in `rows`. Returns whether the lane's rows split.
template <int kWidth, int kParts, bool kGradients>
NEURON_EXT_DEVICE bool finish(const float (&sums)[kWidth / 2], const float* bias,
                              const MlpLayer& layer, int tile, std::int64_t count,
                              Rows<kWidth, kParts>& rows) {
  constexpr int kPieces = kWidth / kPiece;
  constexpr int kAhead = kPieces / 2;  // saved pieces on their way: what registers there are
  const int t = ptx::lane_id_now() % 4, out = static_cast<int>(layer.out_features);
  const std::int64_t row = row_of(tile);
  Largest largest = {};
  float column_sums[8];
#pragma unroll
  for (int first = 0; first < kPieces; first += kAhead) {
    Piece saved[kAhead];
    if constexpr (kGradients) {
      const Matrix matrix{layer.saved, layer.saved == nullptr ? 0 : count, out, out, 1};
#pragma unroll
      for (int p = 0; p < kAhead; ++p) load(saved[p], matrix, row, kPiece * (first + p) + 4 * t);
    }
#pragma unroll
    for (int p = first; p < first + kAhead; ++p) {
      const int column = kPiece * p + 4 * t;
      Piece piece = {};
      if (kPiece * p < out) {
        const Vector<float> b = {ptx::load_16_bytes(bias + column)};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            piece[r].elements[e] = sums[8 * p + e / 2 * 4 + r * 2 + e % 2] + b.elements[e];
          }
        }
        if (kGradients || layer.activation == Activation::kSigmoid) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& x = piece[r].elements[e];
              if constexpr (kGradients) {
                x = gradient(layer.saved == nullptr ? Activation::kIdentity : layer.activation, x,
                             saved[p - first][r].elements[e]);
              } else {
                x = Sigmoid::apply<float>(x);
              }
            }
          }
        }
        // Zeros in the place of columns that the layer hasn't got: weights of zero don't hide an
        // inf.
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (column + e >= out) piece[0].elements[e] = piece[1].elements[e] = 0;
        }
        if (layer.output != nullptr) store(piece, layer, row, column, count);
      }
      if (kGradients && layer.output_sum != nullptr) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          column_sums[p % 2 * 4 + e] = (row < count ? piece[0].elements[e] : 0) +
                                       (row + 8 < count ? piece[1].elements[e] : 0);
        }
        if (p % 2 == 1) store_column_sums(column_sums, layer, row, kPiece * (p - 1), count);
      }
      include(piece, largest);
      split<kParts>(piece, rows[p]);
    }
  }
  return both_split(largest);
}

/// kGradients: layers may have saved outputs, and have no activations.
template <int kWidth, int kParts, bool kGradients>
__global__ void __launch_bounds__(kThreads, kBlocks<kWidth>)
    mlp_sm90_f32_kernel(const __grid_constant__ StackLaunch launch) {
#if NEURON_EXT_HAS_SM90A
  constexpr int kFirstTurn = 1;  // the barrier at which warpgroup 0 waits for its turn
  NEURON_EXT_SHARED(float, biases, [kMostLayers][kWidth]);
  // A warp notes in a bit of each turn whether its rows don't split. Turns so many apart share one.
  constexpr int kTurns = 32;
  NEURON_EXT_SHARED(std::uint32_t, rows_unsplit, [kWarps]);
  NEURON_EXT_SHARED(std::uint32_t, weights_unsplit, [kWarps]);
  auto* const weights = &ptx::dynamic_shared<Weight<kWidth, kParts>>();
  const Stack& stack = launch.stack;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / ptx::kWarp, warpgroup = thread / ptx::kWarpgroup;
  const int grid = static_cast<int>(gridDim.x);

  if (ptx::lane_id() == 0) rows_unsplit[warp] = weights_unsplit[warp] = 0;
  for (int i = 0; i < (launch.is_resident ? stack.depth : 1); ++i) {
    note(load(weights[i], stack.layers[i]), weights_unsplit[warp]);
  }
  for (int e = thread; e < stack.depth * kWidth; e += kThreads) {
    const MlpLayer& layer = stack.layers[e / kWidth];
    const int j = e % kWidth;
    biases[e / kWidth][j] = layer.bias != nullptr && j < layer.out_features
                                ? static_cast<const float*>(layer.bias)[j * layer.bias_stride]
                                : 0.0f;
  }
  ptx::async_proxy_fence();
  ptx::block_sync();

  const Matrix input{stack.input, stack.rows, stack.layers[0].in_features, stack.stride_row,
                     stack.stride_column};
  if (warpgroup == 1) ptx::barrier_arrive(kFirstTurn, kThreads);
  int place = 0;  // of the layer's weight
  for (int tile = static_cast<int>(blockIdx.x); tile < launch.tiles; tile += grid) {
    const int turn = tile / grid % kTurns;
    Rows<kWidth, kParts> rows;
    note(load<kWidth, kParts>(rows, input, tile), rows_unsplit[warp], turn);
    for (int i = 0; i < stack.depth; ++i) {
      if (launch.is_resident) place = i;
      float sums[kWidth / 2];
      // The other warpgroup's products are done, and its part of the weight is there.
      ptx::barrier_sync(kFirstTurn + warpgroup, kThreads);
      multiply<kWidth, kParts>(rows, weights[place], sums);
      if (!launch.is_resident) {
        const MlpLayer& next = stack.layers[i + 1 < stack.depth ? i + 1 : 0];
        note(load(weights[place ^ 1], next), weights_unsplit[warp]);
        ptx::async_proxy_fence();
      }
      ptx::wgmma_wait<0>();
      ptx::barrier_arrive(kFirstTurn + (warpgroup ^ 1), kThreads);
      const bool lane_splits = finish<kWidth, kParts, kGradients>(sums, biases[i], stack.layers[i],
                                                                  tile, stack.rows, rows);
      if (i + 1 < stack.depth) note(lane_splits, rows_unsplit[warp], turn);
      place ^= 1;
    }
  }
  if (warpgroup == 0) ptx::barrier_sync(kFirstTurn, kThreads);

  ptx::block_sync();
  using SimtTile = Tile<float, kWidth, true>;
  static_assert(SimtTile::kRows == kRows);
  for (int tile = static_cast<int>(blockIdx.x); tile < launch.tiles; tile += grid) {
    std::uint32_t notes = 0;
    for (int w = 0; w < kWarps; ++w) {
      notes |= (rows_unsplit[w] >> tile / grid % kTurns & 1) | weights_unsplit[w];
    }
    if (notes != 0) run_tile(ptx::dynamic_shared<SimtTile>(), stack, tile);
  }
#endif
}

// ---- launch ------------------------------------------------------------------------------------

template <int kWidth, int kParts>
int run_as(const Stack& stack, const Device& device, Stream stream) {
  constexpr std::size_t kMultiprocessor = 228 << 10, kBlockMost = 227 << 10, kReserved = 1 << 10;
  constexpr std::size_t kStatic =
      sizeof(float) * kMostLayers * kWidth + 2 * sizeof(std::uint32_t) * kWarps;
  const std::size_t all = sizeof(Weight<kWidth, kParts>) * static_cast<std::size_t>(stack.depth);
  const StackLaunch launch{stack, static_cast<int>((stack.rows + kRows - 1) / kRows),
                           kStatic + all <= kBlockMost};
  const std::size_t shared = std::max(launch.is_resident ? all : 2 * sizeof(Weight<kWidth, kParts>),
                                      sizeof(Tile<float, kWidth, true>));
  const auto blocks =
      std::min<int>(kBlocks<kWidth>, kMultiprocessor / (kStatic + shared + kReserved));
  const auto kernel = has_gradients(stack) ? mlp_sm90_f32_kernel<kWidth, kParts, true>
                                           : mlp_sm90_f32_kernel<kWidth, kParts, false>;
  const auto grid = static_cast<unsigned>(std::min(launch.tiles, blocks * device.sm_count));
  return ptx::launch(kernel, {dim3(grid), dim3(kThreads), shared}, stream, launch);
}

template <int kParts>
int run_as(const Stack& stack, const Device& device, Stream stream) {
  return stack.widest <= 64 ? run_as<64, kParts>(stack, device, stream)
                            : run_as<kWidestLayer, kParts>(stack, device, stream);
}

int run(const Stack& stack, DType, const Device& device, Stream stream) {
  switch (planes_for(stack.precision)) {
    case 1:
      return run_as<1>(stack, device, stream);
    case 2:
      return run_as<2>(stack, device, stream);
    default:
      return run_as<3>(stack, device, stream);
  }
}

constexpr DType kDTypes[] = {DType::kFloat32};

}  // namespace

const MlpKernel mlp_sm90_f32 = {.name = "mlp_sm90_f32",
                                .dtypes = kDTypes,
                                .lowest_sm = 90,
                                .highest_sm = 90,
                                .takes_strict = false,
                                .sum_rows = kSumRows,
                                .run = run};

}  // namespace neuron_ext::cuda
