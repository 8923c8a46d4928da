"""Times calls beside each other, in turns, so that a disturbance of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch._functorch import config as functorch_config
from torch.utils.benchmark import Measurement, Timer

from benchmarks import machine
from benchmarks.cases import Call, Case, Function, Problem
from benchmarks.ceilings import Ceilings
from neuron_ext import backends

NOISY = 0.1  # interquartile range over median
_IF_NOISY = 3  # times as long for a line of which a side is: medians settle
_LEAST_ROUNDS = 3
_MOST_SECONDS = 15.0  # of one line, however slow: then even fewer rounds will do
_MOST_EXPECTED = 20.0  # seconds that torch may need for a call, as its last line of the kind says
_SLOW = 3.0  # seconds: a call that takes longer isn't repeated, nor compiled
_ELEMENTS_AT_ONCE = 4  # of memory for each one read or written: two sides, inputs and results

# Largest difference of ours from torch's, relative to torch's largest value: a wrong answer in no
# time isn't worth timing. How exact the answers are is another question: see accuracy.py.
_AGREEMENT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Effort:
    """How long to time a line in all, and one side before it's the others' turn."""

    seconds: float
    turn: float


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    median: float
    quarter: float  # the interquartile range
    least: float
    count: int  # of measurements, each of many calls where a call is short


@dataclass
class Line:
    """Case, dtype and threads, with the times of each side: ours, torch, and torch compiled."""

    case: Case
    dtype: torch.dtype
    threads: int
    times: dict[str, Times] = field(default_factory=dict)
    kernel: str = ""
    least_seconds: float = 0  # that the ceilings allow
    ceiling: str = ""
    not_run: dict[str, str] = field(default_factory=dict)  # sides and why
    disagrees: bool = False

    def ratio(self, side: str = "torch") -> float | None:
        """Above 1 where ours is faster than ``side``."""
        if side not in self.times or "ours" not in self.times:
            return None
        return self.times[side].median / self.times["ours"].median

    @property
    def spread(self) -> float:
        """The larger interquartile range of ours and torch's, relative to the median."""
        return max(self.times[side].quarter / self.times[side].median for side in ("ours", "torch"))


def _expected_seconds(lines: Sequence[Line], case: Case, dtype: torch.dtype, threads: int) -> float:
    """Of a call of torch, at the speed of the last case of the family; 0 where there was none."""
    kind = (case.family, case.direction, dtype, threads)
    for line in reversed(lines):
        last = (line.case.family, line.case.direction, line.dtype, line.threads)
        if last == kind and line.times and line.case.work.flops:
            return line.times["torch"].median * case.work.flops / line.case.work.flops
    return 0


def _compile(function: Function) -> Function:
    # A backward pass that is repeated can't overwrite what it reads.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def _autotune(function: Function) -> Function:
    return torch.compile(
        function,
        dynamic=False,
        fullgraph=True,
        options={"max_autotune": True, "freezing": True},
    )


def run(
    case: Case,
    dtype: torch.dtype,
    ceilings: Ceilings,
    effort: Effort,
    compiled: bool,
    before: Sequence[Line] = (),
    device: str = "cpu",
) -> Line:
    """One line. What can't be run is named in it, and nothing is raised.

    ``before`` are lines already run, by which torch may turn out to be too slow to wait for.
    """
    line = Line(case, dtype, ceilings.threads)
    expected = _expected_seconds(before, case, dtype, ceilings.threads)
    if expected > _MOST_EXPECTED:
        line.not_run["ours"] = f"torch would take about {expected:.0f} s a call"
        return line
    needed = _ELEMENTS_AT_ONCE * (case.work.read + case.work.written) * dtype.itemsize
    available = machine.available_memory(device)
    if available is not None and needed > available:
        line.not_run["ours"] = f"needs {needed / 2**30:.1f} GiB of memory"
        return line

    threads = torch.get_num_threads()
    torch.set_num_threads(ceilings.threads)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            problem = case.build(dtype)
        with torch.set_grad_enabled(problem.grad):
            _time(line, problem, effort, compiled)
    except Exception as error:  # of torch as of ours: the other lines can still be run
        line.not_run["ours"] = _in_short(error)
    finally:
        torch.set_num_threads(threads)
        torch.compiler.reset()  # or the next case is a recompilation of this one
    line.least_seconds, line.ceiling = ceilings.least_seconds(case.work, dtype)
    return line


def _time(line: Line, problem: Problem, effort: Effort, compiled: bool) -> None:
    calls = {"ours": problem.bind(problem.ours), "torch": problem.bind(problem.torch)}
    ours = calls["ours"]()
    line.kernel = backends.last_kernel()
    start = time.perf_counter()
    theirs = calls["torch"]()
    once = time.perf_counter() - start
    difference = _difference(ours, theirs)
    del ours, theirs
    if not difference <= _AGREEMENT[line.dtype]:
        line.not_run["ours"] = f"DISAGREES with torch by {difference:.1e} of the largest value"
        line.disagrees = True
        return

    if once > _SLOW:
        line.not_run["compile"] = f"torch takes {once:.0f} s a call"
        line.times = _alternate({"ours": calls["ours"]}, line.threads, effort)
        line.times["torch"] = Times(once, 0, once, 1)
        return

    def add(side: str, make: Callable[[], Call]) -> None:
        try:
            call = make()
            call()
        except Exception as error:  # compilers refuse for reasons of their own
            line.not_run[side] = _in_short(error)
        else:
            calls[side] = call

    if compiled:
        add("compile", lambda: problem.bind(_compile(problem.torch)))
        constant, bind_constant = problem.constant, problem.bind_constant
        if constant is not None and bind_constant is not None:
            add("max-autotune", lambda: bind_constant(_autotune(constant)))
    line.times = _alternate(calls, line.threads, effort)


def _alternate(calls: Mapping[str, Call], threads: int, effort: Effort) -> dict[str, Times]:
    timers = {
        side: Timer("call()", globals={"call": call}, num_threads=threads, label=side)
        for side, call in calls.items()
    }
    measured: dict[str, list[Measurement]] = {side: [] for side in timers}
    start = time.perf_counter()
    rounds = 0
    while True:
        order = list(timers) if rounds % 2 == 0 else list(reversed(timers))
        for side in order:
            measured[side].append(timers[side].blocked_autorange(min_run_time=effort.turn))
        rounds += 1
        elapsed = time.perf_counter() - start
        if elapsed < min(effort.seconds, _MOST_SECONDS):
            continue
        times = {side: _summary(*Measurement.merge(parts)) for side, parts in measured.items()}
        is_noisy = any(of_side.quarter > NOISY * of_side.median for of_side in times.values())
        seconds = effort.seconds * (_IF_NOISY if is_noisy else 1)
        if elapsed > _MOST_SECONDS or (rounds >= _LEAST_ROUNDS and elapsed > seconds):
            return times


def _summary(merged: Measurement) -> Times:
    return Times(merged.median, merged.iqr, min(merged.times), len(merged.times))


def _difference(ours: object, theirs: object) -> float:
    """Largest over all tensors of a result; nan where only one side has one."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        a, b = ours.detach().double(), theirs.detach().double()
        if a.shape != b.shape:
            return float("nan")
        same = (a == b) | (a.isnan() & b.isnan())  # infinities too: sums of f16 overflow on both
        scale = b.nan_to_num(0, 0, 0).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        return ((a - b).abs().masked_fill(same, 0).max() / scale).item()
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    differences = torch.tensor([_difference(a, b) for a, b in zip(ours, theirs, strict=True)])
    return differences.max().item()  # nan if there is one


def _in_short(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
