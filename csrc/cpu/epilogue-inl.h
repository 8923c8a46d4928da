// The epilogue: from finished sums to the only store of D.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// d[i][j] = T(activation(tile[i][j] + bias[j])) for i < rows, j < columns. `bias` is null or readable up to a
/// whole vector past the last column, as the tile's rows are.
template <class V, class T>
void epilogue(Activation activation, std::int64_t rows, std::int64_t columns, const void* tile,
              std::int64_t tile_stride, const void* bias, void* d, std::int64_t d_stride) {
  visit_activation(activation, [&]<class F>(F) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto* sums = static_cast<const Scalar<V>*>(tile) + i * tile_stride;
      T* const d_i = static_cast<T*>(d) + i * d_stride;
      for (std::int64_t j = 0; j < columns; j += V::kLanes) {
        Reg<V> z = load<V>(sums + j);
        if (bias != nullptr) z = z + load<V>(static_cast<const Scalar<V>*>(bias) + j);
        const std::int64_t left = columns - j;
        store<V>(d_i + j, F::template apply<V>(z), left < V::kLanes ? left : V::kLanes);
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
