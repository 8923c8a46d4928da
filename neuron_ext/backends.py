"""Which kernels this build has, which of them this machine runs, and which ran last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from neuron_ext import _C

__all__ = [
    "Kernel",
    "cpu_isa",
    "cuda_is_built",
    "kernels",
    "last_kernel",
    "set_cpu_isa",
    "show_config",
    "supported_cpu_isas",
    "use_cpu_isa",
]


class Kernel(NamedTuple):
    """A row of the kernel table; the first row that accepts a problem runs it."""

    name: str
    isa: str
    dtypes: tuple[str, ...]
    runnable: bool  # this machine has the instruction set


def cpu_isa() -> str:
    """The best instruction set that kernels are chosen of: one of :func:`supported_cpu_isas`."""
    return _C.cpu_isa()


def supported_cpu_isas() -> tuple[str, ...]:
    """What this machine can run of portable, avx2, avx512, avx512_bf16 and amx, worst first."""
    return tuple(_C.supported_cpu_isas())


def set_cpu_isa(name: str) -> None:
    """Choose CPU kernels up to the instruction set ``name`` from now on, in all threads.

    The environment variable ``NEURON_EXT_CPU_ISA`` does the same at import.

    Raises:
        ValueError: ``name`` is unknown or this machine can't run it.
    """
    _C.set_cpu_isa(name)


@contextlib.contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """:func:`set_cpu_isa` for the length of a ``with`` block."""
    before = cpu_isa()
    set_cpu_isa(name)
    try:
        yield
    finally:
        set_cpu_isa(before)


def kernels() -> list[Kernel]:
    """All kernels of this build, in the order in which they are tried."""
    return [
        Kernel(name, isa, tuple(dtypes), runnable) for name, isa, dtypes, runnable in _C.kernels()
    ]


def last_kernel() -> str:
    """Name of the kernel that a call on this thread chose last, "" before any."""
    return _C.last_kernel()


def cuda_is_built() -> bool:
    """Whether this build has CUDA kernels; without, tensors on a GPU are computed by torch."""
    return bool(_C.build_info()["cuda"])


def show_config() -> str:
    """What was built and what will run here, as text."""
    info = _C.build_info()
    rows = "\n".join(
        f"    {k.name:<28} {k.isa:<11} {', '.join(k.dtypes)}"
        + ("" if k.runnable else "  (not on this CPU)")
        for k in kernels()
    )
    return (
        f"neuron_ext {info['version']}, built with torch {info['torch']}, {info['compiler']}, "
        f"C++{info['cplusplus']}\n"
        f"  torch here: {torch.__version__}, {torch.get_num_threads()} threads\n"
        f"  CPU: {cpu_isa()} of {', '.join(supported_cpu_isas())}\n"
        f"  CUDA kernels: {'built' if info['cuda'] else 'not built'}\n"
        f"  kernels, in the order in which they are tried:\n{rows}"
    )
