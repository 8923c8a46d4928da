// Small kernels that use every wrapper in csrc/cuda/ptx as real ones do, each with mistakes to
// make.
#pragma once

#include <cstdint>

#include "neuron_ext/types.h"

namespace neuron_ext::emulator_tests {

// Kernel, mistake, what it is.
#define NEURON_EXT_MISTAKES(MISTAKE)                                                    \
  MISTAKE(Simt, NoBarrierAfterFill, "no barrier between filling and reading a tile")    \
  MISTAKE(Simt, NoBarrierBeforeRefill, "no barrier before a tile is filled anew")       \
  MISTAKE(Simt, ReadsPastK, "reads an operand beyond its last k")                       \
  MISTAKE(Simt, WritesPastN, "stores a column too many")                                \
  MISTAKE(Simt, TileOverrun, "fills a row beyond the tile in shared memory")            \
  MISTAKE(Simt, NoZeroFill, "leaves a tile's remainder as it was")                      \
  MISTAKE(Simt, BarrierInBranch, "a barrier that half of a warp passes by")             \
  MISTAKE(Simt, EarlyReturn, "threads without output return before a barrier")          \
  MISTAKE(Simt, TwoWriters, "two threads store the same element")                       \
  MISTAKE(Simt, ReadsItsOutput, "adds to an output that nobody wrote")                  \
  MISTAKE(Simt, WrongPitch, "reads a tile with another pitch than it was filled with")  \
  MISTAKE(Mma, NoWait, "no copy_async_wait")                                            \
  MISTAKE(Mma, WaitsForOneTooFew, "copy_async_wait leaves one group too many pending")  \
  MISTAKE(Mma, NoCommit, "no copy_async_commit")                                        \
  MISTAKE(Mma, NoBarrierAfterWait, "no barrier after waiting for one's own copies")     \
  MISTAKE(Mma, RefillsTooEarly, "fills a stage that others still read")                 \
  MISTAKE(Mma, CopyMisaligned, "copies 16 bytes to half of that alignment")             \
  MISTAKE(Mma, CopyOutOfBounds, "copies rows beyond the matrix")                        \
  MISTAKE(Mma, CopiesPastK, "copies all of a piece that is partly beyond the last k")   \
  MISTAKE(Mma, RowMisaligned, "a load_matrices row not aligned to 16 bytes")            \
  MISTAKE(Mma, RowOutOfBounds, "a load_matrices row beyond the tile")                   \
  MISTAKE(Mma, RowsExchanged, "load_matrices addresses in another order")               \
  MISTAKE(Mma, NotTransposed, "load_matrices without the transposition")                \
  MISTAKE(Mma, RegistersExchanged, "fragment registers in another order")               \
  MISTAKE(Mma, InBranch, "an mma that half of a warp passes by")                        \
  MISTAKE(Mma, NeverWaitsForLast, "ends with copies under way")                         \
  MISTAKE(Wgmma, NoWaitForEmpty, "loads into a stage without waiting until it is free") \
  MISTAKE(Wgmma, NoWaitForFull, "multiplies a stage without waiting until it is full")  \
  MISTAKE(Wgmma, WrongParity, "waits for the other parity")                             \
  MISTAKE(Wgmma, ParityNotFlipped, "keeps the parity when the ring starts over")        \
  MISTAKE(Wgmma, ReleasesTooEarly, "frees a stage that a wgmma still reads")            \
  MISTAKE(Wgmma, ReadsSumsTooEarly, "reads sums before waiting for the last group")     \
  MISTAKE(Wgmma, NeverWaitsForProducts, "ends with wgmmas under way")                   \
  MISTAKE(Wgmma, NoProductFence, "no wgmma_fence")                                      \
  MISTAKE(Wgmma, NoInitFence, "no mbarrier_init_fence")                                 \
  MISTAKE(Wgmma, NoBarrierAfterInit, "uses mbarriers before they are known to be made") \
  MISTAKE(Wgmma, ExpectsTooFewBytes, "announces one of two boxes")                      \
  MISTAKE(Wgmma, ExpectsTooManyBytes, "announces bytes that never come")                \
  MISTAKE(Wgmma, TooManyArrivals, "all threads arrive where one is expected")           \
  MISTAKE(Wgmma, TooFewArrivals, "one thread arrives where two are expected")           \
  MISTAKE(Wgmma, WrongBox, "loads the box beside")                                      \
  MISTAKE(Wgmma, WrongStep, "steps along k by another width")                           \
  MISTAKE(Wgmma, WrongBlockStride, "a descriptor with half of the block stride")        \
  MISTAKE(Wgmma, WrongSwizzle, "a descriptor with another swizzle than the box")        \
  MISTAKE(Wgmma, WrongMajor, "takes a transposed operand for one that isn't")           \
  MISTAKE(Wgmma, StageMisaligned, "a stage that begins within the swizzle's period")    \
  MISTAKE(Wgmma, NoProxyFence, "no async_proxy_fence after rewriting an operand")       \
  MISTAKE(Wgmma, NoBarrierAfterRewrite, "no barrier after rewriting an operand")        \
  MISTAKE(Wgmma, NoProxyFenceBeforeStore, "no async_proxy_fence before a tma_store")    \
  MISTAKE(Wgmma, NoBarrierBeforeStore, "no barrier before a tma_store")                 \
  MISTAKE(Wgmma, RewritesStoredBox, "writes a box anew that a tma_store still reads")   \
  MISTAKE(Wgmma, NeverWaitsForStore, "ends with a tma_store under way")                 \
  MISTAKE(Split, NoWaitForParts, "reads other blocks' sums without waiting for them")   \
  MISTAKE(Split, CountsBeforeWriting, "reports its sums before writing them")           \
  MISTAKE(Split, CounterNeverReached, "waits for more blocks than there are")           \
  MISTAKE(Warp, NoSync, "reads what another lane wrote without a warp_sync")            \
  MISTAKE(Warp, ShuffleInBranch, "a shuffle that half of a warp passes by")

enum class Mistake {
  kNone,
#define NEURON_EXT_MISTAKE(kernel, name, what) k##kernel##name,
  NEURON_EXT_MISTAKES(NEURON_EXT_MISTAKE)
#undef NEURON_EXT_MISTAKE
};

/// D = A Bᵀ, all row by row: A is m x k, B n x k, D m x n.
struct Product {
  int m, n, k;
  const void *a, *b;
  void* d;
};

/// f32, through shared memory.
int multiply_simt(const Product& product, Mistake mistake, void* stream);

/// Of bf16, with f32 results; copy_async in three stages, load_matrices, mma. Rows of k begin at
/// multiples of 8 elements. `b_is_kn`: B is k x n instead, n a multiple of 8.
int multiply_mma(const Product& product, bool b_is_kn, Mistake mistake, void* stream);

/// Of bf16, with bf16 results; tma_load in a ring of mbarriers, wgmma, store_matrices, tma_store.
/// Multiples of 8 everywhere. `a_is_km`, `b_is_kn`: transposed operands. `doubles_a`: A is
/// multiplied by 2 in shared memory before it is read.
struct WgmmaVariant {
  bool a_is_km = false, b_is_kn = false, doubles_a = false;
};
int multiply_wgmma(const Product& product, const WgmmaVariant& variant, Mistake mistake,
                   void* stream);

/// y[0] = sum of x[0..n): each block writes a part, the last to come adds them in order, or, where
/// `first_waits`, block 0 waits for the others. `parts` has room for `blocks`, *counter is 0.
int sum_split(const float* x, int n, int blocks, bool first_waits, float* parts,
              std::uint32_t* counter, float* y, Mistake mistake, void* stream);

/// y[w] = sum of x[32 w..32 w + 32), for each warp of a block.
int sum_warps(const float* x, int warps, float* y, Mistake mistake, void* stream);

// ---- single instructions -----------------------------------------------------------------------

enum class WarpMma { kBFloat16, kFloat16, kTf32, kFloat64Narrow, kFloat64Tall, kFloat64Wide };

/// d (m x n) += a (m x k) b (k x n) of one mma's shape, in f64 (rounded to the operands' type by
/// the caller). A warp loads the fragments element by element.
struct WarpShape {
  int m, n, k;
};
WarpShape shape_of(WarpMma mma);
int multiply_warp(WarpMma mma, const double* a, const double* b, double* d, void* stream);

/// Each of 32 rows of 8 16-bit elements is loaded with load_matrices and stored with store_matrices
/// to y, transposed at either, and the registers in between to `registers` (4 per lane).
int move_matrices(bool load_transposed, bool store_transposed, const std::uint16_t* x,
                  std::uint16_t* y, std::uint32_t* registers, void* stream);

/// D (64 x n, f32) = A B with one wgmma of each step of 16, for 64 k. Operands are boxes of 16-bit
/// matrices in global memory, loaded with this swizzle: A m x k (or k x m), B n x k (or k x n).
struct WgmmaCase {
  int n;
  DType dtype;
  bool a_is_km, b_is_kn, a_in_registers;
  int swizzle_bytes;  // 32, 64 or 128
};
int multiply_one_tile(const WgmmaCase& shape, const void* a, const void* b, float* d, void* stream);

/// y = the elements, in shared memory's order, of the box of x (rows x columns of f32, columns a
/// multiple of 4) at (row, column), 8 rows of one span.
int load_box(const float* x, int rows, int columns, int swizzle_bytes, int row, int column,
             float* y, void* stream);

}  // namespace neuron_ext::emulator_tests
