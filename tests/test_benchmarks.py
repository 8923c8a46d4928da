"""The benchmark runs and says what it should; how fast anything is isn't tested."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ isn't installed

from benchmarks import accuracy, ceilings, machine, measure, report
from benchmarks.__main__ import main
from benchmarks.cases import Case, Problem, all_cases, gpu_cases
from neuron_ext import backends

SMALL = ("neuron/", "network/", "square/64/", "sigmoid/1e3/", "training/64x")
NO_CEILINGS = ceilings.Ceilings(threads=1)
BRIEFLY = measure.Effort(seconds=0, turn=1e-4)


def small_cases() -> list[Case]:
    return [case for case in all_cases() if case.name.startswith(SMALL)]


@pytest.mark.parametrize("cases", [all_cases(), gpu_cases()], ids=["CPU", "GPU"])
def test_case_names_are_unique(cases: list[Case]) -> None:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(len(name.split("/")) == 3 for name in names)


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_sides_are_timed(case: Case, dtype: torch.dtype) -> None:
    line = measure.run(case, dtype, NO_CEILINGS, BRIEFLY, compiled=False)
    assert line.not_run == {}
    assert set(line.times) == {"ours", "torch"}
    assert all(0 < t.least <= t.median and t.count >= 1 for t in line.times.values())
    assert line.ratio() == line.times["torch"].median / line.times["ours"].median
    assert line.kernel in {kernel.name for kernel in backends.kernels()}


def test_a_wrong_answer_is_not_timed() -> None:
    def build(dtype: torch.dtype) -> Problem:
        value = torch.ones(3, dtype=dtype)
        return Problem(lambda: value + 1, lambda: value, lambda f: f)

    case = Case("wrong/3/forward", build, ceilings.Work())
    line = measure.run(case, torch.float32, NO_CEILINGS, BRIEFLY, compiled=False)
    assert line.disagrees
    assert not line.times
    assert "DISAGREES" in report.row(line)


def test_sums_that_overflow_on_both_sides_agree() -> None:
    def build(dtype: torch.dtype) -> Problem:
        value = torch.tensor([1.0, math.inf, -math.inf, math.nan], dtype=dtype)
        return Problem(lambda: value + 0, lambda: value, lambda f: f)

    line = measure.run(
        Case("overflow/4/forward", build, ceilings.Work()),
        torch.float16,
        NO_CEILINGS,
        BRIEFLY,
        compiled=False,
    )
    assert not line.disagrees
    assert line.times


def test_what_cannot_run_says_why() -> None:
    def build(dtype: torch.dtype) -> Problem:
        raise RuntimeError("no such thing\nand more of it")

    case = Case("impossible/3/forward", build, ceilings.Work())
    line = measure.run(case, torch.float32, NO_CEILINGS, BRIEFLY, compiled=False)
    assert line.not_run == {"ours": "RuntimeError: no such thing"}

    too_large = Case("impossible/1e15/forward", build, ceilings.Work(read=1e15))
    line = measure.run(too_large, torch.float32, NO_CEILINGS, BRIEFLY, compiled=False)
    if machine.available_memory() is not None:
        assert "GiB of memory" in line.not_run["ours"]


def test_torch_is_not_waited_for() -> None:
    small, large = (
        Case(
            f"tall/{size}/forward",
            lambda dtype: Problem(len, len, lambda f: f),
            ceilings.Work(size),
        )
        for size in (1, 1000)
    )
    once = measure.Times(median=1, quarter=0, least=1, count=1)
    before = [measure.Line(small, torch.float32, 1, {"ours": once, "torch": once})]
    line = measure.run(large, torch.float32, NO_CEILINGS, BRIEFLY, compiled=False, before=before)
    assert line.not_run == {"ours": "torch would take about 1000 s a call"}


def test_least_seconds() -> None:
    measured = ceilings.Ceilings(
        threads=1,
        peaks={"FMA f32": 100.0, "AMX bf16": 1200.0},
        bandwidths=[
            ceilings.Bandwidth("L1", 100, 50.0, 40.0),
            ceilings.Bandwidth("memory", 1000, 10.0, 8.0),
        ],
    )
    compute = ceilings.Work(flops=1200)
    assert measured.least_seconds(compute, torch.bfloat16) == (1, "AMX bf16")
    assert measured.least_seconds(compute, torch.float32) == (6, "AMX bf16 / 6")
    assert measured.least_seconds(compute, torch.float64) == (0, "")
    assert measured.least_seconds(ceilings.Work(read=50), torch.float32) == (4, "L1")
    cold = ceilings.Work(read=50, cold=True)
    assert measured.least_seconds(cold, torch.float32) == (20, "memory")
    copied = ceilings.Work(read=500, written=500)
    assert measured.least_seconds(copied, torch.float32) == (500, "memory")

    with_system = ceilings.Ceilings(threads=1, fresh=2.0**20)
    large = ceilings.Work(read=2.0**24, written=2.0**24, result=2.0**24)
    assert with_system.least_seconds(large, torch.float32) == (64, "fresh memory")
    assert with_system.least_seconds(large, torch.bfloat16) == (0, "")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda: None)
    measured = ceilings.measure(1)
    assert measured.peaks == {}
    assert "no C++ compiler" in measured.not_measured["all ceilings"]


def test_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SECONDS", 1e-3)
    isa = backends.cpu_isa()
    path, picture = tmp_path / "made" / "run.json", tmp_path / "run.png"
    code = main(
        [
            "--quick",
            *("--cases", "neuron/*"),
            *("--threads", "1"),
            *("--dtypes", "f32", "f64"),
            *("--isa", isa),
            *("--json", str(path)),
            *("--png", str(picture)),
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "neuron/1x5-1/module" in printed
    assert "geometric mean" in printed

    run = json.loads(path.read_text())
    assert run["machine"]["isa"] == isa
    assert run["machine"]["torch"] == torch.__version__
    assert {(line["case"], line["dtype"]) for line in run["lines"]} == {
        (f"neuron/1x5-1/{what}", dtype)
        for what in ("forward", "module")
        for dtype in ("f32", "f64")
    }
    assert all(line["threads"] == 1 and line["ratio"] > 0 for line in run["lines"])
    ratios = [line["ratio"] for line in run["lines"]]
    assert run["geometric_mean"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    (measured,) = run["ceilings"]
    assert measured["peaks"] or measured["not_measured"]
    assert picture.exists() or "no picture" in printed


@pytest.mark.parametrize("arguments", [["--cases", "nothing/*"], ["--threads", "none"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def test_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    isa = backends.cpu_isa()
    assert accuracy.run([isa], [torch.float32, torch.bfloat16]) == 0
    printed = capsys.readouterr().out
    for what in (isa, "linear, weight's gradient", "linear_sigmoid", "last place", "bf16"):
        assert what in printed
    assert backends.cpu_isa() == isa
