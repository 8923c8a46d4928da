"""The demo's pictures. Drawn without pyplot, so that no display or global state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from neuron_ext.cli.training import Outcome


def loss_curves(outcomes: Sequence[Outcome], path: Path) -> None:
    """Both sides' loss per epoch, one panel for each training; torch's dashes lie on our line."""
    figure = Figure(figsize=(5.2 * len(outcomes), 4), layout="constrained")
    panels = figure.subplots(1, len(outcomes), squeeze=False)
    for panel, outcome in zip(panels[0], outcomes, strict=True):
        epochs = range(1, len(outcome.ours.losses) + 1)
        panel.plot(
            epochs, outcome.ours.losses, color="tab:blue", linewidth=4, alpha=0.5, label="ours"
        )
        panel.plot(epochs, outcome.torch.losses, color="black", linestyle="--", label="torch")
        panel.set(title=outcome.title, xlabel="epoch", ylabel="mean training loss", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(which="both", alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


def confusion_matrix(outcome: Outcome, path: Path) -> None:
    """How often each class of the test set was taken for which; the diagonal is right."""
    classes = int(outcome.actual.max()) + 1
    counts = torch.bincount(
        outcome.actual * classes + outcome.predicted, minlength=classes * classes
    ).view(classes, classes)
    right, samples = int(counts.diagonal().sum()), int(counts.sum())

    figure = Figure(figsize=(6, 5.4), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(counts.tolist(), cmap="Blues")
    figure.colorbar(image, label="test images")
    for row in range(classes):
        for column in range(classes):
            count = int(counts[row, column])
            if count:
                dark = count > 0.5 * int(counts.max())
                panel.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
    panel.set(
        title=f"{outcome.title}\n{right} of {samples} test images right",
        xlabel="predicted",
        ylabel="actual",
        xticks=range(classes),
        yticks=range(classes),
    )
    figure.savefig(path, dpi=120)
