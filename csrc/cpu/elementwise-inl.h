// An activation, or its gradient, over an array.
#pragma once

namespace neuron_ext::cpu {
namespace {

// Strided arrays pass through buffers of this many elements on the stack.
constexpr std::int64_t kElementwiseBlock = 256;

template <class V, class T, class F>
struct Forward {
  Reg<V> operator()(Reg<V> x) const { return F::template apply<V, T>(x); }
  Two<V> operator()(const Two<V>& x) const { return {(*this)(x.first), (*this)(x.second)}; }
};
template <class V, class F>
struct Backward {
  Reg<V> operator()(Reg<V> dy, Reg<V> y) const { return F::template gradient<V>(dy, y); }
  Two<V> operator()(const Two<V>& dy, const Two<V>& y) const {
    return {(*this)(dy.first, y.first), (*this)(dy.second, y.second)};
  }
};

/// y[i] = f(x[i], ...) over contiguous arrays. The last few go through the same vector code, so
/// that an element's result doesn't depend on its place.
template <class V, class T, class F, class... Inputs>
void map_contiguous(std::int64_t n, T* y, const F& f, const Inputs*... x) {
  std::int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    store_two<V>(y + i, f(load_two<V>(x + i)...));
  }
  for (; i < n; i += V::kLanes) {
    const std::int64_t count = n - i < V::kLanes ? n - i : V::kLanes;
    store<V>(y + i, f(load<V>(x + i, 1, count)...), count);
  }
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
    for (int v = 0; v < kVectors; v += 2) {
      const Two<V> two = load_two<V>(x + v * V::kLanes);
      begun[v] = Sigmoid::begin<V, T>(two.first);
      begun[v + 1] = Sigmoid::begin<V, T>(two.second);
    }
    for (int v = 0; v < kVectors; v += 2) {
      store_two<V>(y + v * V::kLanes,
                   Two<V>{Sigmoid::finish<V, T>(begun[v]), Sigmoid::finish<V, T>(begun[v + 1])});
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
    if (stride == 0) {  // the gradient of a sum
      const T value = *base;
      for (std::int64_t i = 0; i < count; ++i) buffer[i] = value;
      return buffer;
    }
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
