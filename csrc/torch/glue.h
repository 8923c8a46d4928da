// What the files of the operations share: their registration, and ATen's answer where no kernel has
// one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <typeinfo>

#include "neuron_ext/parallel.h"
#include "tensor_view.h"

namespace neuron_ext {

/// Each defines the operations of one family: schemas and the kernels of every dispatch key.
void register_linear(torch::Library& library);
void register_sigmoid(torch::Library& library);
void register_mlp(torch::Library& library);

/// Registers all of the above once; a second call, and one in a process where another copy of this
/// library has registered them, raises RuntimeError.
void register_library();

/// Whether OMP_WAIT_POLICY asks threads to sleep whenever they have nothing to do.
inline bool threads_sleep() {
  static const bool sleep = [] {
    const char* const policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && (*policy == 'p' || *policy == 'P');  // passive, not active
  }();
  return sleep;
}

/// torch's own pool, so that torch.set_num_threads and nested parallelism count.
inline ParallelFor at_parallel_for() {
  // Two threads that sleep take 50 us to begin, four 70 to 120 (Zen 4, a virtual machine). One
  // figure for all would lose a factor of three or more somewhere: 128 cubed f32 takes one thread
  // 55 us, four that spin, as threads do unless they are told otherwise, 25, and four that sleep
  // 140.
  constexpr double kAsleep = 100'000;
  return ParallelFor(
      [](std::int64_t n, std::int64_t grain, ParallelFor::Body body, const void* closure) {
        at::parallel_for(0, n, grain,
                         [&](std::int64_t begin, std::int64_t end) { body(closure, begin, end); });
      },
      at::get_num_threads(), threads_sleep() ? kAsleep : ParallelFor::kAwake);
}

/// What the dispatcher would come to, where all it would do is to pick a device: the kernels, or a
/// node of the graph and then the kernels.
enum class Shortcut : std::uint8_t { kNone, kNode, kKernels };

/// Of a call on the tensors that were added.
class ShortcutOf {
 public:
  void add(const at::Tensor& t) {
    if (!t.defined()) return;
    keys_ = keys_ | t.key_set();
    needs_grad_ = needs_grad_ || t.requires_grad();
    has_tangent_ = has_tangent_ || has_tangent(t);
  }

  /// Some for dense tensors of the CPU, or of GPUs if there are kernels for them, if in this thread
  /// there is no mode, transform, autocast, tracer or profiler. Which GPU, the kernels see to.
  Shortcut get() const {
    using c10::DispatchKey;
    constexpr auto plain = [](DispatchKey device, DispatchKey autograd) {
      return c10::DispatchKeySet(
          {device, autograd, DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
    };
    constexpr c10::DispatchKeySet kPlainCpu = plain(DispatchKey::CPU, DispatchKey::AutogradCPU);
    constexpr c10::DispatchKeySet kPlainCuda = plain(DispatchKey::CUDA, DispatchKey::AutogradCUDA);
    const c10::impl::LocalDispatchKeySet tls = c10::impl::tls_local_dispatch_key_set();
    const c10::DispatchKeySet active = (keys_ | tls.included_) - tls.excluded_;
    const bool is_plain =
        (active | kPlainCpu) == kPlainCpu || (gpu::kIsBuilt && (active | kPlainCuda) == kPlainCuda);
    if (!is_plain || has_tangent_ ||
        at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value()) {
      return Shortcut::kNone;
    }
    return needs_grad_ && at::GradMode::is_enabled() &&
                   active.has(DispatchKey::AutogradFunctionality)
               ? Shortcut::kNode
               : Shortcut::kKernels;
  }

 private:
  c10::DispatchKeySet keys_;
  bool needs_grad_ = false, has_tangent_ = false;
};

template <class... Tensors>
Shortcut shortcut_for(const Tensors&... tensors) {
  ShortcutOf call;
  (call.add(tensors), ...);
  return call.get();
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Says once that a GPU's tensors are always computed by ATen.
inline void warn_of_cuda(const at::Tensor& input) {
  if (!input.is_cuda() || has_kernels(input.device())) return;
  TORCH_WARN_ONCE(
      gpu::kIsBuilt
          ? "neuron_ext's CUDA kernels need compute capability 8.0, which this GPU hasn't: torch "
            "computes neuron_ext's operations on its tensors"
          : "neuron_ext was built without CUDA kernels: torch computes its operations on CUDA "
            "tensors");
}

/// Runs `compute`, which calls ATen; its errors get `context()` before them, since ATen speaks of
/// mat1 and mat2. Errors with a type of their own (TypeError, NotImplementedError, ...) pass as
/// they are.
template <class Compute, class Context>
auto with_context(const Compute& compute, const Context& context) {
  try {
    return compute();
  } catch (const c10::Error& error) {
    if (typeid(error) != typeid(c10::Error)) throw;
    TORCH_CHECK(false, context(), ": ", error.what_without_backtrace());
  }
}

}  // namespace neuron_ext
