// The Python module: the operations as plain C functions for the eager fast path, and questions
// about the kernels. The only file that knows Python.

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "glue.h"
#include "layer.h"
#include "neuron_ext/cpu.h"
#include "neuron_ext/last_kernel.h"
#include "ops.h"

#define NEURON_EXT_STRING_(x) #x
#define NEURON_EXT_STRING(x) NEURON_EXT_STRING_(x)

namespace neuron_ext {
namespace {

// ---- operations ---------------------------------------------------------------------------------
//
// METH_FASTCALL functions that take exact Tensors and Parameters and nothing else: no subclass, and
// no __torch_function__ mode that would want to see the call. For anything else they return
// NotImplemented and functional.py goes through torch.ops, which knows of all that. For one neuron,
// torch.ops takes 1.6 us and a pybind11 function 0.8, of which this way leaves 0.55 (Xeon, Sapphire
// Rapids class).
//
// Tensors that Python owns aren't copied on the way: their second owner, when it comes and when it
// goes, takes the interpreter's lock, which costs as much as a neuron's arithmetic.

bool is_plain(PyObject* object) { return THPVariable_CheckExact(object); }

bool is_plain_or_none(PyObject* object) { return object == Py_None || is_plain(object); }

/// The argument's tensor, or an undefined one for None.
const at::Tensor& tensor_of(PyObject* object) {
  static const at::Tensor undefined;
  return object == Py_None ? undefined : THPVariable_Unpack(object);
}

/// Tensors of arguments that others may change while the interpreter's lock is released: Python's
/// objects, which own the tensors, are kept.
class Borrowed {
 public:
  explicit Borrowed(Py_ssize_t count) {
    tensors_.reserve(count);
    objects_.reserve(count);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    for (at::Tensor& t : tensors_) Traits::destroyBorrow(t);
    for (PyObject* object : objects_) Py_DECREF(object);
  }

  void add(PyObject* object) {
    objects_.push_back(Py_NewRef(object));
    tensors_.push_back(Traits::createBorrow(tensor_of(object)));
  }
  operator at::TensorList() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  std::vector<at::Tensor> tensors_;
  c10::SmallVector<PyObject*, 8> objects_;
};

PyObject* not_implemented() {
  Py_INCREF(Py_NotImplemented);
  return Py_NotImplemented;
}

/// Lets other Python threads run meanwhile, unless the call is too short for that: releasing and
/// taking the interpreter's lock costs 0.1 us, a tenth of a neuron. `work` is a bound on the call's
/// multiply-adds, of which kShort take a few microseconds.
template <class Compute>
PyObject* run(double work, const Compute& compute) {
  constexpr double kShort = 1 << 16;
  std::optional<pybind11::gil_scoped_release> released;
  if (work > kShort) released.emplace();
  at::Tensor result = compute();
  released.reset();
  return THPVariable_Wrap(std::move(result));
}

/// A bound on the multiply-adds of layers over `input` whose weights have `elements` in all.
double layer_work(const at::Tensor& input, std::int64_t elements) {
  return static_cast<double>(input.numel() + 1) * static_cast<double>(elements + 1);
}

template <at::Tensor (*layer)(const at::Tensor&, const at::Tensor&, const at::Tensor&)>
PyObject* py_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count < 2 || count > 3 || !is_plain(args[0]) || !is_plain(args[1]) ||
      (count == 3 && !is_plain_or_none(args[2])) || at::impl::torch_function_mode_enabled()) {
    return not_implemented();
  }
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  const at::Tensor& weight = THPVariable_Unpack(args[1]);
  const at::Tensor& bias = tensor_of(count == 3 ? args[2] : Py_None);
  return run(layer_work(input, weight.numel()), [&] { return layer(input, weight, bias); });
  END_HANDLE_TH_ERRORS
}

PyObject* py_sigmoid(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 1 || !is_plain(args[0]) || at::impl::torch_function_mode_enabled()) {
    return not_implemented();
  }
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  constexpr double kSigmoidWork = 16;
  return run(kSigmoidWork * static_cast<double>(input.numel()),
             [&] { return neuron_ext::sigmoid(input); });
  END_HANDLE_TH_ERRORS
}

/// What a stack is called with, put together layer by layer.
class Stack {
 public:
  explicit Stack(Py_ssize_t depth) : weights_(depth), biases_(depth) {}

  /// Whether it is one that the operation takes.
  bool add_weight(PyObject* weight) {
    if (!is_plain(weight)) return false;
    weights_.add(weight);
    elements_ += tensor_of(weight).numel();
    return true;
  }

  bool add_bias(PyObject* bias) {
    if (!is_plain_or_none(bias)) return false;
    biases_.add(bias);
    return true;
  }

  PyObject* run_on(const at::Tensor& input,
                   std::optional<std::string_view> output_activation) const {
    return run(layer_work(input, elements_),
               [&] { return neuron_ext::mlp(input, weights_, biases_, output_activation); });
  }

 private:
  Borrowed weights_, biases_;
  std::int64_t elements_ = 0;
};

/// mlp(input, list of weights, list of biases or None, output_activation), lists in the strict
/// sense.
PyObject* py_mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 4 || !is_plain(args[0]) || !PyList_CheckExact(args[1]) ||
      !PyList_CheckExact(args[2]) || !(args[3] == Py_None || PyUnicode_CheckExact(args[3])) ||
      at::impl::torch_function_mode_enabled()) {
    return not_implemented();
  }
  const Py_ssize_t weights = PyList_GET_SIZE(args[1]), biases = PyList_GET_SIZE(args[2]);
  Stack stack(weights);
  for (Py_ssize_t i = 0; i < weights; ++i) {
    if (!stack.add_weight(PyList_GET_ITEM(args[1], i))) return not_implemented();
  }
  for (Py_ssize_t i = 0; i < biases; ++i) {
    if (!stack.add_bias(PyList_GET_ITEM(args[2], i))) return not_implemented();
  }
  std::optional<std::string_view> output_activation;
  if (args[3] != Py_None) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(args[3], &size);
    if (text == nullptr) return nullptr;
    output_activation = std::string_view(text, size);
  }
  return stack.run_on(THPVariable_Unpack(args[0]), output_activation);
  END_HANDLE_TH_ERRORS
}

/// mlp_of_modules(input, modules, Linear, Sigmoid): mlp of the layers of a dictionary of modules,
/// which are in turn exactly of these types. Declines what nn.py's _run_as_one would.
PyObject* py_mlp_of_modules(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject* const hooks[] = {PyUnicode_InternFromString("_forward_hooks"),
                                    PyUnicode_InternFromString("_forward_pre_hooks"),
                                    PyUnicode_InternFromString("_backward_hooks"),
                                    PyUnicode_InternFromString("_backward_pre_hooks")};
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
  static PyObject* const weight_name = PyUnicode_InternFromString("weight");
  static PyObject* const bias_name = PyUnicode_InternFromString("bias");
  if (count != 4 || !is_plain(args[0]) || !PyDict_CheckExact(args[1]) ||
      at::impl::torch_function_mode_enabled()) {
    return not_implemented();
  }
  Stack stack(PyDict_GET_SIZE(args[1]));
  bool expects_linear = true;
  Py_ssize_t position = 0;
  for (PyObject* module; PyDict_Next(args[1], &position, nullptr, &module);) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != args[expects_linear ? 2 : 3]) {
      return not_implemented();
    }
    const auto state =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
    for (PyObject* const hook : hooks) {
      PyObject* const hooked = PyDict_GetItemWithError(state.ptr(), hook);
      if (hooked == nullptr || !PyDict_Check(hooked) || PyDict_GET_SIZE(hooked) != 0)
        return not_implemented();
    }
    if (PyDict_GetItemWithError(state.ptr(), forward) != nullptr) return not_implemented();
    if (expects_linear) {
      PyObject* const parameters = PyDict_GetItemWithError(state.ptr(), parameters_name);
      if (parameters == nullptr || !PyDict_Check(parameters)) return not_implemented();
      PyObject* const weight = PyDict_GetItemWithError(parameters, weight_name);
      PyObject* const bias = PyDict_GetItemWithError(parameters, bias_name);
      if (weight == nullptr || bias == nullptr || !stack.add_weight(weight) ||
          !stack.add_bias(bias)) {
        return not_implemented();
      }
    }
    expects_linear = !expects_linear;
  }
  if (PyDict_GET_SIZE(args[1]) == 0) return not_implemented();
  return stack.run_on(THPVariable_Unpack(args[0]),
                      expects_linear ? std::optional<std::string_view>("sigmoid") : std::nullopt);
  END_HANDLE_TH_ERRORS
}

// ---- the functions of functional.py -------------------------------------------------------------
//
// A Function tries an operation above, and leaves keywords and what the operation declines to the
// Python function that it stands for. The frame of a Python function that tries the operation takes
// 0.1 to 0.16 us of a neuron's 0.9 (Zen 4, Python 3.11).
//
// torch.compile traces no C function unless torch._dynamo, whose import takes 2 s, is told how. Of
// an object it traces what the object's type has for __call__. So that is a Python function here,
// which an interpreter, led by tp_vectorcall_offset, doesn't look for.

struct Function {
  PyObject ob_base;
  vectorcallfunc vectorcall;
  PyObject* operation;
  PyObject* in_python;
  PyObject* attributes;
  PyObject* weak_references;
};

Function& as_function(PyObject* object) { return *reinterpret_cast<Function*>(object); }

PyObject* call_function(PyObject* self, PyObject* const* args, size_t count, PyObject* keywords) {
  if (keywords == nullptr) {
    PyObject* result = PyObject_Vectorcall(as_function(self).operation, args, count, nullptr);
    if (result != Py_NotImplemented) return result;
    Py_DECREF(result);
  }
  return PyObject_Vectorcall(as_function(self).in_python, args, count, keywords);
}

/// Function(operation, in_python). It is never freed: like what it stands for, it is part of a
/// module.
PyObject* new_function(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *operation, *in_python;
  if (!PyArg_ParseTuple(args, "OO", &operation, &in_python)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  as_function(self).vectorcall = call_function;
  as_function(self).operation = Py_NewRef(operation);
  as_function(self).in_python = Py_NewRef(in_python);
  return Py_NewRef(self);
}

PyObject* repr_of_function(PyObject* self) { return PyObject_Repr(as_function(self).in_python); }

/// In a class it is a method, as functions are.
PyObject* bind_function(PyObject* self, PyObject* object, PyObject*) {
  return object == nullptr || object == Py_None ? Py_NewRef(self) : PyMethod_New(self, object);
}

/// Pickled by name, and its own copy.
PyObject* reduce_function(PyObject* self, PyObject*) {
  return PyObject_GetAttrString(self, "__qualname__");
}

/// The type of Functions, with `call` as its __call__: the first one, if it is asked again.
PyObject* function_type(PyObject*, PyObject* call) {
  static PyMethodDef methods[] = {
      {"__reduce__", reduce_function, METH_NOARGS, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyGetSetDef attributes[] = {
      {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyTypeObject type;
  auto* const object = reinterpret_cast<PyObject*>(&type);
  if (type.tp_dict != nullptr) return Py_NewRef(object);
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "neuron_ext._C.Function";
  type.tp_basicsize = sizeof(Function);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  type.tp_new = new_function;
  type.tp_call = PyVectorcall_Call;
  type.tp_vectorcall_offset = offsetof(Function, vectorcall);
  type.tp_dictoffset = offsetof(Function, attributes);
  type.tp_weaklistoffset = offsetof(Function, weak_references);
  type.tp_repr = repr_of_function;
  type.tp_descr_get = bind_function;
  type.tp_methods = methods;
  type.tp_getset = attributes;
  // PyType_Ready leaves alone what is there. Set later, it would become what the type's slots call.
  type.tp_dict = Py_BuildValue("{sO}", "__call__", call);
  return type.tp_dict != nullptr && PyType_Ready(&type) == 0 ? Py_NewRef(object) : nullptr;
}

PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"linear", as_method(py_layer<linear>), METH_FASTCALL, "linear(input, weight, bias=None)"},
    {"linear_sigmoid", as_method(py_layer<linear_sigmoid>), METH_FASTCALL,
     "linear_sigmoid(input, weight, bias=None)"},
    {"sigmoid", as_method(py_sigmoid), METH_FASTCALL, "sigmoid(input)"},
    {"mlp", as_method(py_mlp), METH_FASTCALL, "mlp(input, weights, biases, output_activation)"},
    {"mlp_of_modules", as_method(py_mlp_of_modules), METH_FASTCALL,
     "mlp_of_modules(input, modules, Linear, Sigmoid)"},
    {"function_type", function_type, METH_O, "function_type(call)"},
    {nullptr, nullptr, 0, nullptr},
};

// ---- questions ----------------------------------------------------------------------------------

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Isa isa : cpu::supported_isas()) names.emplace_back(cpu::name_of(isa));
  return names;
}

void set_cpu_isa(const std::string& name) {
  const auto isa = cpu::parse_isa(name);
  TORCH_CHECK_VALUE(isa.has_value(), "set_cpu_isa: name is '", name, "', expected one of ",
                    supported_cpu_isas());
  cpu::set_active_isa(*isa);
}

/// A row of backends.kernels(): name, device, isa, dtypes, whether it runs here.
using KernelRow = std::tuple<std::string, std::string, std::string, std::vector<std::string>, bool>;

std::vector<KernelRow> kernels() {
  std::vector<KernelRow> rows;
  const auto add = [&](const auto& kernel, const char* device, std::string isa, bool runnable) {
    std::vector<std::string> dtypes;
    for (const DType dtype : kernel.dtypes) dtypes.emplace_back(name_of(dtype));
    rows.emplace_back(kernel.name, device, std::move(isa), std::move(dtypes), runnable);
  };
  for (const cpu::KernelInfo& kernel : cpu::kernels()) {
    add(kernel, "cpu", cpu::name_of(kernel.isa), kernel.runnable);
  }
  if constexpr (gpu::kIsBuilt) {
    for (const cuda::KernelInfo& kernel : cuda::kernels()) {
      add(kernel, "cuda", "sm_" + std::to_string(kernel.lowest_sm),
          gpu::is_runnable(kernel.lowest_sm, kernel.highest_sm));
    }
  }
  return rows;
}

void set_most_packed_weights(std::int64_t max_bytes) {
  TORCH_CHECK_VALUE(max_bytes >= 0, "set_packed_weights: max_bytes is ", max_bytes,
                    ", expected 0 or more");
  set_packed_weights(max_bytes);
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown compiler";
#endif
  info["cplusplus"] = __cplusplus;
  info["torch"] = NEURON_EXT_STRING(TORCH_VERSION_MAJOR) "." NEURON_EXT_STRING(
      TORCH_VERSION_MINOR) "." NEURON_EXT_STRING(TORCH_VERSION_PATCH);
#ifdef NEURON_EXT_VERSION
  info["version"] = NEURON_EXT_STRING(NEURON_EXT_VERSION);
#else
  info["version"] = pybind11::none();
#endif
  info["cuda"] = gpu::kIsBuilt;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace neuron_ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace neuron_ext;
  module.doc() = "Compiled part of neuron_ext; see neuron_ext.functional and neuron_ext.backends.";
  // Variables that can't be obeyed are errors now, not in the first call.
  cpu::active_isa();
  f32_is_strict();
  register_library();
  if (PyModule_AddFunctions(module.ptr(), functions) != 0) throw pybind11::error_already_set();
  module.def("cpu_isa", [] { return cpu::name_of(cpu::active_isa()); });
  module.def("supported_cpu_isas", &supported_cpu_isas);
  module.def("set_cpu_isa", &set_cpu_isa);
  module.def("batch_invariant", &batch_invariant);
  module.def("set_batch_invariant", &set_batch_invariant);
  module.def("packed_weights", [] {
    const PackedWeights now = packed_weights();
    return std::tuple(now.max_bytes, now.bytes, now.count);
  });
  module.def("set_packed_weights", &set_most_packed_weights);
  module.def("kernels", &kernels);
  module.def("last_kernel", [] { return last_kernel(); });
  module.def("build_info", &build_info);
}
