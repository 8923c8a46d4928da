"""What ``neuron_ext._C`` is built from and how: one answer for setup.py and ``neuron_ext.jit``.

Standard library only: setup.py and build_backend run this file by its path, before there is a
package or a torch to import.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 15)
TORCH = "torch>=2.11,<2.16"  # the same as a requirement

# What CUDA kernels are compiled for: A100 and what runs its code, H100 and H200, and PTX for the
# GPUs to come. Given as flags, they also keep torch from looking for a GPU to compile for.
CUDA_TARGETS = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
)


def version() -> str:
    """``__version__`` of ``neuron_ext/__init__.py``, read without importing it."""
    text = (ROOT / "neuron_ext" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("neuron_ext/__init__.py doesn't set __version__")
    return match[1]


def sources(cuda: bool) -> list[Path]:
    """Every file that is compiled. CMakeLists.txt has the same patterns."""
    patterns = ["cpu/*.cpp", "torch/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else [])]
    return sorted(path for pattern in patterns for path in CSRC.glob(pattern))


def include_dirs() -> list[Path]:
    return [CSRC / "include"]


def digest() -> str:
    """Names the state of csrc, so that a ``_C`` built from another one can be noticed."""
    state = hashlib.sha256()
    for path in sorted(CSRC.rglob("*.*")):
        if path.suffix in {".h", ".cpp", ".cuh", ".cu"}:
            state.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def compile_args(cuda: bool) -> list[str]:
    """Flags for the C++ compiler. Tested on Linux only.

    No -m flag: the sources say themselves which instruction sets they need. No fused multiply-add
    that the source doesn't ask for: results must not depend on the compiler's choice. -g0 undoes a
    -g among Python's own flags, which makes the library four times larger. Hidden symbols call each
    other directly, and may be inlined: one neuron takes 0.08 us less.
    """
    defines = [f"NEURON_EXT_VERSION={version()}", *(["NEURON_EXT_WITH_CUDA"] if cuda else [])]
    if sys.platform == "win32":
        flags = ["/std:c++20", "/O2", "/openmp", "/W3", "/fp:precise"]
        return [*flags, *(f"/D{define}" for define in defines)]
    openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", *openmp]
    flags += ["-Wall", "-Wextra"]
    return [*flags, *(f"-D{define}" for define in defines)]


def nvcc_args() -> list[str]:
    """Flags for nvcc.

    No fused multiply-add either that the source doesn't ask for. The defines are those that torch
    gives to every extension: with them, 16-bit types have no operators.
    """
    return [
        "-std=c++20",
        "-O3",
        "-fmad=false",
        "-Xcompiler=-fPIC,-ffp-contract=off,-Wall,-Wextra",
        "-D__CUDA_NO_HALF_OPERATORS__",
        "-D__CUDA_NO_HALF_CONVERSIONS__",
        "-D__CUDA_NO_HALF2_OPERATORS__",
        "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
        "--expt-relaxed-constexpr",
        *CUDA_TARGETS,
    ]


def cuda_link_args(toolkit: Toolkit) -> list[str]:
    """For the linker: the CUDA runtime, and no other of its libraries."""
    return [str(toolkit.runtime())]


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


# ---- CUDA ---------------------------------------------------------------------------------------


class Toolkit(NamedTuple):
    """CUDA's compiler and libraries."""

    home: Path
    version: str  # of nvcc: "13.0"

    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    def runtime(self) -> Path | None:
        """libcudart.so, in lib64 of NVIDIA's installers; in their wheels lib/libcudart.so.13."""
        folders = (self.home / name for name in ("lib64", "lib"))
        return next((path for f in folders for path in sorted(f.glob("libcudart.so*"))), None)


class CudaDecision(NamedTuple):
    """What the CUDA kernels are built with, if they are, and a line that says so or why not."""

    toolkit: Toolkit | None
    line: str


def decide_cuda(torch: ModuleType) -> CudaDecision:
    """Whether to build the CUDA kernels.

    NEURON_EXT_CUDA=0 never builds them; 1 does, or raises ValueError; unset does where that works.
    """
    wish = os.environ.get("NEURON_EXT_CUDA")
    if wish not in (None, "0", "1"):
        raise ValueError(f"NEURON_EXT_CUDA must be 0, 1 or unset, not {wish!r}")
    if wish == "0":
        return CudaDecision(None, "CPU only: NEURON_EXT_CUDA=0")
    try:
        toolkit = find_toolkit_for(torch)
    except ValueError as obstacle:
        if wish == "1":
            raise ValueError(f"NEURON_EXT_CUDA=1, but {obstacle}") from None
        return CudaDecision(None, f"CPU only: {obstacle}")
    return CudaDecision(toolkit, f"CPU and CUDA: nvcc {toolkit.version} in {toolkit.home}")


def find_toolkit_for(torch: ModuleType) -> Toolkit:
    """The toolkit to build with; raises ValueError, which says what is missing, without one."""
    if not any(CSRC.glob("cuda/*.cu")):
        raise ValueError("this version has no CUDA kernels")
    if torch.version.cuda is None:
        raise ValueError(f"torch {torch.__version__} is not a CUDA build")
    if sys.platform != "linux":
        raise ValueError("CUDA kernels are built on Linux only")
    toolkit = find_toolkit()
    if toolkit.version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        raise ValueError(
            f"nvcc in {toolkit.home} is of CUDA {toolkit.version}, and torch {torch.__version__} "
            f"was built with CUDA {torch.version.cuda}: the major versions must agree (set "
            "CUDA_HOME to another toolkit)"
        )
    check_toolkit(toolkit)
    return toolkit


def find_toolkit() -> Toolkit:
    """Where nvcc says its toolkit is: an nvcc on PATH may be a script or a link to it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if homes:
        nvcc = Path(homes[0], "bin", "nvcc")
    else:
        nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not nvcc.exists():
        where = f"CUDA_HOME ({homes[0]}) has no bin/nvcc" if homes else "there is no nvcc on PATH"
        raise ValueError(f"{where}; CUDA_HOME must be the folder of a CUDA toolkit")
    top = re.search(r"TOP=(.+)", _output_of(nvcc, "--dryrun", "-c", "kernel.cu"))
    release = re.search(r"release (\d+\.\d+)", _output_of(nvcc, "--version"))
    if top is None or release is None:
        raise ValueError(f"{nvcc} doesn't say where its toolkit is; set CUDA_HOME")
    return Toolkit(Path(top[1].strip()).resolve(), release[1])


def check_toolkit(toolkit: Toolkit) -> None:
    """Raises ValueError where a kernel can't be compiled, or not be linked.

    Only trying shows whether all of a toolkit is installed and takes this C++ compiler.
    """
    headers = ("cuda.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h")
    kernel = "".join(f"#include <{name}>\n" for name in headers) + "__global__ void kernel() {}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(kernel)
        command = [str(toolkit.nvcc()), *nvcc_args(), "-c", str(source)]
        tried = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if tried.returncode != 0:
        lines = [line for line in (tried.stderr + tried.stdout).splitlines() if "error" in line]
        why = lines[0] if lines else f"exit status {tried.returncode}"
        raise ValueError(f"nvcc in {toolkit.home} can't compile an empty kernel: {why}")
    if toolkit.runtime() is None:
        raise ValueError(f"there is no libcudart.so in {toolkit.home}/lib64 or lib to link with")


def _output_of(nvcc: Path, *args: str) -> str:
    try:
        done = subprocess.run([nvcc, *args], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{nvcc} doesn't run: {error}") from None
    return done.stdout + done.stderr


def build_info(torch: ModuleType) -> str:
    """The text of ``_build_info.py``: what must be known of a ``_C`` before it can be imported."""
    cuda = decide_cuda(torch).toolkit is not None
    return (
        '"""Written when neuron_ext._C was built."""\n\n'
        f'VERSION = "{version()}"\n'
        f'SOURCES = "{digest()}"\n'
        f'TORCH_VERSION = "{torch.__version__}"\n'
        f"CUDA = {cuda}\n"
    )
