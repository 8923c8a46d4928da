// What the drivers (gemm.cpp, narrow.cpp) share: their buffers, and the ways into and out of a
// product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "registry.h"

namespace neuron_ext::cpu {

// ---- buffers ------------------------------------------------------------------------------------

constexpr std::size_t kCacheLine = 64;

/// Memory that a thread keeps from call to call, since fresh pages cost more than small products.
/// It only grows, and never beyond what blocking.cpp bounds: about 6 MiB for a task and 4 MiB for
/// what tasks share.
class ThreadBuffer {
 public:
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kCacheLine})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kCacheLine}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

// Two, because the thread that calls also works: its tasks' buffer must leave the shared one alone.
inline thread_local ThreadBuffer task_buffer, shared_buffer;

/// Calls f with room for `count` of S: on the stack for tiny products, else the thread's buffer.
template <class S, class F>
void with_buffer(ThreadBuffer& buffer, std::int64_t count, const F& f) {
  constexpr std::int64_t kOnStack = 8192 / sizeof(S);
  if (count <= kOnStack) {
    alignas(kCacheLine) S elements[kOnStack];
    f(elements);
  } else {
    f(reinterpret_cast<S*>(buffer.reserve(static_cast<std::size_t>(count) * sizeof(S))));
  }
}

// ---- in and out ---------------------------------------------------------------------------------

/// Calls f with a value of the type in which sums of dtype are formed.
template <class F>
auto visit_accumulator(DType dtype, const F& f) {
  return dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

inline Operand operand_a(const GemmDesc& desc, const GemmPointers& at) {
  return {at.a,     desc.a_stride_m,     desc.a_stride_k,    desc.prologue,
          at.saved, desc.saved_stride_m, desc.saved_stride_k};
}

inline Operand operand_b(const GemmDesc& desc, const GemmPointers& at) {
  return {at.b, desc.b_stride_n, desc.b_stride_k};
}

/// The address of element `index` of an array of dtype.
inline void* offset(void* base, DType dtype, std::int64_t index) {
  return static_cast<std::byte*>(base) + index * size_of(dtype);
}
inline const void* offset(const void* base, DType dtype, std::int64_t index) {
  return static_cast<const std::byte*>(base) + index * size_of(dtype);
}

/// D's only store, of finished sums: `rows` rows from i on of `columns` columns from j on. `bias`
/// is that of these columns, or null.
template <class S>
void store_sums(const GemmFunctions& functions, const GemmDesc& desc, const GemmPointers& at,
                std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns,
                const S* tile, std::int64_t tile_stride, const S* bias = nullptr) {
  if (desc.adds) {
    for (std::int64_t r = 0; r < rows; ++r) {
      S* const sums = static_cast<S*>(at.d) + (i + r) * desc.d_stride_m + j;
      for (std::int64_t c = 0; c < columns; ++c) sums[c] += tile[r * tile_stride + c];
    }
    return;
  }
  void* const d = offset(at.d, desc.dtype, i * desc.d_stride_m + j);
  // Rows that follow each other are one.
  if (bias == nullptr && columns == tile_stride && columns == desc.d_stride_m &&
      (!desc.has_epilogue_gradient() || columns == desc.d_saved_stride_m)) {
    columns *= rows;
    rows = 1;
  }
  if (desc.has_epilogue_gradient()) {
    functions.gradient_epilogue(desc.epilogue_gradient, rows, columns, tile, tile_stride,
                                offset(at.d_saved, desc.dtype, i * desc.d_saved_stride_m + j),
                                desc.d_saved_stride_m, d, desc.d_stride_m);
  } else {
    functions.epilogue(desc.epilogue, rows, columns, tile, tile_stride, bias, d, desc.d_stride_m);
  }
}

/// The same for a_sum.
template <class S>
void store_a_sums(const GemmFunctions& functions, const GemmDesc& desc, const GemmPointers& at,
                  std::int64_t i, std::int64_t rows, const S* a_sums) {
  if (!desc.adds) return functions.narrow_row(rows, a_sums, offset(at.a_sum, desc.dtype, i));
  S* const sums = static_cast<S*>(at.a_sum) + i;
  for (std::int64_t r = 0; r < rows; ++r) sums[r] += a_sums[r];
}

/// What is left of the sums after the last block of k: bias, activation, and D's only store, for
/// the columns of D from j on. `bias` is room for the bias of these columns.
template <class S>
class Epilogue {
 public:
  Epilogue(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at, std::int64_t j,
           std::int64_t columns, S* bias)
      : kernel_(kernel), desc_(desc), at_(at), j_(j), bias_(desc.has_bias ? bias : nullptr) {
    if (!desc.has_bias) return;
    kernel.of(desc.dtype)
        .widen_bias(offset(at.bias, desc.dtype, j * desc.bias_stride), desc.bias_stride, columns,
                    bias);
  }

  void store(std::int64_t i, std::int64_t rows, std::int64_t j, std::int64_t columns, const S* tile,
             std::int64_t tile_stride) const {
    store_sums(kernel_.of(desc_.dtype), desc_, at_, i, rows, j, columns, tile, tile_stride,
               bias_ == nullptr ? nullptr : bias_ + (j - j_));
  }

 private:
  const GemmKernel& kernel_;
  const GemmDesc& desc_;
  const GemmPointers& at_;
  std::int64_t j_;
  const S* bias_;
};

// ---- what drivers of several products need (gemm.cpp) -------------------------------------------

/// pack_b in steps, each a panel over all k, that may run in any order and on any threads.
std::int64_t packing_steps(const Packing& packing, const GemmDesc& desc);
void pack_b(const Packing& packing, const GemmDesc& desc, const void* b, void* packed,
            std::int64_t begin, std::int64_t end);

}  // namespace neuron_ext::cpu
