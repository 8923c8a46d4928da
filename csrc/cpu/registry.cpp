#include "registry.h"

#include <stdexcept>
#include <utility>

#include "isa.h"
#include "neuron_ext/last_kernel.h"

namespace neuron_ext::cpu {
namespace {

/// Best first.
std::span<const IsaKernels> all_kernels() {
  static const IsaKernels kernels[] = {
#if defined(__x86_64__)
      amx_kernels(),      avx512_bf16_kernels(), avx512_kernels(), avx2_kernels(),
#endif
      portable_kernels(),
  };
  return kernels;
}

/// The first row that accepts the product and of which `suits` holds.
template <class F>
const GemmKernel& first_gemm(const GemmDesc& desc, const F& suits) {
  const Isa active = active_isa();
  const Form form = form_of(desc);
  for (const IsaKernels& of_isa : all_kernels()) {
    if (of_isa.gemm.front().isa > active) continue;
    for (const GemmKernel& kernel : of_isa.gemm) {
      if (kernel.takes(desc.dtype) && kernel.accepts(desc, form) && suits(kernel)) return kernel;
    }
  }
  throw std::logic_error("the portable rows accept every product");
}

}  // namespace

const GemmKernel& note_choice(const GemmKernel& kernel) {
  last_kernel() = kernel.name;
  return kernel;
}

const GemmKernel& choose_gemm(const GemmDesc& desc) {
  return note_choice(first_gemm(desc, [](const GemmKernel&) { return true; }));
}

const GemmKernel& choose_packing(const GemmDesc& desc) {
  return first_gemm(desc, [&](const GemmKernel& kernel) { return kernel.packs_b(desc.dtype); });
}

const ElementwiseKernel& choose_elementwise() {
  const Isa active = active_isa();
  for (const IsaKernels& of_isa : all_kernels()) {
    if (of_isa.elementwise != nullptr && of_isa.elementwise->isa <= active) {
      last_kernel() = of_isa.elementwise->name;
      return *of_isa.elementwise;
    }
  }
  throw std::logic_error("every CPU runs the portable rows");
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> infos;
  const auto add = [&](const char* name, Isa isa, const auto& takes) {
    KernelInfo info{name, isa, {}, is_supported(isa)};
    for (int i = 0; i < kDTypeCount; ++i) {
      if (takes(i)) info.dtypes.push_back(static_cast<DType>(i));
    }
    infos.push_back(std::move(info));
  };
  for (const IsaKernels& of_isa : all_kernels()) {
    for (const GemmKernel& kernel : of_isa.gemm) {
      add(kernel.name, kernel.isa, [&](int i) { return kernel.takes(static_cast<DType>(i)); });
    }
    if (of_isa.elementwise == nullptr) continue;
    const ElementwiseKernel& kernel = *of_isa.elementwise;
    add(kernel.name, kernel.isa, [&](int i) { return kernel.activate[i] != nullptr; });
  }
  return infos;
}

}  // namespace neuron_ext::cpu
