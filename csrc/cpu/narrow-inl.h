// Narrow products, where D has few rows (or, with A and B exchanged, few columns): an element of
// the wide operand is used a few times only, so that packing it would cost more than using it. It
// is read where it lies, along k or along its other index, whichever is contiguous. Here the few
// rows are a's and the wide operand is b.
#pragma once

namespace neuron_ext::cpu {
namespace {

// Terms of a sum that isn't one of dot products before it is added to others.
constexpr std::int64_t kNarrowBlock = 256;

/// What a V that isn't exact for all values (pairs-inl.h) needs to know of those it met.
template <class V>
struct Met {
  void note(Reg<V>) {}
};
template <class V>
  requires requires { V::lower_magnitudes; }
struct Met<V> {
  void note(Reg<V> x) { lowest = V::lower_magnitudes(lowest, reinterpret_cast<Words<V>>(x)); }
  Words<V> lowest = ~Words<V>{};
};

/// A vector of b's terms along k, `left` of which there are.
template <class V, class T>
Reg<V> terms_along_k(const T* b, std::int64_t left) {
  constexpr int kAll = kTerms<V> * V::kLanes;
  if constexpr (kTerms<V> == 2) {
    return reinterpret_cast<Reg<V>>(V::load_pairs(b, left < kAll ? left : kAll));
  } else {
    return left < kAll ? load_partial<V>(b, left) : load<V>(b);
  }
}

/// In place of Met, for terms that were met before.
template <class V>
struct MetBefore {
  void note(Reg<V>) {}
};

/// tile[i][j] (+)= sum over p < k of rows[i][p] b[p, j]; b's columns are contiguous, rows a group
/// of FewRows. On the way kAhead columns from `ahead` on are fetched.
template <class V, class T, int kRows, int kColumns, int kAhead, class M>
void dot_block(std::int64_t k, const Scalar<V>* rows, const T* b, std::int64_t b_stride,
               const T* ahead, Scalar<V>* tile, std::int64_t tile_stride, bool add, M& met) {
  constexpr int kAll = kTerms<V> * V::kLanes;
  Reg<V> sum[kRows][kColumns] = {};
  // Here and below, unrolled before the compiler decides that an array indexed by variables can't
  // live in registers.
  const auto step = [&](std::int64_t p, std::int64_t left) {
    Reg<V> b_p[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      b_p[j] = terms_along_k<V>(b + j * b_stride + p, left);
      met.note(b_p[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Reg<V> a = load<V>(rows + p / kTerms<V> * kRows + i * V::kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sum[i][j] = V::multiply_add(a, b_p[j], sum[i][j]);
    }
  };
  std::int64_t p = 0;
  for (; p + kAll <= k; p += kAll) {
    for (int j = 0; j < kAhead; ++j) __builtin_prefetch(ahead + j * b_stride + p, 0, 2);
    step(p, kAll);
  }
  if (p < k) step(p, k - p);
  constexpr int kSums = kRows * kColumns, kTogether = kQuadLanes<V>;
#pragma GCC unroll 12
  for (int first = 0; first < kSums; first += kTogether) {
    Reg<V> sums[kTogether];
#pragma GCC unroll 4
    for (int lane = 0; lane < kTogether; ++lane) {
      const int s = first + lane < kSums ? first + lane : first;
      sums[lane] = sum[s / kColumns][s % kColumns];
    }
    const Reg<V> blocks = sum_lanes<V>(sums);
    for (int s = first; s < kSums && s < first + kTogether; ++s) {
      Scalar<V>& place = tile[s / kColumns * tile_stride + s % kColumns];
      place = add ? place + blocks[s - first] : blocks[s - first];
    }
  }
}

/// The same for all rows and whole groups of columns, where k fits kVectors vectors: dot_block's
/// loops take longer than such dot products. Returns how many columns it did. Measured on Zen 4,
/// 10^5 x 13 → 1 with the sigmoid, f32: 335 → 185 µs.
template <class V, int kVectors, class T>
std::int64_t short_dots(std::int64_t k, const FewRows& rows, const T* b, std::int64_t b_stride,
                        std::int64_t columns, Scalar<V>* tile, std::int64_t tile_stride,
                        Met<V>& met) {
  constexpr int kTogether = kQuadLanes<V>, kAll = kTerms<V> * V::kLanes;
  const std::int64_t whole = columns / kTogether * kTogether;
  for (std::int64_t i = 0; i < rows.count; ++i) {
    const auto* const row = static_cast<const Scalar<V>*>(rows.data) + rows.place(i);
    Reg<V> a[kVectors];
    for (int v = 0; v < kVectors; ++v) a[v] = load<V>(row + v * rows.step(i));
    for (std::int64_t j = 0; j < whole; j += kTogether) {
      Reg<V> sums[kTogether] = {};
      for (int lane = 0; lane < kTogether; ++lane) {
        for (int v = 0; v < kVectors; ++v) {
          const Reg<V> b_j = terms_along_k<V>(b + (j + lane) * b_stride + v * kAll, k - v * kAll);
          met.note(b_j);
          sums[lane] = V::multiply_add(a[v], b_j, sums[lane]);
        }
      }
      const Reg<V> blocks = sum_lanes<V>(sums);
      __builtin_memcpy(tile + i * tile_stride + j, &blocks, kTogether * sizeof(Scalar<V>));
    }
  }
  return whole;
}

/// A vector of b's terms of `lanes` columns from j on, at place p of k terms.
template <class V, class T>
Reg<V> terms_along_n(const T* b, std::int64_t stride_k, std::int64_t stride_n, std::int64_t k,
                     std::int64_t p, std::int64_t j, std::int64_t lanes) {
  if constexpr (kTerms<V> == 2) {
    const PairSource<V> source{b, stride_n, stride_k, k};
    return reinterpret_cast<Reg<V>>(source.along_mn(j, p, lanes));
  } else {
    return load<V>(b + p * stride_k + j * stride_n, stride_n, lanes);
  }
}

// Rows of b that are read side by side, each in order; more, if they are shorter than to make up so
// many elements together. Measured on Zen 4, 1 x 1024 to 1024 from L3 and 1 x 4096 to 4096 from
// memory, f32: 8 rows 58 and 2600 µs, 16 61 and 3000, the whole of a narrow strip's after each
// other 102 and 6900.
constexpr std::int64_t kRowsTogether = 8, kElementsTogether = 8192;

/// Adds rows[i][p] b[p, j] for all p < k to tile[i][j], for kVectors vectors of columns of a b
/// whose rows are contiguous, or nothing is. `lanes`: how many columns each vector holds.
template <class V, class T, int kRows, int kVectors>
void outer_block(std::int64_t k, const Scalar<V>* rows, std::int64_t row_stride, const T* b,
                 std::int64_t b_stride_k, std::int64_t b_stride_n, std::int64_t lanes,
                 Scalar<V>* tile, std::int64_t tile_stride, bool add, Met<V>& met) {
  Reg<V> sum[kRows][kVectors] = {};
  for (int i = 0; i < kRows && add; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = load<V>(tile + i * tile_stride + v * V::kLanes);
    }
  }
  for (std::int64_t p = 0; p * kTerms<V> < k; ++p) {
    Reg<V> b_p[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      // The rows that are next: each lies in another page. In L3 it costs a sixth, from memory it
      // saves as much. Pairs of bf16 were no faster for it.
      if constexpr (kTerms<V> == 1) {
        __builtin_prefetch(b + (p + kRowsTogether) * b_stride_k + v * V::kLanes * b_stride_n, 0, 2);
      }
      b_p[v] = terms_along_n<V>(b, b_stride_k, b_stride_n, k, p, v * V::kLanes, lanes);
      met.note(b_p[v]);
    }
    for (int i = 0; i < kRows; ++i) {
      const Reg<V> a = V::set1(rows[i * row_stride + p]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(a, b_p[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      store<V>(tile + i * tile_stride + v * V::kLanes, sum[i][v]);
    }
  }
}

/// sum = the sum of a row as widen_row leaves it, of k places.
template <class V>
void sum_row(std::int64_t k, const void* row, std::int64_t step, void* sum) {
  const auto* p = static_cast<const Scalar<V>*>(row);
  const std::int64_t vectors = (k + V::kLanes - 1) / V::kLanes;
  Scalar<V> total = 0;
  for (std::int64_t begin = 0; begin < vectors; begin += kNarrowBlock) {
    Reg<V> block = {};
    for (std::int64_t v = begin; v < vectors && v < begin + kNarrowBlock; ++v) {
      block = block + sum_of_places<V>(load<V>(p + v * step));
    }
    total += sum_lanes<V>(block);
  }
  *static_cast<Scalar<V>*>(sum) = total;
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

/// Calls f(i, Constant of how many) for i from `begin` on in groups of kGroup, then of half as
/// many.
template <int kGroup, class F>
void in_groups(std::int64_t begin, std::int64_t end, const F& f) {
  for (; begin + kGroup <= end; begin += kGroup) f(begin, Constant<kGroup>{});
  if constexpr (kGroup > 1) in_groups<kGroup / 2>(begin, end, f);
}

// How many rows of `rows`, and vectors of b along its columns, meet in registers.
template <class V>
constexpr int kRowGroup = V::kRegisters >= 32 ? 4 : 2;
constexpr int kColumnGroup = 4;

// The same of b's columns, for dot products with groups of up to kRows: the more, the more often a
// vector of rows serves, and the more places memory is read at. Measured on Zen 4, 1, 8 and 16 x
// 4096 to 4096 from memory, f32: 2.4, 3.6 and 6.1 ms; always four 3.0, 4.0 and 7.4.
template <class V, int kRows>
constexpr int kDotColumns = V::kRegisters < 32 ? 4
                            : kRows <= 2       ? 8
                                               : 6;
// For up to two rows, places in one page gain nothing, nor do vectors of half a line: 1 x 64 to
// 10^5 f32 takes 0.7 ms with four columns, 0.8 to 1.2 with eight, 1 x 4096 to 4096 f16 1.23, 1.45.
constexpr std::int64_t kPage = 4096;

/// Calls f(a constant how many, the first) for the columns of kColumns that a pass of `passes` has
/// to fetch: all, or its share, which is compiled in, for a loop over them would take longer than
/// one row's products.
template <int kColumns, class F>
void share_columns(std::int64_t passes, std::int64_t pass, const F& f) {
  constexpr int kHalf = (kColumns + 1) / 2, kThird = (kColumns + 2) / 3;
  if (passes == 1) return f(Constant<kColumns>{}, 0);
  if (passes == 2) return f(Constant<kHalf>{}, pass * kHalf);
  if (pass < 3) return f(Constant<kThird>{}, pass * kThird);
  return f(Constant<0>{}, 0);
}

/// multiply_narrow where b's columns aren't contiguous, or too short for dot products.
template <class V, class T>
void multiply_outer(std::int64_t m, std::int64_t k, const Scalar<V>* rows, std::int64_t row_stride,
                    const T* b, std::int64_t b_stride_k, std::int64_t b_stride_n,
                    std::int64_t columns, Scalar<V>* tile, std::int64_t tile_stride, Met<V>& met) {
  constexpr std::int64_t kLongest = kNarrowBlock * kTerms<V>;
  const std::int64_t rows_together = kElementsTogether / (columns + 1);
  const std::int64_t together =
      kTerms<V> * (rows_together < kRowsTogether ? kRowsTogether : rows_together);
  const std::int64_t whole = columns / V::kLanes, rest = columns % V::kLanes;
  for (std::int64_t begin = 0; begin == 0 || begin < k; begin += kLongest) {
    const std::int64_t end = k - begin < kLongest ? k : begin + kLongest;
    Scalar<V>* const sums = begin == 0 ? tile : tile + m * tile_stride;
    for (std::int64_t p = begin; p == begin || p < end; p += together) {
      in_groups<kRowGroup<V>>(0, m, [&](std::int64_t i, auto group_rows) {
        const auto block = [&](std::int64_t j, std::int64_t lanes, auto vectors) {
          outer_block<V, T, group_rows.value, vectors.value>(
              end - p < together ? end - p : together, rows + i * row_stride + p / kTerms<V>,
              row_stride, b + j * b_stride_n + p * b_stride_k, b_stride_k, b_stride_n, lanes,
              sums + i * tile_stride + j, tile_stride, p != begin, met);
        };
        in_groups<kColumnGroup>(0, whole, [&](std::int64_t v, auto vectors) {
          block(v * V::kLanes, V::kLanes, vectors);
        });
        if (rest > 0) block(whole * V::kLanes, rest, Constant<1>{});
      });
    }
    if (begin == 0) continue;
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < columns; j += V::kLanes) {
        Scalar<V>* const place = tile + i * tile_stride + j;
        store<V>(place, load<V>(place) + load<V>(sums + i * tile_stride + j));
      }
    }
  }
}

/// tile[i][j] = sum over p < k of rows[i][p] B[p, column + j], for all rows and j < columns. A
/// tile's row holds whole vectors, and as many rows after the tile are room for sums.
template <class V, class T>
void multiply_narrow(std::int64_t k, const FewRows& rows, int lowest_in_rows, const Operand& b,
                     std::int64_t column, std::int64_t columns, void* tile,
                     std::int64_t tile_stride) {
  const auto* a = static_cast<const Scalar<V>*>(rows.data);
  const auto* b_base = static_cast<const T*>(b.base) + column * b.stride_mn;
  auto* sums = static_cast<Scalar<V>*>(tile);
  Met<V> met;
  [[maybe_unused]] MetBefore<V> met_before;
  if (FewRows::are_dotted(b, k)) {
    // A lane's sum is as short as one of a packed product. In f32, 256 terms take up to 10 % less
    // time, but have a mean error of 0.097 eps (|A||B|) for k = 4096, not 0.069 (MKL: 0.085).
    constexpr std::int64_t kAll = kTerms<V> * V::kLanes, kBlock = kLongestSum<V> * kAll;
    std::int64_t done = 0;
    if (k <= kAll) {
      done = short_dots<V, 1>(k, rows, b_base, b.stride_mn, columns, sums, tile_stride, met);
    } else if (k <= 2 * kAll) {
      done = short_dots<V, 2>(k, rows, b_base, b.stride_mn, columns, sums, tile_stride, met);
    }
    const auto dots = [&](auto most_rows, auto most_columns) {
      std::int64_t passes = 0;
      in_groups<most_rows.value>(0, rows.count, [&](std::int64_t, auto) { ++passes; });
      in_groups<most_columns.value>(done, columns, [&](std::int64_t j, auto group_columns) {
        for (std::int64_t p = 0; p == 0 || p < k; p += kBlock) {
          const T* const b_p = b_base + j * b.stride_mn + p;
          std::int64_t pass = 0;
          in_groups<most_rows.value>(0, rows.count, [&](std::int64_t i, auto group_rows) {
            // Each pass over these columns fetches its share of the next ones from memory.
            const auto fetching = [&](auto share, std::int64_t first) {
              const auto block = [&](auto& notes) {
                dot_block<V, T, group_rows.value, group_columns.value, share.value>(
                    k - p < kBlock ? k - p : kBlock,
                    a + i * rows.stride + p / kTerms<V> * group_rows.value, b_p, b.stride_mn,
                    b_p + (group_columns.value + first) * b.stride_mn, sums + i * tile_stride + j,
                    tile_stride, p != 0, notes);
              };
              if (kTerms<V> == 1 || pass == 0) {
                block(met);
              } else {
                block(met_before);
              }
            };
            if constexpr (group_columns.value == most_columns.value) {
              share_columns<most_columns.value>(passes, pass, fetching);
            } else {
              fetching(Constant<0>{}, 0);
            }
            ++pass;
          });
        }
      });
    };
    if (rows.count > 2) {
      dots(Constant<kRowGroup<V>>{}, Constant<kDotColumns<V, kRowGroup<V>>>{});
    } else if (sizeof(T) * kTerms<V> < sizeof(Scalar<V>) ||
               k * static_cast<std::int64_t>(sizeof(T)) < kPage) {
      dots(Constant<2>{}, Constant<4>{});
    } else {
      dots(Constant<2>{}, Constant<kDotColumns<V, 2>>{});
    }
  } else {
    multiply_outer<V, T>(rows.count, k, a, rows.stride, b_base, b.stride_k, b.stride_mn, columns,
                         sums, tile_stride, met);
  }
  if constexpr (kTerms<V> == 2) {
    if (lowest_in_rows + V::lowest_exponent(met.lowest) < V::kLowestExponents) {
      multiply_narrow<typename V::Careful, T>(k, rows, lowest_in_rows, b, column, columns, tile,
                                              tile_stride);
    }
  }
}

}  // namespace
}  // namespace neuron_ext::cpu
