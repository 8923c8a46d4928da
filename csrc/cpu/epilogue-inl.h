// The epilogue: from finished sums to the only store of D.
#pragma once

namespace neuron_ext::cpu {
namespace {

// Sums that pass together through an activation where rows are shorter than vectors.
constexpr std::int64_t kFlat = 256;

/// Rows of at most half a vector, laid end to end: activations cost too much for half-empty
/// vectors.
template <class V, class T, class F>
void short_rows_epilogue(std::int64_t rows, std::int64_t columns, const Scalar<V>* tile,
                         std::int64_t tile_stride, Reg<V> bias, T* d, std::int64_t d_stride) {
  Scalar<V> sums[kFlat + V::kLanes];
  T results[kFlat + V::kLanes];
  const std::int64_t together = kFlat / columns;
  for (std::int64_t begin = 0; begin < rows; begin += together) {
    const std::int64_t count = rows - begin < together ? rows - begin : together;
    // Whole vectors: each row is followed by the next, and the last by nothing.
    for (std::int64_t i = 0; i < count; ++i) {
      store<V>(sums + i * columns, load<V>(tile + (begin + i) * tile_stride) + bias);
    }
    const std::int64_t size = count * columns;
    for (std::int64_t e = 0; e < size; e += V::kLanes) {
      store<V>(results + e, F::template apply<V, T>(load<V>(sums + e)));
    }
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        d[(begin + i) * d_stride + j] = results[i * columns + j];
      }
    }
  }
}

/// d[i][j] = T(activation(tile[i][j] + bias[j])) for i < rows, j < columns. `bias` is null or
/// readable up to a whole vector past the last column, as the tile's rows are.
template <class V, class T>
void epilogue(Activation activation, std::int64_t rows, std::int64_t columns, const void* tile,
              std::int64_t tile_stride, const void* bias, void* d, std::int64_t d_stride) {
  const auto* const sums = static_cast<const Scalar<V>*>(tile);
  const auto* const bias_row = static_cast<const Scalar<V>*>(bias);
  T* const d_rows = static_cast<T*>(d);
  visit_activation(activation, [&]<class F>(F) {
    if (!std::is_same_v<F, Identity> && rows > 1 && columns <= V::kLanes / 2) {
      return short_rows_epilogue<V, T, F>(rows, columns, sums, tile_stride,
                                          bias == nullptr ? Reg<V>{} : load<V>(bias_row), d_rows,
                                          d_stride);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; j += V::kLanes) {
        Reg<V> z = load<V>(sums + i * tile_stride + j);
        if (bias != nullptr) z = z + load<V>(bias_row + j);
        const std::int64_t left = columns - j;
        store<V>(d_rows + i * d_stride + j, F::template apply<V, T>(z),
                 left < V::kLanes ? left : V::kLanes);
      }
    }
  });
}

/// d[i][j] = T(tile[i][j] times the activation's gradient at saved[i][j]) for i < rows, j <
/// columns. A tile's row is readable up to a whole vector.
template <class V, class T>
void gradient_epilogue(Activation activation, std::int64_t rows, std::int64_t columns,
                       const void* tile, std::int64_t tile_stride, const void* saved,
                       std::int64_t saved_stride, void* d, std::int64_t d_stride) {
  const auto* const sums = static_cast<const Scalar<V>*>(tile);
  const T* const saved_rows = static_cast<const T*>(saved);
  T* const d_rows = static_cast<T*>(d);
  visit_activation(activation, [&]<class F>(F) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; j += V::kLanes) {
        const std::int64_t count = columns - j < V::kLanes ? columns - j : V::kLanes;
        store<V>(d_rows + i * d_stride + j,
                 F::template gradient<V>(load<V>(sums + i * tile_stride + j),
                                         load<V>(saved_rows + i * saved_stride + j, 1, count)),
                 count);
      }
    }
  });
}

/// bias in the accumulator type and contiguous, as the epilogue reads it.
template <class V, class T>
void widen_bias(const void* bias, std::int64_t stride, std::int64_t n, void* row) {
  for (std::int64_t j = 0; j < n; j += V::kLanes) {
    const std::int64_t count = n - j < V::kLanes ? n - j : V::kLanes;
    store<V>(static_cast<Scalar<V>*>(row) + j,
             load<V>(static_cast<const T*>(bias) + j * stride, stride, count));
  }
}

/// Rounds finished sums to T.
template <class V, class T>
void narrow_row(std::int64_t n, const void* row, void* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    static_cast<T*>(out)[i] = narrow<T>(static_cast<const Scalar<V>*>(row)[i]);
  }
}

}  // namespace
}  // namespace neuron_ext::cpu
