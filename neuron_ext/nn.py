"""Modules that take the place of their namesakes in :mod:`torch.nn`.

They *are* torch's modules: subclasses with the same parameters, state_dict keys, initialisation and
random stream, so that checkpoints, hooks, parametrizations and wrappers see nothing new. Only
``forward`` differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from neuron_ext import functional

__all__ = ["MLP", "Linear", "LinearSigmoid", "Sigmoid"]


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` through :func:`neuron_ext.functional.linear`.

    Input ``(*, in_features)``, weight ``(out_features, in_features)``, output
    ``(*, out_features)``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, _parameter(self, "weight"), _parameter(self, "bias"))


class Sigmoid(torch.nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` through :func:`neuron_ext.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class LinearSigmoid(torch.nn.Linear):
    """A layer of sigmoid neurons: ``sigmoid(input @ weight.T + bias)`` in one operation.

    Parameters, keys and initialisation are those of :class:`torch.nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_sigmoid(
            input, _parameter(self, "weight"), _parameter(self, "bias")
        )


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
        children = list(self._modules.values())
        if not _is_plain_stack(children):
            output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return output
        layers = children[::2]
        return functional.mlp(
            input,
            [_parameter(layer, "weight") for layer in layers],
            [_parameter(layer, "bias") for layer in layers],
            "sigmoid" if len(children) % 2 == 0 else None,
        )

    def __getitem__(self, index: slice | int) -> torch.nn.Module:
        """One child, or for a slice an :class:`torch.nn.Sequential` of the children in it."""
        if isinstance(index, slice):
            return torch.nn.Sequential(*list(self)[index])
        child: torch.nn.Module = super().__getitem__(index)
        return child


def _parameter(module: torch.nn.Module | None, name: str) -> Any:
    """``module.name``, which nn.Module looks for in three places before the one where it is."""
    try:
        return module._parameters[name]  # type: ignore[union-attr]
    except KeyError:
        return getattr(module, name)


def _is_plain_stack(children: Sequence[torch.nn.Module | None]) -> bool:
    """Whether running the stack as one operation does what calling its children would do."""
    if not children or torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    for i, child in enumerate(children):
        if type(child) is not (Linear if i % 2 == 0 else Sigmoid):
            return False
        if (
            child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or "forward" in child.__dict__
        ):
            return False
    return True
