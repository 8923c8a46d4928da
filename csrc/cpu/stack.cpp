// A stack of layers on the CPU. Where there are rows enough, they go through the stack in blocks,
// each on one thread from the input to the output, so that what a layer leaves is still in the
// cache when the next one reads it, and threads meet twice a call instead of once a layer. Else it
// goes layer by layer, each on all threads. A row's bits are the same either way.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "blocking.h"
#include "driver.h"

namespace neuron_ext::cpu {
namespace {

// What a block leaves between two layers, at most about an L2 cache; but all weights pass once for
// every block, which takes rows enough to pay for reading them from L3.
constexpr std::int64_t kBlockBytes = 1 << 20;
constexpr std::int64_t kFewestRows = 64, kUsualRows = 256, kMostRows = 4096;

// Packed weights that every block reads: they have to stay in L3 meanwhile.
constexpr std::int64_t kPackedBytes = 8 << 20;
// Nanoseconds that packing a byte takes.
constexpr double kPackTime = 0.08;

// What a thread keeps for hidden outputs, from call to call.
constexpr std::int64_t kKeptBytes = 4 << 20;

thread_local ThreadBuffer packed_buffer, hidden_buffer;

/// The widest output that no layer keeps, so that there must be room for it.
std::int64_t widest_passing(const Mlp& mlp) {
  std::int64_t widest = 0;
  for (const MlpLayer& layer : mlp.layers) {
    if (layer.output == nullptr) widest = std::max(widest, layer.out_features);
  }
  return widest;
}

/// Rows [begin, begin + count) through all layers. `packed` has the layers' weights, or is empty;
/// outputs that pass take turns in the two halves of `passing`.
void run_rows(const Mlp& mlp, std::int64_t begin, std::int64_t count,
              std::span<const void* const> packed, std::byte* passing,
              const ParallelFor& parallel_for) {
  const std::int64_t half = count * widest_passing(mlp) * size_of(mlp.dtype);
  GemmPointers at;
  at.a = offset(mlp.input, mlp.dtype, begin * mlp.input_stride_row);
  for (std::size_t i = 0; i < mlp.layers.size(); ++i) {
    const MlpLayer& layer = mlp.layers[i];
    GemmDesc desc = product_of(mlp, layer);
    desc.m = count;
    at.b = layer.weight;
    at.packed_b = packed.empty() ? layer.packed_weight : packed[i];
    at.bias = layer.bias;
    at.d_saved = layer.saved == nullptr
                     ? nullptr
                     : offset(layer.saved, mlp.dtype, begin * layer.out_features);
    at.d = layer.output == nullptr ? passing + (i % 2) * half
                                   : offset(layer.output, mlp.dtype, begin * layer.out_features);
    gemm(desc, at, parallel_for);
    at.a = at.d;
  }
}

void run_by_layers(const Mlp& mlp, const ParallelFor& parallel_for) {
  const std::int64_t bytes = 2 * mlp.rows * widest_passing(mlp) * size_of(mlp.dtype);
  ThreadBuffer once;
  with_buffer<std::byte>(
      bytes <= kKeptBytes ? hidden_buffer : once, bytes,
      [&](std::byte* passing) { run_rows(mlp, 0, mlp.rows, {}, passing, parallel_for); });
}

/// How many rows go through the stack together so that `threads` have equally much to do; 0 if the
/// layers are better run one by one.
std::int64_t rows_of_block(const Mlp& mlp, std::int64_t threads) {
  std::int64_t widest_pair = 1;
  for (const MlpLayer& layer : mlp.layers.subspan(1)) {
    widest_pair = std::max(widest_pair, layer.in_features + layer.out_features);
  }
  const std::int64_t most =
      std::clamp(kBlockBytes / (widest_pair * size_of(mlp.dtype)), kUsualRows, kMostRows);
  const std::int64_t blocks = round_up(divide_up(mlp.rows, most), threads);
  if (blocks <= 1) return 0;
  const std::int64_t rows = divide_up(mlp.rows, blocks);
  const bool is_kept = 2 * rows * widest_passing(mlp) * size_of(mlp.dtype) <= kKeptBytes;
  return rows < kFewestRows || !is_kept ? 0 : rows;
}

/// The weights of a stack, packed by all threads together.
class PackedStack {
 public:
  explicit PackedStack(const Mlp& mlp) : mlp_(mlp) {
    for (const MlpLayer& layer : mlp.layers) {
      Part part{product_of(mlp, layer), {}, bytes_, steps_};
      if (layer.packed_weight == nullptr && choose_gemm(part.desc).packs_b(mlp.dtype)) {
        part.packing = packing_of(part.desc);
        bytes_ += round_up(part.packing.bytes, std::int64_t{kCacheLine});
        steps_ += packing_steps(part.packing, part.desc);
      }
      parts_.push_back(part);
    }
  }

  std::int64_t bytes() const { return bytes_; }

  /// By layer; null where the weight isn't packed. Valid until this thread's next call.
  std::vector<const void*> pack(std::int64_t threads, const ParallelFor& parallel_for) const {
    std::byte* const memory = packed_buffer.reserve(static_cast<std::size_t>(bytes_));
    const std::int64_t sharing =
        std::min(threads, parallel_for.threads_for(static_cast<double>(bytes_) * kPackTime));
    parallel_for(steps_, divide_up(steps_, sharing), [&](std::int64_t begin, std::int64_t end) {
      for (std::size_t i = 0; i < parts_.size(); ++i) {
        const Part& part = parts_[i];
        const std::int64_t next = i + 1 < parts_.size() ? parts_[i + 1].first_step : steps_;
        const std::int64_t first = std::max(begin, part.first_step), last = std::min(end, next);
        if (first >= last) continue;
        pack_b(part.packing, part.desc, mlp_.layers[i].weight, memory + part.place,
               first - part.first_step, last - part.first_step);
      }
    });
    std::vector<const void*> packed;
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      packed.push_back(parts_[i].packing.kernel == nullptr ? mlp_.layers[i].packed_weight
                                                           : memory + parts_[i].place);
    }
    return packed;
  }

 private:
  struct Part {
    GemmDesc desc;
    Packing packing;  // of no kernel, where the weight isn't packed here
    std::int64_t place, first_step;
  };

  const Mlp& mlp_;
  std::vector<Part> parts_;
  std::int64_t bytes_ = 0, steps_ = 0;
};

/// What its largest layer is worth: a stack whose layers are each too small for a second thread
/// takes less than waking one. Measured on Zen 4: 1000 rows through 4-5-7-3, 12 µs, on four threads
/// 34 to 60.
std::int64_t threads_for_stack(const Mlp& mlp, const ParallelFor& parallel_for) {
  std::int64_t threads = 1;
  for (const MlpLayer& layer : mlp.layers) {
    threads = std::max(threads,
                       threads_for(mlp.rows, layer.out_features, layer.in_features, parallel_for));
  }
  return threads;
}

}  // namespace

void mlp_forward(const Mlp& mlp, const ParallelFor& parallel_for) {
  const std::int64_t threads = threads_for_stack(mlp, parallel_for);
  const std::int64_t rows = rows_of_block(mlp, threads);
  if (rows == 0) return run_by_layers(mlp, parallel_for);
  const PackedStack weights(mlp);
  if (weights.bytes() > kPackedBytes) return run_by_layers(mlp, parallel_for);
  const std::vector<const void*> packed = weights.pack(threads, parallel_for);
  const std::int64_t blocks = divide_up(mlp.rows, rows);
  const std::int64_t passing_bytes = 2 * rows * widest_passing(mlp) * size_of(mlp.dtype);
  parallel_for(blocks, divide_up(blocks, threads), [&](std::int64_t begin, std::int64_t end) {
    with_buffer<std::byte>(hidden_buffer, passing_bytes, [&](std::byte* passing) {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = block * rows;
        run_rows(mlp, first, std::min(rows, mlp.rows - first), packed, passing, serial());
      }
    });
  });
}

}  // namespace neuron_ext::cpu
