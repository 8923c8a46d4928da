// The emulator as tests see it: how kernels are to be run, what was wrong with them, and global
// memory that is watched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace neuron_ext::emulator {

enum class Order : std::uint8_t { kForward, kReverse, kShuffled };

/// What a GPU leaves open, decided against the kernel.
struct Settings {
  Order order = Order::kForward;  // of blocks, and of a block's threads between barriers
  bool late_copies = false;       // asynchronous copies happen when waited for, not when issued
  bool late_products = false;     // so do wgmmas
  int approximation = 0;          // -1, 1: approximations are off by all they may be, to that side
  std::uint32_t seed = 1;         // of kShuffled
};

Settings& settings();

/// launch() returns this where the kernel was at fault: cudaErrorLaunchFailure.
inline constexpr int kLaunchFailure = 719;

/// What was wrong with the last launch; empty if nothing was.
const std::string& last_error();

/// False on a GPU (on_gpu.cu), where mistakes aren't looked for.
bool is_emulated();

/// Whether every memory access of the kernels is seen: the race build.
bool sees_accesses();

/// An array in global memory, filled with nan. In the race build an access beyond its ends, a read
/// of what nobody wrote, or an access that races with another thread's is an error; the address
/// sanitizer sees the first by itself.
class GlobalArray {
 public:
  GlobalArray(std::size_t bytes, const char* name);
  ~GlobalArray();
  GlobalArray(const GlobalArray&) = delete;
  GlobalArray& operator=(const GlobalArray&) = delete;

  std::byte* data() const;
  std::size_t size() const { return bytes_; }

  /// What the host wrote counts as written.
  void set_written();

 private:
  std::byte* data_;
  std::size_t bytes_;
};

}  // namespace neuron_ext::emulator
