// A stack of narrow layers by multiply-adds, a block's part of it: mlp_simt, and what mlp_sm90_f32
// leaves to be computed this way.
//
// A block takes a tile of rows through all layers. The rows stay in shared memory, where a layer's
// output takes the place of its input; weights pass through it, 64 bytes of k at a time, the next
// on way in registers. 256 threads form a square of 16 x 16, as in gemm_simt, and every sum is
// formed in the same order as there.
#pragma once

#include <cstdint>

#include "activation.cuh"
#include "mlp_kernels.h"
#include "ptx/global.cuh"
#include "ptx/sync.cuh"
#include "vector.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kSide = 16, kThreads = kSide * kSide;

// Of which outputs have a sum, whatever the tile, whose rows depend on the GPU.
constexpr int kSumRows = kSide;

/// Some of a thread's sums or operands, 16 bytes at a time.
template <class S, int kCount>
union Fragment {
  static constexpr int kVector = sizeof(ptx::Bytes16) / sizeof(S);
  static constexpr int kVectors = (kCount + kVector - 1) / kVector;
  ptx::Bytes16 vectors[kVectors];
  S elements[kCount];
};

/// What a block has in shared memory. A thread's columns, and its rows in a tall tile, are vectors
/// of 16 bytes kSide of them apart; in a flat tile it has one row.
template <class Element, int kColumns, bool kTall>
struct Tile {
  using S = Element;
  static constexpr int kWidth = kColumns;
  static constexpr int kVector = sizeof(ptx::Bytes16) / sizeof(S);
  static constexpr int kThreadRows = kTall ? 2 * kVector : 1;
  static constexpr int kThreadColumns = kWidth / kSide;
  static constexpr int kRows = kSide * kThreadRows;
  static constexpr int kBlocks = kTall && kWidth > 64 ? 1 : 2;  // on a multiprocessor
  static constexpr int kK = 64 / sizeof(S);                     // of a slice of weights
  static constexpr int kPitch = kWidth + kVector;               // of one k in it

  S rows[kWidth][kRows + kVector];  // (column, row)
  S weights[2][kK][kPitch];

  static NEURON_EXT_DEVICE int column(int c, int side) {
    return c / kVector * (kSide * kVector) + side * kVector + c % kVector;
  }
  static NEURON_EXT_DEVICE int row(int r, int side) { return kTall ? column(r, side) : side; }
};

/// Features up to a whole slice.
template <class T>
NEURON_EXT_DEVICE int whole_slices(std::int64_t features) {
  return (static_cast<int>(features) + T::kK - 1) / T::kK * T::kK;
}

/// A tile of the stack's input, with zeros up to whole slices and for rows beyond the last.
template <class T>
NEURON_EXT_DEVICE void load_rows(T& tile, const Stack& stack, int index) {
  using S = typename T::S;
  const int in = static_cast<int>(stack.layers[0].in_features), columns = whole_slices<T>(in);
  const bool along_rows = stack.stride_column == 1;  // neighbours by neighbours
  for (int e = static_cast<int>(threadIdx.x); e < columns * T::kRows; e += kThreads) {
    const int row = along_rows ? e / columns : e % T::kRows;
    const int column = along_rows ? e % columns : e / T::kRows;
    const std::int64_t i = std::int64_t{T::kRows} * index + row;
    tile.rows[column][row] = 0;
    if (i >= stack.rows || column >= in) continue;
    tile.rows[column][row] =
        static_cast<const S*>(stack.input)[i * stack.stride_row + column * stack.stride_column];
  }
}

/// A thread's share of a weight, slice by slice on its way to shared memory. Neighbouring threads
/// take neighbours.
template <class T>
class Slices {
 public:
  using S = typename T::S;

  NEURON_EXT_DEVICE explicit Slices(const MlpLayer& layer)
      : along_k_(layer.weight_stride_in == 1),
        k_(along_k_ ? thread() % T::kK : thread() / T::kWidth),
        column_(along_k_ ? thread() / T::kK : thread() % T::kWidth),
        step_(along_k_ ? kColumns * layer.weight_stride_out : kKs * layer.weight_stride_in),
        offset_(column_ * layer.weight_stride_out + k_ * layer.weight_stride_in) {}

  /// Of the slices in order.
  NEURON_EXT_DEVICE void load(const MlpLayer& layer, int first_k) {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      elements_[l] = 0;
      if (first_k + k(l) >= layer.in_features || column(l) >= layer.out_features) continue;
      elements_[l] = static_cast<const S*>(layer.weight)[offset_ + l * step_];
    }
    offset_ += T::kK * layer.weight_stride_in;
  }
  NEURON_EXT_DEVICE void store(S (&slice)[T::kK][T::kPitch]) const {
#pragma unroll
    for (int l = 0; l < kLoads; ++l) slice[k(l)][column(l)] = elements_[l];
  }

 private:
  static constexpr int kLoads = T::kWidth * T::kK / kThreads;
  static constexpr int kColumns = kThreads / T::kK, kKs = kThreads / T::kWidth;  // at once

  static NEURON_EXT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  NEURON_EXT_DEVICE int k(int load) const { return along_k_ ? k_ : k_ + load * kKs; }
  NEURON_EXT_DEVICE int column(int load) const {
    return along_k_ ? column_ + load * kColumns : column_;
  }

  bool along_k_;
  int k_, column_;
  std::int64_t step_, offset_;
  S elements_[kLoads];
};

/// The tile's rows, a layer's input, become its output. A barrier comes before the first read of
/// them; another has to follow the last write.
template <class T>
NEURON_EXT_DEVICE void run_layer(T& tile, const MlpLayer& layer, int index, std::int64_t count) {
  using S = typename T::S;
  constexpr int kVector = T::kVector;
  const int thread = static_cast<int>(threadIdx.x), ty = thread / kSide, tx = thread % kSide;
  const int in = whole_slices<T>(layer.in_features), out = static_cast<int>(layer.out_features);

  Slices<T> next(layer);
  S sums[T::kThreadRows][T::kThreadColumns] = {};
  if (in > 0) {
    next.load(layer, 0);
    next.store(tile.weights[0]);
  }
  ptx::block_sync();
  int buffer = 0;
  for (int k0 = 0; k0 < in; k0 += T::kK) {
    const bool has_next = k0 + T::kK < in;
    if (has_next) next.load(layer, k0 + T::kK);
#pragma unroll
    for (int k = 0; k < T::kK; ++k) {
      Fragment<S, T::kThreadRows> a;
      Fragment<S, T::kThreadColumns> b;
      if constexpr (T::kThreadRows == 1) {
        a.elements[0] = tile.rows[k0 + k][ty];
      } else {
#pragma unroll
        for (int v = 0; v < a.kVectors; ++v) {
          a.vectors[v] = ptx::load_16_bytes(&tile.rows[k0 + k][T::row(v * kVector, ty)]);
        }
      }
#pragma unroll
      for (int v = 0; v < b.kVectors; ++v) {
        b.vectors[v] = ptx::load_16_bytes(&tile.weights[buffer][k][T::column(v * kVector, tx)]);
      }
#pragma unroll
      for (int r = 0; r < T::kThreadRows; ++r) {
#pragma unroll
        for (int c = 0; c < T::kThreadColumns; ++c) {
          sums[r][c] = ptx::fma(a.elements[r], b.elements[c], sums[r][c]);
        }
      }
    }
    buffer ^= 1;
    if (has_next) next.store(tile.weights[buffer]);  // nobody has read it since the last barrier
    ptx::block_sync();
  }

  const bool has_whole_rows = out % kVector == 0;
  const bool output_is_whole = has_whole_rows && is_aligned(layer.output);
  const bool saved_is_whole = has_whole_rows && is_aligned(layer.saved);
#pragma unroll
  for (int c = 0; c < T::kThreadColumns; c += kVector) {
    const int j = T::column(c, tx);
    Fragment<S, kVector> bias = {};
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (layer.bias == nullptr || j + e >= out) continue;
      bias.elements[e] = static_cast<const S*>(layer.bias)[(j + e) * layer.bias_stride];
    }
#pragma unroll
    for (int r = 0; r < T::kThreadRows; ++r) {
      const std::int64_t i = std::int64_t{T::kRows} * index + T::row(r, ty);
      const bool is_inside = i < count && j < out;
      Fragment<S, kVector> y = {};
      if (layer.saved != nullptr && is_inside) {
        const S* const at = static_cast<const S*>(layer.saved) + i * out + j;
        if (saved_is_whole) {
          y.vectors[0] = ptx::load_16_bytes(at);
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) y.elements[e] = j + e < out ? at[e] : 0;
        }
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const S sum = sums[r][c + e];
        y.elements[e] = layer.saved != nullptr ? gradient(layer.activation, sum, y.elements[e])
                                               : apply<S>(layer.activation, sum + bias.elements[e]);
        // Zeros up to a whole slice: weights of zero don't hide an inf.
        if (j + e >= out) y.elements[e] = 0;
        tile.rows[j + e][T::row(r, ty)] = y.elements[e];
      }
      if (layer.output == nullptr || !is_inside) continue;
      S* const at = static_cast<S*>(layer.output) + i * out + j;
      store_vector(at, Vector<S>{y.vectors[0]}, output_is_whole, out - j);
    }
  }
}

/// The sums of the tile's columns, a layer's output, for each kSumRows of its rows that there are.
/// A barrier comes before, and another before the tile is written to.
template <class T>
NEURON_EXT_DEVICE void sum_columns(const T& tile, const MlpLayer& layer, int index,
                                   std::int64_t count) {
  using S = typename T::S;
  const int out = static_cast<int>(layer.out_features);
  for (int e = static_cast<int>(threadIdx.x); e < out * (T::kRows / kSumRows); e += kThreads) {
    const int column = e % out, first = e / out * kSumRows;
    const std::int64_t i = std::int64_t{T::kRows} * index + first;
    if (i >= count) continue;
    S sum = 0;
#pragma unroll
    for (int r = 0; r < kSumRows; r += T::kVector) {
      Fragment<S, T::kVector> y;
      y.vectors[0] = ptx::load_16_bytes(&tile.rows[column][first + r]);
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) sum += i + r + v < count ? y.elements[v] : 0;
    }
    static_cast<S*>(layer.output_sum)[i / kSumRows * out + column] = sum;
  }
}

/// All layers of a tile of rows. All threads of the block take part.
template <class T>
NEURON_EXT_DEVICE void run_tile(T& tile, const Stack& stack, int index) {
  load_rows(tile, stack, index);
  for (int i = 0; i < stack.depth; ++i) {
    const MlpLayer& layer = stack.layers[i];
    run_layer(tile, layer, index, stack.rows);
    if (layer.output_sum == nullptr) continue;
    ptx::block_sync();
    sum_columns(tile, layer, index, stack.rows);
  }
  ptx::block_sync();
}

}  // namespace
}  // namespace neuron_ext::cuda
