"""The demo's two trainings: our modules and plain torch from the same start on the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import neuron_ext
from neuron_ext.cli.report import Report

# Both sides round differently by 6e-8 in each operation. A gradient sums up to 128 such terms, and
# is compared itself because Adam would hide a wrong factor. Training carries the differences along:
# 1e-6 of the loss is usual.
_GRADIENT_LIMIT = 1e-5
_LOSS_LIMIT = 1e-4
# Where two scores tie to within rounding, a test sample may be classified differently.
_SAMPLES_LIMIT = 1
_BATCH = 64


@dataclass
class Split:
    """A data set, divided for training and testing."""

    train_features: Tensor
    test_features: Tensor
    train_targets: Tensor
    test_targets: Tensor


@dataclass
class Run:
    """One model's training: what goes in and what is measured."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of each epoch
    seconds: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """Both trainings of a model, and the classes predicted for the test samples by ours."""

    title: str
    ours: Run
    torch: Run
    predicted: Tensor
    actual: Tensor


def breast_cancer(report: Report, device: torch.device, epochs: int) -> Outcome:
    """One neuron with 30 standardised features: is a tumour benign?"""
    data = _split(load_breast_cancer(return_X_y=True), device)
    mean, deviation = data.train_features.mean(0), data.train_features.std(0)
    data.train_features = (data.train_features - mean) / deviation
    data.test_features = (data.test_features - mean) / deviation

    title = "Breast cancer: one neuron, 30 features"
    report.section(f"Training. {title}")
    _describe(report, data, f"SGD(lr=0.1), binary cross-entropy, {epochs} epochs")

    def build(model: nn.Module) -> Run:
        model.to(device)
        return Run(model, torch.optim.SGD(model.parameters(), lr=0.1))

    torch.manual_seed(7)
    ours = build(neuron_ext.LinearSigmoid(30, 1))
    torch.manual_seed(7)
    theirs = build(nn.Sequential(nn.Linear(30, 1), nn.Sigmoid()))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(output.squeeze(1), target.to(output.dtype))

    def classify(output: Tensor) -> Tensor:
        return (output.squeeze(1) > 0.5).long()

    return _train_both(report, title, ours, theirs, data, loss, classify, epochs)


def handwritten_digits(report: Report, device: torch.device, epochs: int) -> Outcome:
    """A 64-128-64-10 sigmoid MLP on 8 x 8 images of digits."""
    data = _split(load_digits(return_X_y=True), device)
    data.train_features /= 16  # a pixel counts up to 16
    data.test_features /= 16

    title = "Handwritten digits: MLP 64-128-64-10"
    report.section(f"Training. {title}")
    _describe(report, data, f"Adam(lr=0.01), cross-entropy, {epochs} epochs")

    def build(model: nn.Module) -> Run:
        model.to(device)
        return Run(model, torch.optim.Adam(model.parameters(), lr=0.01))

    torch.manual_seed(7)
    ours = build(neuron_ext.MLP([64, 128, 64, 10]))
    torch.manual_seed(7)
    theirs = build(
        nn.Sequential(
            nn.Linear(64, 128), nn.Sigmoid(), nn.Linear(128, 64), nn.Sigmoid(), nn.Linear(64, 10)
        )
    )

    def classify(output: Tensor) -> Tensor:
        return output.argmax(1)

    return _train_both(report, title, ours, theirs, data, F.cross_entropy, classify, epochs)


def _split(table: tuple[object, object], device: torch.device) -> Split:
    features, targets = torch.as_tensor(table[0]).float(), torch.as_tensor(table[1]).long()
    train, test = train_test_split(
        torch.arange(len(targets)), test_size=0.25, random_state=7, stratify=targets
    )
    return Split(
        features[train].to(device),
        features[test].to(device),
        targets[train].to(device),
        targets[test].to(device),
    )


def _describe(report: Report, data: Split, method: str) -> None:
    report.text(
        f"{len(data.train_targets)} samples to train on, {len(data.test_targets)} to test; "
        f"{method}, batches of {_BATCH}"
    )


def _train_both(
    report: Report,
    title: str,
    ours: Run,
    theirs: Run,
    data: Split,
    loss: Callable[[Tensor, Tensor], Tensor],
    classify: Callable[[Tensor], Tensor],
    epochs: int,
) -> Outcome:
    """Trains epoch by epoch in turns, so that a disturbance of the machine meets both alike."""
    _compare_start(report, ours, theirs, data, loss)
    order = torch.Generator().manual_seed(7)
    progress = tqdm(range(epochs), desc="   training", unit="epoch", ncols=100, mininterval=0.5)
    for epoch in progress:
        shuffled = torch.randperm(len(data.train_targets), generator=order)
        batches = [
            (data.train_features[batch], data.train_targets[batch])
            for batch in (shuffled[i : i + _BATCH] for i in range(0, len(shuffled), _BATCH))
        ]
        for run in (ours, theirs) if epoch % 2 == 0 else (theirs, ours):
            _train_epoch(run, batches, loss)
        progress.set_postfix_str(
            f"loss {ours.losses[-1]:.4f}, torch {theirs.losses[-1]:.4f}", refresh=False
        )

    with torch.no_grad():
        predicted = classify(ours.model(data.test_features))
        report.note_kernel()
        expected = classify(theirs.model(data.test_features))
    outcome = Outcome(title, ours, theirs, predicted.cpu(), data.test_targets.cpu())
    _compare(report, outcome, expected.cpu())
    return outcome


def _compare_start(
    report: Report, ours: Run, theirs: Run, data: Split, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Compares the parameters and the first gradients, which also warms both sides up."""
    mine, others = list(ours.model.parameters()), list(theirs.model.parameters())
    report.require(
        "the same seed gave the same initial parameters",
        all(torch.equal(a, b) for a, b in zip(mine, others, strict=True)),
    )
    features, targets = data.train_features[:_BATCH], data.train_targets[:_BATCH]
    expected = torch.autograd.grad(loss(theirs.model(features), targets), others)
    gradients = torch.autograd.grad(loss(ours.model(features), targets), mine)
    report.note_kernel()
    report.limit(
        "largest relative difference of the first gradients",
        max(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(gradients, expected, strict=True)
        ),
        limit=_GRADIENT_LIMIT,
    )


def _train_epoch(
    run: Run, batches: list[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    start = time.perf_counter()
    total = torch.zeros((), device=batches[0][0].device)
    for features, targets in batches:
        run.optimizer.zero_grad()
        value = loss(run.model(features), targets)
        value.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        total += value.detach()
    run.losses.append(total.item() / len(batches))  # item() also waits for a GPU
    run.seconds.append(time.perf_counter() - start)


def _compare(report: Report, outcome: Outcome, expected: Tensor) -> None:
    ours, theirs = outcome.ours, outcome.torch
    report.row("", "ours", "torch", "difference")
    for label, epoch in (("first", 0), ("last", -1)):
        report.compare(
            f"loss in the {label} epoch",
            ours.losses[epoch],
            theirs.losses[epoch],
            limit=_LOSS_LIMIT * theirs.losses[epoch],
        )
    report.limit(
        "largest relative difference of any epoch's loss",
        max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)),
        limit=_LOSS_LIMIT,
    )
    samples = len(outcome.actual)
    percent = [
        100 * (predicted == outcome.actual).sum().item() / samples
        for predicted in (outcome.predicted, expected)
    ]
    report.compare(
        "test accuracy", *percent, digits=1, unit=" %", limit=100 * (_SAMPLES_LIMIT + 0.5) / samples
    )
    median = [1e3 * statistics.median(run.seconds) for run in (ours, theirs)]
    report.row(
        "median time per epoch, and torch's over ours",
        f"{median[0]:.1f} ms",
        f"{median[1]:.1f} ms",
        f"{median[1] / median[0]:.2f}x",
    )
    report.kernels()
