"""What the tests share: inputs named after what they probe, and how far a result may be off.

Bounds are derived, not tuned: an :class:`Approx` carries a value in exact arithmetic beside the
largest error that rounding can have made in computing it, so the bound of a gradient of a stack is
the composition of the bounds of its products and sigmoids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
_T = TypeVar("_T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

# ---- shapes: name -> (leading sizes of the input, in_features, out_features)

Shape = tuple[tuple[int, ...], int, int]

SMALL_SHAPES: dict[str, Shape] = {
    "one neuron": ((1,), 5, 1),
    "one value": ((1,), 1, 1),
    "3-2-1, first layer": ((1,), 3, 2),
    "4-5-7-3, second layer": ((16,), 5, 7),
    "vector": ((), 5, 3),
    "batch of two dimensions": ((2, 3), 5, 4),
    "batch of four dimensions": ((2, 1, 3, 2), 5, 4),
    "odd everything": ((7,), 13, 11),
}
EMPTY_SHAPES: dict[str, Shape] = {
    "no rows": ((0,), 5, 3),
    "no rows in one of two": ((2, 0), 5, 3),
    "no inputs": ((4,), 0, 3),
    "no inputs, vector": ((), 0, 3),
    "no outputs": ((4,), 5, 0),
    "no rows, no inputs": ((0,), 0, 3),
    "nothing at all": ((0,), 0, 0),
}
LARGE_SHAPES: dict[str, Shape] = {
    **{f"{m} rows of 257": ((m,), 257, 257) for m in range(1, 9)},
    "one output": ((129,), 257, 1),
    "one input": ((129,), 1, 129),
    "one output, one row, long sum": ((1,), 10000, 1),
    "long sum": ((5,), 4097, 9),
    "very long sum": ((3,), 10000, 17),
    "tall": ((3001,), 3, 2),
    "wide": ((2,), 3, 3001),
    "tiles and one": ((113,), 129, 97),
    "tiles less one": ((111,), 127, 95),
    "whole tiles": ((112,), 128, 96),
    "batch of matrices": ((3, 5, 7), 65, 33),
}
SHAPES = SMALL_SHAPES | EMPTY_SHAPES | LARGE_SHAPES


def each_shape(shapes: dict[str, Shape]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", shapes.values(), ids=shapes.keys())


# Edges of register tiles (6, 14, 16, 32) and of vectors (4, 8, 16).
TILE_EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33)

# ---- inputs


def integers(*size: int, dtype: torch.dtype, largest: int = 2) -> Tensor:
    """Small whole numbers, whose products and sums are exact in every order."""
    return torch.randint(-largest, largest + 1, size).to(dtype)


def normal(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float64).to(dtype)


def layer_inputs(
    shape: Shape, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normal input, weight scaled so that sums stay near 1, and bias."""
    lead, in_features, out_features = shape
    x = normal(*lead, in_features, dtype=dtype)
    w = max(in_features, 1) ** -0.5 * normal(out_features, in_features, dtype=dtype)
    b = normal(out_features, dtype=dtype) if bias else None
    return x, w, b


def sample(choices: Iterable[_T], count: int) -> list[_T]:
    """So many of them, others in each run."""
    every = list(choices)
    return [every[i] for i in torch.randperm(len(every))[:count].tolist()]


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `t` (at least 2-D) laid out in every way a view can have; nan lies between and
    around them, so that whatever reads past the view shows."""

    def fill(view: Tensor) -> Tensor:
        return view.copy_(t)

    def nans(*size: int) -> Tensor:
        return torch.full(size, torch.nan, dtype=t.dtype)

    *lead, rows, columns = t.shape
    yield "contiguous", t.contiguous()
    yield "transposed", t.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every second column", fill(nans(*lead, rows, 2 * columns)[..., ::2])
    yield "every third row", fill(nans(*lead, 3 * rows, columns)[..., ::3, :])
    yield "columns of a wider matrix", fill(nans(*lead, rows, columns + 5)[..., 2:-3])
    yield "unaligned", fill(nans(t.numel() + 1)[1:].view(t.shape))
    yield (
        "rows and columns stepped, transposed",
        fill(nans(*lead, 2 * columns + 1, 3 * rows + 1)[..., 1::2, 1::3].transpose(-1, -2)),
    )


# ---- error bounds

_needs_wider_than_f64 = pytest.mark.skipif(
    bool(np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps),
    reason="float64 needs a reference in a wider type, which long double isn't on this platform",
)
each_dtype_with_reference = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(d, marks=_needs_wider_than_f64 if d == torch.float64 else (), id=name_of(d))
        for d in DTYPES
    ],
)


def wide(t: Tensor) -> Array:
    """The values in a type in which rounding errors don't count: f64, or long double for f64."""
    values: Array = t.detach().to(torch.float64).numpy()
    return values.astype(np.longdouble) if t.dtype == torch.float64 else values


@dataclasses.dataclass(frozen=True)
class Approx:
    """A value in exact arithmetic, and a bound on the error of a computed one, elementwise."""

    value: Array
    error: Array

    @property
    def largest(self) -> Array:
        """Bound on the computed value's magnitude."""
        return np.abs(self.value) + self.error

    @property
    def T(self) -> Approx:  # noqa: N802
        return Approx(self.value.T, self.error.T)

    def rows(self) -> Approx:
        """As a matrix."""
        features = self.value.shape[-1]
        count = int(np.prod(self.value.shape[:-1]))
        return self.reshape((count, features))

    def reshape(self, shape: tuple[int, ...]) -> Approx:
        return Approx(self.value.reshape(shape), self.error.reshape(shape))


def exact(t: Tensor) -> Approx:
    value = wide(t)
    return Approx(value, np.zeros_like(value))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Rounding as the kernels do it: in f32 (f64 for f64), then once at the store."""

    dtype: torch.dtype

    @functools.cached_property
    def _sum(self) -> torch.finfo:
        return torch.finfo(torch.promote_types(self.dtype, torch.float32))

    @property
    def unit(self) -> float:
        """Largest relative error of one rounding while summing."""
        return self._sum.eps / 2

    def stored(self, x: Approx) -> Approx:
        """Rounded to the dtype; nothing for a dtype that is summed in itself."""
        info = torch.finfo(self.dtype)
        if info.eps == self._sum.eps:
            return x
        return Approx(
            x.value,
            x.error + info.eps / 2 * x.largest + info.smallest_normal * info.eps / 2,
        )

    def product(self, a: Approx, b: Approx, bias: Approx | None = None) -> Approx:
        """a @ b + bias, summed in any order: a product and k sums for each term, and three more
        roundings where an engine splits its operands."""
        k = a.value.shape[-1]
        value = a.value @ b.value
        largest = a.largest @ b.largest
        if bias is not None:
            value = value + bias.value
            largest = largest + bias.largest
        carried = a.error @ b.largest + np.abs(a.value) @ b.error
        rounding = (k + 4) * self.unit / (1 - (k + 4) * self.unit)
        underflow = k * self._sum.smallest_normal * self._sum.eps
        return Approx(value, carried + rounding * largest + underflow)

    def column_sum(self, a: Approx) -> Approx:
        ones = np.ones((1, a.value.shape[0]), a.value.dtype)
        return self.product(Approx(ones, 0 * ones), a).reshape((a.value.shape[1],))

    def sigmoid(self, z: Approx) -> Approx:
        y = sigmoid_reference(z.value)
        # The slope changes by a factor of at most e^d within a distance d, and is never above 1/4.
        slope = np.minimum(y * sigmoid_reference(-z.value) * np.exp(np.minimum(z.error, 50)), 0.25)
        own = 3 * self.unit * y + self._sum.smallest_normal * self._sum.eps
        return Approx(y, slope * z.error + own)

    def sigmoid_backward(self, dy: Approx, y: Approx) -> Approx:
        """dy y (1 - y), from the stored y."""
        slope = y.value * (1 - y.value)
        slope_error = np.abs(1 - 2 * y.value) * y.error + y.error**2
        own = 4 * self.unit * dy.largest * (np.abs(slope) + slope_error)
        underflow = 3 * self._sum.smallest_normal * self._sum.eps
        return Approx(
            dy.value * slope,
            dy.error * (np.abs(slope) + slope_error)
            + np.abs(dy.value) * slope_error
            + own
            + underflow,
        )


def sigmoid_reference(x: Array) -> Array:
    """In x's type, without overflow."""
    e = np.exp(-np.abs(x))
    y: Array = np.where(x >= 0, 1, e) / (1 + e)
    return y


def relative_errors(actual: Tensor, expected: Approx) -> Array:
    """Errors in units of the bound."""
    difference = np.abs(wide(actual) - expected.value)
    with np.errstate(invalid="ignore"):
        errors: Array = np.where(difference == 0, 0, difference / expected.error)
    return errors


def assert_within(actual: Tensor, expected: Approx, what: str) -> None:
    assert actual.shape == expected.value.shape, f"{what}: shape {tuple(actual.shape)}"
    errors = relative_errors(actual, expected)
    if not (errors <= 1).all():
        at = np.unravel_index(np.argmax(np.where(np.isnan(errors), np.inf, errors)), errors.shape)
        raise AssertionError(
            f"{what}: {wide(actual)[at]} at {tuple(map(int, at))}, expected {expected.value[at]} "
            f"within {expected.error[at]:.3g}; "
            f"{int((~(errors <= 1)).sum())} of {errors.size} are off"
        )


def assert_no_worse(ours: Array, torchs: Array, what: str, unit: float) -> None:
    """Errors in the same units, a few thousand of each; `unit` is two roundings in them. The
    largest scatters by half, on both sides, the mean by a tenth."""
    assert ours.max() <= 2 * torchs.max() + unit, (
        f"{what}: largest error {ours.max():.3g}, torch's {torchs.max():.3g}"
    )
    assert ours.mean() <= 1.1 * torchs.mean() + 0.05 * unit, (
        f"{what}: mean error {ours.mean():.3g}, torch's {torchs.mean():.3g}"
    )


def ulps(actual: Tensor, expected: Array) -> Array:
    """Errors in units in the last place of the exact result; below the normal range, in that of the
    smallest normal number."""
    info = torch.finfo(actual.dtype)
    exponent = np.frexp(np.maximum(np.abs(expected), info.smallest_normal))[1]
    unit = np.ldexp(np.ones_like(expected), exponent - 1) * info.eps
    errors: Array = np.abs(wide(actual) - expected) / unit
    return errors


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """The same dtype, shape and values; nan is equal to nan, and zeros of either sign are."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


# ---- the same outcome: a result or an error

Outcome = Tensor | Sequence[Tensor] | Exception


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """What it returns, or the exception it raises."""
    try:
        result: Outcome = function(*args, **kwargs)
        return result
    except Exception as error:
        return error


def assert_same_outcome(actual: Outcome, expected: Outcome, what: str = "") -> None:
    """Errors of the same type, or tensors that agree in everything but the last rounding."""
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert type(actual) is type(expected), f"{what}: {actual!r}, torch {expected!r}"
        return
    if not isinstance(expected, Tensor):
        assert not isinstance(actual, Tensor)
        for a, e in zip(actual, expected, strict=True):
            assert_same_outcome(a, e, what)
        return
    assert type(actual) is type(expected), f"{what}: {type(actual)}, torch {type(expected)}"
    assert actual.layout == expected.layout, what
    assert actual.requires_grad == expected.requires_grad, what
    assert actual.device == expected.device, what
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    if expected.device.type != "meta":
        dense, expected_dense = (
            t if t.layout == torch.strided else t.to_dense() for t in (actual, expected)
        )
        rounded = dense.is_floating_point() or dense.is_complex()
        tolerance = 64 * torch.finfo(dense.dtype).eps if rounded and dense.itemsize > 1 else 0
        torch.testing.assert_close(
            dense,
            expected_dense,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m: f"{what}: {m}",
        )
    if expected.layout == torch.strided and not expected.is_nested:
        assert actual.stride() == expected.stride(), f"{what}: strides"


# ---- layers in exact arithmetic


def layer(
    arithmetic: Arithmetic, x: Approx, weight: Approx, bias: Approx | None, sigmoid: bool
) -> Approx:
    """y = f(x Wᵀ + b)."""
    z = arithmetic.product(x, weight.T, bias)
    return arithmetic.stored(arithmetic.sigmoid(z) if sigmoid else z)


def layer_backward(
    arithmetic: Arithmetic,
    dy: Approx,
    x: Approx,
    weight: Approx,
    y: Approx | None,
    stores_dz: bool = False,
) -> tuple[Approx, Approx, Approx]:
    """dx, dW and db; `y` for a layer that ends in a sigmoid."""
    dz = dy if y is None else arithmetic.sigmoid_backward(dy, y)
    # Stored by the layer after it, or an operand of bf16 instructions; in torch's layers always.
    if y is not None and (stores_dz or arithmetic.dtype == torch.bfloat16):
        dz = arithmetic.stored(dz)
    return (
        arithmetic.stored(arithmetic.product(dz, weight)),
        arithmetic.stored(arithmetic.product(dz.rows().T, x.rows())),
        arithmetic.stored(arithmetic.column_sum(dz.rows())),
    )


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """So that an element of an output that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before)
