// The mainloop: a block of D's sums in registers, from packed panels. It knows nothing of D, of
// storage types or of activations.
#pragma once

namespace neuron_ext::cpu {
namespace {

// Terms that are added up in registers before their sum is added to the tile: many short sums lose
// less than one long one. In f32 half a block: a whole one makes the largest error of a uniform
// product of k = 256 6.9 eps (|A||B|) instead of 4.3. Adding to the tile takes some 35 cycles on
// Zen 4, 1 % of 128 terms. In f64 few sums need it.
template <class V>
constexpr std::int64_t kLongestSum = [] {
  if constexpr (requires { V::kLongestSum; }) return V::kLongestSum;
  return std::int64_t{sizeof(Scalar<V>) == 4 ? 128 : 256};
}();

/// tile[i][j] (+)= sum over p < depth of a[p][i] b[p][j], for i < kRows and j < kVectors * kLanes.
/// The panels and the tile are kMr and kNr wide. Each sum of terms is formed from zero, and only
/// then added, so that its arithmetic is the same wherever its element lies.
template <class V, int kMr, int kNr, int kRows, int kVectors>
void microkernel(std::int64_t depth, const Scalar<V>* a, const Scalar<V>* b, Scalar<V>* tile,
                 bool add) {
  do {
    const std::int64_t terms = depth < kLongestSum<V> ? depth : kLongestSum<V>;
    // Unrolled early, or GCC keeps the sums in memory around the loop over p: 160 cycles a call.
    Reg<V> sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Reg<V>{};
    }
    for (std::int64_t p = 0; p < terms; ++p, a += kMr, b += kNr) {
      Reg<V> b_p[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) b_p[v] = load<V>(b + v * V::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Reg<V> a_ip = V::set1(a[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(a_ip, b_p[v], sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Scalar<V>* const place = tile + i * kNr + v * V::kLanes;
        store<V>(place, add ? load<V>(place) + sum[i][v] : sum[i][v]);
      }
    }
    add = true;
    depth -= terms;
  } while (depth > 0);
}

/// A kernel of exactly the rows asked for, and of the vectors that hold the columns: edges cost
/// what they hold.
template <class V, int kMr, int kNr>
struct Microkernels {
  using Kernel = void (*)(std::int64_t, const Scalar<V>*, const Scalar<V>*, Scalar<V>*, bool);

  template <int kVectors, int... kRow>
  static Kernel of_rows(std::int64_t rows, std::integer_sequence<int, kRow...>) {
    static constexpr Kernel kKernels[] = {microkernel<V, kMr, kNr, kRow + 1, kVectors>...};
    return kKernels[rows - 1];
  }

  static void run(std::int64_t rows, std::int64_t columns, std::int64_t depth, const void* a,
                  const void* b, void* tile, bool add) {
    static_assert(kNr == 2 * V::kLanes);
    constexpr std::make_integer_sequence<int, kMr> kRows;
    const Kernel kernel = columns > V::kLanes ? of_rows<2>(rows, kRows) : of_rows<1>(rows, kRows);
    // Sums that wait for this block may have left for L3 by now.
    if (add) {
      for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < 2; ++v) {
          __builtin_prefetch(static_cast<Scalar<V>*>(tile) + i * kNr + v * V::kLanes, 1);
        }
      }
    }
    kernel(depth, static_cast<const Scalar<V>*>(a), static_cast<const Scalar<V>*>(b),
           static_cast<Scalar<V>*>(tile), add);
  }
};

}  // namespace
}  // namespace neuron_ext::cpu
