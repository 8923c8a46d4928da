#include "gpu.h"

#ifdef NEURON_EXT_WITH_CUDA

#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <vector>

#include "tensor_view.h"

namespace neuron_ext::gpu {
namespace {

/// What a GPU is; sm is negative for one that can't be asked. Asked once by each thread.
const cuda::Device& properties_of(c10::Device gpu) {
  thread_local std::vector<cuda::Device> known;
  const auto index = static_cast<std::size_t>(std::max<int>(gpu.index(), 0));
  if (index >= known.size()) known.resize(index + 1);
  cuda::Device& device = known[index];
  if (device.sm == 0 && !cuda::query_device(static_cast<int>(index), device).ok()) device.sm = -1;
  return device;
}

/// Makes the GPU the current one and launches on its current stream: launch(device, stream).
template <class Launch>
void run_on(c10::Device gpu, const Launch& launch) {
  const c10::DeviceGuard guard(gpu);
  const cuda::Stream stream =
      c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(gpu).native_handle();
  const cuda::Status status = launch(properties_of(gpu), stream);
  TORCH_CHECK(status.ok(), "neuron_ext: the kernel ", status.kernel, " failed on ", gpu, ": ",
              cuda::error_text(status.error));
}

/// Of torch's allocator. It may go out of scope once what uses it is launched: the stream is the
/// one that it was taken on.
at::Tensor memory_on(c10::Device gpu, std::size_t bytes) {
  return at::empty({static_cast<std::int64_t>(bytes)}, at::device(gpu).dtype(at::kByte));
}

/// As run_on, with so much scratch memory: bytes_for(device), launch(workspace, device, stream).
/// Without any, which is null, torch's allocator isn't asked.
template <class Bytes, class Launch>
void run_with_workspace(c10::Device gpu, const Bytes& bytes_for, const Launch& launch) {
  run_on(gpu, [&](const cuda::Device& device, cuda::Stream stream) {
    const std::size_t bytes = bytes_for(device);
    const at::Tensor workspace = bytes == 0 ? at::Tensor() : memory_on(gpu, bytes);
    return launch(bytes == 0 ? nullptr : workspace.mutable_data_ptr(), device, stream);
  });
}

/// The elements of out, in and, unless undefined, saved: their dimensions sorted by stride and
/// merged.
cuda::ElementwiseDesc describe(Activation f, const at::Tensor& out, const at::Tensor& in,
                               const at::Tensor& saved) {
  cuda::ElementwiseDesc desc;
  desc.f = f;
  desc.dtype = dtype_of(out);
  if (out.is_contiguous() && in.is_contiguous() && (!saved.defined() || saved.is_contiguous())) {
    desc.sizes[0] = out.numel();
    desc.in_strides[0] = desc.saved_strides[0] = desc.out_strides[0] = 1;
    return desc;
  }
  at::TensorIteratorConfig config;
  config.add_output(out).add_const_input(in);
  if (saved.defined()) config.add_const_input(saved);
  const at::TensorIterator iterator = config.build();
  desc.rank = iterator.ndim();
  std::ranges::copy(iterator.shape(), desc.sizes.begin());
  cuda::Dims* const strides[] = {&desc.out_strides, &desc.in_strides, &desc.saved_strides};
  for (int operand = 0; operand < iterator.ntensors(); ++operand) {
    std::ranges::transform(iterator.strides(operand), strides[operand]->begin(),
                           [&](std::int64_t bytes) { return bytes / size_of(desc.dtype); });
  }
  return desc;
}

}  // namespace

bool has_kernels(c10::Device gpu) {
  const cuda::Device& device = properties_of(gpu);
  return device.sm < 0 || device.sm >= cuda::kLowestSm;
}

bool is_runnable(int lowest_sm, int highest_sm) {
  const c10::DeviceIndex count = c10::impl::VirtualGuardImpl(c10::kCUDA).deviceCount();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    const int sm = properties_of({c10::kCUDA, index}).sm;
    if (lowest_sm <= sm && sm <= highest_sm) return true;
  }
  return false;
}

void gemm(const GemmDesc& desc, const GemmPointers& at, c10::Device gpu) {
  run_with_workspace(
      gpu, [&](const cuda::Device& device) { return cuda::gemm_workspace(desc, at, device); },
      [&](void* workspace, const cuda::Device& device, cuda::Stream stream) {
        return cuda::gemm(desc, at, workspace, device, stream);
      });
}

bool sums_a_apart(const GemmDesc& desc, const GemmPointers& at, c10::Device gpu) {
  return cuda::sums_a_apart(desc, at, properties_of(gpu));
}

at::Tensor form_a(GemmDesc& desc, GemmPointers& at, c10::Device gpu) {
  if (!cuda::forms_a(desc, at, properties_of(gpu))) return {};
  at::Tensor memory;
  run_on(gpu, [&](const cuda::Device&, cuda::Stream stream) {
    memory = memory_on(gpu, cuda::form_a_memory(desc));
    return cuda::form_a(desc, at, memory.mutable_data_ptr(), stream);
  });
  return memory;
}

void mlp(const Mlp& mlp, c10::Device gpu) {
  run_with_workspace(
      gpu, [&](const cuda::Device& device) { return cuda::mlp_workspace(mlp, device); },
      [&](void* workspace, const cuda::Device& device, cuda::Stream stream) {
        return cuda::mlp(mlp, workspace, device, stream);
      });
}

void activate(Activation f, const at::Tensor& x, const at::Tensor& y) {
  run_on(x.device(), [&](const cuda::Device& device, cuda::Stream stream) {
    return cuda::activate(describe(f, y, x, at::Tensor()), x.const_data_ptr(), y.mutable_data_ptr(),
                          device, stream);
  });
}

void activate_backward(Activation f, const at::Tensor& dy, const at::Tensor& saved,
                       const at::Tensor& dx) {
  run_on(dy.device(), [&](const cuda::Device& device, cuda::Stream stream) {
    return cuda::activate_backward(describe(f, dx, dy, saved), dy.const_data_ptr(),
                                   saved.const_data_ptr(), dx.mutable_data_ptr(), device, stream);
  });
}

}  // namespace neuron_ext::gpu

#endif
