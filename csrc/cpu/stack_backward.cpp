// The gradients of a stack over a long batch. Its rows go back through the layers in blocks, so
// that the dz that a layer leaves is still in the cache when the weight's gradient and the next
// layer read it. Blocks form chunks, each on one thread with sums of its own for all weights and
// biases; the chunks' sums are added in the end. How rows are cut follows from shapes and dtype
// alone.
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "blocking.h"
#include "driver.h"
#include "scalar.h"

namespace neuron_ext::cpu {
namespace {

// What a block's rows hold between two layers, at most about an L2 cache. But all weights are
// packed for every block, and a chunk's sums read and written: that takes rows enough. Measured on
// Zen 4, 64-64-64-64-64-1, f32: blocks of 512 to 8192 rows all within 3 %; 4-5-7-3: 512 rows 25 %
// slower, from 2048 on no difference.
constexpr std::int64_t kBlockBytes = 1 << 20;
constexpr std::int64_t kFewestRows = 1024, kMostRows = 4096;
// Below so many blocks layers are better run one by one, each on all threads.
constexpr std::int64_t kFewestBlocks = 8, kMostChunks = 32;
static_assert(kShortBatch == (kFewestBlocks - 1) * kFewestRows);
// A chunk's sums stay in L2 beside a block; all of them are kept from call to call.
constexpr std::int64_t kChunkBytes = 1 << 18, kSumBytes = 4 << 20;

thread_local ThreadBuffer dz_buffer, sums_buffer;

template <class S>
class BackwardInBlocks {
 public:
  explicit BackwardInBlocks(const MlpBackward& mlp)
      : mlp_(mlp),
        forms_dz_(mlp.dtype == DType::kBFloat16 && mlp.output.data != nullptr &&
                  !mlp.batch_invariant) {
    std::int64_t widest_pair = 1;
    if (forms_dz_) widest_ = mlp.layers.back().out_features;
    for (const MlpLayerBackward& layer : mlp.layers) {
      widest_pair = std::max(widest_pair, layer.in_features + layer.out_features);
      if (&layer != mlp.layers.data()) {
        widest_ = std::max(widest_, layer.in_features);
        hidden_features_ += layer.in_features;
      }
      sums_size_ += sums_size(layer);
    }
    sums_size_ = round_up(sums_size_, kCacheLine / sizeof(S));
    const std::int64_t rows = std::clamp(std::min(kBlockBytes / (widest_pair * size_of(mlp.dtype)),
                                                  round_up(divide_up(mlp.rows, kFewestBlocks), 16)),
                                         kFewestRows, kMostRows);
    const std::int64_t blocks = divide_up(mlp.rows, rows);
    is_worth_it_ = blocks >= kFewestBlocks && sums_bytes(1) <= kChunkBytes;
    if (!is_worth_it_) return;
    const std::int64_t most =
        std::min(kMostChunks, kSumBytes / std::max(sums_bytes(1), std::int64_t{1}));
    chunk_rows_ = divide_up(blocks, most) * rows;
    chunks_ = divide_up(mlp.rows, chunk_rows_);
    block_rows_ = rows;
  }

  bool is_worth_it() const { return is_worth_it_; }

  void run(const ParallelFor& parallel_for) const {
    with_buffer<S>(sums_buffer, chunks_ * sums_size_, [&](S* all_sums) {
      std::int64_t threads = 1;
      for (const MlpLayerBackward& layer : mlp_.layers) {
        threads = std::max(
            threads, threads_for(mlp_.rows, layer.out_features, layer.in_features, parallel_for));
      }
      parallel_for(chunks_, divide_up(chunks_, threads), [&](std::int64_t begin, std::int64_t end) {
        with_buffer<std::byte>(dz_buffer, 2 * dz_bytes(), [&](std::byte* dz) {
          for (std::int64_t chunk = begin; chunk < end; ++chunk) {
            S* const sums = all_sums + chunk * sums_size_;
            std::fill_n(sums, sums_size_, S{0});
            const std::int64_t last = std::min((chunk + 1) * chunk_rows_, mlp_.rows);
            for (std::int64_t row = chunk * chunk_rows_; row < last; row += block_rows_) {
              run_rows(row, std::min(block_rows_, last - row), sums, dz);
            }
          }
        });
      });
      for (std::int64_t step = 1; step < chunks_; step *= 2) {
        for (std::int64_t chunk = 0; chunk + step < chunks_; chunk += 2 * step) {
          S* const sums = all_sums + chunk * sums_size_;
          const S* const others = sums + step * sums_size_;
          for (std::int64_t e = 0; e < sums_size_; ++e) sums[e] += others[e];
        }
      }
      store(all_sums);
    });
  }

 private:
  /// Of a layer's sums: those of its weight, wanted or not, then those of its bias.
  static std::int64_t weight_size(const MlpLayerBackward& layer) {
    return layer.out_features * layer.in_features;
  }
  static std::int64_t sums_size(const MlpLayerBackward& layer) {
    return weight_size(layer) + layer.out_features;
  }
  std::int64_t sums_bytes(std::int64_t chunks) const {
    return chunks * sums_size_ * static_cast<std::int64_t>(sizeof(S));
  }
  std::int64_t dz_bytes() const { return block_rows_ * widest_ * size_of(mlp_.dtype); }

  /// `count` rows from `row` on, from the last layer to the first that a gradient is wanted of.
  void run_rows(std::int64_t row, std::int64_t count, S* sums, std::byte* dz) const {
    GemmDesc whole;
    whole.dtype = mlp_.dtype;
    whole.precision = mlp_.precision;
    const auto rows_of = [&](const MlpBackward::Rows& rows) {
      return rows.data == nullptr ? nullptr : offset(rows.data, mlp_.dtype, row * rows.stride_row);
    };
    // dz, or, for the last layer, dy and y.
    MlpBackward::Rows a = mlp_.grad_output, y = mlp_.output;
    a.data = rows_of(a), y.data = rows_of(y);
    if (forms_dz_) {
      a = form_dz(a, y, count, dz + mlp_.layers.size() % 2 * dz_bytes());
      y.data = nullptr;
    }
    const void* h_end = offset(mlp_.hidden, mlp_.dtype, mlp_.rows * hidden_features_);
    for (std::size_t i = mlp_.layers.size(); i-- > 0;) {
      const MlpLayerBackward& layer = mlp_.layers[i];
      MlpBackward::Rows x = mlp_.input;
      if (i > 0) {
        h_end = offset(h_end, mlp_.dtype, -mlp_.rows * layer.in_features);
        x = {h_end, layer.in_features, 1};
      }
      x.data = rows_of(x);
      if (layer.grad_weight != nullptr || layer.grad_bias != nullptr) {
        GemmDesc wgrad = whole;
        wgrad.m = layer.out_features, wgrad.k = count;
        wgrad.n = layer.grad_weight == nullptr ? 0 : layer.in_features;
        wgrad.a_stride_m = a.stride_column, wgrad.a_stride_k = a.stride_row;
        wgrad.b_stride_k = x.stride_row, wgrad.b_stride_n = x.stride_column;
        wgrad.d_stride_m = layer.in_features;
        wgrad.has_a_sum = layer.grad_bias != nullptr;
        wgrad.adds = true;
        set_prologue(wgrad, layer.activation, y.stride_column, y.stride_row, y.data);
        GemmPointers at;
        at.a = a.data, at.saved = y.data, at.b = x.data;
        at.d = sums, at.a_sum = sums + weight_size(layer);
        gemm(wgrad, at, serial());
      }
      sums += sums_size(layer);
      if (!layer.wants_before) return;
      GemmDesc dgrad = whole;
      dgrad.m = count, dgrad.n = layer.in_features, dgrad.k = layer.out_features;
      dgrad.whole_m = mlp_.batch_invariant ? GemmDesc::kAnyBatch : mlp_.rows;
      dgrad.a_stride_m = a.stride_row, dgrad.a_stride_k = a.stride_column;
      dgrad.b_stride_k = layer.weight_stride_out, dgrad.b_stride_n = layer.weight_stride_in;
      dgrad.d_stride_m = layer.in_features;
      set_prologue(dgrad, layer.activation, y.stride_row, y.stride_column, y.data);
      GemmPointers at;
      at.a = a.data, at.saved = y.data, at.b = layer.weight;
      if (i == 0) {
        at.d = offset(mlp_.grad_input, mlp_.dtype, row * layer.in_features);
      } else {
        dgrad.epilogue_gradient = mlp_.layers[i - 1].activation;
        dgrad.d_saved_stride_m = x.stride_row;
        at.d_saved = x.data;
        at.d = dz + (i % 2) * dz_bytes();
      }
      gemm(dgrad, at, serial());
      a = {at.d, layer.in_features, 1};
      y.data = nullptr;
    }
  }

  /// The last layer's dz, which its two products then read from L2. Only of bf16, since most of
  /// their products would round it anyway; not where a row's bits are to be the same in any batch,
  /// since some wouldn't. Measured on Zen 4, one layer: 10^5 x 10 → 64 8.6 → 5.9 ms, 10^5 x 16 →
  /// 16 1.8 → 1.6, 10^5 x 64 → 10 3.8 → 3.5.
  MlpBackward::Rows form_dz(const MlpBackward::Rows& dy, const MlpBackward::Rows& y,
                            std::int64_t rows, void* dz) const {
    const MlpLayerBackward& layer = mlp_.layers.back();
    std::int64_t columns = layer.out_features;
    const MlpBackward::Rows formed{dz, columns, 1};
    // Rows that follow each other are one.
    if (dy.stride_row == columns * dy.stride_column && y.stride_row == columns * y.stride_column) {
      columns *= rows;
      rows = 1;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      activate_backward(layer.activation, mlp_.dtype, columns,
                        offset(dy.data, mlp_.dtype, r * dy.stride_row), dy.stride_column,
                        offset(y.data, mlp_.dtype, r * y.stride_row), y.stride_column,
                        offset(dz, mlp_.dtype, r * columns), 1);
    }
    return formed;
  }

  static void set_prologue(GemmDesc& desc, Activation activation, std::int64_t stride_m,
                           std::int64_t stride_k, const void* saved) {
    if (saved == nullptr) return;
    desc.prologue = activation;
    desc.saved_stride_m = stride_m;
    desc.saved_stride_k = stride_k;
  }

  /// Rounds the sums, which lie as run_rows left them, to the gradients.
  void store(const S* sums) const {
    visit_dtype(mlp_.dtype, [&]<class T>(T*) {
      if constexpr (std::is_same_v<Accumulator<T>, S>) {
        const auto store_all = [](void* to, std::int64_t count, const S* from) {
          if (to == nullptr) return;
          for (std::int64_t e = 0; e < count; ++e) static_cast<T*>(to)[e] = narrow<T>(from[e]);
        };
        for (std::size_t i = mlp_.layers.size(); i-- > 0;) {
          const MlpLayerBackward& layer = mlp_.layers[i];
          store_all(layer.grad_weight, weight_size(layer), sums);
          store_all(layer.grad_bias, layer.out_features, sums + weight_size(layer));
          sums += sums_size(layer);
        }
      }
    });
  }

  const MlpBackward& mlp_;
  const bool forms_dz_;
  std::int64_t widest_ = 0, hidden_features_ = 0, sums_size_ = 0;
  std::int64_t block_rows_ = 0, chunk_rows_ = 0, chunks_ = 0;
  bool is_worth_it_ = false;
};

}  // namespace

bool mlp_backward(const MlpBackward& mlp, const ParallelFor& parallel_for) {
  return visit_accumulator(mlp.dtype, [&]<class S>(S) {
    const BackwardInBlocks<S> blocks(mlp);
    if (blocks.is_worth_it()) blocks.run(parallel_for);
    return blocks.is_worth_it();
  });
}

}  // namespace neuron_ext::cpu
