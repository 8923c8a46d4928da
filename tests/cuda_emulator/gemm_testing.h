// What the tests of CUDA's matrix products share: a product computed on the emulator, and what it
// is held against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "control.h"
#include "gemm_config.h"
#include "neuron_ext/cuda.h"
#include "reference.h"
#include "testing.h"

namespace neuron_ext::testing {

inline constexpr cuda::Device kDevice{90, 3};

/// A different way to run on each call.
inline void change_settings() {
  static int turn = 0;
  emulator::settings() = {static_cast<emulator::Order>(turn % 3), turn / 3 % 2 != 0,
                          turn / 6 % 2 != 0, turn % 5 % 3 - 1, static_cast<std::uint32_t>(turn)};
  ++turn;
}

/// The bytes of `host`, where kernels' accesses are watched.
inline std::unique_ptr<emulator::GlobalArray> on_device(const Bytes& host, const char* name) {
  auto array = std::make_unique<emulator::GlobalArray>(host.size(), name);
  std::memcpy(array->data(), host.data(), host.size());
  array->set_written();
  return array;
}

/// As Product::compute, on the emulator. workspace_of(pointers): in bytes; run(pointers, workspace)
/// returns an error. Outputs are given as unwritten memory.
template <class Workspace, class Run>
Product::Result compute_by(const Product& product, const Workspace& workspace_of, const Run& run) {
  const GemmDesc& desc = product.desc;
  const auto a = on_device(product.a.storage, "A"), b = on_device(product.b.storage, "B");
  const auto saved = on_device(product.saved.storage, "saved");
  const auto d_saved = on_device(product.d_saved.storage, "d_saved");
  const auto bias = on_device(product.bias.storage, "bias");
  const auto moved = [](const void* address, const Bytes& from,
                        const emulator::GlobalArray& to) -> const void* {
    return address == nullptr ? nullptr
                              : to.data() + (static_cast<const std::byte*>(address) - from.data());
  };
  const auto unwritten = [](const Bytes& host, const char* name) {
    auto array = std::make_unique<emulator::GlobalArray>(host.size(), name);
    std::memcpy(array->data(), host.data(), host.size());
    return array;
  };
  const Product::Result poisoned = product.poisoned();
  const auto d = unwritten(poisoned.d, "D");
  const auto a_sum = unwritten(poisoned.a_sum, "a_sum"), d_sum = unwritten(poisoned.d_sum, "d_sum");
  const std::int64_t guard = Product::kGuard * size_of(desc.dtype);
  const GemmPointers at{moved(product.inputs.a, product.a.storage, *a),
                        moved(product.inputs.b, product.b.storage, *b),
                        d->data() + guard,
                        moved(product.inputs.bias, product.bias.storage, *bias),
                        moved(product.inputs.saved, product.saved.storage, *saved),
                        moved(product.inputs.d_saved, product.d_saved.storage, *d_saved),
                        a_sum->data() + guard,
                        d_sum->data() + guard};
  emulator::GlobalArray workspace(workspace_of(at), "workspace");
  const int error = run(at, workspace.data());
  CHECK(error == 0, product.name() << ": " << emulator::last_error());
  const auto bytes = [](const emulator::GlobalArray& array) {
    return Bytes(array.data(), array.data() + array.size());
  };
  return {bytes(*d), bytes(*a_sum), bytes(*d_sum)};
}

/// All layouts and all parts of a product, and most pairs of them, as turns go by.
inline Product::Options options_of(int turn) {
  Product::Options options = Product::Options::of(turn);
  options.epilogue_gradient = turn % 7 < 3;
  options.d_sum = turn % 7 < 2;
  options.d_saved = turn % 2 == 0 ? Layout::kRows : Layout::kNegative;
  options.bias = options.bias && !options.epilogue_gradient;
  return options;
}

/// A layer's output, and the dz of the layer before with its sums.
inline Product::Options layer_options() {
  Product::Options options;
  options.bias = true;
  options.epilogue = Activation::kSigmoid;
  return options;
}
inline Product::Options gradient_options() {
  Product::Options options;
  options.epilogue_gradient = options.d_sum = true;
  return options;
}

/// By a row that needn't be the one to be chosen.
inline Product::Result compute(const cuda::GemmKernel& kernel, const Product& product,
                               const cuda::Device& device = kDevice) {
  return compute_by(
      product,
      [&](const GemmPointers&) { return cuda::row_workspace(kernel, product.desc, device); },
      [&](const GemmPointers& at, void* workspace) {
        return cuda::run_row(kernel, product.desc, at, workspace, device, nullptr);
      });
}

/// By the row that is chosen.
inline Product::Result compute(const Product& product, const cuda::Device& device) {
  return compute_by(
      product,
      [&](const GemmPointers& at) { return cuda::gemm_workspace(product.desc, at, device); },
      [&](const GemmPointers& at, void* workspace) {
        return cuda::gemm(product.desc, at, workspace, device, nullptr).error;
      });
}

/// Bit for bit the reference's result, rounded once; for operands whose sums are exact.
inline void check_exact(const cuda::GemmKernel& kernel, const Product& product,
                        const Product::Result& result) {
  CHECK(result == product.expected(cpu::reference_gemm(product.desc, product.inputs)),
        kernel.name << ' ' << product.name());
}

/// What a sum of `terms` may be off by, in units of the sum of magnitudes: 128 at a time, then
/// those.
inline double sum_error(DType dtype, std::int64_t terms) {
  const double eps = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  return eps * static_cast<double>(std::min<std::int64_t>(terms, 128) + terms / 128 + 4);
}

/// The same of f32 as products of bf16 parts: what they leave out, and sums of `together` k that
/// have as many terms for each product, then those.
inline double split_error(Precision precision, std::int64_t k, std::int64_t together) {
  const int products = precision == Precision::kHighest ? 6 : precision == Precision::kHigh ? 3 : 1;
  const double parts = precision == Precision::kHighest ? 0x1.02p-23
                       : precision == Precision::kHigh  ? 0x1.82p-15
                                                        : 0x1.02p-7;
  return parts + 0x1p-24 * static_cast<double>(together * products + k / together + 4);
}

/// The sums of D's columns, of what D is: within what adding them up may be off by.
inline void check_column_sums(const cuda::GemmKernel& kernel, const Product& product,
                              const Product::Result& result) {
  const GemmDesc& desc = product.desc;
  const double eps = desc.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  for (std::int64_t j = 0; desc.has_d_sum && j < desc.n; ++j) {
    double exact = 0, magnitude = 0;
    for (std::int64_t i = 0; i < desc.m; ++i) {
      exact += product.d(result, i, j);
      magnitude += std::fabs(product.d(result, i, j));
    }
    const double sum = cpu::reference_load(desc.dtype, result.d_sum.data(), Product::kGuard + j);
    const double bound =
        eps * static_cast<double>(desc.m) * magnitude + 1.01 * spacing(desc.dtype, exact);
    CHECK(std::fabs(sum - exact) <= bound, kernel.name << ' ' << product.name() << " column " << j
                                                       << ": " << sum << ", not " << exact);
  }
}

/// The same bits, and sums of D's columns, in any order of threads, however late what is
/// asynchronous comes, and on each of the devices.
inline void check_orders(const cuda::GemmKernel& kernel, const Product& product,
                         std::initializer_list<cuda::Device> devices = {kDevice}) {
  using emulator::Order;
  emulator::settings() = {};
  const Product::Result first = compute(kernel, product, *devices.begin());
  check_column_sums(kernel, product, first);
  for (const cuda::Device& device : devices) {
    for (const bool late : {false, true}) {
      emulator::settings() = {.order = late ? Order::kReverse : Order::kShuffled,
                              .late_copies = late,
                              .late_products = !late};
      CHECK(compute(kernel, product, device) == first,
            kernel.name << ' ' << product.name() << ", sm_" << device.sm << ", " << device.sm_count
                        << " multiprocessors, " << (late ? "backwards" : "shuffled"));
    }
  }
}

/// D within `relative` of the sum of magnitudes, and one rounding.
inline void check_close(const cuda::GemmKernel& kernel, const Product& product,
                        const Product::Result& result, double relative) {
  const GemmDesc& desc = product.desc;
  const cpu::ReferenceGemm reference = cpu::reference_gemm(desc, product.inputs);
  check_column_sums(kernel, product, result);
  const double slope = desc.epilogue == Activation::kSigmoid ? 0.25 : 1;
  for (std::int64_t i = 0; i < desc.m; ++i) {
    for (std::int64_t j = 0; j < desc.n; ++j) {
      const double exact = reference.d[static_cast<std::size_t>(i * desc.n + j)];
      const double magnitude = reference.d_magnitude[static_cast<std::size_t>(i * desc.n + j)];
      const double bound = slope * relative * magnitude + 1.01 * spacing(desc.dtype, exact);
      CHECK(std::fabs(product.d(result, i, j) - exact) <= bound,
            kernel.name << ' ' << product.name() << " (" << i << ", " << j
                        << "): " << product.d(result, i, j) << ", not " << exact);
    }
  }
}

}  // namespace neuron_ext::testing
