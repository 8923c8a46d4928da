// The driver for products of long operands with few features: either D and A have many rows and B
// is small (a layer's output, its input's gradient), or k is long and D is small (its weight's
// gradient). What is done to a vector is in strips-inl.h.
#include <algorithm>

#include "blocking.h"
#include "driver.h"
#include "forms.h"
#include "log.h"

namespace neuron_ext::cpu {
namespace {

// Elements of a strip's operands and results together: half of an L1 cache of f32.
constexpr std::int64_t kStripSize = 4096;
// Sums of k in strips are added to a chunk's, and the chunks' pairwise: however long k is, a result
// is the sum of few roundings.
constexpr std::int64_t kShortestChunk = 4096, kMostChunks = 256;

template <class S>
class StripProduct {
 public:
  StripProduct(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at)
      : kernel_(kernel),
        functions_(kernel.of(desc.dtype)),
        desc_(desc),
        at_(at),
        a_(operand_a(desc, at)),
        b_(operand_b(desc, at)),
        n_vectors_(round_up(desc.n, kernel.lanes)) {}

  /// B stays, strips of A's rows pass, and give rows of D.
  void run_rows(const ParallelFor& parallel_for) const {
    const std::int64_t depth = places(desc_.k);
    const std::int64_t b_size = padded(depth * desc_.n);
    with_buffer<S>(shared_buffer, b_size + n_vectors_, [&](S* b_rows) {
      const int b_lowest = functions_.stage_columns(b_, 0, desc_.n, 0, desc_.k, b_rows);
      S* const bias = b_rows + b_size;
      std::fill_n(bias, n_vectors_, S{0});
      if (desc_.has_bias) functions_.widen_bias(at_.bias, desc_.bias_stride, desc_.n, bias);

      const std::int64_t rows = strip_rows(depth + desc_.n, 256);
      const std::int64_t strips = divide_up(desc_.m, rows);
      const std::int64_t threads = threads_for(desc_.m, desc_.n, desc_.k, parallel_for);
      parallel_for(strips, divide_up(strips, threads), [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t a_size = padded(rows * depth), tile_size = padded(rows * desc_.n);
        with_buffer<S>(task_buffer, a_size + tile_size + padded(rows), [&](S* strip) {
          S *const tile = strip + a_size, *const a_sums = tile + tile_size;
          for (std::int64_t i = begin * rows; i < std::min(end * rows, desc_.m); i += rows) {
            const std::int64_t count = std::min(rows, desc_.m - i);
            const Rows<const S> a = rows_of_a(i, count, strip);
            const int lowest = a.lowest + b_lowest;
            const std::int64_t in_place = rows_in_place(count), left = count - in_place;
            void* const d = offset(at_.d, desc_.dtype, i * desc_.d_stride_m);
            kernel_for(functions_.strips_to_d, lowest)(in_place, desc_.n, depth, a.first, a.stride,
                                                       a.stride_k, b_rows, desc_.n, bias, 0, d,
                                                       desc_.d_stride_m);
            // Done while they are in L1. Measured on Zen 4, 10^5 x 16-32-16 backward, f32: 5.5 →
            // 5.1 ms.
            if (desc_.has_epilogue_gradient()) {
              store_sums(functions_, desc_, at_, i, in_place, 0, desc_.n, static_cast<const S*>(d),
                         desc_.d_stride_m);
            }
            kernel_for(kernel_.strips, lowest)(left, desc_.n, depth, a.first + in_place * a.stride,
                                               a.stride, a.stride_k, b_rows, desc_.n, bias, 0, tile,
                                               desc_.n);
            store_sums(functions_, desc_, at_, i + in_place, left, 0, desc_.n, tile, desc_.n);
            if (!desc_.has_a_sum) continue;
            std::fill_n(a_sums, padded(rows), S{0});
            kernel_.sum_strip(depth, count, a.first, a_sums);
            store_a_sums(functions_, desc_, at_, i, count, a_sums);
          }
        });
      });
    });
  }

  /// The same for one column, which is contiguous: strips of it pass as columns of A.
  void run_column(const ParallelFor& parallel_for) const {
    const std::int64_t depth = places(desc_.k);
    constexpr std::int64_t kRows = 256;
    const std::int64_t b_size = padded(depth);
    with_buffer<S>(shared_buffer, b_size + kRows, [&](S* b_column) {
      const int b_lowest = functions_.stage_columns(b_, 0, 1, 0, desc_.k, b_column);
      S* const bias = b_column + b_size;
      std::fill_n(bias, kRows, S{0});
      if (desc_.has_bias) functions_.widen_bias(at_.bias, 0, kRows, bias);

      const std::int64_t strips = divide_up(desc_.m, kRows);
      const std::int64_t threads = threads_for(desc_.m, desc_.n, desc_.k, parallel_for);
      parallel_for(strips, divide_up(strips, threads), [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t a_size = padded(depth * kRows);
        with_buffer<S>(task_buffer, a_size + kRows, [&](S* strip) {
          S* const tile = strip + a_size;
          for (std::int64_t i = begin * kRows; i < std::min(end * kRows, desc_.m); i += kRows) {
            const std::int64_t count = std::min(kRows, desc_.m - i);
            const int a_lowest = functions_.stage_columns(a_, i, count, 0, desc_.k, strip);
            kernel_for(kernel_.strips, a_lowest + b_lowest)(1, count, depth, b_column, 0, 1, strip,
                                                            count, bias, 0, tile, 0);
            store_sums(functions_, desc_, at_, i, count, 0, 1, tile, 1);
          }
        });
      });
    });
  }

  /// Strips of A's columns and B's rows pass, and add to all of D.
  void run_sums(const ParallelFor& parallel_for) const {
    const std::int64_t rows = kernel_.kr * strip_rows(desc_.m + desc_.n, 128);
    const std::int64_t chunk_k =
        round_up(std::max(kShortestChunk, divide_up(desc_.k, kMostChunks)), rows);
    const std::int64_t chunks = divide_up(desc_.k, chunk_k);
    const std::int64_t tile_size = desc_.m * n_vectors_ + kernel_.lanes;
    const std::int64_t sums_size = tile_size + round_up(desc_.m, kernel_.lanes);
    with_buffer<S>(shared_buffer, chunks * sums_size, [&](S* all_sums) {
      const std::int64_t threads = threads_for(desc_.m, desc_.n, desc_.k, parallel_for);
      parallel_for(chunks, divide_up(chunks, threads), [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t a_size = padded(places(rows) * desc_.m);
        with_buffer<S>(task_buffer, a_size + padded(places(rows) * desc_.n), [&](S* a_strip) {
          S* const b_strip = a_strip + a_size;
          for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            S* const sums = all_sums + chunk * sums_size;
            std::fill_n(sums, sums_size, S{0});
            const std::int64_t last = std::min((chunk + 1) * chunk_k, desc_.k);
            for (std::int64_t p = chunk * chunk_k; p < last; p += rows) {
              add_strip(p, std::min(rows, last - p), a_strip, b_strip, sums, sums + tile_size);
            }
          }
        });
      });
      for (std::int64_t step = 1; step < chunks; step *= 2) {
        for (std::int64_t chunk = 0; chunk + step < chunks; chunk += 2 * step) {
          S* const sums = all_sums + chunk * sums_size;
          const S* const others = sums + step * sums_size;
          for (std::int64_t e = 0; e < sums_size; ++e) sums[e] += others[e];
        }
      }
      store_sums(functions_, desc_, at_, 0, desc_.m, 0, desc_.n, all_sums, n_vectors_);
      if (desc_.has_a_sum) store_a_sums(functions_, desc_, at_, 0, desc_.m, all_sums + tile_size);
    });
  }

 private:
  /// What multiply_strip reads or writes of an operand, and the lowest exponent in it.
  template <class Element>
  struct Rows {
    Element* first;
    std::int64_t stride;
    int lowest = 0;
    std::int64_t stride_k = 1;
  };

  /// Whether arrays hold what strips do, which then are used where they lie.
  bool holds_accumulators() const {
    return size_of(desc_.dtype) == static_cast<std::int64_t>(sizeof(S));
  }
  Rows<const S> rows_of_a(std::int64_t i, std::int64_t count, S* strip) const {
    if (holds_accumulators() && a_.prologue == Activation::kIdentity && !desc_.has_a_sum) {
      return {static_cast<const S*>(a_.base) + i * a_.stride_mn, a_.stride_mn, 0, a_.stride_k};
    }
    if (has_contiguous_columns(desc_)) {
      return {strip, 1, functions_.stage_columns(a_, i, count, 0, desc_.k, strip), count};
    }
    return {strip, places(desc_.k), functions_.stage_rows(a_, i, count, desc_.k, strip)};
  }
  /// Of the next `count` rows of D, how many the kernel writes where they are to be: none if an
  /// activation or a sum is left, or a factor of sums that would be rounded before, or if rounding
  /// would be of half-empty vectors; else those whose vectors don't reach beyond the others.
  std::int64_t rows_in_place(std::int64_t count) const {
    if (desc_.epilogue != Activation::kIdentity || desc_.adds) return 0;
    if (!holds_accumulators() && (desc_.has_epilogue_gradient() || desc_.n <= kernel_.lanes / 2)) {
      return 0;
    }
    if (desc_.n == n_vectors_) return count;
    if (desc_.d_stride_m != desc_.n) return 0;
    return std::max<std::int64_t>(0, count - (divide_up(n_vectors_, desc_.n) - 1));
  }
  Rows<const S> rows_of_b(std::int64_t p, std::int64_t count, S* strip) const {
    // The last vector of a row may reach into the next row, but not past the last one.
    const std::int64_t reached = (p + count - 1) * b_.stride_k + n_vectors_;
    if (holds_accumulators() && reached <= (desc_.k - 1) * b_.stride_k + desc_.n) {
      return {static_cast<const S*>(b_.base) + p * b_.stride_k, b_.stride_k};
    }
    return {strip, desc_.n, functions_.stage_columns(b_, 0, desc_.n, p, count, strip)};
  }

  std::int64_t padded(std::int64_t count) const {
    return round_up(count + kernel_.lanes, static_cast<std::int64_t>(kCacheLine / sizeof(S)));
  }
  std::int64_t places(std::int64_t k) const { return divide_up(k, kernel_.kr); }
  StripKernel kernel_for(const StripKernels& kernels, int lowest) const {
    return lowest >= kernel_.lowest_exponents ? kernels.multiply : kernels.multiply_carefully;
  }
  static std::int64_t strip_rows(std::int64_t row_size, std::int64_t most) {
    return std::clamp<std::int64_t>(kStripSize / row_size / 16 * 16, 16, most);
  }

  void add_strip(std::int64_t p, std::int64_t count, S* a_strip, S* b_strip, S* tile,
                 S* a_sums) const {
    const std::int64_t depth = places(count);
    const int a_lowest = functions_.stage_columns(a_, 0, desc_.m, p, count, a_strip);
    if (desc_.n > 0) {
      const Rows<const S> b = rows_of_b(p, count, b_strip);
      kernel_for(kernel_.strips, a_lowest + b.lowest)(desc_.m, desc_.n, depth, a_strip, 1, desc_.m,
                                                      b.first, b.stride, tile, n_vectors_, tile,
                                                      n_vectors_);
    }
    if (desc_.has_a_sum) kernel_.sum_strip(depth, desc_.m, a_strip, a_sums);
  }

  const GemmKernel& kernel_;
  const GemmFunctions& functions_;
  const GemmDesc& desc_;
  const GemmPointers& at_;
  const Operand a_, b_;           // B's rows are rows here
  const std::int64_t n_vectors_;  // columns of whole vectors
};

template <class S>
void multiply_in_strips(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                        const ParallelFor& parallel_for) {
  const StripProduct<S> product(kernel, desc, at);
  switch (form_of(desc)) {
    case Form::kLongColumn:
      return product.run_column(parallel_for);
    case Form::kLongRows:
      return product.run_rows(parallel_for);
    default:
      return product.run_sums(parallel_for);
  }
}

}  // namespace

void run_strips(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                const ParallelFor& parallel_for) {
  log_choice(kernel, desc, nullptr);
  visit_accumulator(desc.dtype,
                    [&]<class S>(S) { multiply_in_strips<S>(kernel, desc, at, parallel_for); });
}

}  // namespace neuron_ext::cpu
