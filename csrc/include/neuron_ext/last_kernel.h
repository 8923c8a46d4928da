// Which kernel ran, for whoever asks: one answer for all devices.
#pragma once

namespace neuron_ext {

/// Name of the kernel last chosen by a call on this thread; "" before any. Each choice sets it.
inline const char*& last_kernel() {
  static thread_local const char* name = "";
  return name;
}

}  // namespace neuron_ext
