// f32 (or f16) through engines that multiply bf16: x = x0 + x1 + x2, each the bf16 nearest to what
// those before it leave. Three of them hold every bit of an f32, two those of an f16. The products
// of such parts are summed in f32; what the parts can't hold is found here, row by row, and
// computed by multiply-adds (gemm.cpp).
#pragma once

namespace neuron_ext::cpu {
namespace {

// ---- what is known of a panel's rows ------------------------------------------------------------

// After its places, a panel has for each of its rows (or columns) a margin and, if it's one of A, a
// sum.
constexpr int kKnown = 2;

// Parts that end in a bit of weight 2^-kBits below their number's leading one.
constexpr int bits_of_planes(int planes) { return planes == 1 ? 7 : 23; }

/// How far the exponents of a row are from either end of what the engine multiplies exactly. Where
/// the margins of a row and a column add up to less than zero, their product might
///
///   * lose a bit below the normal range, which the engine takes for zero: the lowest exponents
///     (biased, hence 127) of a and b give their product's last bit the exponent
///     a + b - 2 (127 + kBits), which must not be below -126;
///   * overflow where the exact product doesn't: 2^9 terms, and parts that are rounded up.
///
/// Rows with values that have no such parts (subnormal, infinite, nan, or next to infinite) have
/// the margin kNone, which no other outweighs.
template <class V, int kBits>
Reg<V> margin_of(Words<V> lowest, Words<V> highest) {
  constexpr Scalar<V> kLowest = (2 * (127 + kBits) - 126) / 2, kHighest = (2 * 127 + 114) / 2;
  constexpr Scalar<V> kNone = -2000, kFirstHuge = 254;
  const Reg<V> low = __builtin_convertvector(lowest >> 23, Reg<V>);
  const Reg<V> high = __builtin_convertvector(highest >> 23, Reg<V>);
  const Reg<V> margin = V::min(low - kLowest, kHighest - high);
  return low <= V::set1(kBits) || high >= V::set1(kFirstHuge) ? V::set1(kNone) : margin;
}

/// Two consecutive k in each lane.
template <class V>
struct Pairs {
  Reg<V> even, odd;
};

/// The magnitudes that a lane has seen, less one, so that zeros, which are harmless, are the
/// largest; and its sum.
template <class V>
struct Seen {
  Words<V> lowest = ~Words<V>{}, highest = {};
  Reg<V> sum = {};

  void note(const Pairs<V>& x) {
    const auto even = reinterpret_cast<Words<V>>(x.even) & 0x7fffffff;
    const auto odd = reinterpret_cast<Words<V>>(x.odd) & 0x7fffffff;
    note(even - 1, even);
    note(odd - 1, odd);
    sum = sum + (x.even + x.odd);
  }
  void note(Words<V> low, Words<V> high) {
    lowest = low < lowest ? low : lowest;
    highest = high > highest ? high : highest;
  }
};

/// What packing has seen of kWidth rows, be it a row at a time or one k of them all.
template <class V, int kWidth>
class Notes {
 public:
  /// Of row i.
  void note_row(std::int64_t i, const Pairs<V>& x) { rows_[i].note(x); }

  /// Of rows i, i + 1, ..., each in its lane.
  void note_lanes(std::int64_t i, const Pairs<V>& x) {
    Slice& slice = slices_[i / V::kLanes];
    slice.recent.note(x);
    if (++slice.count % kShortSum == 0) slice.flush();
  }

  /// Writes what is known of the rows, and returns their least margin.
  template <int kBits>
  int describe(Scalar<V>* known) {
    for (int first = 0; first < kWidth; first += V::kLanes) {
      Slice& slice = slices_[first / V::kLanes];
      slice.flush();
      Seen<V> seen = slice.all;
      add_rows(first, seen);
      const int left = kWidth - first, stored = left < V::kLanes ? left : V::kLanes;
      store<V>(known + first, margin_of<V, kBits>(seen.lowest, seen.highest), stored);
      store<V>(known + kWidth + first, seen.sum, stored);
    }
    Scalar<V> least = known[0];
    for (int i = 1; i < kWidth; ++i) least = known[i] < least ? known[i] : least;
    return static_cast<int>(least);
  }

 private:
  static constexpr int kSlices = (kWidth + V::kLanes - 1) / V::kLanes;

  struct Slice {
    void flush() {
      all.note(recent.lowest, recent.highest);
      all.sum = all.sum + recent.sum;
      recent = {};
    }
    Seen<V> recent, all;
    std::int64_t count = 0;
  };

  /// Takes what was seen of kLanes rows one by one into their lanes.
  void add_rows(int first, Seen<V>& seen) const {
    Reg<V> lowest[V::kLanes], highest[V::kLanes], sum[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      const Seen<V>& row = rows_[first + i];
      lowest[i] = reinterpret_cast<Reg<V>>(row.lowest);
      highest[i] = reinterpret_cast<Reg<V>>(row.highest);
      sum[i] = row.sum;
    }
    transpose<V>(lowest);
    transpose<V>(highest);
    transpose<V>(sum);
    for (int i = 0; i < V::kLanes; ++i) {
      seen.note(reinterpret_cast<Words<V>>(lowest[i]), reinterpret_cast<Words<V>>(highest[i]));
      seen.sum = seen.sum + sum[i];
    }
  }

  Seen<V> rows_[kSlices * V::kLanes];
  Slice slices_[kSlices];
};

/// As sum_panel, of what is known.
template <class V, int kWidth>
void sum_known(const Scalar<V>* known, void* sums) {
  for (int i = 0; i < kWidth; ++i) static_cast<Scalar<V>*>(sums)[i] += known[kWidth + i];
}

/// tile[i][j] = careful[i][j] where the margins of row i and column j ask for it.
template <class V, int kNr>
void take_careful(std::int64_t rows, const Scalar<V>* a_known, const Scalar<V>* b_known,
                  const Scalar<V>* careful, Scalar<V>* tile) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kNr; j += V::kLanes) {
      const Reg<V> margin = V::set1(a_known[i]) + load<V>(b_known + j);
      Scalar<V>* const place = tile + i * kNr + j;
      store<V>(place, margin < V::set1(0) ? load<V>(careful + i * kNr + j) : load<V>(place));
    }
  }
}

// ---- parts --------------------------------------------------------------------------------------

/// The bf16 nearest to each of two, in a place. V may have an instruction for it, which may take
/// subnormal numbers for zeros.
template <class V>
Words<V> nearest_pairs(const Pairs<V>& x) {
  if constexpr (requires { V::nearest_pairs(x.even, x.odd); }) {
    return V::nearest_pairs(x.even, x.odd);
  } else {
    return __builtin_convertvector(nearest_bf16<V>(x.even), Words<V>) |
           __builtin_convertvector(nearest_bf16<V>(x.odd), Words<V>) << 16;
  }
}

/// A source (pack-inl.h) read in pairs p = k / 2, with zeros from `end` on.
template <class V, class Source>
struct SourcePairs {
  const Source& source;
  std::int64_t end;

  bool unit_k() const { return source.unit_k(); }
  void prefetch(std::int64_t mn, std::int64_t p) const { source.prefetch(mn, 2 * p); }

  Pairs<V> along_k(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const std::int64_t k = 2 * p, left = end - k < 2 * count ? end - k : 2 * count;
    if constexpr (requires { V::load_pairs(source.base, left); }) {
      if (source.stride_k == 1) {
        const Words<V> pairs = V::load_pairs(source.base + mn * source.stride_mn + k, left);
        return {lower<V>(pairs), upper<V>(pairs)};
      }
    }
    constexpr auto kEven = [](int lane) constexpr { return 2 * lane; };
    constexpr auto kOdd = [](int lane) constexpr { return 2 * lane + 1; };
    const std::int64_t more = left - V::kLanes;
    const Reg<V> first = source.along_k(mn, k, more < 0 ? left : V::kLanes);
    const Reg<V> second = more > 0 ? source.along_k(mn, k + V::kLanes, more) : Reg<V>{};
    return {shuffle<V>(first, second, kEven, AllLanes<V>{}),
            shuffle<V>(first, second, kOdd, AllLanes<V>{})};
  }
  Pairs<V> along_mn(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const std::int64_t k = 2 * p;
    return {source.along_mn(mn, k, count),
            k + 1 < end ? source.along_mn(mn, k + 1, count) : Reg<V>{}};
  }
};

// ---- the row for what can't be split ------------------------------------------------------------

// It needn't be the best there is, only to keep the multipliers of two ports busy.
constexpr int kCarefulMr = 4;

// ---- one part, in pairs (pairs-inl.h) -----------------------------------------------------------

/// What pack_source reads to round f32 to bf16.
template <class V, int kWidth, class Source>
struct RoundedPairs {
  SourcePairs<V, Source> pairs;
  std::int64_t first;  // the panel's first row
  Notes<V, kWidth>& notes;

  bool unit_k() const { return pairs.unit_k(); }
  void prefetch(std::int64_t mn, std::int64_t p) const { pairs.prefetch(mn, p); }
  Reg<V> along_k(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const Pairs<V> x = pairs.along_k(mn, p, count);
    notes.note_row(mn - first, x);
    return reinterpret_cast<Reg<V>>(nearest_pairs<V>(x));
  }
  Reg<V> along_mn(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const Pairs<V> x = pairs.along_mn(mn, p, count);
    notes.note_lanes(mn - first, x);
    return reinterpret_cast<Reg<V>>(nearest_pairs<V>(x));
  }
};

/// As pack_pairs, of rounded values, and with what is known of them. Returns the least margin.
template <class V, class T, int kWidth>
int pack_rounded_pairs(const Operand& operand, std::int64_t mn, std::int64_t count, std::int64_t k,
                       std::int64_t kc, void* panel) {
  auto* const places = static_cast<Scalar<V>*>(panel);
  const std::int64_t depth = (kc + 1) / 2;
  Notes<V, kWidth> notes;
  visit_source<V, T>(operand, [&]<class Source>(const Source& source) {
    const RoundedPairs<V, kWidth, Source> rounded{{source, k + kc}, mn, notes};
    pack_source<V, kWidth>(rounded, mn, count, k / 2, depth, places);
  });
  return notes.template describe<bits_of_planes(1)>(places + kWidth * depth);
}

template <class V, int kWidth>
void sum_known_pairs(std::int64_t depth, const void* panel, void* sums) {
  sum_known<V, kWidth>(static_cast<const Scalar<V>*>(panel) + kWidth * depth, sums);
}

template <class V, int kMr, int kNr>
void take_careful_pairs(std::int64_t rows, std::int64_t depth, const void* a, const void* b,
                        const void* careful, void* tile) {
  take_careful<V, kNr>(rows, static_cast<const Scalar<V>*>(a) + kMr * depth,
                       static_cast<const Scalar<V>*>(b) + kNr * depth,
                       static_cast<const Scalar<V>*>(careful), static_cast<Scalar<V>*>(tile));
}

}  // namespace
}  // namespace neuron_ext::cpu
