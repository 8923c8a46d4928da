"""What results are worth nothing without: which machine, which software, which settings."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from neuron_ext import _C, __version__, backends
from neuron_ext.cli.machine import cpu_name

_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "hypervisor",
)
_ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "NEURON_EXT_", "LD_P")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 64 << 20


def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _caches() -> dict[str, str]:
    def entry(index: Path, name: str) -> str:
        return (index / name).read_text().strip()

    try:
        return {
            f"L{entry(index, 'level')} {entry(index, 'type').lower()}": entry(index, "size")
            for index in sorted(_CACHES.glob("index*"))
        }
    except OSError:
        return {}


def last_level_cache() -> int:
    """Bytes; a large guess where the system doesn't say."""
    sizes = [int(size[:-1]) << 10 for size in _caches().values() if size.endswith("K")]
    return max(sizes, default=_UNKNOWN_CACHE)


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that can be taken without swapping, where the system says."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def compiler() -> str | None:
    """The C++ compiler's path: CXX, or what is usual."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _first_line(*command: str) -> str | None:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.partition("\n")[0]


def describe() -> dict[str, Any]:
    """For the JSON file; everything in it is text, a number or a collection of such."""
    cxx = compiler()
    flags = cpu_flags()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores(),
        "gpu": gpu_name(),
        "caches": _caches(),
        "memory_available": available_memory(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_config": re.sub(r"CXX_COMPILER=\S*/", "CXX_COMPILER=", torch.__config__.show()),
        "neuron_ext": __version__,
        "neuron_ext_commit": _first_line("git", "describe", "--always", "--dirty"),
        "neuron_ext_build": dict(_C.build_info()),
        "isa": backends.cpu_isa(),
        "compiler": _first_line(cxx, "--version") if cxx else None,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
        },
    }
