"""``python -m neuron_ext info``: this build and this machine, as it belongs into a bug report."""

from __future__ import annotations

import os
import platform

import torch

import neuron_ext
from neuron_ext import _C, backends
from neuron_ext.cli import machine

_ENVIRONMENT = {
    "NEURON_EXT_CPU_ISA": "best instruction set to use",
    "NEURON_EXT_FP32": "strict: float32 products by float32 arithmetic",
    "NEURON_EXT_LOG": "1: print each kernel choice once",
    "NEURON_EXT_CUDA": "when building: 0 without, 1 with CUDA",
    "OMP_NUM_THREADS": "threads for CPU kernels",
    "OMP_WAIT_POLICY": "PASSIVE: idle threads don't spin",
    "CUDA_VISIBLE_DEVICES": "GPUs that torch may use",
}


def run() -> int:
    """Prints the report and returns 0."""
    info = _C.build_info()
    _line("neuron_ext", f"{neuron_ext.__version__}, {_C.__file__}")
    _line("Python", f"{platform.python_version()}, {platform.platform()}")
    _line("torch", f"{torch.__version__}, built against {info['torch']}")
    _line("compiler", f"{info['compiler']}, C++ {info['cplusplus']}")
    _line("CPU", machine.cpu_name())
    runnable = ", ".join(backends.supported_cpu_isas())
    _line("CPU kernels", f"{backends.cpu_isa()}; this CPU runs {runnable}")
    openmp = "with OpenMP" if info["openmp"] else "but built without OpenMP: kernels use one"
    _line("threads", f"{torch.get_num_threads()}, {openmp}")
    _line("CUDA kernels", _cuda_kernels())
    _line("CUDA in torch", _cuda_in_torch())

    print("\nkernels, tried in this order")
    print(f"  {'name':<32} {'instructions':<14} dtypes")
    for kernel in backends.kernels():
        absent = "" if kernel.runnable else "  (not on this machine)"
        print(f"  {kernel.name:<32} {kernel.isa:<14} {' '.join(kernel.dtypes)}{absent}")

    print("\nenvironment")
    for name, meaning in _ENVIRONMENT.items():
        print(f"  {name:<22} {os.environ.get(name, 'not set'):<10} {meaning}")
    return 0


def _line(label: str, text: str) -> None:
    print(f"{label:<15} {text}")


def _cuda_kernels() -> str:
    cuda = _C.build_info()["cuda"]
    if isinstance(cuda, str):
        return cuda
    return "built" if cuda else "not built: tensors on a GPU are computed by torch"


def _cuda_in_torch() -> str:
    if torch.version.cuda is None:
        return "none: this torch is a CPU build"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no GPU is usable"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"
