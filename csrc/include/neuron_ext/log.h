// NEURON_EXT_LOG=1: what was asked for and what was chosen, each distinct choice once, on stderr.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>

#include "neuron_ext/gemm.h"

namespace neuron_ext {

inline bool log_is_on() {
  static const bool on = [] {
    const char* value = std::getenv("NEURON_EXT_LOG");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return on;
}

/// `plan`: how the kernel goes about it, after a semicolon, if there is something to say.
inline void log_choice(const char* kernel, const GemmDesc& desc, std::string_view plan = "") {
  std::ostringstream text;
  text << "neuron_ext: " << kernel << ": " << name_of(desc.dtype) << " m " << desc.m << " n "
       << desc.n << " k " << desc.k << ", A (" << desc.a_stride_m << ", " << desc.a_stride_k
       << ") B (" << desc.b_stride_k << ", " << desc.b_stride_n << ") D (" << desc.d_stride_m
       << ", 1)" << (desc.has_bias ? ", bias" : "") << ", prologue " << name_of(desc.prologue)
       << ", epilogue " << name_of(desc.epilogue)
       << (desc.has_epilogue_gradient() ? ", epilogue gradient" : "")
       << (desc.dtype == DType::kFloat32 ? std::string(", ") + name_of(desc.precision) : "")
       << (desc.has_a_sum ? ", a_sum" : "") << (desc.adds ? ", added" : "") << plan << '\n';
  const std::string line = text.str();

  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(line).second) std::fputs(line.c_str(), stderr);
}

}  // namespace neuron_ext
