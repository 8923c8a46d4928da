// The driver for products with few rows or columns. What is done to a vector is in narrow-inl.h.
#include <algorithm>
#include <limits>

#include "blocking.h"
#include "driver.h"
#include "forms.h"
#include "log.h"

namespace neuron_ext::cpu {
namespace {

// A strip's width where its rows lie along D's rows: long enough to be read in order, and their
// sums short enough for L1. Measured on Zen 4, 1 x 4096 to 4096 f64 from memory: 5.0 ms, with 512
// or 4096 the same, with 256 6.9; 1 x 1024 to 1024 f32 from L3: 58 µs, with 256 62.
constexpr std::int64_t kLongRow = 1024;

/// The few rows (or columns) are widened once, by the caller's thread; then each strip of D's many
/// columns (or rows) is a task.
template <class S>
void multiply_narrow(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                     const ParallelFor& parallel_for) {
  const GemmFunctions& functions = kernel.of(desc.dtype);
  const bool exchanged = form_of(desc) == Form::kFewColumns;
  const Operand a = operand_a(desc, at), b = operand_b(desc, at);
  const Operand &few = exchanged ? b : a, &many = exchanged ? a : b;
  const std::int64_t few_count = exchanged ? desc.n : desc.m;
  const std::int64_t many_count = exchanged ? desc.m : desc.n;
  // An odd number of vectors, so that rows don't compete for the same places in the L1 cache.
  const std::int64_t vectors = divide_up(divide_up(desc.k, kernel.kr), kernel.lanes);
  const std::int64_t row_stride = (vectors | 1) * kernel.lanes;
  const std::int64_t together = FewRows::are_dotted(many, desc.k) ? kernel.mr : 1;
  const std::int64_t threads = threads_for(desc.m, desc.n, desc.k, parallel_for);
  const std::int64_t widest = many.stride_k == 1 ? kernel.nr : kLongRow;
  // Narrower strips where there would be fewer than threads.
  const std::int64_t width =
      std::clamp(round_up(divide_up(many_count, threads), kernel.lanes), kernel.lanes, widest);
  const std::int64_t strips = divide_up(many_count, width);

  with_buffer<S>(shared_buffer, few_count * row_stride, [&](S* data) {
    const FewRows rows{data, few_count, row_stride, kernel.lanes, together};
    int lowest_in_rows = std::numeric_limits<int>::max() / 2;
    for (std::int64_t i = 0; i < few_count; ++i) {
      S* const row = data + rows.place(i);
      const int lowest_in_row = functions.widen_row(few, i, desc.k, row, rows.step(i));
      lowest_in_rows = std::min(lowest_in_rows, lowest_in_row);
      if (!desc.has_a_sum) continue;
      S sum;
      kernel.sum_row(divide_up(desc.k, kernel.kr), row, rows.step(i), &sum);
      store_a_sums(functions, desc, at, i, 1, &sum);
    }
    parallel_for(strips, divide_up(strips, threads), [&](std::int64_t begin, std::int64_t end) {
      // The tile, the same exchanged (before that, room for sums), the bias; all read up to a whole
      // vector.
      const std::int64_t tile_size = few_count * width + kernel.lanes;
      const std::int64_t bias_size = std::max(width, round_up(few_count, kernel.lanes));
      with_buffer<S>(task_buffer, 2 * tile_size + bias_size, [&](S* tile) {
        S* const transposed = tile + tile_size;
        S* const bias = transposed + tile_size;
        if (exchanged && desc.has_bias) {
          functions.widen_bias(at.bias, desc.bias_stride, few_count, bias);
        }
        for (std::int64_t strip = begin; strip < end; ++strip) {
          const std::int64_t first = strip * width;
          const std::int64_t count = std::min(width, many_count - first);
          functions.multiply_narrow(desc.k, rows, lowest_in_rows, many, first, count, tile, width);
          if (exchanged) {
            for (std::int64_t j = 0; j < few_count; ++j) {
              const S* const column = tile + j * width;
              for (std::int64_t i = 0; i < count; ++i) {
                transposed[i * few_count + j] = desc.has_bias ? column[i] + bias[j] : column[i];
              }
            }
            store_sums(functions, desc, at, first, count, 0, few_count, transposed, few_count);
          } else {
            Epilogue<S>(kernel, desc, at, first, count, bias)
                .store(0, few_count, first, count, tile, width);
          }
        }
      });
    });
  });
}

}  // namespace

void run_narrow(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                const ParallelFor& parallel_for) {
  log_choice(kernel, desc, nullptr);
  visit_accumulator(desc.dtype,
                    [&]<class S>(S) { multiply_narrow<S>(kernel, desc, at, parallel_for); });
}

}  // namespace neuron_ext::cpu
