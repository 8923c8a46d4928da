// The kernels start no thread: whoever calls them hands in a ParallelFor.
#pragma once

#include <cstdint>

namespace neuron_ext {

/// Runs a body over disjoint ranges that together cover [0, n).
///
/// `run` must call `body(closure, begin, end)` with 0 <= begin < end <= n, each index exactly once,
/// in as few pieces as it likes, on any threads, with pieces of at least `grain` indices where it
/// makes more than one, and return after the last. An exception thrown by a body must reach the
/// caller of `run`. Kernels give bitwise the same result for every way of cutting the range.
class ParallelFor {
 public:
  using Body = void (*)(const void* closure, std::int64_t begin, std::int64_t end);
  using Run = void (*)(std::int64_t n, std::int64_t grain, Body body, const void* closure);

  /// `max_threads`: how many threads `run` could use; kernels only use it to choose how finely to
  /// cut.
  constexpr ParallelFor(Run run, int max_threads) : run_(run), max_threads_(max_threads) {}

  /// Calls `f(begin, end)`. Below one grain the call stays on this thread and `run` isn't entered.
  template <class F>
  void operator()(std::int64_t n, std::int64_t grain, const F& f) const {
    if (n <= 0) return;
    if (max_threads_ <= 1 || n <= grain) {
      f(std::int64_t{0}, n);
      return;
    }
    run_(
        n, grain,
        [](const void* closure, std::int64_t begin, std::int64_t end) {
          (*static_cast<const F*>(closure))(begin, end);
        },
        &f);
  }

  constexpr int max_threads() const { return max_threads_; }

 private:
  Run run_;
  int max_threads_;
};

/// Everything on the calling thread.
inline ParallelFor serial() {
  return ParallelFor([](std::int64_t n, std::int64_t, ParallelFor::Body body,
                        const void* closure) { body(closure, 0, n); },
                     1);
}

}  // namespace neuron_ext
