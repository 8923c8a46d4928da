// control.h for a GPU: the emulator's tests, compiled by nvcc with this file in the emulator's
// place, run the same kernels there, and so compare each wrapper's two bodies. tools/gpu_check.py
// does it.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "control.h"

namespace neuron_ext::emulator {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);  // nothing works after that
}

}  // namespace

Settings& settings() {  // what a GPU leaves open is left to it
  static Settings settings;
  return settings;
}

const std::string& last_error() {
  static std::string text;
  text = cudaGetErrorString(cudaPeekAtLastError());
  return text;
}

bool is_emulated() { return false; }
bool sees_accesses() { return false; }

GlobalArray::GlobalArray(std::size_t bytes, const char* name) : bytes_(bytes) {
  void* data = nullptr;
  check(cudaMallocManaged(&data, bytes == 0 ? 1 : bytes), name);
  data_ = static_cast<std::byte*>(data);
  check(cudaMemset(data_, 0xff, bytes), name);  // nan
  check(cudaDeviceSynchronize(), name);
}

GlobalArray::~GlobalArray() { check(cudaFree(data_), "cudaFree"); }

std::byte* GlobalArray::data() const {
  check(cudaDeviceSynchronize(), "a kernel failed");
  return data_;
}

void GlobalArray::set_written() {}

}  // namespace neuron_ext::emulator
