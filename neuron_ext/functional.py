"""The operations as functions: each puts one node into the autograd graph.

All of them follow the contract of their counterparts in ``torch`` for shapes, strides, dtypes,
autograd and transforms. float32, float64, bfloat16 and float16 tensors run through this package's
kernels; every other dtype, layout, device or tensor subclass gives what torch gives, computed by
torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.flop_counter import register_flop_formula

from neuron_ext import _C

__all__ = ["decomposition_table", "linear", "linear_sigmoid", "mlp", "sigmoid"]

_ops = torch.ops.neuron_ext
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_NO_TORCH_FUNCTION = torch._C._disabled_torch_function_impl
_F = TypeVar("_F", bound=Callable[..., Any])


def _call_in_python(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What torch.compile traces where the interpreter calls a ``_C.Function``."""
    return function.__wrapped__(*args, **kwargs)


_Function = _C.function_type(_call_in_python)


def trying(operation: Callable[..., Any]) -> Callable[[_F], _F]:
    """Lets the interpreter try a compiled operation before it sets up a frame for the function.

    To all others it looks like the function, which tries the same: for keywords, and to be read.
    """

    def decorate(function: _F) -> _F:
        return cast(_F, functools.update_wrapper(_Function(operation, function), function))

    return decorate


@trying(_C.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, as :func:`torch.nn.functional.linear`.

    Args:
        input: shape ``(*, in_features)``, with any number of leading dimensions, including none.
        weight: shape ``(out_features, in_features)``, any strides. A weight stored as
            ``(in_features, out_features)`` is passed as ``weight.T``, which copies nothing.
        bias: shape ``(out_features,)``, ``(1, out_features)``, ``(1,)`` or ``()``; or None.

    Returns:
        Tensor of shape ``(*, out_features)`` and the dtype of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices don't fit; the message names the argument.
    """
    if not is_dynamo_compiling():
        output = _C.linear(input, weight, bias)
        if output is not NotImplemented:
            return output
    if _through_torch(input, weight, bias):
        return F.linear(input, weight, bias)
    return _call(_ops.linear.default, input, weight, bias)


@trying(_C.sigmoid)
def sigmoid(input: Tensor) -> Tensor:
    """``1 / (1 + exp(-input))`` elementwise, as :func:`torch.sigmoid`.

    The error is below 1.5 units in the last place in float32 and float64, results below the normal
    range included; bfloat16 and float16 are computed in float32 and rounded once.

    Args:
        input: any shape and strides. Integers and booleans give the default floating dtype.

    Returns:
        Tensor of the same shape, with the strides :func:`torch.sigmoid` would give it.
    """
    if not is_dynamo_compiling():
        output = _C.sigmoid(input)
        if output is not NotImplemented:
            return output
    if _through_torch(input):
        return torch.sigmoid(input)
    return _call(_ops.sigmoid.default, input)


@trying(_C.linear_sigmoid)
def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.sigmoid(F.linear(input, weight, bias))`` as one operation.

    The sigmoid is taken of the unrounded sum, and only the output is saved for the backward pass.
    Arguments, result and errors are those of :func:`linear`.
    """
    if not is_dynamo_compiling():
        output = _C.linear_sigmoid(input, weight, bias)
        if output is not NotImplemented:
            return output
    if _through_torch(input, weight, bias):
        return torch.sigmoid(F.linear(input, weight, bias))
    return _call(_ops.linear_sigmoid.default, input, weight, bias)


@trying(_C.mlp)
def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    output_activation: str | None = None,
) -> Tensor:
    """A stack of linear layers with a sigmoid after every hidden one, as one operation.

    ``h = sigmoid(linear(h, w, b))`` for every ``w, b`` but the last, then ``linear`` of the last
    pair, followed by a sigmoid if ``output_activation`` is ``"sigmoid"``.

    Args:
        input: shape ``(*, n0)``.
        weights: at least one; the i-th has shape ``(n[i+1], n[i])``.
        biases: None or empty for none at all, or as many as there are weights, each of shape
            ``(n[i+1],)`` or None.
        output_activation: None or ``"sigmoid"``.

    Returns:
        Tensor of shape ``(*, nk)`` and the dtype of ``input``.

    Raises:
        ValueError: no weights, not as many biases as weights, or an unknown ``output_activation``.
        RuntimeError: shapes, dtypes or devices don't fit; the message names layer and argument.
    """
    weights = list(weights)
    all_biases = [] if biases is None else list(biases)
    all_biases = all_biases or [None] * len(weights)
    if not is_dynamo_compiling():
        output = _C.mlp(input, weights, all_biases, output_activation)
        if output is not NotImplemented:
            return output
    if _through_torch(input, *weights, *all_biases):
        return _mlp_decomposed(input, weights, all_biases, output_activation)
    return _call(_ops.mlp.default, input, weights, all_biases, output_activation)


def decomposition_table() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Every operation in terms of ATen, for :meth:`ExportedProgram.run_decompositions`.

    >>> table = torch.export.default_decompositions() | neuron_ext.functional.decomposition_table()
    >>> exported_program.run_decompositions(table)  # runs where neuron_ext isn't installed
    """
    return {
        _ops.linear.default: F.linear,
        _ops.sigmoid.default: torch.sigmoid,
        _ops.linear_sigmoid.default: _linear_sigmoid_decomposed,
        _ops.mlp.default: _mlp_decomposed,
        _ops.mlp_forward.default: _mlp_forward_decomposed,
        _ops.linear_backward.default: _linear_backward_decomposed,
        _ops.sigmoid_backward.default: _sigmoid_backward_decomposed,
        _ops.linear_sigmoid_backward.default: _linear_sigmoid_backward_decomposed,
        _ops.mlp_backward.default: _mlp_backward_decomposed,
    }


def _through_torch(*tensors: Any) -> bool:
    """Whether an argument is of a class that has its own idea of what torch's functions do.

    Such a class (DTensor, jagged tensors, quantized weights, torch.fx proxies, a user's own) knows
    aten and torch.nn.functional, not this package. Fake and functional tensors, which torch.compile
    and torch.export trace with, count as plain. The class is asked, not torch.overrides, which says
    yes to every tensor while a TorchFunctionMode is active.
    """
    return any(
        hasattr(cls, "__tensor_flatten__")
        or getattr(cls, "__torch_function__", _NO_TORCH_FUNCTION) is not _NO_TORCH_FUNCTION
        for cls in map(type, tensors)
        if cls not in _PLAIN
    )


def _layer_flops(rows: int, weight: Sequence[int]) -> int:
    return 2 * rows * weight[0] * weight[1]


@register_flop_formula([_ops.linear, _ops.linear_sigmoid])
def _linear_flops(input: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of the matrix product alone, which is how torch counts its own layers."""
    return _layer_flops(math.prod(input[:-1]), weight)


@register_flop_formula([_ops.mlp, _ops.mlp_forward])
def _mlp_flops(
    input: Sequence[int], weights: Sequence[Sequence[int]], *args: Any, **kwargs: Any
) -> int:
    return sum(_layer_flops(math.prod(input[:-1]), weight) for weight in weights)


@register_flop_formula([_ops.linear_backward, _ops.linear_sigmoid_backward])
def _linear_backward_flops(
    grad_output: Sequence[int],
    input: Sequence[int] | None,
    weight: Sequence[int] | None,
    *args: Any,
    **kwargs: Any,
) -> int:
    *rows, out_features = grad_output
    *_, output_mask = args
    in_features = input[-1] if input is not None else weight[1] if weight is not None else 0
    products = int(output_mask[0]) + int(output_mask[1])
    return products * _layer_flops(math.prod(rows), (out_features, in_features))


@register_flop_formula(_ops.mlp_backward)
def _mlp_backward_flops(
    grad_output: Sequence[int],
    input: Sequence[int] | None,
    weights: Sequence[Sequence[int] | None],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Each wanted weight gradient, and each step back towards the first gradient wanted."""
    *_, hidden_features, output_mask = args
    *lead, out_features = grad_output
    first = weights[0]
    in_features = input[-1] if input is not None else first[1] if first is not None else 0
    features = [in_features, *hidden_features, out_features]
    flops = 0
    for i, layer in enumerate(itertools.pairwise(features)):
        wants_before = any(output_mask[: 1 + i]) or any(
            output_mask[1 + len(weights) : 1 + len(weights) + i]
        )
        products = int(wants_before) + int(output_mask[1 + i])
        flops += products * _layer_flops(math.prod(lead), layer)
    return flops


def _call(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    output: Tensor = op(*args)
    return output


def _linear_sigmoid_decomposed(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.sigmoid(F.linear(input, weight, bias))


def _layers(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    output_activation: str | None,
) -> list[Tensor]:
    """The outputs of all layers, the last one's at the end."""
    outputs = []
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        input = F.linear(input, weight, bias)
        if i < last or output_activation == "sigmoid":
            input = torch.sigmoid(input)
        outputs.append(input)
    return outputs


def _mlp_decomposed(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    output_activation: str | None = None,
) -> Tensor:
    return _layers(input, weights, biases, output_activation)[-1]


def _mlp_forward_decomposed(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    output_activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    *hidden, output = _layers(input, weights, biases, output_activation)
    return output, torch.cat([h.reshape(-1) for h in hidden]) if hidden else input.new_empty(0)


def _sigmoid_backward_decomposed(grad_output: Tensor, output: Tensor) -> Tensor:
    return _call(torch.ops.aten.sigmoid_backward.default, grad_output, output)


def _linear_backward_decomposed(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``input`` is there if the weight's gradient is wanted, ``weight`` if the input's is."""
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    return (
        grad_output @ weight if output_mask[0] and weight is not None else None,
        rows.T @ input.reshape(-1, input.shape[-1])
        if output_mask[1] and input is not None
        else None,
        rows.sum(0) if output_mask[2] else None,
    )


def _linear_sigmoid_backward_decomposed(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    grad_sum = _sigmoid_backward_decomposed(grad_output, output)
    return _linear_backward_decomposed(grad_sum, input, weight, output_mask)


def _mlp_backward_decomposed(
    grad_output: Tensor,
    input: Tensor | None,
    weights: Sequence[Tensor | None],
    places: Sequence[Tensor | None],
    output: Tensor | None,
    hidden: Tensor,
    hidden_features: Sequence[int],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """Gradients wanted by ``output_mask`` = (input, weights..., biases...), in that order.

    What no wanted gradient takes may be None; ``output`` is there if a sigmoid made it. ``places``
    matter to derivatives of the result alone.
    """
    depth = len(weights)
    *lead, _ = grad_output.shape
    sizes = [math.prod(lead) * features for features in hidden_features]
    inputs = [input] + [
        part.view(*lead, features)
        for part, features in zip(torch.split(hidden, sizes), hidden_features, strict=True)
    ]
    grads: list[Tensor | None] = [None] * (1 + 2 * depth)
    grad = grad_output if output is None else _sigmoid_backward_decomposed(grad_output, output)
    for i in reversed(range(depth)):
        wants_before = any(output_mask[: 1 + i]) or any(output_mask[1 + depth : 1 + depth + i])
        wanted = (wants_before, output_mask[1 + i], output_mask[1 + depth + i])
        before, grads[1 + i], grads[1 + depth + i] = _linear_backward_decomposed(
            grad, inputs[i], weights[i], wanted
        )
        layer_input = inputs[i]
        if before is None or layer_input is None or i == 0:
            grads[0] = before
            break
        grad = _sigmoid_backward_decomposed(before, layer_input)
    return [g for g, wanted in zip(grads, output_mask, strict=True) if wanted and g is not None]
