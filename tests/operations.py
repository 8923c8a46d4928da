"""The operations as functions of a flat list of tensors, each beside the same in torch's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_ext import functional


@dataclass(frozen=True)
class Operation:
    """``ours(*tensors)`` must be ``torch(*tensors)``, under everything torch does to functions."""

    id: str
    op: str  # torch.ops.neuron_ext.<op>
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(
        self,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        requires_grad: bool | Sequence[bool] = False,
    ) -> list[Tensor]:
        """The same tensors at every call with the same seed, fresh leaves."""
        generator = torch.Generator().manual_seed(seed)
        masks = (
            [requires_grad] * len(self.shapes) if isinstance(requires_grad, bool) else requires_grad
        )
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(needed)
            for shape, needed in zip(self.shapes, masks, strict=True)
        ]

    def __str__(self) -> str:
        return self.id


def mlp_in_torch(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    output_activation: str | None = None,
) -> Tensor:
    """What ``functional.mlp`` computes, layer by layer."""
    for i, weight in enumerate(weights):
        input = F.linear(input, weight, biases[i] if biases else None)
        if i + 1 < len(weights) or output_activation == "sigmoid":
            input = torch.sigmoid(input)
    return input


def _layer(
    op: str, ours: Callable[..., Tensor], in_torch: Callable[..., Tensor], *, bias: bool
) -> Operation:
    return Operation(
        id=op if bias else f"{op}-no_bias",
        op=op,
        ours=ours,
        torch=in_torch,
        names=("input", "weight", "bias")[: 2 + bias],
        shapes=((5, 3), (4, 3), (4,))[: 2 + bias],
    )


def _mlp(*, biased_layers: Sequence[bool], output_activation: str | None) -> Operation:
    """Widths 3, 4, 2, 3; the flat list is input, weights, and the biases that there are."""
    widths = (3, 4, 2, 3)
    weights = tuple(zip(widths[1:], widths[:-1], strict=True))
    biases = tuple((w[0],) for w, biased in zip(weights, biased_layers, strict=True) if biased)

    def call(mlp: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        there = list(tensors[4:])
        all_biases = [there.pop(0) if biased else None for biased in biased_layers]
        return mlp(
            tensors[0],
            list(tensors[1:4]),
            all_biases if any(biased_layers) else None,
            output_activation,
        )

    kind = {0: "-no_bias", 3: ""}.get(sum(biased_layers), "-some_bias")
    return Operation(
        id=f"mlp{kind}" + ("-sigmoid" if output_activation else ""),
        op="mlp",
        ours=lambda *tensors: call(functional.mlp, tensors),
        torch=lambda *tensors: call(mlp_in_torch, tensors),
        names=(
            "input",
            *(f"weight{i}" for i in range(3)),
            *(f"bias{i}" for i in range(3) if biased_layers[i]),
        ),
        shapes=((5, 3), *weights, *biases),
    )


LINEAR = _layer("linear", functional.linear, F.linear, bias=True)
LINEAR_NO_BIAS = _layer("linear", functional.linear, F.linear, bias=False)
SIGMOID = Operation(
    "sigmoid", "sigmoid", functional.sigmoid, torch.sigmoid, names=("input",), shapes=((5, 3),)
)
LINEAR_SIGMOID = _layer(
    "linear_sigmoid",
    functional.linear_sigmoid,
    lambda *tensors: torch.sigmoid(F.linear(*tensors)),
    bias=True,
)
LINEAR_SIGMOID_NO_BIAS = _layer(
    "linear_sigmoid",
    functional.linear_sigmoid,
    lambda *tensors: torch.sigmoid(F.linear(*tensors)),
    bias=False,
)
MLP = _mlp(biased_layers=(True, True, True), output_activation=None)
MLP_SIGMOID = _mlp(biased_layers=(True, True, True), output_activation="sigmoid")
MLP_NO_BIAS = _mlp(biased_layers=(False, False, False), output_activation=None)
MLP_NO_BIAS_SIGMOID = _mlp(biased_layers=(False, False, False), output_activation="sigmoid")
MLP_SOME_BIAS = _mlp(biased_layers=(True, False, True), output_activation="sigmoid")

ALL = (
    LINEAR,
    LINEAR_NO_BIAS,
    SIGMOID,
    LINEAR_SIGMOID,
    LINEAR_SIGMOID_NO_BIAS,
    MLP,
    MLP_SIGMOID,
    MLP_NO_BIAS,
    MLP_NO_BIAS_SIGMOID,
    MLP_SOME_BIAS,
)
ONE_EACH = (LINEAR, SIGMOID, LINEAR_SIGMOID, MLP_SIGMOID)


each = pytest.mark.parametrize("operation", ALL, ids=str)
one_each = pytest.mark.parametrize("operation", ONE_EACH, ids=str)


def assert_close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    """Equal structure, shapes and dtypes, values within ``tolerance`` of the largest in a tensor.

    Derivatives are sums whose terms cancel: what they lose is in proportion to other elements.
    """
    if isinstance(expected, tuple | list):
        assert isinstance(actual, tuple | list)
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, tolerance)
        return
    largest = 1.0
    if isinstance(expected, Tensor) and expected.numel() > 0:
        largest = max(largest, expected.detach().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * largest)
