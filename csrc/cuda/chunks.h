// Products whose k is cut into chunks: their sums go to a workspace, and are added in order by a
// kernel of its own. Host code only; chunks.cuh is the kernels' part.
#pragma once

#include <cstddef>

#include "neuron_ext/cuda.h"

namespace neuron_ext::cuda {

/// In the type of sums: those of D (chunk, m, n), then those of A's rows (chunk, m).
struct ChunkSums {
  void* base = nullptr;  // null: there is one chunk, whose sums go to D and a_sum themselves
  std::int64_t chunks = 1;
};

std::size_t chunk_bytes(const GemmDesc& desc, std::int64_t chunks);

/// D and a_sum from the sums of all chunks, unless there is only one.
int add_chunks(const GemmDesc& desc, const GemmPointers& at, const ChunkSums& sums, Stream stream);

}  // namespace neuron_ext::cuda
