#include "reference.h"

#include <cmath>

#include "scalar.h"

namespace neuron_ext::cpu {
namespace {

// Wider than f64 where the platform has it, so that f64 results can be judged too.
using Wide = long double;

Wide activate(Activation f, Wide x) {
  switch (f) {
    case Activation::kIdentity:
      break;
    case Activation::kSigmoid:
      return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
  }
  return x;
}

Wide activate_backward(Activation f, Wide dy, Wide y) {
  switch (f) {
    case Activation::kIdentity:
      break;
    case Activation::kSigmoid:
      return dy * y * (1 - y);
  }
  return dy;
}

}  // namespace

ReferenceGemm reference_gemm(const GemmDesc& desc, const GemmPointers& at) {
  ReferenceGemm result;
  const auto a = [&](std::int64_t i, std::int64_t p) -> Wide {
    const double value =
        reference_load(desc.dtype, at.a, i * desc.a_stride_m + p * desc.a_stride_k);
    if (desc.prologue == Activation::kIdentity) return value;
    const double saved =
        reference_load(desc.dtype, at.saved, i * desc.saved_stride_m + p * desc.saved_stride_k);
    return activate_backward(desc.prologue, value, saved);
  };
  for (std::int64_t i = 0; i < desc.m; ++i) {
    for (std::int64_t j = 0; j < desc.n; ++j) {
      const Wide bias =
          desc.has_bias ? reference_load(desc.dtype, at.bias, j * desc.bias_stride) : 0.0;
      Wide sum = 0, magnitude = std::fabs(bias);
      for (std::int64_t p = 0; p < desc.k; ++p) {
        const Wide term =
            a(i, p) * reference_load(desc.dtype, at.b, p * desc.b_stride_k + j * desc.b_stride_n);
        sum += term;
        magnitude += std::fabs(term);
      }
      const auto finish = [&](Wide x) {
        if (!desc.has_epilogue_gradient()) return activate(desc.epilogue, x);
        return activate_backward(
            desc.epilogue_gradient, x,
            reference_load(desc.dtype, at.d_saved, i * desc.d_saved_stride_m + j));
      };
      result.d.push_back(static_cast<double>(finish(sum + bias)));
      result.d_magnitude.push_back(static_cast<double>(magnitude));
    }
    if (desc.has_a_sum) {
      Wide sum = 0, magnitude = 0;
      for (std::int64_t p = 0; p < desc.k; ++p) {
        sum += a(i, p);
        magnitude += std::fabs(a(i, p));
      }
      result.a_sum.push_back(static_cast<double>(sum));
      result.a_sum_magnitude.push_back(static_cast<double>(magnitude));
    }
  }
  return result;
}

double reference_activate(Activation f, double x) { return static_cast<double>(activate(f, x)); }

double reference_activate_backward(Activation f, double dy, double y) {
  return static_cast<double>(activate_backward(f, dy, y));
}

double reference_load(DType dtype, const void* base, std::int64_t index) {
  return visit_dtype(dtype, [&]<class T>(T*) {
    return static_cast<double>(widen(static_cast<const T*>(base)[index]));
  });
}

void reference_store(DType dtype, void* base, std::int64_t index, double value) {
  visit_dtype(dtype, [&]<class T>(T*) {
    static_cast<T*>(base)[index] = narrow<T>(static_cast<Accumulator<T>>(value));
  });
}

}  // namespace neuron_ext::cpu
