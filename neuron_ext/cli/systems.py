"""The demo's five small systems, each computed by our kernels and by plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import neuron_ext
from neuron_ext import functional
from neuron_ext.cli.report import Report

# Sums of up to seven float32 products near one: a few roundings of 1.2e-7 each on either side.
_FLOAT32_LIMIT = 1e-6
# The same in float64, whose roundings are 2.2e-16.
_FLOAT64_LIMIT = 2e-15
# A difference of one step's rounding is carried through every later step of the descent.
_TRAINED_LIMIT = 1e-5


def single_neuron(report: Report, device: torch.device) -> None:
    """sigmoid(sum(x w) + b) for weights held as (1, 5) and as (5, 1)."""
    features, weights, bias = _single_neuron_inputs(device)
    report.section("One neuron: sigmoid(sum(features * weights) + bias), 5 features")
    report.row("weights", "ours", "torch", "difference")

    expected = torch.sigmoid((features * weights).sum() + bias)
    ours = functional.linear_sigmoid(features, weights, bias)
    report.note_kernel()
    report.compare("(1, 5), the sum form", ours.item(), expected.item(), limit=_FLOAT32_LIMIT)
    report.require("the notebook's 0.1595", f"{ours.item():.4f}" == "0.1595")

    columns = {
        "weights.view(5, 1)": weights.view(5, 1),
        "weights.reshape(5, 1)": weights.reshape(5, 1),
        "weights.resize_(5, 1)": weights.clone().resize_(5, 1),
        "weights.T": weights.T,
    }
    for label, column in columns.items():
        expected = torch.sigmoid(torch.mm(features, column) + bias)
        ours = functional.linear_sigmoid(features, column.T, bias)
        report.compare(
            f"{label}, the matrix form", ours.item(), expected.item(), limit=_FLOAT32_LIMIT
        )
    report.kernels()


def linear_output(report: Report, device: torch.device) -> None:
    """The same neuron without its sigmoid."""
    features, weights, bias = _single_neuron_inputs(device)
    report.section("Its linear output: sum(features * weights) + bias")
    report.row("weights", "ours", "torch", "difference")
    expected = torch.mm(features, weights.view(5, 1)) + bias
    ours = functional.linear(features, weights, bias)
    report.note_kernel()
    report.compare("(1, 5)", ours.item(), expected.item(), limit=_FLOAT32_LIMIT)
    report.require("the notebook's -1.6619", f"{ours.item():.4f}" == "-1.6619")
    report.kernels()


def small_network(report: Report, device: torch.device) -> None:
    """3 features, 2 hidden units, 1 output; weights held as (in, out)."""
    torch.manual_seed(7)
    features = torch.randn((1, 3)).to(device)
    n_hidden, n_output = 2, 1
    w1 = torch.randn(3, n_hidden).to(device)
    w2 = torch.randn(n_hidden, n_output).to(device)
    b1 = torch.randn((1, n_hidden)).to(device)
    b2 = torch.randn((1, n_output)).to(device)

    report.section("3-2-1 network: sigmoid(sigmoid(features W1 + B1) W2 + B2)")
    report.row("weights W1 (3, 2) and W2 (2, 1), kept as (in, out)", "ours", "torch", "difference")
    expected = torch.sigmoid(torch.mm(torch.sigmoid(torch.mm(features, w1) + b1), w2) + b2)

    hidden = functional.linear_sigmoid(features, w1.T, b1)
    ours = functional.linear_sigmoid(hidden, w2.T, b2)
    report.note_kernel()
    report.compare("two layers", ours.item(), expected.item(), limit=_FLOAT32_LIMIT)

    ours = functional.mlp(features, [w1.T, w2.T], [b1, b2], output_activation="sigmoid")
    report.note_kernel()
    report.compare("mlp, one op", ours.item(), expected.item(), limit=_FLOAT32_LIMIT)
    report.require("the notebook's 0.3171", f"{ours.item():.4f}" == "0.3171")
    report.require("W1.T is W1's memory, not a copy", w1.T.data_ptr() == w1.data_ptr())
    report.kernels()


class _Network(nn.Module):
    """4-5-7-3 with our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = neuron_ext.LinearSigmoid(4, 5)
        self.layer2 = neuron_ext.LinearSigmoid(5, 7)
        self.layer3 = neuron_ext.Linear(7, 3)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layer3(self.layer2(self.layer1(input)))
        return output


class _TorchNetwork(nn.Module):
    """4-5-7-3 with torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(4, 5)
        self.layer2 = nn.Linear(5, 7)
        self.layer3 = nn.Linear(7, 3)

    def forward(self, input: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.layer1(input))
        output: Tensor = self.layer3(torch.sigmoid(self.layer2(hidden)))
        return output


def module_descent(report: Report, device: torch.device, steps: int) -> None:
    """A 4-5-7-3 nn.Module on the chosen device, trained for ``steps`` steps."""
    torch.manual_seed(7)
    ours, theirs = _Network().to(device), _TorchNetwork().to(device)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(64, 4).to(device)
    targets = torch.sin(features[:, :3] + features[:, 1:])

    report.section("4-5-7-3 network as an nn.Module: MSELoss, backward, SGD(lr=0.3)")
    report.text(f"{len(features)} samples on {device}; both start from the same state_dict")
    report.row("loss after", "ours", "torch", "difference")
    criterion = nn.MSELoss()
    models = (ours, theirs)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in models]
    history: list[list[float]] = []
    for step in range(steps + 1):
        losses = [criterion(model(features), targets) for model in models]
        history.append([loss.item() for loss in losses])
        if step in (0, 1, 10, 100, 1000):
            report.compare(
                "1 step" if step == 1 else f"{step} steps", *history[-1], limit=_TRAINED_LIMIT
            )
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            report.note_kernel()
            report.limit(
                "largest difference of the first gradients",
                max(
                    _largest_difference(_gradient(mine), _gradient(other))
                    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True)
                ),
                limit=_FLOAT32_LIMIT,
            )
        for optimizer in optimizers:
            optimizer.step()
    report.require("the loss went down", history[-1][0] < history[0][0])
    report.kernels()


def numpy_memory(report: Report) -> None:
    """A NumPy array and a tensor over the same memory, computed on through either."""
    report.section("A NumPy array that shares its memory with the tensor computed on (float64)")
    array = np.random.default_rng(7).normal(size=(4, 3))
    tensor = torch.from_numpy(array)
    report.row("(4, 3), largest difference", "", "", "difference")
    report.require("array and tensor are one memory", array.ctypes.data == tensor.data_ptr())

    def compare(label: str) -> None:
        ours = functional.sigmoid(tensor)
        report.note_kernel()
        in_numpy = torch.from_numpy(1 / (1 + np.exp(-array)))
        report.limit(
            f"{label}, from torch.sigmoid",
            _largest_difference(ours, torch.sigmoid(tensor)),
            limit=_FLOAT64_LIMIT,
        )
        report.limit(
            f"{label}, from NumPy", _largest_difference(ours, in_numpy), limit=_FLOAT64_LIMIT
        )

    compare("sigmoid(tensor)")
    before = array.copy()
    tensor.mul_(2)
    report.require("tensor.mul_(2) doubled the array", np.array_equal(array, 2 * before))
    array += 1
    compare("the same after array += 1")
    report.kernels()


def _single_neuron_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    features = torch.randn((1, 5))
    weights = torch.randn_like(features)
    bias = torch.randn((1, 1))
    return features.to(device), weights.to(device), bias.to(device)


def _largest_difference(ours: Tensor, expected: Tensor) -> float:
    return (ours - expected).abs().max().item()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
