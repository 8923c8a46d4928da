"""``python -m neuron_ext``: small systems and two trainings, each beside plain torch."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import torch

import neuron_ext
from neuron_ext import backends
from neuron_ext.cli import machine
from neuron_ext.cli.report import Report

_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "numpy": "numpy"}


def run(*, device: str, output: Path, quick: bool) -> int:
    """Runs the demo. Returns 0, 1 if something disagrees with torch, 2 if it can't run here."""
    missing = [name for module, name in _NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        return _refuse(f"the demo also needs {', '.join(missing)}: pip install 'neuron_ext[demo]'")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"--output {output}: {error.strerror}")

    # Imported once it's known that they can be.
    from neuron_ext.cli import plots, systems, training

    start = time.perf_counter()
    # Both sides run on one thread: these systems are too small for more, and on a busy machine
    # waiting for a second thread takes longer than all of the work.
    torch.set_num_threads(1)
    chosen = _device(device)
    _print_setting(chosen)
    report = Report()
    systems.single_neuron(report, chosen)
    systems.linear_output(report, chosen)
    systems.small_network(report, chosen)
    systems.module_descent(report, chosen, steps=100 if quick else 1000)
    systems.numpy_memory(report)
    cancer = training.breast_cancer(report, chosen, epochs=3 if quick else 60)
    digits = training.handwritten_digits(report, chosen, epochs=3 if quick else 30)

    curves, matrix = output / "loss_curves.png", output / "confusion_matrix.png"
    plots.loss_curves([cancer, digits], curves)
    plots.confusion_matrix(digits, matrix)
    print(f"\nSaved {curves}\nSaved {matrix}")

    seconds = time.perf_counter() - start
    if report.failures:
        print(f"\nDISAGREES with torch ({seconds:.0f} s):")
        for failure in report.failures:
            print(f"  {failure}")
        return 1
    print(f"\nEverything agrees with torch ({seconds:.0f} s).")
    return 0


def _device(choice: str) -> torch.device:
    if choice == "auto":
        choice = "cuda" if backends.cuda_is_built() and torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def _print_setting(device: torch.device) -> None:
    print(f"neuron_ext {neuron_ext.__version__} beside torch {torch.__version__}")
    print(f"CPU: {machine.cpu_name()}, {backends.cpu_isa()}, {torch.get_num_threads()} thread")
    if device.type == "cuda":
        computing = "our CUDA kernels" if backends.cuda_is_built() else "torch, for lack of ours"
        print(f"GPU: {torch.cuda.get_device_name(device)}; computed by {computing}")
    print(f"device: {device}")


def _refuse(reason: str) -> int:
    print(f"python -m neuron_ext: {reason}", file=sys.stderr)
    return 2
