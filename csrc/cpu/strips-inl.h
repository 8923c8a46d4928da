// Products of long operands with few features (the layers of a long batch): whatever of them is
// long passes through the L1 cache once, in strips of contiguous rows, and nothing is transposed or
// padded. One operand's elements are broadcast, the other's rows are read in vectors, up to whole
// ones: what the last vector reads and computes beyond its row is overwritten or never used.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// Calls f with the source of an operand of `k` values along k, in places of kTerms<V>. Returns the
/// lowest exponent met, where V needs it (pairs-inl.h), else 0.
template <class V, class T, class F>
int visit_places(const Operand& operand, std::int64_t k, const F& f) {
  int lowest = 0;
  if constexpr (kTerms<V> == 2) {
    visit_pairs<V>(operand, k, [&](const auto& source) {
      f(source);
      lowest = source.lowest_exponent();
    });
  } else {
    visit_source<V, T>(operand, f);
  }
  return lowest;
}

/// out[e] = the source along one index, for e < count. The last vector is stored whole.
template <class V, class F>
[[gnu::always_inline]] inline void stage_row(std::int64_t count, Scalar<V>* out, const F& place) {
  std::int64_t e = 0;
  for (; e + V::kLanes <= count; e += V::kLanes) place(out + e, e, std::int64_t{V::kLanes});
  if (e < count) place(out + e, e, count - e);
}

/// strip[r][p] = operand[mn + r, p] for r < rows and p < k, row after row. Returns as visit_places.
template <class V, class T>
int stage_rows(const Operand& operand, std::int64_t mn, std::int64_t rows, std::int64_t k,
               void* strip) {
  const bool is_plain = operand.prologue == Activation::kIdentity;
  // Rows that follow each other are one.
  if (k % kTerms<V> == 0 && operand.stride_k == 1 && operand.stride_mn == k &&
      (is_plain || (operand.saved_stride_k == 1 && operand.saved_stride_mn == k))) {
    k *= rows;
    rows = 1;
  }
  const std::int64_t places = (k + kTerms<V> - 1) / kTerms<V>;
  return visit_places<V, T>(operand, k, [&](const auto& source) {
    for (std::int64_t r = 0; r < rows; ++r) {
      stage_row<V>(places, static_cast<Scalar<V>*>(strip) + r * places,
                   [&](Scalar<V>* out, std::int64_t p, std::int64_t count) {
                     store<V>(out, source.along_k(mn + r, p, count));
                   });
    }
  });
}

/// strip[p][r] = operand[mn + r, k + p] for r < rows and p < kc, k after k (two of them in a
/// place). Returns as visit_places.
template <class V, class T>
int stage_columns(const Operand& operand, std::int64_t mn, std::int64_t rows, std::int64_t k,
                  std::int64_t kc, void* strip) {
  std::int64_t places = (kc + kTerms<V> - 1) / kTerms<V>;
  const bool is_plain = operand.prologue == Activation::kIdentity;
  // Columns that follow each other are one.
  if (kTerms<V> == 1 && mn == 0 && operand.stride_mn == 1 && operand.stride_k == rows &&
      (is_plain || (operand.saved_stride_mn == 1 && operand.saved_stride_k == rows))) {
    rows *= places;
    places = 1;
  }
  return visit_places<V, T>(operand, k + kc, [&](const auto& source) {
    for (std::int64_t p = 0; p < places; ++p) {
      stage_row<V>(rows, static_cast<Scalar<V>*>(strip) + p * rows,
                   [&](Scalar<V>* out, std::int64_t r, std::int64_t count) {
                     store<V>(out, source.along_mn(mn + r, k / kTerms<V> + p, count));
                   });
    }
  });
}

/// tile[i][j] = T(start[i][j] + the sum over p < k of a[i, p] b[p][j]), for kRows rows and kVectors
/// vectors of columns.
template <class V, class T, int kRows, int kVectors>
void strip_block(std::int64_t k, const Scalar<V>* a, std::int64_t a_stride_m,
                 std::int64_t a_stride_k, const Scalar<V>* b, std::int64_t b_stride,
                 const Scalar<V>* start, std::int64_t start_stride, T* tile,
                 std::int64_t tile_stride) {
  Reg<V> sum[kRows][kVectors] = {};
  for (std::int64_t p = 0; p < k; ++p) {
    Reg<V> b_p[kVectors];
    for (int v = 0; v < kVectors; ++v) b_p[v] = load<V>(b + p * b_stride + v * V::kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Reg<V> a_ip = V::set1(a[i * a_stride_m + p * a_stride_k]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(a_ip, b_p[v], sum[i][v]);
    }
  }
  // Unrolled by pragma, or rounding is too much for GCC, which then keeps the sums in memory.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store<V>(tile + i * tile_stride + v * V::kLanes,
               load<V>(start + i * start_stride + v * V::kLanes) + sum[i][v]);
    }
  }
}

/// The same for all m rows and n columns. Rows of the tile may overlap, in their last vectors,
/// where those further down win: so rows go downwards, and the vectors of each few rows from the
/// last one.
template <class V, class T>
void multiply_strip(std::int64_t m, std::int64_t n, std::int64_t k, const void* a,
                    std::int64_t a_stride_m, std::int64_t a_stride_k, const void* b,
                    std::int64_t b_stride, const void* start, std::int64_t start_stride, void* tile,
                    std::int64_t tile_stride) {
  const auto *a_base = static_cast<const Scalar<V>*>(a), *b_base = static_cast<const Scalar<V>*>(b);
  const auto* from = static_cast<const Scalar<V>*>(start);
  T* const to = static_cast<T*>(tile);
  const auto block = [&](std::int64_t i, auto rows, std::int64_t v, auto vectors) {
    const std::int64_t j = v * V::kLanes;
    strip_block<V, T, rows.value, vectors.value>(
        k, a_base + i * a_stride_m, a_stride_m, a_stride_k, b_base + j, b_stride,
        from + i * start_stride + j, start_stride, to + i * tile_stride + j, tile_stride);
  };
  const std::int64_t all = (n + V::kLanes - 1) / V::kLanes;
  if (all == 1) {
    // More rows, or an instruction's latency leaves half of its places empty.
    constexpr std::integral_constant<int, 1> kOneVector;
    in_groups<2 * kRowGroup<V>>(0, m,
                                [&](std::int64_t i, auto rows) { block(i, rows, 0, kOneVector); });
    return;
  }
  in_groups<kRowGroup<V>>(0, m, [&](std::int64_t i, auto rows) {
    in_groups<kColumnGroup>(0, all, [&](std::int64_t v, auto vectors) {
      block(i, rows, all - v - vectors.value, vectors);
    });
  });
}

/// sums[i] += the sum over r < rows of strip[r][i], of sums as short as sum_panel's.
template <class V>
void sum_strip(std::int64_t rows, std::int64_t columns, const void* strip, void* sums) {
  constexpr std::int64_t kShortSum = 4, kTogether = 4;
  for (std::int64_t j = 0; j < columns; j += V::kLanes) {
    const auto* row = static_cast<const Scalar<V>*>(strip) + j;
    Reg<V> block = {};
    std::int64_t left = rows;
    for (; left >= kShortSum * kTogether; left -= kShortSum * kTogether) {
      Reg<V> terms[kTogether] = {};
      for (int r = 0; r < kShortSum; ++r) {
        for (int t = 0; t < kTogether; ++t, row += columns) {
          terms[t] = terms[t] + sum_of_places<V>(load<V>(row));
        }
      }
      block = block + ((terms[0] + terms[1]) + (terms[2] + terms[3]));
    }
    for (; left > 0; --left, row += columns) block = block + sum_of_places<V>(load<V>(row));
    Scalar<V>* const place = static_cast<Scalar<V>*>(sums) + j;
    store<V>(place, load<V>(place) + block);
  }
}

}  // namespace
}  // namespace neuron_ext::cpu
