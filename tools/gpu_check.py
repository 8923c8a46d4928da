"""Everything that needs a GPU, on a machine with one, nvcc, torch and pytest.

    python tools/gpu_check.py [--minutes N] [PART ...]

Each part takes a few minutes and stands for itself, but for the build, which comes first; without
arguments all of them run. What each did is added to build/gpu_check/results.json and printed as a
table at the end; its output is in build/gpu_check/PART.log. Exits with 1 where a part failed.

On a machine that is there for some minutes at a time, for example:

    python tools/gpu_check.py --minutes 9 build wrappers tests; tar czf out.tgz build/gpu_check
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import runpy
import shutil
import signal
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
RECIPE: dict[str, Any] = runpy.run_path(str(ROOT / "neuron_ext" / "_extension.py"))
# Shapes of a few tiles: the sanitizer takes a hundred times as long.
SMALL = (
    "test_whole_numbers_are_exact_at_every_edge and (float32 or bfloat16) or test_every_layout"
    " or test_layer_and_gradients and several and (float32 or bfloat16)"
    " or test_stack_and_gradients and (4-5-7-3 or 64-64-64-64-64) and (float32 or bfloat16)"
)


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    commands: Sequence[Sequence[str]]
    needs: str | None = None  # a program


def _pytest(*args: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "tests/test_cuda.py", *args]


def _sanitizer(tool: str) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", "1"]
    if tool != "initcheck":  # which must see what torch's kernels write
        options += ["--kernel-regex", "kns=neuron_ext"]
    if tool == "memcheck":  # drivers are asked for functions that they may not have
        options += ["--report-api-errors", "no"]
    return ["compute-sanitizer", *options, *_pytest("-k", SMALL)]


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
    tests = ROOT / "tests" / "cuda_emulator"
    sources = [tests / name for name in ("on_gpu.cu", "test_kernels.cu", "emulator_tests.cpp")]
    sources.append(ROOT / "csrc" / "cpu" / "reference.cpp")
    folders = [tests, ROOT / "tests" / "cpp", ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"]
    program = OUTPUT / "wrappers"
    command = ["nvcc", *RECIPE["nvcc_args"]()]
    command += [f"-I{path}" for path in [*folders, *RECIPE["include_dirs"]()]]
    command += [str(path) for path in sources]
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


def environment_of(part: Part) -> dict[str, str]:
    """With the programs of this Python and of CUDA's toolkit."""
    folders = [str(Path(PYTHON).parent), os.environ.get("PATH", os.defpath)]
    with contextlib.suppress(ValueError):
        folders.append(str(RECIPE["find_toolkit"]().home / "bin"))
    environment = os.environ | {"NEURON_EXT_CUDA": "1", "PATH": os.pathsep.join(folders)}
    if part.needs == "compute-sanitizer":
        # Memory that torch keeps for reuse would hide accesses beyond an array's end. (Any value
        # sets this in some versions of torch, 0 too.)
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def run(part: Part, seconds: float) -> dict[str, Any]:
    """What became of it, for the table and the file."""
    result: dict[str, Any] = {"part": part.name, "what": part.what}
    environment = environment_of(part)
    if part.needs and shutil.which(part.needs, path=environment["PATH"]) is None:
        return result | {"outcome": "skipped", "last line": f"there is no {part.needs}"}
    log = OUTPUT / f"{part.name}.log"
    start = time.monotonic()
    outcome = "passed"
    with log.open("w") as output:
        for command in part.commands:
            # A process group, so that what it started ends with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(seconds - (time.monotonic() - start), 1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                outcome = "cut off"
                break
            if code != 0:
                outcome = "FAILED"
                break
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return result | {
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "last line": lines[-1] if lines else "",
    }


def machine() -> dict[str, str]:
    ask = "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    asked = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True).stdout
    torch, _, gpu = asked.strip().partition(" ")
    smi = shutil.which("nvidia-smi")
    query = ["--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    says = subprocess.run([smi, *query], capture_output=True, text=True).stdout if smi else ""
    return {
        "gpu": gpu,
        "driver, memory, clock": says.strip(),
        "torch": torch,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"parts: {' '.join(names)}"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="for all of them (default: 8 for each)"
    )
    options = parser.parse_args(argv)
    wanted = options.parts or names
    end = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no part is called {' or '.join(unknown)}")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "results.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    here = machine()
    print(json.dumps(here), flush=True)
    left = []
    for part in PARTS:
        if part.name not in wanted:
            continue
        seconds = min(LIMIT, end - time.monotonic())
        if seconds <= 0:
            left.append(part.name)
            continue
        print(f"{part.name}: {part.what} ...", flush=True)
        results[part.name] = run(part, seconds)
        file.write_text(json.dumps({"machine": here, "results": results}, indent=1) + "\n")
    print(f"\n{'part':<18}{'outcome':<10}{'seconds':>8}  last line")
    for result in results.values():
        print(
            f"{result['part']:<18}{result['outcome']:<10}{result.get('seconds', ''):>8}  "
            f"{result['last line']}"
        )
    if left:
        print(f"no time left for {' '.join(left)}")
    done = [results[name]["outcome"] for name in wanted if name not in left]
    return int(bool(left) or any(outcome in ("FAILED", "cut off") for outcome in done))


if __name__ == "__main__":
    sys.exit(main())
