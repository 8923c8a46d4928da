"""``python -m neuron_ext``: its commands as a user runs them, and that they notice faults."""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import neuron_ext
from neuron_ext import backends, functional, nn
from neuron_ext.cli import main

MISSING = [name for name in ("sklearn", "matplotlib", "tqdm") if not importlib.util.find_spec(name)]
needs_demo_packages = pytest.mark.skipif(
    bool(MISSING), reason=f"the demo needs {', '.join(MISSING)}: pip install 'neuron_ext[demo]'"
)
Fault = Callable[[str, pytest.MonkeyPatch], None]
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    package = Path(neuron_ext.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "neuron_ext", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(package)} | environment,
    )


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.returncode == 0, result.stderr
    for command in ("demo", "info", "check"):
        assert f"\n    {command} " in result.stdout


def test_version() -> None:
    assert run("--version").stdout == f"neuron_ext {neuron_ext.__version__}\n"


def test_info_says_what_is_built_and_what_runs() -> None:
    result = run("info", NEURON_EXT_CPU_ISA="portable")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    assert "portable; this CPU runs " + ", ".join(backends.supported_cpu_isas()) in result.stdout
    for kernel in backends.kernels():
        assert kernel.name in result.stdout


def test_check_passes() -> None:
    result = run("check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Everything is correct" in result.stdout
    for isa in backends.supported_cpu_isas():
        assert isa in result.stdout


@needs_demo_packages
def test_demo_runs_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    result = run("--quick", "--device", "cpu", "--output", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Everything agrees with torch" in result.stdout
    for number in ("0.1595", "-1.6619", "0.3171"):
        assert number in result.stdout
    for name in ("loss_curves.png", "confusion_matrix.png"):
        assert str(folder / name) in result.stdout
        assert (folder / name).read_bytes().startswith(PNG)


def test_unknown_options_are_refused() -> None:
    result = run("--epochs", "3")
    assert result.returncode == 2
    assert "--epochs" in result.stderr


@needs_demo_packages
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_demo_needs_a_gpu_for_cuda(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_demo_names_missing_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo"]) == 2
    message = capsys.readouterr().err
    assert "scikit-learn, tqdm" in message
    assert "pip install 'neuron_ext[demo]'" in message


def slightly_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an op's results too large by 1e-4 of themselves."""
    op = getattr(functional, name)
    monkeypatch.setattr(functional, name, lambda *args: op(*args) * 1.0001)


def wrong_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves an op's results as they are and makes its gradients too large by 1 %."""
    op = getattr(functional, name)

    def compute(*args: object, **named: object) -> Tensor:
        output: Tensor = op(*args, **named)
        return output + 0.01 * (output - output.detach())

    monkeypatch.setattr(functional, name, compute)
    # A module then calls it too, in place of the compiled operation.
    monkeypatch.setattr(nn, "_run_as_one", inspect.unwrap(nn._run_as_one))


@pytest.mark.parametrize(
    ("name", "fault"),
    [("linear", slightly_off), ("mlp", wrong_gradient)],
    ids=["value", "gradient"],
)
def test_check_notices(
    name: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(name, monkeypatch)
    assert main(["check"]) == 1
    assert f"  {name}, {backends.supported_cpu_isas()[0]}, float32" in capsys.readouterr().out


@needs_demo_packages
@pytest.mark.parametrize(
    ("name", "fault", "section"),
    [("linear_sigmoid", slightly_off, 1), ("mlp", wrong_gradient, 7)],
    ids=["value", "gradient"],
)
def test_demo_notices(
    name: str,
    fault: Fault,
    section: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fault(name, monkeypatch)
    assert main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert f"\n  section {section}: " in capsys.readouterr().out
