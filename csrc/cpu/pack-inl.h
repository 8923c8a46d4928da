// Packing: slivers of an operand, of any strides and storage type, laid out as the micro-kernel
// reads them.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// An operand as it is stored. "mn" is the index that survives the product (rows of A, columns of
/// B).
template <class V, class T>
struct PlainSource {
  const T* base;
  std::int64_t stride_mn, stride_k;

  explicit PlainSource(const Operand& operand)
      : base(static_cast<const T*>(operand.base)),
        stride_mn(operand.stride_mn),
        stride_k(operand.stride_k) {}

  bool unit_k() const { return stride_k == 1; }
  /// Into L2: rows that lie a multiple of 4 KiB apart share a set of L1, which can't hold them.
  void prefetch(std::int64_t mn, std::int64_t k) const {
    __builtin_prefetch(base + mn * stride_mn + k * stride_k, 0, 2);
  }
  Reg<V> along_mn(std::int64_t mn, std::int64_t k, std::int64_t count) const {
    return load<V>(base + mn * stride_mn + k * stride_k, stride_mn, count);
  }
  Reg<V> along_k(std::int64_t mn, std::int64_t k, std::int64_t count) const {
    return load<V>(base + mn * stride_mn + k * stride_k, stride_k, count);
  }
};

/// An operand times an activation's gradient, dz = dy f'(y), which is never stored anywhere else.
template <class V, class T, class F>
struct GradientSource {
  PlainSource<V, T> dy, saved;

  explicit GradientSource(const Operand& operand)
      : dy(operand), saved({operand.saved, operand.saved_stride_mn, operand.saved_stride_k}) {}

  bool unit_k() const { return saved.unit_k(); }
  void prefetch(std::int64_t mn, std::int64_t k) const {
    dy.prefetch(mn, k);
    saved.prefetch(mn, k);
  }
  Reg<V> along_mn(std::int64_t mn, std::int64_t k, std::int64_t count) const {
    return F::template gradient<V>(dy.along_mn(mn, k, count), saved.along_mn(mn, k, count));
  }
  Reg<V> along_k(std::int64_t mn, std::int64_t k, std::int64_t count) const {
    return F::template gradient<V>(dy.along_k(mn, k, count), saved.along_k(mn, k, count));
  }
};

template <class V, class T, class F>
void visit_source(const Operand& operand, const F& f) {
  visit_activation(operand.prologue, [&]<class Prologue>(Prologue) {
    if constexpr (std::is_same_v<Prologue, Identity>) {
      f(PlainSource<V, T>(operand));
    } else {
      f(GradientSource<V, T, Prologue>(operand));
    }
  });
}

/// A square of kLanes along mn and k, transposed in registers.
template <class V, int kWidth, class Source>
[[gnu::always_inline]] inline void pack_square(const Source& source, std::int64_t mn,
                                               std::int64_t k, Scalar<V>* panel) {
  Reg<V> square[V::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) square[i] = source.along_k(mn + i, k, V::kLanes);
  transpose<V>(square);
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) store<V>(panel + i * kWidth, square[i]);
}

/// The same for fewer rows or k.
template <class V, int kWidth, class Source>
[[gnu::noinline]] void pack_ragged_square(const Source& source, std::int64_t mn, std::int64_t rows,
                                          std::int64_t k, std::int64_t depth, Scalar<V>* panel) {
  Reg<V> square[V::kLanes] = {};
  for (std::int64_t i = 0; i < rows; ++i) square[i] = source.along_k(mn + i, k, depth);
  transpose<V>(square);
  for (std::int64_t i = 0; i < depth; ++i) store<V>(panel + i * kWidth, square[i]);
}

/// panel[k][mn], kWidth values of mn to a k. The operand has `count` from mn on: if they are fewer
/// than kWidth, the rest of the panel is never used; if they are more, they may be read.
///
/// Vectors are stored whole. Where kWidth isn't a multiple of the lanes, the last vector of a k
/// runs into the next k's place, which is written afterwards (hence the descending loop), and in
/// the end up to kLanes - 1 elements past the panel.
template <class V, int kWidth, class Source>
void pack_source(const Source& source, std::int64_t mn, std::int64_t count, std::int64_t k,
                 std::int64_t kc, Scalar<V>* panel) {
  constexpr int kLanes = V::kLanes;
  constexpr int kSlices = (kWidth + kLanes - 1) / kLanes;
  const auto lanes_of = [](std::int64_t left) { return left < kLanes ? left : kLanes; };
  constexpr int kLinePlaces = 64 / sizeof(Scalar<V>);
  // A square of a few k is mostly empty: then, collecting them one by one takes less.
  constexpr std::int64_t kFewPlaces = 3;
  if (source.unit_k() && kc > kFewPlaces) {
    // Row by row, as memory likes it; the squares then come from L2.
    for (int i = 0; i < kWidth && i < count; ++i) {
      for (std::int64_t p = 0; p < kc; p += kLinePlaces) source.prefetch(mn + i, k + p);
    }
    for (std::int64_t p = 0; p < kc; p += kLanes) {
      const std::int64_t depth = lanes_of(kc - p);
      for (int slice = kSlices - 1; slice >= 0; --slice) {
        const int first = slice * kLanes;
        if (first >= count) continue;
        const std::int64_t rows = lanes_of(count - first);
        Scalar<V>* const place = panel + p * kWidth + first;
        if (rows == kLanes && depth == kLanes) {
          pack_square<V, kWidth>(source, mn + first, k + p, place);
        } else {
          pack_ragged_square<V, kWidth>(source, mn + first, rows, k + p, depth, place);
        }
      }
    }
  } else {
    const auto copy = [&](const auto& lanes_from) {
      for (std::int64_t p = 0; p < kc; ++p) {
        for (int first = 0; first < kWidth; first += kLinePlaces) {
          source.prefetch(mn + kWidth + first, k + p);  // the next panel's
        }
        for (int first = 0; first < kWidth && first < count; first += kLanes) {
          store<V>(panel + p * kWidth + first,
                   source.along_mn(mn + first, k + p, lanes_from(first)));
        }
      }
    };
    if (count >= kSlices * kLanes) {
      copy([](int) { return std::int64_t{kLanes}; });
    } else {
      copy([&](int first) { return lanes_of(count - first); });
    }
  }
}

/// Returns 0: the micro-kernel takes every value.
template <class V, class T, int kWidth>
int pack_panel(const Operand& operand, std::int64_t mn, std::int64_t count, std::int64_t k,
               std::int64_t kc, void* panel) {
  visit_source<V, T>(operand, [&](const auto& source) {
    pack_source<V, kWidth>(source, mn, count, k, kc, static_cast<Scalar<V>*>(panel));
  });
  return 0;
}

/// row = operand[mn, p] for p < k, then zeros up to a whole vector; its vectors are `step` apart.
template <class V, class T>
int widen_row(const Operand& operand, std::int64_t mn, std::int64_t k, void* row,
              std::int64_t step) {
  visit_source<V, T>(operand, [&](const auto& source) {
    for (std::int64_t p = 0; p < k; p += V::kLanes) {
      const std::int64_t count = k - p < V::kLanes ? k - p : V::kLanes;
      store<V>(static_cast<Scalar<V>*>(row) + p / V::kLanes * step, source.along_k(mn, p, count));
    }
  });
  return 0;
}

/// What places of a panel or row add to a sum: themselves, unless they hold several terms.
template <class V>
Reg<V> sum_of_places(Reg<V> places) {
  if constexpr (kTerms<V> == 2) {
    const auto pairs = reinterpret_cast<Words<V>>(places);
    return lower<V>(pairs) + upper<V>(pairs);
  } else {
    return places;
  }
}

// Terms of a sum over a panel's rows: shorter than those of a block of D, for there is nothing else
// to be gained by long ones.
constexpr std::int64_t kShortSum = 16;

/// sums[mn] += the sum over k of panel[k][mn], formed from zero like a block of D.
template <class V, int kWidth>
void sum_panel(std::int64_t depth, const void* panel, void* sums) {
  constexpr int kVectors = (kWidth + V::kLanes - 1) / V::kLanes;
  const auto* p = static_cast<const Scalar<V>*>(panel);
  Reg<V> block[kVectors] = {};
  for (std::int64_t begin = 0; begin < depth; begin += kShortSum) {
    Reg<V> terms[kVectors] = {};
    for (std::int64_t k = begin; k < depth && k < begin + kShortSum; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        terms[v] = terms[v] + sum_of_places<V>(load<V>(p + k * kWidth + v * V::kLanes));
      }
    }
    for (int v = 0; v < kVectors; ++v) block[v] = block[v] + terms[v];
  }
  for (int i = 0; i < kWidth; ++i) {
    static_cast<Scalar<V>*>(sums)[i] += block[i / V::kLanes][i % V::kLanes];
  }
}

}  // namespace
}  // namespace neuron_ext::cpu
