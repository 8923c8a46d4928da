// y = f(x) and dx = dy f'(at y), element by element, for tensors of any strides.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "activation.cuh"
#include "neuron_ext/cuda.h"
#include "neuron_ext/last_kernel.h"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"

namespace neuron_ext::cuda {
namespace {

constexpr int kThreads = 256;

// ---- what is computed --------------------------------------------------------------------------

template <class F>
struct Forward {
  static constexpr int kInputs = 1;
  static constexpr const char* kName = "activate";
  template <class T>
  static NEURON_EXT_DEVICE T compute(const T (&in)[1]) {
    return ptx::narrow<T>(F::template apply<T>(ptx::widen(in[0])));
  }
};

template <class F>
struct Backward {
  static constexpr int kInputs = 2;  // dy, y
  static constexpr const char* kName = "activate_backward";
  template <class T>
  static NEURON_EXT_DEVICE T compute(const T (&in)[2]) {
    return ptx::narrow<T>(F::gradient(ptx::widen(in[0]), ptx::widen(in[1])));
  }
};

// ---- contiguous: 16 bytes at a time ------------------------------------------------------------

template <class T, int kInputs>
struct Contiguous {
  std::int64_t first, vectors, last;  // elements before the vectors, vectors, elements after them
  const T* in[kInputs];
  T* out;
};

// Loads that a thread has under way. With 2048 threads on a multiprocessor, four are 128 KiB,
// several times what its share of the memory's bandwidth and latency asks for.
constexpr int kUnroll = 4;

template <class Operation, class T>
__global__ void __launch_bounds__(kThreads)
    map_contiguous(const __grid_constant__ Contiguous<T, Operation::kInputs> at) {
  constexpr int kInputs = Operation::kInputs;
  constexpr int kLanes = sizeof(ptx::Bytes16) / sizeof(T);
  union Vector {
    ptx::Bytes16 bytes;
    T elements[kLanes];
  };
  const auto thread = static_cast<int>(threadIdx.x);
  constexpr std::int64_t kPerBlock = kThreads * kUnroll;
  const std::int64_t stride = kPerBlock * gridDim.x;
  for (std::int64_t block = kPerBlock * blockIdx.x; block < at.vectors; block += stride) {
    Vector in[kUnroll][kInputs];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = block + u * kThreads + thread;
      if (v >= at.vectors) continue;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        in[u][i].bytes = ptx::load_16_bytes(at.in[i] + at.first + v * kLanes);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = block + u * kThreads + thread;
      if (v >= at.vectors) continue;
      Vector out;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        T elements[kInputs];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) elements[i] = in[u][i].elements[lane];
        out.elements[lane] = Operation::compute(elements);
      }
      ptx::store_16_bytes(at.out + at.first + v * kLanes, out.bytes);
    }
  }
  // Fewer than a vector's on either side.
  if (blockIdx.x > 0 || thread >= at.first + at.last) return;
  const std::int64_t e = thread < at.first ? thread : thread + at.vectors * kLanes;
  T elements[kInputs];
#pragma unroll
  for (int i = 0; i < kInputs; ++i) elements[i] = at.in[i][e];
  at.out[e] = Operation::compute(elements);
}

// ---- strided -----------------------------------------------------------------------------------

template <class T, int kInputs>
struct Strided {
  std::int64_t count;
  int rank;
  std::int64_t sizes[kMaxRank], in_strides[kInputs][kMaxRank], out_strides[kMaxRank];
  const T* in[kInputs];
  T* out;
};

/// Index is 32 bits where the count allows it: what is spent on divisions is a quarter then.
template <class Operation, class T, class Index>
__global__ void __launch_bounds__(kThreads)
    map_strided(const __grid_constant__ Strided<T, Operation::kInputs> at) {
  constexpr int kInputs = Operation::kInputs;
  const std::int64_t stride = std::int64_t{kThreads} * gridDim.x;
  for (std::int64_t e = std::int64_t{kThreads} * blockIdx.x + threadIdx.x; e < at.count;
       e += stride) {
    auto rest = static_cast<Index>(e);
    std::int64_t in_offsets[kInputs] = {}, out_offset = 0;
#pragma unroll 1
    for (int d = 0; d < at.rank; ++d) {
      const auto size = static_cast<Index>(at.sizes[d]);
      const Index quotient = rest / size;
      const auto index = static_cast<std::int64_t>(rest - quotient * size);
      rest = quotient;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) in_offsets[i] += index * at.in_strides[i][d];
      out_offset += index * at.out_strides[d];
    }
    T elements[kInputs];
#pragma unroll
    for (int i = 0; i < kInputs; ++i) elements[i] = at.in[i][in_offsets[i]];
    at.out[out_offset] = Operation::compute(elements);
  }
}

// ---- choice ------------------------------------------------------------------------------------

std::int64_t count_of(const ElementwiseDesc& desc) {
  std::int64_t count = 1;
  for (int d = 0; d < desc.rank; ++d) count *= desc.sizes[d];
  return count;
}

dim3 grid_for(std::int64_t count, std::int64_t per_block, const Device& device) {
  // Enough to even out what the multiprocessors have left at the end; more only start and end.
  constexpr std::int64_t kBlocksPerMultiprocessor = 64;
  return dim3(static_cast<unsigned>(std::clamp<std::int64_t>(
      (count + per_block - 1) / per_block, 1, kBlocksPerMultiprocessor * device.sm_count)));
}

/// How many elements come before the first that is aligned to 16 bytes; the same for all arrays, or
/// else -1.
template <class T, int kInputs>
std::int64_t elements_to_alignment(const T* const (&in)[kInputs], const T* out) {
  const auto misalignment = [](const T* array) {
    return reinterpret_cast<std::uintptr_t>(array) % sizeof(ptx::Bytes16);
  };
  for (const T* array : in) {
    if (misalignment(array) != misalignment(out)) return -1;
  }
  constexpr std::size_t kBytes = sizeof(ptx::Bytes16);
  return static_cast<std::int64_t>((kBytes - misalignment(out)) % kBytes / sizeof(T));
}

template <class Operation, class T>
Status map(const ElementwiseDesc& desc, const void* const (&in)[Operation::kInputs],
           const Dims (&in_strides)[Operation::kInputs], void* out, const Device& device,
           Stream stream) {
  constexpr int kInputs = Operation::kInputs;
  const std::int64_t count = count_of(desc);
  if (count == 0) return {};
  last_kernel() = Operation::kName;

  Strided<T, kInputs> strided = {};
  strided.count = count;
  strided.rank = desc.rank;
  std::copy(desc.sizes.begin(), desc.sizes.end(), strided.sizes);
  std::copy(desc.out_strides.begin(), desc.out_strides.end(), strided.out_strides);
  strided.out = static_cast<T*>(out);
  bool is_contiguous = desc.rank <= 1 && (desc.rank == 0 || desc.out_strides[0] == 1);
  for (int i = 0; i < kInputs; ++i) {
    strided.in[i] = static_cast<const T*>(in[i]);
    std::copy(in_strides[i].begin(), in_strides[i].end(), strided.in_strides[i]);
    is_contiguous &= desc.rank == 0 || in_strides[i][0] == 1;
  }

  const std::int64_t first = elements_to_alignment(strided.in, strided.out);
  if (is_contiguous && first >= 0) {
    constexpr std::int64_t kLanes = sizeof(ptx::Bytes16) / sizeof(T);
    Contiguous<T, kInputs> at = {};
    at.first = std::min(first, count);
    at.vectors = (count - at.first) / kLanes;
    at.last = (count - at.first) % kLanes;
    std::copy_n(strided.in, kInputs, at.in);
    at.out = strided.out;
    const dim3 grid = grid_for(at.vectors, kThreads * kUnroll, device);
    return {ptx::launch(map_contiguous<Operation, T>, {grid, dim3(kThreads)}, stream, at),
            Operation::kName};
  }
  const dim3 grid = grid_for(count, kThreads, device);
  const bool is_small = count <= std::numeric_limits<std::int32_t>::max();
  const auto kernel = is_small ? map_strided<Operation, T, std::uint32_t>
                               : map_strided<Operation, T, std::uint64_t>;
  return {ptx::launch(kernel, {grid, dim3(kThreads)}, stream, strided), Operation::kName};
}

}  // namespace

Status activate(const ElementwiseDesc& desc, const void* x, void* y, const Device& device,
                Stream stream) {
  return visit_activation(desc.f, [&]<class F>(F) {
    return visit_dtype(desc.dtype, [&]<class T>(T*) {
      return map<Forward<F>, T>(desc, {x}, {desc.in_strides}, y, device, stream);
    });
  });
}

Status activate_backward(const ElementwiseDesc& desc, const void* dy, const void* saved, void* dx,
                         const Device& device, Stream stream) {
  return visit_activation(desc.f, [&]<class F>(F) {
    return visit_dtype(desc.dtype, [&]<class T>(T*) {
      return map<Backward<F>, T>(desc, {dy, saved}, {desc.in_strides, desc.saved_strides}, dx,
                                 device, stream);
    });
  });
}

}  // namespace neuron_ext::cuda
