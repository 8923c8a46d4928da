// Products of bf16 from pairs: two consecutive k of a row or column share a 32-bit place, the lower
// k in the lower half, and an instruction multiplies and adds both. V is a vector of such places
// (its Scalar, float, only says how wide they are) whose multiply_add does that. All other files'
// packing, loops and sums over places serve as they are.
#pragma once

namespace neuron_ext::cpu {
namespace {

/// A dot product of two pairs without the instruction, which takes subnormal numbers for zeros and
/// makes zeros of them; where there are none, the results are the same.
template <class V>
struct CarefulPairs : V {
  static constexpr int kLowestExponents = 2 * V::kSubnormal;  // takes all

  static Reg<V> multiply_add(Reg<V> a, Reg<V> b, Reg<V> c) {
    const auto a_bits = reinterpret_cast<Words<V>>(a), b_bits = reinterpret_cast<Words<V>>(b);
    return V::fma(lower<V>(a_bits), lower<V>(b_bits),
                  V::fma(upper<V>(a_bits), upper<V>(b_bits), c));
  }
};

/// An operand of `k` values along k, as packing and narrow products read it: in pairs p = k / 2,
/// with a zero after an odd k. kUnitMn: what is contiguous is known to lie along mn; packing by
/// copying is then free of calls, around which all vectors would be saved.
template <class V, bool kUnitMn = false>
struct PairSource {
  const BFloat16* base;
  std::int64_t stride_mn, stride_k, k;

  bool unit_k() const { return stride_k == 1; }
  const BFloat16* at(std::int64_t mn, std::int64_t p) const {
    return base + mn * stride_mn + 2 * p * stride_k;
  }
  void prefetch(std::int64_t mn, std::int64_t p) const {
    __builtin_prefetch(at(mn, p), 0, 2);
    if (stride_k != 1) __builtin_prefetch(at(mn, p) + stride_k, 0, 2);
  }

  Words<V> along_k(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const std::int64_t left = k - 2 * p;
    if (stride_k == 1) return V::load_pairs(at(mn, p), left < 2 * count ? left : 2 * count);
    return gather(at(mn, p), 2 * stride_k, count, left - 1);
  }
  Words<V> along_mn(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    const bool has_upper = 2 * p + 1 < k;
    if (kUnitMn || stride_mn == 1) {
      return has_upper ? V::load_interleaved(at(mn, p), at(mn, p) + stride_k, count)
                       : V::load_halves(at(mn, p), count);
    }
    return gather(at(mn, p), stride_mn, count, has_upper ? 2 * count : 0);
  }

 private:
  /// Pairs that lie `stride` apart; pair i is whole if 2 i < uppers.
  [[gnu::noinline]] Words<V> gather(const BFloat16* p, std::int64_t stride, std::int64_t count,
                                    std::int64_t uppers) const {
    Words<V> pairs = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t high = 2 * i < uppers ? p[i * stride + stride_k].bits : 0;
      pairs[i] = p[i * stride].bits | high << 16;
    }
    return pairs;
  }
};

/// What Pack reads: the operand, or dz = dy f'(y) rounded to bf16, as a layer that stores dz would
/// round it, and notes what it has met.
template <class V, class F, bool kUnitMn>
class NotedPairs {
 public:
  NotedPairs(const Operand& operand, std::int64_t k)
      : a_{static_cast<const BFloat16*>(operand.base), operand.stride_mn, operand.stride_k, k},
        saved_{static_cast<const BFloat16*>(operand.saved), operand.saved_stride_mn,
               operand.saved_stride_k, k} {}

  bool unit_k() const { return kIsPlain ? a_.unit_k() : saved_.unit_k(); }
  void prefetch(std::int64_t mn, std::int64_t p) const {
    a_.prefetch(mn, p);
    if constexpr (!kIsPlain) saved_.prefetch(mn, p);
  }
  Reg<V> along_k(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    if constexpr (kIsPlain) return note(a_.along_k(mn, p, count));
    return note(gradient(a_.along_k(mn, p, count), saved_.along_k(mn, p, count)));
  }
  Reg<V> along_mn(std::int64_t mn, std::int64_t p, std::int64_t count) const {
    if constexpr (kIsPlain) return note(a_.along_mn(mn, p, count));
    return note(gradient(a_.along_mn(mn, p, count), saved_.along_mn(mn, p, count)));
  }
  int lowest_exponent() const { return V::lowest_exponent(lowest_); }

 private:
  static constexpr bool kIsPlain = std::is_same_v<F, Identity>;

  static Words<V> gradient(Words<V> dy, Words<V> y) {
    return round_to_pairs<V>({F::template gradient<V>(lower<V>(dy), lower<V>(y)),
                              F::template gradient<V>(upper<V>(dy), upper<V>(y))});
  }
  Reg<V> note(Words<V> pairs) const {
    lowest_ = V::lower_magnitudes(lowest_, pairs);
    return reinterpret_cast<Reg<V>>(pairs);
  }

  PairSource<V, kUnitMn> a_, saved_;
  mutable Words<V> lowest_ = ~Words<V>{};
};

template <class V, class F>
void visit_pairs(const Operand& operand, std::int64_t k, const F& f) {
  visit_activation(operand.prologue, [&]<class Prologue>(Prologue) {
    const bool is_plain = std::is_same_v<Prologue, Identity>;
    if (operand.stride_mn == 1 && (is_plain || operand.saved_stride_mn == 1)) {
      f(NotedPairs<V, Prologue, true>(operand, k));
    } else {
      f(NotedPairs<V, Prologue, false>(operand, k));
    }
  });
}

/// As pack_panel, in pairs. Returns the lowest exponent in the panel.
template <class V, int kWidth>
int pack_pairs(const Operand& operand, std::int64_t mn, std::int64_t count, std::int64_t k,
               std::int64_t kc, void* panel) {
  int lowest = 0;
  visit_pairs<V>(operand, k + kc, [&](const auto& source) {
    pack_source<V, kWidth>(source, mn, count, k / 2, (kc + 1) / 2, static_cast<Scalar<V>*>(panel));
    lowest = source.lowest_exponent();
  });
  return lowest;
}

/// As widen_row, in pairs. Returns the lowest exponent in the row.
template <class V>
int pair_row(const Operand& operand, std::int64_t mn, std::int64_t k, void* row,
             std::int64_t step) {
  int lowest = 0;
  visit_pairs<V>(operand, k, [&](const auto& source) {
    const std::int64_t places = (k + 1) / 2;
    for (std::int64_t p = 0; p < places; p += V::kLanes) {
      const std::int64_t count = places - p < V::kLanes ? places - p : V::kLanes;
      store<V>(static_cast<Scalar<V>*>(row) + p / V::kLanes * step, source.along_k(mn, p, count));
    }
    lowest = source.lowest_exponent();
  });
  return lowest;
}

}  // namespace
}  // namespace neuron_ext::cpu
