// How a product is cut: into blocks of k that bound the rounding error, into tiles that fit the
// caches and keep every thread busy.
#pragma once

#include <cstdint>

#include "registry.h"

namespace neuron_ext::cpu {

/// D is cut into tiles_m x tiles_n tiles of tile_m x tile_n (multiples of mr and nr; the last ones
/// are smaller), and k into `chunks` of chunk_k, which are cut into blocks of kc. A task is one
/// tile's sum over one chunk.
///
/// kc and chunk_k decide in which order a sum is formed. They follow from the product's shape and
/// the row alone, never from the number of threads; the tiles follow from all of them, and change
/// no result.
struct Blocking {
  std::int64_t kc, chunk_k, chunks;
  std::int64_t tile_m, tiles_m;
  std::int64_t tile_n, tiles_n;

  bool has_one_block() const { return chunk_k <= kc; }
  std::int64_t tasks() const { return chunks * tiles_m * tiles_n; }
};

/// The length of the blocks into which k is cut, a multiple of kr.
std::int64_t block_of_k(const GemmKernel& kernel, std::int64_t k);

Blocking choose_blocking(const GemmKernel& kernel, const GemmDesc& desc,
                         const ParallelFor& parallel_for);

/// How many threads a product is worth.
std::int64_t threads_for(std::int64_t m, std::int64_t n, std::int64_t k,
                         const ParallelFor& parallel_for);

/// In bytes.
constexpr std::int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

}  // namespace neuron_ext::cpu
