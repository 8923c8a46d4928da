// What every kernel is tested against: the definitions in gemm.h and cpu.h, written down and
// nothing else.
#pragma once

#include <cstdint>
#include <vector>

#include "neuron_ext/gemm.h"

namespace neuron_ext::cpu {

/// Results before rounding to the dtype, and what the error of a sum is measured against.
struct ReferenceGemm {
  std::vector<double> d;                // m x n, after bias and epilogue
  std::vector<double> d_magnitude;      // m x n, (|A'| |B|)[i, j] + |bias[j]|
  std::vector<double> a_sum;            // m, or empty
  std::vector<double> a_sum_magnitude;  // m, sum over p of |A'[i, p]|, or empty
};

ReferenceGemm reference_gemm(const GemmDesc& desc, const GemmPointers& at);

/// f(x) and dy f' from f's output y, rounded only to the nearest f64.
double reference_activate(Activation f, double x);
double reference_activate_backward(Activation f, double dy, double y);

/// One element of an array of dtype, as f64; and the nearest element of dtype, for filling arrays.
double reference_load(DType dtype, const void* base, std::int64_t index);
void reference_store(DType dtype, void* base, std::int64_t index, double value);

}  // namespace neuron_ext::cpu
