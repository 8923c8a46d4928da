"""What ``neuron_ext._C`` is built from and how: one answer for setup.py and ``neuron_ext.jit``.

Standard library only: setup.py and build_backend run this file by its path, before there is a
package or a torch to import.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 15)
TORCH = "torch>=2.11,<2.16"  # the same as a requirement


def version() -> str:
    """``__version__`` of ``neuron_ext/__init__.py``, read without importing it."""
    text = (ROOT / "neuron_ext" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("neuron_ext/__init__.py doesn't set __version__")
    return match[1]


def sources() -> list[Path]:
    """Every file that is compiled. CMakeLists.txt has the same two patterns."""
    return sorted([*CSRC.glob("cpu/*.cpp"), *CSRC.glob("torch/*.cpp")])


def include_dirs() -> list[Path]:
    return [CSRC / "include"]


def digest() -> str:
    """Names the state of csrc, so that a ``_C`` built from another one can be noticed."""
    state = hashlib.sha256()
    for path in sorted(CSRC.rglob("*.*")):
        if path.suffix in {".h", ".cpp", ".cuh", ".cu"}:
            state.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def compile_args() -> list[str]:
    """Flags for the C++ compiler. Tested on Linux only.

    No -m flag: the sources say themselves which instruction sets they need. No fused multiply-add
    that the source doesn't ask for: results must not depend on the compiler's choice. -g0 undoes a
    -g among Python's own flags, which makes the library four times larger.
    """
    define = f"NEURON_EXT_VERSION={version()}"
    if sys.platform == "win32":
        return ["/std:c++20", "/O2", "/openmp", "/W3", "/fp:precise", f"/D{define}"]
    openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    warnings = ["-Wall", "-Wextra"]
    return ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", *openmp, *warnings, f"-D{define}"]


def torch_minor(torch_version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu": what an extension's ABI depends on."""
    major, minor = re.findall(r"\d+", torch_version)[:2]
    return int(major), int(minor)


def check_torch(torch_version: str) -> None:
    """Raises ValueError where neuron_ext doesn't support this torch."""
    if not OLDEST_TORCH <= torch_minor(torch_version) <= NEWEST_TORCH:
        raise ValueError(
            f"torch {torch_version} is installed and neuron_ext supports {TORCH}: install one of "
            "those, or uninstall torch and let pip fetch one"
        )


def minor_requirement(torch_version: str) -> str:
    """The torch versions that a ``_C`` built against this one can be imported with."""
    major, minor = torch_minor(torch_version)
    return f"torch=={major}.{minor}.*"


def decide_cuda(torch: ModuleType) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and a line that says so and why.

    NEURON_EXT_CUDA=0 never builds them; 1 does, or raises ValueError; unset does where that works.
    """
    wish = os.environ.get("NEURON_EXT_CUDA")
    if wish not in (None, "0", "1"):
        raise ValueError(f"NEURON_EXT_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0":
        return False, "CPU only: NEURON_EXT_CUDA=0"
    obstacles = cuda_obstacles(torch)
    if obstacles and wish == "1":
        raise ValueError("NEURON_EXT_CUDA=1, but " + "; ".join(obstacles))
    if obstacles:
        return False, "CPU only: " + "; ".join(obstacles)
    return True, f"CPU and CUDA {torch.version.cuda}"


def cuda_obstacles(torch: ModuleType) -> list[str]:
    """What is missing for building CUDA kernels."""
    from torch.utils.cpp_extension import CUDA_HOME

    obstacles = []
    if not any(CSRC.glob("cuda/*.cu")):
        obstacles.append("this version has no CUDA kernels")
    if torch.version.cuda is None:
        obstacles.append(f"torch {torch.__version__} is not a CUDA build")
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        obstacles.append(f"CUDA_HOME ({CUDA_HOME}) has no bin/nvcc")
    return obstacles


def build_info(torch: ModuleType) -> str:
    """The text of ``_build_info.py``: what must be known of a ``_C`` before it can be imported."""
    cuda, _ = decide_cuda(torch)
    return (
        '"""Written when neuron_ext._C was built."""\n\n'
        f'VERSION = "{version()}"\n'
        f'SOURCES = "{digest()}"\n'
        f'TORCH_VERSION = "{torch.__version__}"\n'
        f"CUDA = {cuda}\n"
    )
