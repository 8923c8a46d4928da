#include "blocking.h"

#include <algorithm>
#include <limits>

namespace neuron_ext::cpu {
namespace {

// A block of B, kc x tile_n, is used once for every mr rows of A. The micro-kernel reads it in
// order and so slowly that L3 will do (Zen 4: 2 MiB cost nothing); what counts is that a large tile
// packs its operands less often. So it is twice as large where no sums wait beside it.
constexpr std::int64_t kBlockBytes = 1 << 20;
// Sums that wait for the next block of k: 1024 x 1024 of f32, and some for whole panels. Together
// with the blocks this bounds a thread's buffer to about 6 MiB.
constexpr std::int64_t kAccumulatorBytes = 5 << 20;
// All chunks' sums, which every thread can reach.
constexpr std::int64_t kPartialBytes = 4 << 20;

// Chunks exist for small outputs of long sums (the weight gradient of a long batch), which have too
// few tiles to go round, and whose tiles are too small to pay for packing.
constexpr std::int64_t kLongestChunks = 32, kShortestChunk = 4096;

// Multiply-adds of f32 in a nanosecond, on Zen 4.
constexpr double kSpeed = 58;
// Packing an element costs about as much as this many multiply-adds, and reading one as few rows do
// (1 x 1024 to 1024 f32, in L3: 0.07 ns) as these.
constexpr std::int64_t kPackCost = 16, kReadCost = 4;

std::int64_t number_of_blocks(const GemmKernel& kernel, std::int64_t k) {
  return k <= kernel.only_kc ? 1 : std::max<std::int64_t>(1, divide_up(k, kernel.kc));
}

}  // namespace

std::int64_t threads_for(std::int64_t m, std::int64_t n, std::int64_t k,
                         const ParallelFor& parallel_for) {
  // In multiply-adds: packing A and storing D count as kPackCost more columns and k, and reading B
  // as kReadCost more rows.
  const double work = static_cast<double>(m + kReadCost) * static_cast<double>(n + kPackCost) *
                      static_cast<double>(k + kPackCost);
  return parallel_for.threads_for(work / kSpeed);
}

std::int64_t block_of_k(const GemmKernel& kernel, std::int64_t k) {
  return round_up(divide_up(k, number_of_blocks(kernel, k)), kernel.kr);
}

Blocking choose_blocking(const GemmKernel& kernel, const GemmDesc& desc,
                         const ParallelFor& parallel_for) {
  const std::int64_t size = accumulator_size(desc.dtype);
  const std::int64_t panels_m = std::max<std::int64_t>(1, divide_up(desc.m, kernel.mr));
  const std::int64_t panels_n = std::max<std::int64_t>(1, divide_up(desc.n, kernel.nr));

  Blocking blocking;
  blocking.kc = block_of_k(kernel, desc.k);
  // In two divisions: deciding_m may be far beyond any product.
  const std::int64_t most_chunks = kPartialBytes / (panels_n * kernel.nr * size) /
                                   std::max(kernel.mr, round_up(desc.deciding_m(), kernel.mr));
  blocking.chunks =
      std::clamp<std::int64_t>(std::min(desc.k / kShortestChunk, most_chunks), 1, kLongestChunks);
  blocking.chunk_k = divide_up(number_of_blocks(kernel, desc.k), blocking.chunks) * blocking.kc;
  if (blocking.chunk_k > 0) blocking.chunks = divide_up(desc.k, blocking.chunk_k);

  // The largest tile, in panels.
  const std::int64_t column_size = std::max<std::int64_t>(1, kernel.row_size(blocking.kc));
  const std::int64_t block_bytes = blocking.has_one_block() ? 2 * kBlockBytes : kBlockBytes;
  const std::int64_t most_n =
      std::clamp<std::int64_t>(block_bytes / (column_size * kernel.nr * size), 1, panels_n);
  // What has to wait for every panel of rows: sums of A, and those of D unless k is one block.
  const std::int64_t waiting = blocking.has_one_block() ? 1 : most_n * kernel.nr;
  const std::int64_t most_m =
      std::clamp<std::int64_t>(kAccumulatorBytes / (kernel.mr * waiting * size), 1, panels_m);

  // Among the ways to give every thread a tile, the one whose busiest thread has the least to do.
  const std::int64_t threads = threads_for(desc.m, desc.n, desc.k, parallel_for);
  const std::int64_t fewest_m = divide_up(panels_m, most_m);
  const std::int64_t fewest_n = divide_up(panels_n, most_n);
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t cut_n = fewest_n; cut_n <= std::min(panels_n, fewest_n + threads - 1);
       ++cut_n) {
    const std::int64_t wanted_m = divide_up(threads, blocking.chunks * cut_n);
    const std::int64_t cut_m = std::min(panels_m, round_up(fewest_m, wanted_m));
    const std::int64_t per_m = divide_up(panels_m, cut_m), per_n = divide_up(panels_n, cut_n);
    Blocking cut = blocking;
    cut.tile_m = per_m * kernel.mr;
    cut.tile_n = per_n * kernel.nr;
    cut.tiles_m = divide_up(panels_m, per_m);
    cut.tiles_n = divide_up(panels_n, per_n);
    const std::int64_t rounds = divide_up(cut.tasks(), threads);
    const std::int64_t cost =
        rounds * (cut.tile_m * cut.tile_n + kPackCost * (cut.tile_m + cut.tile_n));
    if (cost < least) {
      least = cost;
      blocking.tile_m = cut.tile_m;
      blocking.tile_n = cut.tile_n;
      blocking.tiles_m = cut.tiles_m;
      blocking.tiles_n = cut.tiles_n;
    }
  }
  return blocking;
}

}  // namespace neuron_ext::cpu
