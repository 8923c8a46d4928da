// Element types the kernels take. Nothing under csrc/include, csrc/cpu or csrc/cuda knows of torch.
#pragma once

#include <cstdint>

namespace neuron_ext {

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int kDTypeCount = 4;

/// Storage types that C++20 has no name for.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "f32";
    case DType::kFloat64:
      return "f64";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat16:
      return "f16";
  }
  return "?";
}

/// How closely products of f32 are computed: what torch.set_float32_matmul_precision sets, and
/// below it the choice between ways to full precision. Larger is faster. Other dtypes know no
/// choice.
enum class Precision : std::uint8_t {
  kStrict,   // as f32 multiply-adds
  kHighest,  // no less accurate than those; on bf16 engines as six products of bf16
  kHigh,     // at least 10 bits of every product: three of bf16, or one of tf32
  kMedium,   // 7 bits: one
};

constexpr const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::kStrict:
      return "strict";
    case Precision::kHighest:
      return "highest";
    case Precision::kHigh:
      return "high";
    case Precision::kMedium:
      return "medium";
  }
  return "?";
}

/// Calls f with a null pointer of the storage type that `dtype` names.
template <class F>
auto visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

}  // namespace neuron_ext
