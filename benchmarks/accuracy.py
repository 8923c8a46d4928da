"""How exact the operations are, beside torch: ``python -m benchmarks accuracy``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.report import short
from neuron_ext import backends, functional

Array: TypeAlias = NDArray[Any]
Layer: TypeAlias = tuple[Tensor, Tensor, Tensor]  # input, weight, bias

_LEGEND = """\
Errors as "ours / torch". Those of products are in units of eps (|A||B| + |b|), elementwise, with
the dtype's eps; behind a sigmoid its slope scales that, and its own rounding is added.
inputs   normal; uniform in [0, 1); ill-scaled: rows times 1e-30 to 1e30 (f16: 1e-2 to 1e2);
         cancelling: sums a thousandth of their terms; subnormal: mostly below the normal range
special  how many elements aren't finite, infinite or nan as they should be, where one row of the
         input holds an infinity, another a nan, and one weight is infinite"""

_WIDE_ENOUGH = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)


# ---- inputs


def _layer(input: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Layer:
    return input.to(dtype), weight.to(dtype), bias.to(dtype)


def _normal(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    wide = torch.float64
    return _layer(
        torch.randn(m, k, dtype=wide),
        torch.randn(n, k, dtype=wide),
        torch.randn(n, dtype=wide),
        dtype,
    )


def _uniform(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    wide = torch.float64
    return _layer(
        torch.rand(m, k, dtype=wide), torch.rand(n, k, dtype=wide), torch.rand(n, dtype=wide), dtype
    )


def _ill_scaled(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    input, weight, bias = _normal(m, k, n, torch.float64)
    most = 2 if dtype is torch.float16 else 30
    scales = 10 ** torch.empty(m, 1, dtype=torch.float64).uniform_(-most, most)
    return _layer(input * scales, weight, bias, dtype)


def _cancelling(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    input, weight, bias = _normal(m, k, n, torch.float64)
    half = k // 2
    input[:, half : 2 * half] = input[:, :half]
    weight[:, half : 2 * half] = -weight[:, :half] * (1 + 1e-3 * torch.randn(n, half))
    return _layer(input, weight, 1e-3 * bias, dtype)


def _subnormal(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    input, weight, bias = _normal(m, k, n, torch.float64)
    small = torch.finfo(dtype).smallest_normal / 4
    return _layer(input * small, weight, bias * small, dtype)


def _special(m: int, k: int, n: int, dtype: torch.dtype) -> Layer:
    input, weight, bias = _normal(m, k, n, dtype)
    input[0, k // 2] = torch.inf
    input[m // 2, 0] = torch.nan
    weight[n - 1, k - 1] = -torch.inf
    return input, weight, bias


_INPUTS: dict[str, Callable[[int, int, int, torch.dtype], Layer]] = {
    "normal": _normal,
    "uniform": _uniform,
    "ill-scaled": _ill_scaled,
    "cancelling": _cancelling,
    "subnormal": _subnormal,
}


# ---- operations, each beside torch and in exact arithmetic


def _wide(t: Tensor) -> Array:
    """In a type in which rounding doesn't count: float64, or long double for float64."""
    values: Array = t.detach().double().numpy()
    return values.astype(np.longdouble) if t.dtype is torch.float64 else values


def _exact_sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    y: Array = np.where(x >= 0, 1, small) / (1 + small)
    return y


def _exact_linear(input: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """The result, and the sum of its terms' magnitudes."""
    scale: Array = np.abs(input) @ np.abs(weight).T + np.abs(bias)
    return input @ weight.T + bias, scale


@dataclass(frozen=True)
class _Operation:
    """The same in our words, in torch's, and exactly: the value, and the scale of its error."""

    name: str
    shape: tuple[int, int, int]
    ours: Callable[[Layer], Tensor]
    torch: Callable[[Layer], Tensor]
    exact: Callable[[Sequence[Array]], tuple[Array, Array]]


def _gradient(layer: Layer, function: Callable[..., Tensor], which: int) -> Tensor:
    leaves = [t.clone().requires_grad_() for t in layer]
    output = function(*leaves)
    return torch.autograd.grad(output, leaves[which], _grad_output(output))[0]


def _grad_output(output: Tensor) -> Tensor:
    """The same for every function."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return grad.to(output.dtype)


def _exact_gradient(layer: Sequence[Array], dtype: torch.dtype, which: int) -> tuple[Array, Array]:
    input, weight, _ = layer
    grad = _wide(_grad_output(torch.empty(len(input), len(weight), dtype=dtype)))
    if which == 0:
        return grad @ weight, np.abs(grad) @ np.abs(weight)
    if which == 1:
        return grad.T @ input, np.abs(grad).T @ np.abs(input)
    return grad.sum(0), np.abs(grad).sum(0)


def _exact_linear_sigmoid(layer: Sequence[Array]) -> tuple[Array, Array]:
    z, scale = _exact_linear(*layer)
    y = _exact_sigmoid(z)
    return y, y * _exact_sigmoid(-z) * scale + y


def _operations(dtype: torch.dtype) -> list[_Operation]:
    tiles, few_rows, one_neuron = (96, 512, 96), (4, 512, 96), (96, 512, 1)

    def linear(name: str, shape: tuple[int, int, int]) -> _Operation:
        return _Operation(
            name,
            shape,
            lambda layer: functional.linear(*layer),
            lambda layer: F.linear(*layer),
            lambda layer: _exact_linear(*layer),
        )

    def gradient(name: str, which: int) -> _Operation:
        return _Operation(
            name,
            tiles,
            lambda layer: _gradient(layer, functional.linear, which),
            lambda layer: _gradient(layer, F.linear, which),
            lambda layer: _exact_gradient(layer, dtype, which),
        )

    return [
        linear("linear", tiles),
        linear("linear, 4 rows", few_rows),
        linear("linear, 1 neuron", one_neuron),
        gradient("linear, input's gradient", 0),
        gradient("linear, weight's gradient", 1),
        gradient("linear, bias's gradient", 2),
        _Operation(
            "linear_sigmoid",
            tiles,
            lambda layer: functional.linear_sigmoid(*layer),
            lambda layer: torch.sigmoid(F.linear(*layer)),
            _exact_linear_sigmoid,
        ),
        _Operation(
            "mlp of one layer",
            tiles,
            lambda layer: functional.mlp(layer[0], [layer[1]], [layer[2]], "sigmoid"),
            lambda layer: torch.sigmoid(F.linear(*layer)),
            _exact_linear_sigmoid,
        ),
    ]


# ---- errors


def _errors(actual: Tensor, value: Array, scale: Array) -> Array:
    info = torch.finfo(actual.dtype)
    errors: Array = np.abs(_wide(actual) - value) / (
        info.eps * np.maximum(scale, info.smallest_normal)
    )
    return errors


def _kind(values: Array) -> Array:
    """0 finite, 1 and -1 infinite, 2 nan."""
    kinds: Array = np.where(np.isnan(values), 2, np.where(np.isinf(values), np.sign(values), 0))
    return kinds


def _figures(operation: _Operation, layer: Layer) -> tuple[Array, Array]:
    value, scale = operation.exact([_wide(t) for t in layer])
    return (
        _errors(operation.ours(layer), value, scale),
        _errors(operation.torch(layer), value, scale),
    )


def _wrong_special(operation: _Operation, layer: Layer) -> tuple[int, int]:
    with np.errstate(all="ignore"):
        expected = _kind(operation.exact([_wide(t) for t in layer])[0])
    ours, theirs = _kind(_wide(operation.ours(layer))), _kind(_wide(operation.torch(layer)))
    return int((ours != expected).sum()), int((theirs != expected).sum())


def _cell(ours: float, theirs: float) -> str:
    return f"{_number(ours)} / {_number(theirs)}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}"


# ---- sigmoid


def _sigmoid_inputs(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type; random ones of every exponent of the others."""
    if dtype.itemsize == 2:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        return every[every.isfinite()]
    # Beyond 2^11 every sigmoid is 0 or 1, below 2^-80 it is 1/2.
    exponents = torch.arange(-80, 12, dtype=torch.float64).exp2()
    mantissas = 1 + torch.rand(4096, dtype=torch.float64)
    values = torch.outer(exponents, mantissas).flatten()
    return torch.cat([values, -values]).to(dtype)


def _ulps(actual: Tensor, expected: Array) -> Array:
    """Errors in units in the last place of the exact result."""
    info = torch.finfo(actual.dtype)
    exponent = np.frexp(np.maximum(expected, info.smallest_normal))[1]
    unit = np.ldexp(np.ones_like(expected), exponent - 1) * info.eps
    errors: Array = np.abs(_wide(actual) - expected) / unit
    return errors


def _sigmoid_row(dtype: torch.dtype) -> str:
    input = _sigmoid_inputs(dtype)
    expected = _exact_sigmoid(_wide(input))
    ours, theirs = (
        _ulps(function(input), expected) for function in (functional.sigmoid, torch.sigmoid)
    )
    normal = expected >= torch.finfo(dtype).smallest_normal
    figures = (
        _cell(ours[normal].max(), theirs[normal].max()),
        _cell(ours[normal].mean(), theirs[normal].mean()),
        _cell(ours.max(), theirs.max()),
    )
    return (
        f"  {short(dtype):<6}{figures[0]:>14}{figures[1]:>14}{figures[2]:>17}"
        f"{input.numel():>10}  {backends.last_kernel()}"
    )


# ---- the table


def run(isas: Sequence[str], dtypes: Sequence[torch.dtype]) -> int:
    """Prints the errors of every operation and dtype, with the kernels of each instruction set."""
    torch.manual_seed(0)
    if not _WIDE_ENOUGH and torch.float64 in dtypes:
        print("float64: not measured: this system has no wider type to compare with")
        dtypes = [dtype for dtype in dtypes if dtype is not torch.float64]
    print(f"{_LEGEND}\n\nbeside torch {torch.__version__}")
    before = backends.cpu_isa()
    try:
        for isa in isas:
            backends.set_cpu_isa(isa)
            _print_products(isa, dtypes)
            _print_sigmoid(isa, dtypes)
    finally:
        backends.set_cpu_isa(before)
    return 0


def _print_products(isa: str, dtypes: Sequence[torch.dtype]) -> None:
    names = "".join(f"{name:>14}" for name in _INPUTS)
    print(f"\n{isa:<14}{names}{'special':>10}  kernel")
    for at in range(len(_operations(torch.float32))):
        for dtype in dtypes:
            operation = _operations(dtype)[at]
            if dtype is dtypes[0]:
                print(f"{operation.name} {'x'.join(map(str, operation.shape))}")
            largest = mean = ""
            for make in _INPUTS.values():
                ours, theirs = _figures(operation, make(*operation.shape, dtype))
                largest += f"{_cell(ours.max(), theirs.max()):>14}"
                mean += f"{_cell(ours.mean(), theirs.mean()):>14}"
            wrong = "{} / {}".format(*_wrong_special(operation, _special(*operation.shape, dtype)))
            kernel = backends.last_kernel()
            print(f"  {short(dtype):<6}{'max':<6}{largest}{wrong:>10}  {kernel}")
            print(f"  {'':<6}{'mean':<6}{mean}", flush=True)


def _print_sigmoid(isa: str, dtypes: Sequence[torch.dtype]) -> None:
    print(
        f"sigmoid, in units in the last place ({isa})\n"
        f"  {'':<6}{'max':>14}{'mean':>14}{'with subnormals':>17}{'inputs':>10}"
    )
    for dtype in dtypes:
        print(_sigmoid_row(dtype), flush=True)
