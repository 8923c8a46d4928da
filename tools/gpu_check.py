"""Everything that needs a GPU, on a machine with one, nvcc, torch and pytest.

    python tools/gpu_check.py [PART ...]

Each part takes a few minutes and stands for itself, but for the build, which comes first; without
arguments all of them run. What each did is added to build/gpu_check/results.json and printed as a
table at the end; its output is in build/gpu_check/PART.log. Exits with 1 where a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "gpu_check"
LIMIT = 8 * 60  # seconds: parts that take longer are cut off

PYTHON = sys.executable
# Shapes of a few tiles: the sanitizer takes a hundred times as long.
SMALL = "test_whole_numbers_are_exact_at_every_edge and (float32 or bfloat16) or test_every_layout"


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    commands: Sequence[Sequence[str]]
    needs: str | None = None  # a program


def _pytest(*args: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "tests/test_cuda.py", *args]


def _sanitizer(tool: str) -> list[str]:
    # Memory that torch keeps for reuse would hide accesses beyond an array's end.
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *_pytest("-k", SMALL)]


def _benchmark(dtype: str) -> Part:
    arguments = ["--device", "cuda", "--no-compile", "--dtypes", dtype]
    files = ["--json", str(OUTPUT / f"benchmark_{dtype}.json")]
    files += ["--png", str(OUTPUT / f"benchmark_{dtype}.png")]
    return Part(
        f"benchmark_{dtype}",
        f"times beside torch, {dtype}",
        [[PYTHON, "-m", "benchmarks", *arguments, *files]],
    )


def _wrappers() -> Part:
    """The emulator's tests, in which each instruction's two bodies meet the same expectations."""
    recipe = runpy.run_path(str(ROOT / "neuron_ext" / "_extension.py"))
    tests = ROOT / "tests" / "cuda_emulator"
    sources = [tests / name for name in ("on_gpu.cu", "test_kernels.cu", "emulator_tests.cpp")]
    folders = [tests, ROOT / "tests" / "cpp", ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"]
    program = OUTPUT / "wrappers"
    command = ["nvcc", *recipe["nvcc_args"](), *(f"-I{path}" for path in folders)]
    command += [f"-I{path}" for path in recipe["include_dirs"]()]
    command += [str(path) for path in [*sources, *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]]
    return Part(
        "wrappers",
        "each instruction beside its emulation",
        [[*command, "-o", str(program)], [str(program)]],
        "nvcc",
    )


PARTS = (
    Part("build", "the extension", [[PYTHON, "setup.py", "build_ext", "--inplace"]]),
    _wrappers(),
    Part("tests", "values, gradients, streams, graphs", [_pytest()]),
    *(
        Part(tool, "compute-sanitizer over small shapes", [_sanitizer(tool)], "compute-sanitizer")
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ),
    *(_benchmark(dtype) for dtype in ("bf16", "f32", "f16", "f64")),
)


def run(part: Part) -> dict[str, Any]:
    """What became of it, for the table and the file."""
    result: dict[str, Any] = {"part": part.name, "what": part.what}
    if part.needs and shutil.which(part.needs) is None:
        return result | {"outcome": "skipped", "last line": f"there is no {part.needs}"}
    environment = os.environ | {
        "NEURON_EXT_CUDA": "1",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1" if part.needs == "compute-sanitizer" else "0",
    }
    log = OUTPUT / f"{part.name}.log"
    start = time.monotonic()
    outcome = "passed"
    with log.open("w") as output:
        for command in part.commands:
            left = LIMIT - (time.monotonic() - start)
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=max(left, 1),
                )
            except subprocess.TimeoutExpired:
                outcome = "cut off"
                break
            if done.returncode != 0:
                outcome = "FAILED"
                break
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return result | {
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "last line": lines[-1] if lines else "",
    }


def machine() -> dict[str, str]:
    query = "name,driver_version,memory.total,clocks.max.sm"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    gpu = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    ask = "import torch; print(torch.__version__)"
    torch = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True).stdout.strip()
    return {"gpu": gpu, "torch": torch, "date": time.strftime("%Y-%m-%d")}


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"parts: {' '.join(names)}"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    wanted = parser.parse_args(argv).parts or names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no part is called {' or '.join(unknown)}")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "results.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    for part in PARTS:
        if part.name not in wanted:
            continue
        print(f"{part.name}: {part.what} ...", flush=True)
        results[part.name] = run(part)
        file.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(f"\n{'part':<18}{'outcome':<10}{'seconds':>8}  last line")
    for result in results.values():
        seconds = result.get("seconds", "")
        print(f"{result['part']:<18}{result['outcome']:<10}{seconds:>8}  {result['last line']}")
    return int(any(results[name]["outcome"] in ("FAILED", "cut off") for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
