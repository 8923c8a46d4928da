// What all kernels do with a vector type. An isa_*.cpp defines, for each accumulator type, a struct
// V with
//
//   Scalar, kLanes, Reg     float or double, how many, and a native vector of them (with + - * /)
//   kRegisters              how many vector registers the ISA has
//   set1(x)                 x in every lane
//   fma(a, b, c)            a b + c, rounded once
//   multiply_add(a, b, c)   a b + c, in the fastest way
//   min(a, b), max(a, b)    b where either is nan
//   lookup(table, i)        table[i mod 8]
//   widen(h), narrow(x)     f16 bits to and from f32; only where Scalar is float
//   to_bf16(x)              the bf16 nearest to x, if the ISA can do it; the same for f32
//   load_partial(p, count), store_partial(p, x, count)
//                           masked moves of Scalar, and of Halves, if the ISA has them
//
// A V is named in an unnamed namespace, so everything made from it has internal linkage: the linker
// can't merge code for one ISA with another's. For the same reason nothing here calls a function
// template of std. No lambda takes or returns a vector: GCC checks such a signature against the
// file's flags, not the region's.
#pragma once

namespace neuron_ext::cpu {
namespace {

template <class V>
using Reg = typename V::Reg;
template <class V>
using Scalar = typename V::Scalar;

/// Integers of the width and number of V's lanes, and 16-bit ones of the same number.
template <class V>
struct Integers {
  using Lane = std::conditional_t<sizeof(Scalar<V>) == 4, std::uint32_t, std::uint64_t>;
  typedef Lane Words __attribute__((vector_size(V::kLanes * sizeof(Lane))));
  typedef std::uint16_t Halves __attribute__((vector_size(V::kLanes * sizeof(std::uint16_t))));
};
template <class V>
using Words = typename Integers<V>::Words;
template <class V>
using Halves = typename Integers<V>::Halves;

/// How many terms of a sum share a lane: one, unless V says otherwise (pairs-inl.h).
template <class V>
constexpr int kTerms = [] {
  if constexpr (requires { V::kTerms; }) return V::kTerms;
  return 1;
}();

/// Where they are two: bf16 in the halves of a lane, as f32.
template <class V>
Reg<V> lower(Words<V> pairs) {
  return reinterpret_cast<Reg<V>>(pairs << 16);
}
template <class V>
Reg<V> upper(Words<V> pairs) {
  return reinterpret_cast<Reg<V>>(pairs & 0xffff0000);
}

/// Lane i of the result is lane index(i) of a followed by b.
template <class V, class Index, int... kLane>
Reg<V> shuffle(Reg<V> a, Reg<V> b, Index index, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, index(kLane)...);
#else
  return __builtin_shuffle(a, b, Words<V>{index(kLane)...});
#endif
}

template <class V>
using AllLanes = std::make_integer_sequence<int, V::kLanes>;

// ---- loads: from any storage type, any stride, or fewer elements than lanes (the rest are zero) -

template <class V>
Reg<V> load(const Scalar<V>* p) {
  Reg<V> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

/// The bits of T, one of the 16-bit types, as f32.
template <class V, class T>
Reg<V> widen_halves(Halves<V> h) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<Reg<V>>(__builtin_convertvector(h, Words<V>) << 16);
  } else {
    return V::widen(h);
  }
}

template <class V, class T>
  requires(sizeof(T) == 2)
Reg<V> load(const T* p) {
  Halves<V> h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_halves<V, T>(h);
}

/// Every kStride-th element from p on, picked from kStride vectors, the last of which ends where
/// the elements do.
template <class V, int kStride, class T, int kVector = 1>
[[gnu::always_inline]] inline Reg<V> pick(const T* p, Reg<V> picked) {
  if constexpr (kVector == kStride) {
    return picked;
  } else {
    constexpr int kBegin = kVector * V::kLanes - (kVector + 1 == kStride ? kStride - 1 : 0);
    constexpr auto kFrom = [](int lane) constexpr {
      const int element = lane * kStride;
      if (element >= kVector * V::kLanes) return V::kLanes + (element - kBegin) % V::kLanes;
      return kVector == 1 ? element : lane;
    };
    return pick<V, kStride, T, kVector + 1>(
        p, shuffle<V>(picked, load<V>(p + kBegin), kFrom, AllLanes<V>{}));
  }
}

// Not inlined: it's the slow way out of many places.
template <class V, class T>
[[gnu::noinline]] Reg<V> load_strided(const T* p, std::int64_t stride, std::int64_t count) {
  if (count == V::kLanes) {
    if (stride == 0) return V::set1(widen(*p));
    if (stride == 2) return pick<V, 2>(p, load<V>(p));
    if (stride == 3) return pick<V, 3>(p, load<V>(p));
    if constexpr (V::kLanes >= 3) {  // or a vector would begin behind the last element
      if (stride == 4) return pick<V, 4>(p, load<V>(p));
    }
  }
  Scalar<V> lanes[V::kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i * stride]);
  return load<V>(lanes);
}

template <class V, class T>
Reg<V> load_partial(const T* p, std::int64_t count) {
  if constexpr (requires(const Scalar<V>* scalars) { V::load_partial(scalars, count); }) {
    if constexpr (sizeof(T) == 2)
      return widen_halves<V, T>(V::load_partial(&p->bits, count));
    else
      return V::load_partial(p, count);
  } else {
    return load_strided<V>(p, 1, count);
  }
}

/// The `count` <= kLanes elements at p, p + stride, ...
template <class V, class T>
Reg<V> load(const T* p, std::int64_t stride, std::int64_t count) {
  if (stride != 1) return load_strided<V>(p, stride, count);
  return count == V::kLanes ? load<V>(p) : load_partial<V>(p, count);
}

// ---- stores: rounding to any storage type -------------------------------------------------------

template <class V>
void store(Scalar<V>* p, Reg<V> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

/// In the upper halves: the bf16 nearest to x, unless that is a nan with bits in its lower half.
template <class V>
Words<V> round_to_bf16(Reg<V> x) {
  const auto bits = reinterpret_cast<Words<V>>(x);
  return bits + 0x7fff + (bits >> 16 & 1);
}

/// The bf16 nearest to x, by integer arithmetic.
template <class V>
Halves<V> nearest_bf16(Reg<V> x) {
  const Words<V> quieted = reinterpret_cast<Words<V>>(x) >> 16 | 0x40;
  return __builtin_convertvector(x == x ? round_to_bf16<V>(x) >> 16 : quieted, Halves<V>);
}

template <class V>
Halves<V> to_bf16(Reg<V> x) {
  if constexpr (requires { V::to_bf16(x); }) {
    return V::to_bf16(x);
  } else {
    return nearest_bf16<V>(x);
  }
}

/// The bits of the T, one of the 16-bit types, nearest to x.
template <class V, class T>
Halves<V> narrow_halves(Reg<V> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_bf16<V>(x);
  } else {
    return V::narrow(x);
  }
}

template <class V, class T>
  requires(sizeof(T) == 2)
void store(T* p, Reg<V> x) {
  const Halves<V> h = narrow_halves<V, T>(x);
  __builtin_memcpy(p, &h, sizeof h);
}

/// The first `count` <= kLanes elements.
template <class V, class T>
void store(T* p, Reg<V> x, std::int64_t count) {
  if (count == V::kLanes) {
    store<V>(p, x);
  } else if constexpr (requires(Scalar<V>* scalars) { V::store_partial(scalars, x, count); }) {
    if constexpr (sizeof(T) == 2)
      V::store_partial(&p->bits, narrow_halves<V, T>(x), count);
    else
      V::store_partial(p, x, count);
  } else {
    T lanes[V::kLanes];
    store<V>(lanes, x);
    for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
}

// ---- two vectors at once, for what doesn't care about the order of elements --------------------

template <class V>
struct Two {
  Reg<V> first, second;
};

template <class V, class T>
Two<V> load_two(const T* p) {
  return {load<V>(p), load<V>(p + V::kLanes)};
}

/// Elements of even index, then those of odd: none has to cross lanes.
template <class V>
Two<V> load_two(const BFloat16* p) {
  Words<V> pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return {lower<V>(pairs), upper<V>(pairs)};
}

/// The bf16 nearest to x.first in the lower halves, to x.second in the upper ones. As for
/// round_to_bf16, the lower half of a nan must be zero, as it is in what was computed from bf16.
template <class V>
Words<V> round_to_pairs(const Two<V>& x) {
  return round_to_bf16<V>(x.first) >> 16 | (round_to_bf16<V>(x.second) & 0xffff0000);
}

/// In the order of load_two, of what was computed from T.
template <class V, class T>
void store_two(T* p, const Two<V>& x) {
  store<V>(p, x.first);
  store<V>(p + V::kLanes, x.second);
}

template <class V>
void store_two(BFloat16* p, const Two<V>& x) {
  const Words<V> pairs = round_to_pairs<V>(x);
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

// ---- across lanes -------------------------------------------------------------------------------

/// How many lanes 16 bytes hold: x86 shuffles within them in one step.
template <class V>
constexpr int kQuadLanes = 16 / sizeof(Scalar<V>);

/// For each two rows kDistance apart, puts what `low` and `high` pick of them in their places.
template <class V, int kDistance, class Low, class High>
[[gnu::always_inline]] inline void exchange(Reg<V> (&row)[V::kLanes], Low low, High high) {
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) {
    if (i & kDistance) continue;
    const Reg<V> a = row[i], b = row[i + kDistance];
    row[i] = shuffle<V>(a, b, low, AllLanes<V>{});
    row[i + kDistance] = shuffle<V>(a, b, high, AllLanes<V>{});
  }
}

/// Within each 16 bytes: the low (or high) halves of two vectors, groups of kGroup lanes from
/// either in turn.
template <class V, int kGroup, bool kHigh>
constexpr auto kInterleave = [](int lane) constexpr {
  constexpr int kQuad = kQuadLanes<V>;
  const int within = lane % kQuad, group = within / kGroup;
  return group % 2 * V::kLanes + lane - within + group / 2 * kGroup + within % kGroup +
         (kHigh ? kQuad / 2 : 0);
};

template <class V, int kGroup>
[[gnu::always_inline]] inline void in_lane_stages(Reg<V> (&row)[V::kLanes]) {
  if constexpr (kGroup < kQuadLanes<V>) {
    exchange<V, kGroup>(row, kInterleave<V, kGroup, false>, kInterleave<V, kGroup, true>);
    in_lane_stages<V, 2 * kGroup>(row);
  }
}

/// Every other 16 bytes of one row, then of the other.
template <class V, int kDistance>
[[gnu::always_inline]] inline void block_stages(Reg<V> (&row)[V::kLanes]) {
  constexpr int kQuad = kQuadLanes<V>;
  if constexpr (kDistance < V::kLanes) {
    constexpr auto kEven = [](int lane) constexpr {
      return lane / kQuad * 2 * kQuad + lane % kQuad;
    };
    exchange<V, kDistance>(row, kEven, [=](int lane) constexpr { return kEven(lane) + kQuad; });
    block_stages<V, 2 * kDistance>(row);
  }
}

/// Transposes a square of kLanes x kLanes: interleaving within 16 bytes, then picking every other
/// 16 bytes.
template <class V>
[[gnu::always_inline]] inline void transpose(Reg<V> (&row)[V::kLanes]) {
  constexpr int kLanes = V::kLanes, kQuad = kQuadLanes<V>;
  in_lane_stages<V, 1>(row);
  block_stages<V, kQuad>(row);
  // Interleaving left rows 1 and 2 of each four exchanged.
  if constexpr (kQuad == 4) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += kQuad) {
      const Reg<V> swapped = row[i + 1];
      row[i + 1] = row[i + 2];
      row[i + 2] = swapped;
    }
  }
}

/// Adds the halves of x, then their halves, until every 16 bytes hold the same sums.
template <class V, int kDistance = V::kLanes / 2>
[[gnu::always_inline]] inline Reg<V> sum_blocks(Reg<V> x) {
  if constexpr (kDistance < kQuadLanes<V>) {
    return x;
  } else {
    constexpr auto kRotated = [](int lane) constexpr { return (lane + kDistance) % V::kLanes; };
    return sum_blocks<V, kDistance / 2>(x + shuffle<V>(x, x, kRotated, AllLanes<V>{}));
  }
}

/// Halves what is left to add up of a and b, interleaved.
template <class V, int kGroup>
[[gnu::always_inline]] inline Reg<V> fold(Reg<V> a, Reg<V> b) {
  return shuffle<V>(a, b, kInterleave<V, kGroup, false>, AllLanes<V>{}) +
         shuffle<V>(a, b, kInterleave<V, kGroup, true>, AllLanes<V>{});
}

/// In the first lanes: the sum of all lanes of each x, added in an order that is the same for each.
template <class V>
[[gnu::always_inline]] inline Reg<V> sum_lanes(const Reg<V> (&x)[kQuadLanes<V>]) {
  if constexpr (kQuadLanes<V> == 4) {
    return sum_blocks<V>(fold<V, 2>(fold<V, 1>(x[0], x[1]), fold<V, 1>(x[2], x[3])));
  } else {
    return sum_blocks<V>(fold<V, 1>(x[0], x[1]));
  }
}

/// The sum of all lanes, in the same order.
template <class V>
[[gnu::always_inline]] inline Scalar<V> sum_lanes(Reg<V> x) {
  Reg<V> same[kQuadLanes<V>];
  for (Reg<V>& each : same) each = x;
  return sum_lanes<V>(same)[0];
}

}  // namespace
}  // namespace neuron_ext::cpu
