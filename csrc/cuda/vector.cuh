// Neighbouring elements that one access of 16 bytes moves.
#pragma once

#include <cstdint>

#include "ptx/global.cuh"

namespace neuron_ext::cuda {

template <class T>
inline constexpr int kVector = sizeof(ptx::Bytes16) / sizeof(T);

template <class T>
union Vector {
  ptx::Bytes16 bytes;
  T elements[kVector<T>];
};

/// Whether an access of 16 bytes may be made there.
NEURON_EXT_DEVICE bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(ptx::Bytes16) == 0;
}

/// first[0], first[stride], ..., with zeros from the `left`th on. is_aligned: the stride is 1, and
/// `first` a multiple of 16 bytes.
template <class T>
NEURON_EXT_DEVICE Vector<T> load_vector(const T* first, std::int64_t stride, bool is_aligned,
                                        std::int64_t left) {
  Vector<T> vector;
  if (is_aligned && left >= kVector<T>) {
    vector.bytes = ptx::load_16_bytes(first);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) vector.elements[e] = e < left ? first[e * stride] : T{};
  }
  return vector;
}

/// To first[0], first[1], ..., up to the `left`th. is_aligned: all of the vector belongs there, and
/// `first` is a multiple of 16 bytes.
template <class T>
NEURON_EXT_DEVICE void store_vector(T* first, const Vector<T>& vector, bool is_aligned,
                                    std::int64_t left) {
  if (is_aligned) {
    ptx::store_16_bytes(first, vector.bytes);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (e < left) first[e] = vector.elements[e];
    }
  }
}

/// Whether every row of a matrix may be read by load_vector as aligned.
inline bool has_aligned_rows(const void* base, std::int64_t element_bytes, std::int64_t stride,
                             std::int64_t row_stride) {
  return stride == 1 && row_stride * element_bytes % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(base) % 16 == 0;
}

}  // namespace neuron_ext::cuda
