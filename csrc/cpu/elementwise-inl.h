// An activation, or its gradient, over an array.
#pragma once

namespace neuron_ext::cpu {
namespace {

// Strided arrays pass through buffers of this many elements on the stack.
constexpr std::int64_t kElementwiseBlock = 256;

template <class V, class T, class F>
struct Forward {
  Reg<V> operator()(Reg<V> x) const { return F::template apply<V, T>(x); }
};
template <class V, class F>
struct Backward {
  Reg<V> operator()(Reg<V> dy, Reg<V> y) const { return F::template gradient<V>(dy, y); }
};

/// y[i] = f(x[i], ...) over contiguous arrays. The last few go through the same vector code, so
/// that an element's result doesn't depend on its place.
template <class V, class T, class F, class... Inputs>
void map_contiguous(std::int64_t n, T* y, const F& f, const Inputs*... x) {
  std::int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) store<V>(y + i, f(load<V>(x + i)...));
  if (i < n) store<V>(y + i, f(load_partial<V>(x + i, n - i)...), n - i);
}

/// The same for the sigmoid, in blocks whose halves go through it one after the other. Each half's
/// chain of dependent operations is half as long, and so twice as many vectors are on their way at
/// once: what limits the whole is not the arithmetic but how far ahead a CPU looks for work.
template <class V, class T>
void map_contiguous(std::int64_t n, T* y, const Forward<V, T, Sigmoid>& f, const T* x) {
  constexpr int kVectors = 16;
  constexpr std::int64_t kBlock = kVectors * V::kLanes;
  for (; n >= kBlock; n -= kBlock, x += kBlock, y += kBlock) {
    Exponential<V> begun[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      begun[v] = Sigmoid::begin<V, T>(load<V>(x + v * V::kLanes));
    }
    for (int v = 0; v < kVectors; ++v) {
      store<V>(y + v * V::kLanes, Sigmoid::finish<V, T>(begun[v]));
    }
  }
  for (; n > 0; n -= V::kLanes, x += V::kLanes, y += V::kLanes) {
    const std::int64_t count = n < V::kLanes ? n : V::kLanes;
    store<V>(y, f(load<V>(x, 1, count)), count);
  }
}

template <class T>
struct StridedInput {
  const T* base;
  std::int64_t stride;

  const T* gather(std::int64_t begin, std::int64_t count, T* buffer) const {
    if (stride == 1) return base + begin;
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = base[(begin + i) * stride];
    return buffer;
  }
};

template <class V, class T, class F, int... kInput>
void map_strided(std::int64_t n, T* y, std::int64_t y_stride, const F& f,
                 const StridedInput<T> (&x)[sizeof...(kInput)],
                 std::integer_sequence<int, kInput...>) {
  if (y_stride == 1 && ((x[kInput].stride == 1) && ...)) {
    return map_contiguous<V>(n, y, f, x[kInput].base...);
  }
  T gathered[sizeof...(kInput)][kElementwiseBlock], results[kElementwiseBlock];
  for (std::int64_t begin = 0; begin < n; begin += kElementwiseBlock) {
    const std::int64_t count = n - begin < kElementwiseBlock ? n - begin : kElementwiseBlock;
    T* const out = y_stride == 1 ? y + begin : results;
    map_contiguous<V>(count, out, f, x[kInput].gather(begin, count, gathered[kInput])...);
    if (y_stride == 1) continue;
    for (std::int64_t i = 0; i < count; ++i) y[(begin + i) * y_stride] = results[i];
  }
}

template <class V, class T>
void activate(Activation activation, std::int64_t n, const void* x, std::int64_t x_stride, void* y,
              std::int64_t y_stride) {
  const StridedInput<T> inputs[] = {{static_cast<const T*>(x), x_stride}};
  visit_activation(activation, [&]<class F>(F) {
    map_strided<V>(n, static_cast<T*>(y), y_stride, Forward<V, T, F>{}, inputs,
                   std::integer_sequence<int, 0>{});
  });
}

template <class V, class T>
void activate_backward(Activation activation, std::int64_t n, const void* dy,
                       std::int64_t dy_stride, const void* saved, std::int64_t saved_stride,
                       void* dx, std::int64_t dx_stride) {
  const StridedInput<T> inputs[] = {{static_cast<const T*>(dy), dy_stride},
                                    {static_cast<const T*>(saved), saved_stride}};
  visit_activation(activation, [&]<class F>(F) {
    map_strided<V>(n, static_cast<T*>(dx), dx_stride, Backward<V, F>{}, inputs,
                   std::integer_sequence<int, 0, 1>{});
  });
}

}  // namespace
}  // namespace neuron_ext::cpu
