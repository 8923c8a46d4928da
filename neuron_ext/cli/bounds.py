"""How far a correct layer may be from the exact result: a running error analysis.

Every intermediate value carries a bound on its error, and every operation widens it by what its
own roundings can add (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3).
The bounds hold for any order of summation, so they are the same for every kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A product with ``weight`` where there is one, plus ``bias``, then a sigmoid if asked."""

    weight: Tensor | None
    bias: Tensor | None
    sigmoid: bool


@dataclass(frozen=True)
class _Rounding:
    """Largest relative errors of one operation."""

    sum: float  # an addition or multiplication, in the type that sums are formed in
    store: float  # rounding a result to the dtype
    sigmoid: float  # the sigmoid, its store included
    underflow: float  # absolute: a result below the normal range


def _rounding(dtype: torch.dtype) -> _Rounding:
    info = torch.finfo(dtype)
    store = info.eps / 2
    underflow = info.smallest_normal * info.eps
    if dtype is torch.float64:
        # The reference is itself computed in float64: it rounds too, flushes results below the
        # normal range, and its sigmoid is good to 2.5 units in the last place beside our 1.5.
        return _Rounding(2 * store, 2 * store, 4 * info.eps, info.smallest_normal)
    if dtype is torch.float32:
        return _Rounding(store, store, 1.5 * info.eps, underflow)
    single = torch.finfo(torch.float32).eps
    return _Rounding(single / 2, store, store + 1.5 * single, underflow)


def _product(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor, unit: float) -> Tensor:
    """Bound for ``a @ b`` plus a bias, of two matrices known to within their errors."""
    terms = a.shape[-1] + 2
    gamma = terms * unit / (1 - terms * unit)
    propagated = a_error @ (b.abs() + b_error) + a.abs() @ b_error
    return propagated + gamma * ((a.abs() + a_error) @ (b.abs() + b_error))


def layer_bounds(
    input: Tensor, layers: Sequence[Layer], grad_output: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Componentwise bounds on the errors of ``layers`` applied to ``input``, computed in ``dtype``.

    Args:
        input: float64, shape ``(batch, in_features)``; the layers' tensors are float64 too.
        grad_output: float64, shape ``(batch, out_features)``: the gradient of the output.
        dtype: what the kernels read and write; bfloat16 and float16 are summed in float32.

    Returns:
        Bounds for the output and for the gradients of the input and of each layer's weight and
        bias, where there are such.
    """
    rounding = _rounding(dtype)
    value, error = input, torch.zeros_like(input)
    inputs: list[tuple[Tensor, Tensor]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        inputs.append((value, error))
        if layer.weight is not None:
            columns = layer.weight.T
            bias = torch.zeros((), dtype=torch.float64) if layer.bias is None else layer.bias
            error = _product(value, error, columns, torch.zeros_like(columns), rounding.sum)
            error = error + 2 * rounding.sum * bias.abs()
            value = value @ columns + bias
            if not layer.sigmoid:
                error = error + rounding.store * value.abs() + rounding.underflow
        if layer.sigmoid:
            value = torch.sigmoid(value)
            # s'(z + t) <= s'(z) exp(|t|), integrated over t
            error = value * (1 - value) * torch.expm1(error)
            error = error + rounding.sigmoid * value + rounding.underflow
        outputs.append((value, error))
    output_error = error

    grad, error = grad_output, torch.zeros_like(grad_output)
    parameters: list[Tensor] = []
    for layer, (x, x_error), (y, y_error) in zip(
        reversed(layers), reversed(inputs), reversed(outputs), strict=True
    ):
        if layer.sigmoid:
            slope = y * (1 - y)
            slope_error = (1 - 2 * y).abs() * y_error + y_error**2 + 3 * rounding.sum * slope
            error = error * slope + (grad.abs() + error) * slope_error
            grad = grad * slope
            error = error + rounding.store * grad.abs() + rounding.underflow
        if layer.weight is None:
            continue
        if layer.bias is not None:
            ones = torch.ones(1, len(grad), dtype=torch.float64)
            bias_error = _product(ones, torch.zeros_like(ones), grad, error, rounding.sum)
            parameters.insert(0, _stored(bias_error.squeeze(0), grad.sum(0), rounding))
        weight_error = _product(grad.T, error.T, x, x_error, rounding.sum)
        parameters.insert(0, _stored(weight_error, grad.T @ x, rounding))
        exact = torch.zeros_like(layer.weight)
        error = _product(grad, error, layer.weight, exact, rounding.sum)
        grad = grad @ layer.weight
        error = _stored(error, grad, rounding)
    return [output_error, error, *parameters]


def _stored(error: Tensor, value: Tensor, rounding: _Rounding) -> Tensor:
    return error + rounding.store * value.abs() + rounding.underflow
