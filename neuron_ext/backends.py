"""Which kernels this build has, which of them run, and how: settings of the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from neuron_ext import _C

__all__ = [
    "Kernel",
    "PackedWeights",
    "batch_invariant",
    "cpu_isa",
    "cuda_is_built",
    "kernels",
    "last_kernel",
    "packed_weights",
    "set_batch_invariant",
    "set_cpu_isa",
    "set_packed_weights",
    "show_config",
    "supported_cpu_isas",
    "use_batch_invariant",
    "use_cpu_isa",
    "use_packed_weights",
]


class Kernel(NamedTuple):
    """A row of the kernel table; a device's first row that accepts a problem runs it."""

    name: str
    device: str  # "cpu" or "cuda"
    isa: str  # the instruction set; of a GPU the lowest compute capability, sm_90 for 9.0
    dtypes: tuple[str, ...]
    runnable: bool  # this machine has a CPU or a GPU with it


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


def batch_invariant() -> bool:
    """Whether a row's result is the same whatever batch it is in."""
    return _C.batch_invariant()


def set_batch_invariant(enabled: bool) -> None:
    """Give a row the same bits whatever batch it is in, and wherever it lies in it.

    This is about :func:`~neuron_ext.functional.linear`, ``linear_sigmoid`` and ``mlp``, their
    outputs and the gradients of their inputs, as the CPU kernels compute them with one instruction
    set: a row of a batch of 1000 then equals, bit for bit, the same row alone. Gradients of weights
    and biases are sums over the batch. ``sigmoid`` is always like that, and nothing ever depends
    on the number of threads. What torch computes, under ``torch.func`` for example, isn't changed.
    Rows must lie alike: one whose features are contiguous in memory and one whose aren't may
    differ in the last bits.

    Batches of up to 32 rows lose their own kernels: the weight is packed for them as for a large
    batch. :func:`set_packed_weights` takes that back where weights don't change.
    """
    _C.set_batch_invariant(enabled)


@contextlib.contextmanager
def use_batch_invariant(enabled: bool = True) -> Iterator[None]:
    """:func:`set_batch_invariant` for the length of a ``with`` block."""
    before = batch_invariant()
    set_batch_invariant(enabled)
    try:
        yield
    finally:
        set_batch_invariant(before)


class PackedWeights(NamedTuple):
    """What is kept of packed weights now."""

    max_bytes: int  # 0: nothing is to be kept
    bytes: int
    weights: int


def packed_weights() -> PackedWeights:
    """How much may be kept of packed weights, and how much is."""
    return PackedWeights(*_C.packed_weights())


def set_packed_weights(max_bytes: int) -> None:
    """Keep weights packed as kernels read them, for calls without gradients, up to ``max_bytes``.

    For inference with weights that don't change: a call then doesn't pack them again. A weight is
    packed by the first call that takes it, and again after a change that torch counts
    (``weight._version``): in-place operations, optimizers, ``load_state_dict``. **Changes that
    torch doesn't count can't be seen, and the old values go on being used**: those made through
    ``weight.data``, through a NumPy array, a DLPack capsule or a pointer that shares the memory,
    and by other processes. After such a change, call this function with 0 and then with the limit.

    Calls that record gradients and inference tensors (which count no changes) never use packed
    weights. The least recently used go first when the limit is reached; those of tensors that are
    gone go when the next one is packed; all go with a limit of 0, the default.

    Raises:
        ValueError: ``max_bytes`` is negative.
    """
    _C.set_packed_weights(max_bytes)


@contextlib.contextmanager
def use_packed_weights(max_bytes: int) -> Iterator[None]:
    """:func:`set_packed_weights` for the length of a ``with`` block."""
    before = packed_weights().max_bytes
    set_packed_weights(max_bytes)
    try:
        yield
    finally:
        set_packed_weights(before)


def kernels() -> list[Kernel]:
    """All kernels of this build, those of each device in the order in which they are tried."""
    return [
        Kernel(name, device, isa, tuple(dtypes), runnable)
        for name, device, isa, dtypes, runnable in _C.kernels()
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
        + ("" if k.runnable else "  (not on this machine)")
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
