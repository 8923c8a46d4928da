"""What the machine can do at most, measured by ceilings.cpp on the threads that a case may use."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks import machine
from neuron_ext import backends

_SOURCE = Path(__file__).with_name("ceilings.cpp")
_SECONDS = 0.06  # of one measurement; the best of _REPEATS counts
_REPEATS = 5
_MOST_MEMORY = 1 << 30
_SIDE_BY_SIDE = 8 * 16 << 10  # bytes that read_side_by_side takes at a time

# glibc's malloc returns results above this to the system, and so does torch.
_FRESH_ABOVE = 32 << 20

# What each instruction set adds to the one before, as compilers name it, and as Linux does.
_FEATURES = {
    "portable": {},
    "avx2": {"avx2": "avx2", "fma": "fma"},
    "avx512": {"avx512f": "avx512f", "avx512bf16": "avx512_bf16"},
    "amx": {"amx-tile": "amx_tile", "amx-bf16": "amx_bf16"},
}
# Per thread: in the first, second and last level of cache. Memory itself comes on top.
_CACHED_BYTES = (16 << 10, 256 << 10, 2 << 20)

_PEAKS = {
    "FMA f32": ("peak_f32", torch.float32),
    "FMA f64": ("peak_f64", torch.float64),
    "AVX512-BF16": ("peak_avx512_bf16", torch.bfloat16),
    "AMX bf16": ("peak_amx_bf16", torch.bfloat16),
}
# Products of bf16 parts that a product of the dtype takes at full accuracy: three parts of f32
# (00 01 10 11 02 20), two of f16, all of whose products f32 sums keep.
_BF16_PRODUCTS = {torch.float32: 6, torch.float16: 4, torch.bfloat16: 1}


@dataclass(frozen=True)
class Work:
    """The least that one call must do, whatever the kernel.

    ``read`` and ``written`` count elements; ``result`` those of the largest tensor that is made.
    ``cold`` says that what is read can't be in a cache.
    """

    flops: float = 0
    read: float = 0
    written: float = 0
    result: float = 0
    cold: bool = False


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second with working sets of ``size`` bytes; a copy moves each byte twice."""

    level: str
    size: int
    read: float
    copy: float


@dataclass(frozen=True)
class Ceilings:
    """Peak rates in operations per second by name, and bandwidths, smallest working set first."""

    threads: int
    peaks: dict[str, float] = field(default_factory=dict)
    bandwidths: list[Bandwidth] = field(default_factory=list)
    fresh: float = 0  # bytes per second of memory that the system hands out, 0 if not measured
    not_measured: dict[str, str] = field(default_factory=dict)  # what, and why

    def least_seconds(self, work: Work, dtype: torch.dtype) -> tuple[float, str]:
        """No call can take less; and what forbids it. (0, "") where nothing was measured."""
        limits = [(0.0, "")]
        if work.flops:
            limits += [(work.flops / rate, name) for name, rate in self._rates(dtype)]
        if self.bandwidths and work.read:
            bandwidth = self._bandwidth(work, dtype)
            seconds = (
                2 * work.written / bandwidth.copy
                + max(work.read - work.written, 0) / bandwidth.read
            ) * dtype.itemsize
            limits.append((seconds, bandwidth.level))
        if self.fresh and work.result * dtype.itemsize > _FRESH_ABOVE:
            limits.append((work.result * dtype.itemsize / self.fresh, "fresh memory"))
        return max(limits)

    def _rates(self, dtype: torch.dtype) -> list[tuple[str, float]]:
        """The fastest engine for the dtype, if any was measured."""
        rates: list[tuple[str, float]] = []
        for name, rate in self.peaks.items():
            if _PEAKS[name][1] is not torch.bfloat16:
                if torch.promote_types(dtype, torch.float32) is _PEAKS[name][1]:
                    rates.append((name, rate))
            elif dtype in _BF16_PRODUCTS:
                products = _BF16_PRODUCTS[dtype]
                rates.append((f"{name} / {products}" if products > 1 else name, rate / products))
        return sorted(rates, key=lambda item: item[1])[-1:]

    def _bandwidth(self, work: Work, dtype: torch.dtype) -> Bandwidth:
        """That of the largest measured working set which isn't larger than the call's."""
        if work.cold:
            return self.bandwidths[-1]
        size = (work.read + work.written) * dtype.itemsize
        fitting = [b for b in self.bandwidths if b.size <= size]
        return fitting[-1] if fitting else self.bandwidths[0]


def measure(threads: int, rounds: int = 1) -> Ceilings:
    """Takes a few seconds a round; whatever can't be measured is named in ``not_measured``.

    The best of all rounds counts: where others use the machine too, seconds go by in which one of
    several threads gets half a core, and all of a round's figures are too low.
    """
    try:
        library = _library()
    except RuntimeError as error:
        return Ceilings(threads, not_measured={"all ceilings": str(error)})
    best, *others = [_measure_once(library, threads) for _ in range(rounds)]
    for other in others:
        best = Ceilings(
            threads,
            {name: max(rate, other.peaks[name]) for name, rate in best.peaks.items()},
            [
                Bandwidth(a.level, a.size, max(a.read, b.read), max(a.copy, b.copy))
                for a, b in zip(best.bandwidths, other.bandwidths, strict=True)
            ],
            max(best.fresh, other.fresh),
            best.not_measured,
        )
    return best


def _measure_once(library: ctypes.CDLL, threads: int) -> Ceilings:
    ceilings = Ceilings(threads, fresh=_measure_fresh(library, threads))
    for name, (function, _) in _PEAKS.items():
        rate = _peak(getattr(library, function), threads)
        if rate:
            ceilings.peaks[name] = rate
        else:
            ceilings.not_measured[name] = f"no such instructions with {backends.cpu_isa()} here"
    memory = min(4 * machine.last_level_cache(), _MOST_MEMORY) // threads // 4096 * 4096
    for size, level in zip((*_CACHED_BYTES, memory), ("L1", "L2", "L3", "memory"), strict=True):
        ceilings.bandwidths.append(_measure_bandwidth(library, level, size, threads))
    return ceilings


def measure_gpu() -> Ceilings:
    """What a copy in the GPU's memory reaches."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    timer = Timer("target.copy_(source)", globals={"target": target, "source": source})
    times = timer.blocked_autorange(min_run_time=_SECONDS)
    rate = 2 * source.nbytes / min(times.times)
    return Ceilings(threads=1, bandwidths=[Bandwidth("memory", 2 * source.nbytes, rate, rate)])


def _library() -> ctypes.CDLL:
    """ceilings.cpp compiled for the instruction set that kernels are chosen for."""
    compiler = machine.compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler: set CXX to one")
    command = [compiler, "-std=c++20", "-O3", "-fPIC", "-shared", *_instruction_flags()]
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "neuron_ext"
    target = folder / f"ceilings-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.so")
        run = subprocess.run([*command, _SOURCE, "-o", partial], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {run.stderr.strip().partition(chr(10))[0]}")
        partial.replace(target)  # at once, should two runs build it
    library = ctypes.CDLL(str(target))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    for function, _ in _PEAKS.values():
        getattr(library, function).argtypes = [size]
        getattr(library, function).restype = ctypes.c_double
    for read in (library.read_memory, library.read_side_by_side):
        read.argtypes = [pointer, size, size]
    library.take_fresh_memory.argtypes = [size, size]
    library.take_fresh_memory.restype = ctypes.c_bool
    for copy in (library.copy_memory, library.copy_memory_past_caches):
        copy.argtypes = [pointer, pointer, size, size]
    return library


def _instruction_flags() -> list[str]:
    """-m flags for the features of the active instruction set and of those before it that are here.

    A name that isn't known stands for all features.
    """
    there = machine.cpu_flags()
    flags = []
    for isa, features in _FEATURES.items():
        flags += [f"-m{flag}" for flag, feature in features.items() if feature in there]
        if isa == backends.cpu_isa():
            break
    return flags


def _best_seconds(call: Callable[[int, int], object], threads: int) -> tuple[float, int]:
    """Calls ``call(thread, passes)`` on all threads at once, with enough passes to measure.

    Returns the least seconds from the first start to the last end, and the passes.
    """
    barrier = threading.Barrier(threads)

    def run(thread: int, passes: int) -> tuple[float, float]:
        barrier.wait()
        start = time.perf_counter()
        call(thread, passes)
        return start, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:

        def seconds(passes: int) -> float:
            spans = list(pool.map(run, range(threads), [passes] * threads))
            return max(end for _, end in spans) - min(start for start, _ in spans)

        passes = 1
        while (taken := seconds(passes)) < _SECONDS / 8:
            passes *= 4
        passes = max(1, round(passes * _SECONDS / taken))
        return min(seconds(passes) for _ in range(_REPEATS)), passes


def _peak(function: Callable[[int], float], threads: int) -> float:
    """Operations per second of all threads together; 0 where there are no such instructions."""
    operations = function(1)
    if not operations:
        return 0
    seconds, passes = _best_seconds(lambda thread, passes: function(passes), threads)
    return operations * passes * threads / seconds


def _measure_bandwidth(library: ctypes.CDLL, level: str, size: int, threads: int) -> Bandwidth:
    """``size`` is per thread. A copy reads from one half of it and writes to the other."""
    buffers = [torch.empty(size // 8, dtype=torch.int64).random_() for _ in range(threads)]
    starts = [buffer.data_ptr() for buffer in buffers]
    middles = [start + size // 2 for start in starts]

    def read(thread: int, passes: int) -> None:
        library.read_memory(starts[thread], size, passes)

    whole = size // _SIDE_BY_SIDE * _SIDE_BY_SIDE

    def read_side_by_side(thread: int, passes: int) -> None:
        library.read_side_by_side(starts[thread], whole, passes)

    def copy(thread: int, passes: int) -> None:
        library.copy_memory(starts[thread], middles[thread], size // 2, passes)

    def copy_past_caches(thread: int, passes: int) -> None:
        library.copy_memory_past_caches(starts[thread], middles[thread], size // 2, passes)

    def rate(call: Callable[[int, int], object], moved: int = size) -> float:
        seconds, passes = _best_seconds(call, threads)
        return moved * threads * passes / seconds

    reads = [rate(read)]
    if whole > 0:
        reads.append(rate(read_side_by_side, whole))
    return Bandwidth(level, size * threads, max(reads), max(rate(copy), rate(copy_past_caches)))


def _measure_fresh(library: ctypes.CDLL, threads: int) -> float:
    size = 2 * _FRESH_ABOVE // threads
    if not library.take_fresh_memory(size, 1):
        return 0
    seconds, passes = _best_seconds(
        lambda thread, passes: library.take_fresh_memory(size, passes), threads
    )
    return size * threads * passes / seconds
