#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>

namespace neuron_ext::cpu {
namespace {

bool is_on() {
  static const bool on = [] {
    const char* value = std::getenv("NEURON_EXT_LOG");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return on;
}

}  // namespace

void log_choice(const GemmKernel& kernel, const GemmDesc& desc, const Blocking* cut) {
  if (!is_on()) return;
  std::ostringstream line;
  line << "neuron_ext: " << kernel.name << ": " << name_of(desc.dtype) << " m " << desc.m << " n "
       << desc.n << " k " << desc.k << ", A (" << desc.a_stride_m << ", " << desc.a_stride_k
       << ") B (" << desc.b_stride_k << ", " << desc.b_stride_n << ") D (" << desc.d_stride_m
       << ", 1)" << (desc.has_bias ? ", bias" : "") << ", prologue " << name_of(desc.prologue)
       << ", epilogue " << name_of(desc.epilogue) << (desc.has_a_sum ? ", a_sum" : "");
  if (cut != nullptr) {
    line << "; tiles " << cut->tiles_m << " x " << cut->tiles_n << " of " << cut->tile_m << " x "
         << cut->tile_n << ", k in " << cut->chunks << " chunks, blocks of " << cut->kc;
  }
  line << '\n';

  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(line.str()).second) std::fputs(line.str().c_str(), stderr);
}

}  // namespace neuron_ext::cpu
