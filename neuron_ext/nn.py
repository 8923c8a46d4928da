"""Modules that take the place of their namesakes in :mod:`torch.nn`.

They *are* torch's modules: subclasses with the same parameters, state_dict keys, initialisation and
random stream, so that checkpoints, hooks, parametrizations and wrappers see nothing new. Only
``forward`` differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from neuron_ext import _C, functional

__all__ = ["MLP", "Linear", "LinearSigmoid", "Sigmoid"]


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` through :func:`neuron_ext.functional.linear`.

    Input ``(*, in_features)``, weight ``(out_features, in_features)``, output
    ``(*, out_features)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _parameters(self)
        return functional.linear(input, weight, bias)


class Sigmoid(torch.nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` through :func:`neuron_ext.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class LinearSigmoid(torch.nn.Linear):
    """A layer of sigmoid neurons: ``sigmoid(input @ weight.T + bias)`` in one operation.

    Parameters, keys and initialisation are those of :class:`torch.nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _parameters(self)
        return functional.linear_sigmoid(input, weight, bias)


class MLP(torch.nn.Sequential):
    """Linear layers with a sigmoid after every hidden one, run as a single operation.

    The children and so the keys of the state_dict are those of
    ``nn.Sequential(nn.Linear(n0, n1), nn.Sigmoid(), nn.Linear(n1, n2), ...)``: "0.weight",
    "0.bias", "2.weight", ... Children may be hooked, parametrized or replaced; the stack then runs
    child by child, so that nothing is bypassed.

    Args:
        features: layer widths ``[n0, n1, ..., nk]``, at least two.
        bias: whether the layers have biases.
        output_activation: None, or ``"sigmoid"`` for one after the last layer too.
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer than two widths, or an unknown ``output_activation``.
    """

    def __init__(
        self,
        features: Sequence[int],
        bias: bool = True,
        output_activation: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(features) < 2:
            raise ValueError(
                f"MLP: features has {len(features)} widths, expected at least 2: "
                "[inputs, ..., outputs]"
            )
        if output_activation not in (None, "sigmoid"):
            raise ValueError(
                f"MLP: output_activation is {output_activation!r}, expected None or 'sigmoid'"
            )
        children: list[torch.nn.Module] = []
        for in_features, out_features in itertools.pairwise(features):
            if children:
                children.append(Sigmoid())
            children.append(
                Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
            )
        if output_activation == "sigmoid":
            children.append(Sigmoid())
        super().__init__(*children)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor | None = None
        if not torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            output = _run_as_one(input, self._modules, Linear, Sigmoid)
        if output is None:
            output = super().forward(input)  # type: ignore[no-untyped-call]
        return output

    def __getitem__(self, index: slice | int) -> torch.nn.Module:
        """One child, or for a slice an :class:`torch.nn.Sequential` of the children in it."""
        if isinstance(index, slice):
            return torch.nn.Sequential(*list(self)[index])
        child: torch.nn.Module = super().__getitem__(index)
        return child


def _parameters(layer: torch.nn.Module) -> tuple[Any, Any]:
    """Weight and bias; as attributes nn.Module would look for them in three places before these."""
    parameters = layer._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        return layer.weight, layer.bias


@functional.trying(_C.mlp_of_modules)
def _run_as_one(
    input: Tensor,
    children: Mapping[str, torch.nn.Module | None],
    linear: type[torch.nn.Module],
    sigmoid: type[torch.nn.Module],
) -> Tensor | None:
    """The stack as one operation, if that does what calling its children would do; else None."""
    if not children:
        return None
    weights, biases = [], []
    expected = linear
    for child in children.values():
        if type(child) is not expected:
            return None
        state = child.__dict__  # not attributes, for the same reason
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return None
        if expected is linear:
            parameters = state["_parameters"]
            try:
                weights.append(parameters["weight"])
                biases.append(parameters["bias"])
            except KeyError:
                return None
            expected = sigmoid
        else:
            expected = linear
    return functional.mlp(input, weights, biases, "sigmoid" if expected is linear else None)
