// The rows of one ISA, made from its vector types; included inside the ISA's target region.
#pragma once

// clang-format off: each builds on those before it
#include "vector-inl.h"
#include "vec_math-inl.h"
#include "elementwise-inl.h"
#include "pack-inl.h"
#include "pairs-inl.h"
#include "split-inl.h"
#include "microkernel-inl.h"
#include "epilogue-inl.h"
#include "narrow-inl.h"
#include "strips-inl.h"
// clang-format on

namespace neuron_ext::cpu {
namespace {

// Longest block of k that is packed together. A packed panel of B is then 32 KiB on AVX-512, and
// A's half of that stays in the L1 cache while B's panels pass from L2.
constexpr std::int64_t kLongestBlock = 256;  // accumulators

template <class V, class T, int kMr, int kNr>
consteval GemmFunctions blocked_functions() {
  return {.pack_a = pack_panel<V, T, kMr>,
          .pack_b = pack_panel<V, T, kNr>,
          .widen_bias = widen_bias<V, T>,
          .epilogue = epilogue<V, T>,
          .gradient_epilogue = gradient_epilogue<V, T>,
          .narrow_row = narrow_row<V, T>};
}

template <class V, class T>
consteval GemmFunctions narrow_functions() {
  return {.widen_row = widen_row<V, T>,
          .multiply_narrow = multiply_narrow<V, T>,
          .widen_bias = widen_bias<V, T>,
          .epilogue = epilogue<V, T>,
          .gradient_epilogue = gradient_epilogue<V, T>,
          .narrow_row = narrow_row<V, T>};
}

template <class V, class T>
consteval GemmFunctions strip_functions() {
  return {.stage_rows = stage_rows<V, T>,
          .stage_columns = stage_columns<V, T>,
          .strips_to_d = {multiply_strip<V, T>},
          .widen_bias = widen_bias<V, T>,
          .epilogue = epilogue<V, T>,
          .gradient_epilogue = gradient_epilogue<V, T>,
          .narrow_row = narrow_row<V, T>};
}

/// By DType: the types whose sums are formed in V's scalar.
template <class V, class Functions>
consteval std::array<GemmFunctions, kDTypeCount> by_dtype(Functions functions_of) {
  std::array<GemmFunctions, kDTypeCount> functions{};
  if constexpr (std::is_same_v<Scalar<V>, double>) {
    functions[static_cast<int>(DType::kFloat64)] = functions_of.template operator()<double>();
  } else {
    functions[static_cast<int>(DType::kFloat32)] = functions_of.template operator()<float>();
    functions[static_cast<int>(DType::kBFloat16)] = functions_of.template operator()<BFloat16>();
    functions[static_cast<int>(DType::kFloat16)] = functions_of.template operator()<Float16>();
  }
  return functions;
}

template <class V, int kMr>
consteval GemmKernel blocked_kernel(const char* name, Isa isa) {
  constexpr int kNr = 2 * V::kLanes;
  return {.name = name,
          .isa = isa,
          .accepts = is_any,
          .run = run_blocked,
          .lanes = V::kLanes,
          .mr = kMr,
          .nr = kNr,
          .kc = kLongestBlock,
          .microkernel = Microkernels<V, kMr, kNr>::run,
          .sum_panel = sum_panel<V, kMr>,
          .functions = by_dtype<V>([]<class T> { return blocked_functions<V, T, kMr, kNr>(); })};
}

template <class V>
consteval GemmKernel narrow_kernel(const char* name, Isa isa) {
  return {.name = name,
          .isa = isa,
          .accepts = is_narrow,
          .run = run_narrow,
          .lanes = V::kLanes,
          .mr = kRowGroup<V>,
          .nr = kDotColumns<V, kRowGroup<V>> * V::kLanes,
          .sum_row = sum_row<V>,
          .functions = by_dtype<V>([]<class T> { return narrow_functions<V, T>(); })};
}

template <class V>
consteval GemmKernel strips_kernel(const char* name, Isa isa) {
  return {.name = name,
          .isa = isa,
          .accepts = is_long,
          .run = run_strips,
          .lanes = V::kLanes,
          .strips = {multiply_strip<V, Scalar<V>>},
          .sum_strip = sum_strip<V>,
          .functions = by_dtype<V>([]<class T> { return strip_functions<V, T>(); })};
}

template <class F32, class F64>
consteval ElementwiseKernel elementwise_kernel(const char* name, Isa isa) {
  return {.name = name,
          .isa = isa,
          .activate = {activate<F32, float>, activate<F64, double>, activate<F32, BFloat16>,
                       activate<F32, Float16>},
          .activate_backward = {activate_backward<F32, float>, activate_backward<F64, double>,
                                activate_backward<F32, BFloat16>, activate_backward<F32, Float16>}};
}

}  // namespace
}  // namespace neuron_ext::cpu
