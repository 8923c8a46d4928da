// A stack of narrow layers on sm_80's tensor cores: bf16 and f16.
//
// A warp takes 32 rows through all layers by itself. What a layer gives stays in its registers: the
// sums of a product, finished and rounded, are A of the next one, since mma's D and A have their
// elements in the same lanes. Weights are in shared memory, all of them where they fit, so that a
// block loads them once for all of its rows; else two layers' at a time, one that is multiplied
// with and the next on its way.
//
// Columns are numbered so that each span of 32 gives a lane 8 neighbours, 16 bytes of a row in
// global memory: lane 4 g + t has columns 8 t to 8 t + 7 of rows g and g + 8. Column 8 t + 2 j + e
// is element e of tile j of D, and, with j = 2 a + r, half e of register pair r of the a-th A. It
// also makes a lane's elements of two Bs 16 bytes of a row of the weight.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "activation.cuh"
#include "column_sums.cuh"
#include "mlp_kernels.h"
#include "ptx/copy.cuh"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/sync.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kSpan = 32;    // columns
constexpr int kHeights = 2;  // of mma's 16 rows; two halve what is read of shared memory
constexpr int kRows = 16 * kHeights;
constexpr int kTiles = 2;                       // of D, 8 columns each, at a time: of a span's four
constexpr int kNeighbours = kVector<BFloat16>;  // columns of a lane in a span

/// A multiprocessor has one block, whose threads may have 168 or 255 registers: beside the sums,
/// what was a layer's input and what will be its output take as many as it's wide.
template <int kWidth>
constexpr int kWarps = kWidth == 64 ? 12 : 8;
template <int kWidth>
constexpr int kThreads = kWarps<kWidth> * ptx::kWarp;

/// 32 rows of a warp by a span, as A of products: registers of (height, half of the span).
using Span = std::uint32_t[kHeights][2][4];
template <int kWidth>
using Rows = Span[kWidth / kSpan];

/// A layer's parameters. Of odd rows, neighbouring 64 bytes are swapped: those that lanes read
/// together are in different banks then.
template <class T, int kWidth>
struct Parameters {
  T weight[kWidth * kWidth];
  float bias[kWidth];

  static NEURON_EXT_DEVICE int place(int row, int column) {
    return row * kWidth + (column ^ row % 2 * kSpan);
  }
};

struct Matrix {
  const void* base;
  std::int64_t rows, columns, stride_row, stride_column;

  /// Whether a row is 16 bytes after 16 bytes.
  NEURON_EXT_DEVICE bool is_whole() const {
    return stride_column == 1 && stride_row % kNeighbours == 0 && columns % kNeighbours == 0 &&
           is_aligned(base);
  }
  NEURON_EXT_DEVICE Matrix transposed() const {
    return {base, columns, rows, stride_column, stride_row};
  }
};

NEURON_EXT_DEVICE int spans_of(std::int64_t features) {
  return (static_cast<int>(features) + kSpan - 1) / kSpan;
}

// ---- between global memory and a block ---------------------------------------------------------

/// Starts to load a layer's parameters, with zeros up to whole spans.
template <class T, int kWidth>
NEURON_EXT_DEVICE void load(Parameters<T, kWidth>& parameters, const MlpLayer& layer) {
  using P = Parameters<T, kWidth>;
  const int in = static_cast<int>(layer.in_features), out = static_cast<int>(layer.out_features);
  const int thread = static_cast<int>(threadIdx.x), rows = spans_of(out) * kSpan;
  const T* const weight = static_cast<const T*>(layer.weight);
  const std::int64_t stride_out = layer.weight_stride_out, stride_in = layer.weight_stride_in;
  const Matrix matrix{weight, out, in, stride_out, stride_in};
  if (matrix.is_whole()) {
    constexpr int kVectors = kWidth / kNeighbours;
    for (int v = thread; v < rows * kVectors; v += kThreads<kWidth>) {
      const int row = v / kVectors, column = v % kVectors * kNeighbours;
      const bool is_inside = row < out && column < in;
      ptx::copy_async<16>(&parameters.weight[P::place(row, column)],
                          is_inside ? weight + row * stride_out + column : weight, is_inside);
    }
  } else if (matrix.transposed().is_whole()) {
    // Neighbouring lanes store neighbours, of a column each.
    for (int v = thread; v < rows / kNeighbours * kWidth; v += kThreads<kWidth>) {
      const int row = v / kWidth * kNeighbours, column = v % kWidth;
      Vector<T> vector = {};
      if (row < out && column < in) {
        vector.bytes = ptx::load_16_bytes(weight + column * stride_in + row);
      }
#pragma unroll
      for (int e = 0; e < kNeighbours; ++e) {
        parameters.weight[P::place(row + e, column)] = vector.elements[e];
      }
    }
  } else {
    for (int e = thread; e < rows * kWidth; e += kThreads<kWidth>) {
      const int row = e / kWidth, column = e % kWidth;
      parameters.weight[P::place(row, column)] =
          row < out && column < in ? weight[row * stride_out + column * stride_in] : T{};
    }
  }
  for (int j = thread; j < rows; j += kThreads<kWidth>) {
    parameters.bias[j] = layer.bias != nullptr && j < out
                             ? ptx::widen(static_cast<const T*>(layer.bias)[j * layer.bias_stride])
                             : 0.0f;
  }
  ptx::copy_async_commit();
}

/// Span s of a matrix's tile, with zeros beyond the matrix.
template <class T>
NEURON_EXT_DEVICE void load(Span& span, const Matrix& matrix, int tile, int s) {
  const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
  const int column = s * kSpan + t * kNeighbours;
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    const std::int64_t row = std::int64_t{kRows} * tile + 8 * r + g;
    Vector<T> vector = {};
    if (row < matrix.rows && column < matrix.columns) {
      const T* const at = static_cast<const T*>(matrix.base) + row * matrix.stride_row +
                          column * matrix.stride_column;
      if (matrix.is_whole()) {
        vector.bytes = ptx::load_16_bytes(at);
      } else {
#pragma unroll
        for (int e = 0; e < kNeighbours; ++e) {
          if (column + e < matrix.columns) vector.elements[e] = at[e * matrix.stride_column];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) span[r / 2][j / 2][r % 2 + j % 2 * 2] = vector.bytes.words[j];
  }
}

/// Span s of a tile goes to a layer's output.
template <class T>
NEURON_EXT_DEVICE void store(const Span& span, int s, const MlpLayer& layer, int tile,
                             std::int64_t count) {
  const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
  const int out = static_cast<int>(layer.out_features), column = s * kSpan + t * kNeighbours;
  const bool is_whole = out % kNeighbours == 0 && is_aligned(layer.output);
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    const std::int64_t row = std::int64_t{kRows} * tile + 8 * r + g;
    if (row >= count || column >= out) continue;
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < 4; ++j) vector.bytes.words[j] = span[r / 2][j / 2][r % 2 + j % 2 * 2];
    store_vector(static_cast<T*>(layer.output) + row * out + column, vector, is_whole,
                 out - column);
  }
}

/// The sums of its columns, over the tile's rows that there are, go to where the layer has them.
template <class T>
NEURON_EXT_DEVICE void store_column_sums(const Span& span, int s, const MlpLayer& layer, int tile,
                                         std::int64_t count) {
  const int lane = ptx::lane_id_now(), g = lane / 4, t = lane % 4;
  float sums[kNeighbours] = {};
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) {
    const bool is_inside = std::int64_t{kRows} * tile + 8 * r + g < count;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const union {
        std::uint32_t word;
        T elements[2];
      } pair = {is_inside ? span[r / 2][j / 2][r % 2 + j % 2 * 2] : 0};
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[2 * j + e] += ptx::widen(pair.elements[e]);
    }
  }
  sum_over_rows(sums, lane);
  const std::int64_t out = layer.out_features, column = s * kSpan + t * kNeighbours + g;
  if (column < out) static_cast<float*>(layer.output_sum)[tile * out + column] = sums[0];
}

// ---- a layer -----------------------------------------------------------------------------------

/// Sums of a span's tiles from j on, finished and rounded.
template <class T, class F>
NEURON_EXT_DEVICE void finish(const float (&sums)[kHeights][kTiles][4], int j, Span& span) {
#pragma unroll
  for (int m = 0; m < kHeights; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        span[m][(j + i) / 2][r + (j + i) % 2 * 2] = ptx::narrow_pair<T>(
            F::template apply<T>(sums[m][i][2 * r]), F::template apply<T>(sums[m][i][2 * r + 1]));
      }
    }
  }
}

/// The same, multiplied by the gradient of what was saved.
template <class T>
NEURON_EXT_DEVICE void finish_gradient(Activation activation,
                                       const float (&sums)[kHeights][kTiles][4], int j,
                                       const Span& saved, Span& span) {
#pragma unroll
  for (int m = 0; m < kHeights; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int a = (j + i) / 2, place = r + (j + i) % 2 * 2;
        const union {
          std::uint32_t word;
          T elements[2];
        } y = {saved[m][a][place]};
        span[m][a][place] = ptx::narrow_pair<T>(
            gradient(activation, sums[m][i][2 * r], ptx::widen(y.elements[0])),
            gradient(activation, sums[m][i][2 * r + 1], ptx::widen(y.elements[1])));
      }
    }
  }
}

/// Zeros in the place of columns that a layer hasn't got: an inf before them makes them nan, and
/// the next layer's weights of zero leave them so.
NEURON_EXT_DEVICE void clear_beyond(Span& span, int columns) {
  const int t = ptx::lane_id() % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int left = columns - (kNeighbours * t + 2 * j);
    const std::uint32_t kept = left >= 2 ? 0xffffffffu : left == 1 ? 0xffffu : 0;
#pragma unroll
    for (int m = 0; m < kHeights; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) span[m][j / 2][r + j % 2 * 2] &= kept;
    }
  }
}

/// `rows`, a tile of a layer's input, become its output.
template <class T, int kWidth, bool kGradients>
NEURON_EXT_DEVICE void run_layer(const Parameters<T, kWidth>& parameters, const MlpLayer& layer,
                                 int tile, std::int64_t count, Rows<kWidth>& rows) {
  constexpr int kSpans = kWidth / kSpan;
  const int g = ptx::lane_id() / 4, t = ptx::lane_id() % 4;
  const int out = static_cast<int>(layer.out_features);
  const int spans_in = spans_of(layer.in_features), spans_out = spans_of(out);
  // Of the weight's rows that are columns of B; row g % 2 of each pair, which decides on the swap.
  const T* const weight = parameters.weight + (8 * (g / 2) + g % 2) * kWidth + kNeighbours * t;
  const float* const bias = parameters.bias + kNeighbours * t;
  Rows<kWidth> next = {};
#pragma unroll
  for (int c = 0; c < kSpans; ++c) {
    if (c >= spans_out) continue;
#pragma unroll
    for (int j = 0; j < 4; j += kTiles) {
      Span saved;
      if constexpr (kGradients) {
        // Half of it is used, and loaded: registers are scarce.
        load<T>(saved, {layer.saved, layer.saved == nullptr ? 0 : count, out, out, 1}, tile, c);
      }
      float sums[kHeights][kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int m = 0; m < kHeights; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][i][e] = bias[c * kSpan + 2 * (j + i) + e % 2];
        }
      }
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        if (s >= spans_in) continue;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const ptx::Bytes16 b =
              ptx::load_16_bytes(weight + (c * kSpan + 2 * (j + i)) * kWidth + (s ^ g % 2) * kSpan);
#pragma unroll
          for (int a = 0; a < 2; ++a) {
#pragma unroll
            for (int m = 0; m < kHeights; ++m) {
              ptx::mma_16x8x16<T>(sums[m][i], rows[s][m][a], {b.words[2 * a], b.words[2 * a + 1]});
            }
          }
        }
      }
      if constexpr (kGradients) {
        finish_gradient<T>(layer.saved == nullptr ? Activation::kIdentity : layer.activation, sums,
                           j, saved, next[c]);
      } else if (layer.activation == Activation::kSigmoid) {
        finish<T, Sigmoid>(sums, j, next[c]);
      } else {
        finish<T, Identity>(sums, j, next[c]);
      }
    }
    if (out < (c + 1) * kSpan) clear_beyond(next[c], out - c * kSpan);
    if (layer.output != nullptr) store<T>(next[c], c, layer, tile, count);
  }
#pragma unroll
  for (int c = 0; c < kSpans; ++c) {
#pragma unroll
    for (int m = 0; m < kHeights; ++m) {
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int r = 0; r < 4; ++r) rows[c][m][a][r] = next[c][m][a][r];
      }
    }
  }
}

/// Of all spans of a layer's output. Not beside products, which take all registers.
template <class T, int kWidth>
NEURON_EXT_DEVICE void store_column_sums(const Rows<kWidth>& rows, const MlpLayer& layer, int tile,
                                         std::int64_t count) {
#pragma unroll
  for (int s = 0; s < kWidth / kSpan; ++s) {
    if (s * kSpan < layer.out_features) store_column_sums<T>(rows[s], s, layer, tile, count);
  }
}

/// kGradients: layers may have saved outputs, and have no activations.
template <class T, int kWidth, bool kGradients>
__global__ void __launch_bounds__(kThreads<kWidth>, 1)
    mlp_sm80_kernel(const __grid_constant__ StackLaunch launch) {
  const Stack& stack = launch.stack;
  auto* const parameters = &ptx::dynamic_shared<Parameters<T, kWidth>>();
  const int warp = static_cast<int>(threadIdx.x) / ptx::kWarp;
  if (launch.is_resident) {
    for (int i = 0; i < stack.depth; ++i) load(parameters[i], stack.layers[i]);
    ptx::copy_async_wait<0>();
    ptx::block_sync();
  } else {
    load(parameters[0], stack.layers[0]);
  }

  const Matrix input{stack.input, stack.rows, stack.layers[0].in_features, stack.stride_row,
                     stack.stride_column};
  int place = 0;  // of the layer's parameters
  for (int turn = 0; turn < launch.tiles; turn += kWarps<kWidth> * static_cast<int>(gridDim.x)) {
    // Warps of different blocks first, so that few rows occupy all multiprocessors. Those that are
    // left without any still take part in loading.
    const int tile = turn + warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
    Rows<kWidth> rows;
#pragma unroll
    for (int s = 0; s < kWidth / kSpan; ++s) load<T>(rows[s], input, tile, s);
    for (int i = 0; i < stack.depth; ++i) {
      if (launch.is_resident) {
        place = i;
      } else {
        ptx::copy_async_wait<0>();
        ptx::block_sync();
        load(parameters[place ^ 1], stack.layers[i + 1 < stack.depth ? i + 1 : 0]);
      }
      if (tile < launch.tiles) {
        const MlpLayer& layer = stack.layers[i];
        run_layer<T, kWidth, kGradients>(parameters[place], layer, tile, stack.rows, rows);
        if (kGradients && layer.output_sum != nullptr) {
          store_column_sums<T, kWidth>(rows, layer, tile, stack.rows);
        }
      }
      place ^= 1;
    }
  }
  ptx::copy_async_wait<0>();
}

// ---- launch ------------------------------------------------------------------------------------

/// Shared memory that a block may have.
std::size_t shared_bytes(const Device& device) {
  constexpr std::size_t kKiB = 1 << 10;
  switch (device.sm) {
    case 80:
    case 87:
      return 163 * kKiB;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * kKiB;
    default:
      return 227 * kKiB;
  }
}

template <class T, int kWidth>
int run_as(const Stack& stack, const Device& device, Stream stream) {
  constexpr std::size_t kLayer = sizeof(Parameters<T, kWidth>);
  const std::size_t all = kLayer * static_cast<std::size_t>(stack.depth);
  const StackLaunch launch{stack, static_cast<int>((stack.rows + kRows - 1) / kRows),
                           all <= shared_bytes(device)};
  const auto blocks = static_cast<unsigned>(std::min(launch.tiles, device.sm_count));
  const auto kernel =
      has_gradients(stack) ? mlp_sm80_kernel<T, kWidth, true> : mlp_sm80_kernel<T, kWidth, false>;
  return ptx::launch(kernel,
                     {dim3(blocks), dim3(kThreads<kWidth>), launch.is_resident ? all : 2 * kLayer},
                     stream, launch);
}

template <class T>
int run_as(const Stack& stack, const Device& device, Stream stream) {
  return stack.widest <= 64 ? run_as<T, 64>(stack, device, stream)
                            : run_as<T, kWidestLayer>(stack, device, stream);
}

int run(const Stack& stack, DType dtype, const Device& device, Stream stream) {
  return dtype == DType::kBFloat16 ? run_as<BFloat16>(stack, device, stream)
                                   : run_as<Float16>(stack, device, stream);
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

const MlpKernel mlp_sm80 = {.name = "mlp_sm80",
                            .dtypes = kDTypes,
                            .lowest_sm = kLowestSm,
                            .highest_sm = 999,
                            .takes_strict = true,
                            .sum_rows = kRows,
                            .run = run};

}  // namespace neuron_ext::cuda
