// The kernels start no thread: whoever calls them hands in a ParallelFor.
#pragma once

#include <algorithm>
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

  /// Nanoseconds of work that pay for a thread which spins while it waits: it begins after 3 us.
  static constexpr double kAwake = 4500;

  /// `max_threads`: how many threads `run` could use; `pays`: how much work, in nanoseconds, pays
  /// for one of them. Kernels only use them to choose how finely to cut.
  constexpr ParallelFor(Run run, int max_threads, double pays = kAwake)
      : run_(run), max_threads_(std::max(1, max_threads)), pays_(pays) {}

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

  /// How many threads so much work is worth.
  constexpr std::int64_t threads_for(double nanoseconds) const {
    return static_cast<std::int64_t>(
        std::clamp(nanoseconds / pays_, 1.0, static_cast<double>(max_threads_)));
  }
  /// The grain that gives each of them a piece of n indices, which take `each` nanoseconds.
  constexpr std::int64_t grain_for(std::int64_t n, double each) const {
    const std::int64_t threads = threads_for(static_cast<double>(n) * each);
    return (n + threads - 1) / threads;
  }

 private:
  Run run_;
  int max_threads_;
  double pays_;
};

/// Everything on the calling thread.
inline ParallelFor serial() {
  return ParallelFor([](std::int64_t n, std::int64_t, ParallelFor::Body body,
                        const void* closure) { body(closure, 0, n); },
                     1);
}

}  // namespace neuron_ext
