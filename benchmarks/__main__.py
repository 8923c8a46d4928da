"""``python -m benchmarks``: every case beside torch, and ``python -m benchmarks accuracy``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Before torch starts its threads, and for both sides: threads that spin while they wait stall calls
# by milliseconds as soon as anything else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import accuracy, ceilings, measure, report
from benchmarks.cases import all_cases, gpu_cases
from benchmarks.machine import describe
from neuron_ext import backends

_DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
_QUICK_DTYPES = ("f32", "bf16")
_FULL, _QUICK = measure.Effort(seconds=0.8, turn=0.02), measure.Effort(seconds=0.25, turn=0.01)
_OUTPUT = Path("build")

_EPILOG = """\
examples:
  python -m benchmarks --quick                          under a minute
  python -m benchmarks                                  everything, half an hour on 4 cores
  python -m benchmarks --cases 'square/*' --dtypes f32 --threads 1 --no-compile
  python -m benchmarks --device cuda --no-compile       on a GPU
  python -m benchmarks accuracy                         errors beside torch's

OMP_WAIT_POLICY=PASSIVE is set for both sides unless it is set already."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the operations beside eager torch, torch.compile and what this machine "
        "can do at most, or compare their errors with torch's.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", choices=("speed", "accuracy"), default="speed", help="default: speed"
    )
    parser.add_argument("--quick", action="store_true", help="a choice of cases, briefly")
    parser.add_argument(
        "--cases", action="append", metavar="GLOB", help="names to run, e.g. 'square/*/forward'"
    )
    parser.add_argument(
        "--threads",
        action="append",
        metavar="N",
        help="a number or 'all', may be repeated (default: 1 and all)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=tuple(_DTYPES),
        help=f"default: all; with --quick {' and '.join(_QUICK_DTYPES)}",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s"
    )
    parser.add_argument("--large", action="store_true", help="the 4096 cubed products too")
    parser.add_argument(
        "--isa", choices=backends.supported_cpu_isas(), help="kernels up to this instruction set"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile beside eager torch (default: yes, but not with --quick)",
    )
    for kind in ("json", "png"):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            default=_OUTPUT / f"benchmark.{kind}",
            metavar="FILE",
            help="default: %(default)s",
        )
    return parser


def _thread_counts(parser: argparse.ArgumentParser, wanted: Sequence[str] | None) -> list[int]:
    counts = []
    for text in wanted or ("1", "all"):
        if text != "all" and not (text.isdecimal() and int(text)):
            parser.error(f"--threads {text}: expected a number from 1 up, or 'all'")
        counts.append(torch.get_num_threads() if text == "all" else int(text))
    return list(dict.fromkeys(counts))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where ours disagreed with torch, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.isa:
        backends.set_cpu_isa(options.isa)
    dtypes = options.dtypes or (_QUICK_DTYPES if options.quick else tuple(_DTYPES))
    if options.what == "accuracy":
        isas = [options.isa] if options.isa else list(backends.supported_cpu_isas())
        return accuracy.run(isas, [_DTYPES[name] for name in options.dtypes or _DTYPES])

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    threads = _thread_counts(parser, options.threads)
    patterns = options.cases or ["*"]
    cases = [
        case
        for case in (gpu_cases() if on_gpu else all_cases())
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
        and (case.quick or not options.quick)
        and (options.large or not case.on_demand)
    ]
    if not cases:
        parser.error(f"no case is called {' or '.join(patterns)}")

    start = time.perf_counter()
    description = describe()
    print(backends.show_config())
    machine = (
        description["gpu"] if on_gpu else f"{description['cpu']}, {description['cores']} cores"
    )
    print(
        f"{machine}, torch {torch.__version__}, "
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, load {description['load_average']}"
    )
    print("\nmeasuring what this machine can do at most ...", flush=True)
    rounds = 1 if options.quick else 3
    limits = [ceilings.measure_gpu()] if on_gpu else [ceilings.measure(n, rounds) for n in threads]
    print(report.ceilings_table(limits))

    compiled = not options.quick if options.compile is None else options.compile
    effort = _QUICK if options.quick else _FULL
    jobs = [(case, _DTYPES[dtype], limit) for case in cases for dtype in dtypes for limit in limits]
    print(f"\n{report.LEGEND}\n\n{report.HEADING}", flush=True)
    lines: list[measure.Line] = []
    for number, (case, dtype, limit) in enumerate(jobs, 1):
        if sys.stderr.isatty():
            status = f"{number} of {len(jobs)}: {case.name} {report.short(dtype)}"
            print(f"\r\033[K{status}", end="\r", file=sys.stderr, flush=True)
        line = measure.run(case, dtype, limit, effort, compiled, lines, options.device)
        lines.append(line)
        print(("\033[K" if sys.stdout.isatty() else "") + report.row(line), flush=True)

    minutes = (time.perf_counter() - start) / 60
    print(f"\n{report.summary(lines)}")
    if not options.large and not on_gpu:
        print("\nnot run: square/4096, which runs on demand (--large)")
    settings = {
        "quick": options.quick,
        "compile": compiled,
        "seconds": effort.seconds,
        "turn": effort.turn,
        "minutes": minutes,
    }
    report.write_json(options.json, description, settings, limits, lines)
    print(f"\n{minutes:.1f} minutes. {options.json}", end="")
    try:
        title = f"Times faster than eager torch {torch.__version__} (torch/ours)\n" + (
            machine if on_gpu else f"{machine}, {description['isa']}"
        )
        report.draw(options.png, title, lines)
        print(f", {options.png}")
    except ImportError as error:
        print(f"; no picture: {error}")
    return int(any(line.disagrees for line in lines))


if __name__ == "__main__":
    sys.exit(main())
