"""Compiles the CUDA kernels for every target and looks at what became of them. Needs no GPU.

    python tools/cuda_gate.py [FILE.cu ...]

Fails on any warning, on spilled registers and other local memory, on what ptxas says of wgmmas
that it had to serialise, and where a kernel isn't made of the instructions that it is meant for
(EXPECTED). nvcc and the disassembler are those of the machine; what is missing comes from PyPI,
into build/cuda_tools. Where that fails too, nothing is checked, and the last line says why.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECIPE: dict[str, Any] = runpy.run_path(str(ROOT / "neuron_ext" / "_extension.py"))
PYPI_TOOLS = ROOT / "build" / "cuda_tools"
# The versions of the toolkit that torch is built with; the disassemblers begin later, and read it.
PYPI_COMPILER = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-nvvm==13.0.*",
)
PYPI_DISASSEMBLER = ("nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*")


class Expected(NamedTuple):
    """Of every kernel whose name contains `kernel`, compiled for `target`."""

    kernel: str
    target: str
    needs: tuple[str, ...]  # beginnings of instructions
    forbids: tuple[str, ...] = ()


EXPECTED = tuple(
    Expected(kernel, target, needs)
    for kernel, targets, needs in (
        ("map_contiguous<", ("sm_80", "sm_90a"), ("LDG.E.128", "STG.E.128")),
        ("gemm_narrow_along_kernel<", ("sm_80", "sm_90a"), ("HMMA", "LDG.E.128")),
        ("gemm_narrow_across_kernel<", ("sm_80", "sm_90a"), ("HMMA", "LDG.E.128")),
        ("gemv_along_kernel<", ("sm_80", "sm_90a"), ("LDG.E.128",)),
        ("gemv_across_kernel<", ("sm_80", "sm_90a"), ("LDG.E.128",)),
        ("gemm_simt_kernel<float, 2>", ("sm_80", "sm_90a"), ("FFMA", "LDS.128")),
        ("gemm_simt_kernel<double, 2>", ("sm_80", "sm_90a"), ("DFMA", "LDS.128")),
        (
            "gemm_sm80_kernel<neuron_ext::",  # of 16 bits
            ("sm_80", "sm_90a"),
            ("LDGSTS.E.BYPASS", "LDSM", "HMMA.16816", "STG.E.128"),
        ),
        ("gemm_sm80_kernel<float,", ("sm_80", "sm_90a"), ("LDGSTS.E.BYPASS", "HMMA", "STG.E.128")),
        ("gemm_sm80_kernel<double,", ("sm_80", "sm_90a"), ("LDGSTS.E.BYPASS", "DMMA", "STG.E.128")),
        (
            "gemm_sm90_kernel<",
            ("sm_90a",),
            ("HGMMA", "UTMALDG", "LDG.E.128", "LDSM", "STSM", "UTMASTG"),
        ),
        ("gemm_sm90_f32_kernel<", ("sm_90a",), ("HGMMA", "UTMALDG", "SHFL.BFLY")),
        ("mlp_sm80_kernel<", ("sm_80", "sm_90a"), ("HMMA", "LDGSTS", "LDG.E.128", "STG.E.128")),
        ("mlp_sm80_kernel<neuron_ext::BFloat16, 128, true>", ("sm_80", "sm_90a"), ("SHFL.BFLY",)),
        (
            "mlp_sm90_f32_kernel<",
            ("sm_90a",),
            ("HGMMA", "LDG.E.128", "STG.E.128", "LDS.128", "FFMA"),
        ),
        ("mlp_simt_kernel<Tile<float", ("sm_80", "sm_90a"), ("FFMA", "LDS.128", "STG.E.128")),
        ("mlp_simt_kernel<Tile<double", ("sm_80", "sm_90a"), ("DFMA", "LDS.128", "STG.E.128")),
        ("split_kernel<", ("sm_80", "sm_90a"), ("STG.E.128",)),
        ("prologue_kernel<", ("sm_80", "sm_90a"), ("LDG.E.128", "STG.E.128")),
    )
    for target in targets
)

# What must be in no kernel: loads and stores of local memory, that is of spilled registers, and of
# arrays whose index the compiler doesn't know.
LOCAL_MEMORY = ("LDL", "STL")

# Instructions worth a column of the report: matrix products, copies, and the widest accesses.
NOTABLE = (
    *("HGMMA", "HMMA", "DMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDSM", "STSM"),
    *("LDG.E.128", "STG.E.128", "LDS.128", "MUFU", "LDL", "STL"),
)

# Wgmmas that ptxas serialises: of registers in use, calls, branches, or unknown descriptors.
SERIALISED = re.compile(r"\bC75(08|10|11|14|17)\b|Potential Performance Loss")


class MissingError(Exception):
    """There is no compiler or disassembler, and none can be had."""


@dataclass
class Kernel:
    """A function for one target, as ptxas and the disassembler describe it."""

    name: str
    target: str
    registers: int = 0
    stack: int = 0
    spilled: int = 0  # bytes stored and loaded
    shared: int = 0  # bytes, static
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, beginning: str) -> int:
        return sum(
            n
            for instruction, n in self.instructions.items()
            if instruction == beginning or instruction.startswith(beginning + ".")
        )

    @property
    def is_empty(self) -> bool:
        """Whether it only returns: a kernel of another target's instructions."""
        return set(self.instructions) <= {"EXIT", "BRA", "NOP", "LDC", "MOV", "IMAD.MOV.U32"}


# ---- tools ---------------------------------------------------------------------------------------


def install(program: str, packages: Sequence[str]) -> Path:
    """Gets NVIDIA's wheels; returns the folder of the program."""
    folder = PYPI_TOOLS / program
    bin = folder / "nvidia" / "cu13" / "bin"
    if not (bin / program).exists():
        print(f"from PyPI: {' '.join(packages)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(folder), *packages])
    if not (bin / program).exists():
        raise MissingError(f"there is no {program} on this machine, and pip can't install one")
    return bin


def find_compiler() -> Path:
    try:
        return Path(RECIPE["find_toolkit"]().nvcc())
    except ValueError:
        return install("nvcc", PYPI_COMPILER) / "nvcc"


def find_disassembler(nvcc: Path) -> Path:
    """The folder of cuobjdump, which calls nvdisasm."""
    path = os.pathsep.join([str(nvcc.parent), os.environ["PATH"]])
    cuobjdump, nvdisasm = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump and nvdisasm:
        return Path(cuobjdump).parent
    return install("cuobjdump", PYPI_DISASSEMBLER)


# ---- compiling and reading -----------------------------------------------------------------------


def compile_and_read(
    source: Path, nvcc: Path, disassembler: Path, folder: Path
) -> tuple[list[Kernel], list[str]]:
    """The kernels of a source file, and what the compilers complain of."""
    compiled = folder / f"{source.stem}.o"
    command = [str(nvcc), *RECIPE["nvcc_args"](), *(f"-I{d}" for d in RECIPE["include_dirs"]())]
    command += ["-Werror=all-warnings", "-Xcompiler=-Werror", "-Xptxas=-v,--warn-on-spills"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(compiled)], capture_output=True, text=True
    )
    said = (done.stdout + done.stderr).splitlines()
    complaints = [line for line in said if SERIALISED.search(line) or "warning" in line.lower()]
    if done.returncode != 0:
        return [], [line for line in said if "error" in line.lower()] or ["nvcc failed"]

    kernels = {(kernel.name, kernel.target): kernel for kernel in read_ptxas(said)}
    path = os.pathsep.join([str(disassembler), os.environ["PATH"]])
    sass = subprocess.run(
        [disassembler / "cuobjdump", "-sass", compiled],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name, target, instruction in read_sass(sass.stdout.splitlines()):
        kernels[name, target].instructions[instruction] += 1
    return list(kernels.values()), complaints


def read_ptxas(lines: Sequence[str]) -> Iterator[Kernel]:
    kernel = None
    for line in lines:
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel = Kernel(match[1], match[2])
            yield kernel
        elif kernel is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            kernel.stack, kernel.spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            if match := re.search(r"(\d+) bytes smem", line):
                kernel.shared = int(match[1])


def read_sass(lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(function, target, instruction with its modifiers) for every instruction."""
    target = function = ""
    for line in lines:
        if match := re.match(r"\s*code for (\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line):
            yield function, target, match[1]


def readable(names: Sequence[str]) -> list[str]:
    """Demangled, without namespaces, return type and parameters."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True
    )
    scope = re.compile(r"neuron_ext::cuda::(?:\(anonymous namespace\)::|_GLOBAL__N__\w+::)?")
    return [re.sub(r"^void |\(.*$", "", scope.sub("", name)) for name in done.stdout.splitlines()]


# ---- judging -------------------------------------------------------------------------------------


def faults(kernel: Kernel) -> list[str]:
    found = []
    if kernel.spilled:
        found.append(f"spills {kernel.spilled} bytes")
    for instruction in LOCAL_MEMORY:
        if kernel.count(instruction):
            found.append(f"uses local memory: {kernel.count(instruction)} {instruction}")
    for expected in EXPECTED:
        if expected.kernel not in kernel.name or expected.target != kernel.target:
            continue
        found += [f"has no {name}" for name in expected.needs if not kernel.count(name)]
        found += [f"has {name}" for name in expected.forbids if kernel.count(name)]
    return found


def unmet(kernels: Sequence[Kernel]) -> list[str]:
    """Expectations of kernels that aren't there."""
    return [
        f"there is no kernel named {expected.kernel} for {expected.target}"
        for expected in EXPECTED
        if not any(expected.kernel in k.name and expected.target == k.target for k in kernels)
    ]


def report(kernels: Sequence[Kernel]) -> None:
    print("target  registers  shared  stack  spilled  size  kernel: notable instructions")
    for kernel in sorted(kernels, key=lambda k: (k.name, k.target)):
        if kernel.is_empty:
            continue
        notable = ", ".join(f"{kernel.count(n)} {n}" for n in NOTABLE if kernel.count(n))
        print(
            f"{kernel.target:<8}{kernel.registers:>9}{kernel.shared:>8}{kernel.stack:>7}"
            f"{kernel.spilled:>9}{kernel.instructions.total():>6}  {kernel.name}: {notable}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: all of csrc/cuda")
    sources = parser.parse_args(argv).sources
    everything = not sources
    sources = sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        nvcc = find_compiler()
        disassembler = find_disassembler(nvcc)
    except MissingError as missing:
        print(f"SKIPPED: {missing}")
        return 0

    print(f"{nvcc}, {disassembler}/cuobjdump", flush=True)
    kernels: list[Kernel] = []
    failures: list[str] = []
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        todo = {
            pool.submit(compile_and_read, source, nvcc, disassembler, Path(folder)): source
            for source in sources
        }
        for done in concurrent.futures.as_completed(todo):
            found, complaints = done.result()
            kernels += found
            failures += [f"{todo[done].name}: {complaint}" for complaint in complaints]
    for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=True):
        kernel.name = name
    report(kernels)
    failures += [f"{k.name} for {k.target} {fault}" for k in kernels for fault in faults(k)]
    failures += unmet(kernels) if everything else []
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{len(sources)} files, {len(kernels)} kernels, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
