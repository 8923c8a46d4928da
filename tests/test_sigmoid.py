"""sigmoid, alone and as the end of a layer: accuracy over the whole number range, and layouts."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from cases import (
    Arithmetic,
    assert_same,
    assert_within,
    each_dtype,
    each_dtype_with_reference,
    exact,
    name_of,
    normal,
    sigmoid_reference,
    ulps,
    uninitialised_memory_is_nan,
    wide,
)
from torch import Tensor

from neuron_ext import functional

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def numbers_of_every_exponent(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit type; of a wider one, all of its first 20 bits with random bits
    after them, and half a million more where the sigmoid is neither 0 nor 1."""
    bits = 8 * dtype.itemsize
    integer = INTEGER_OF_SIZE[dtype.itemsize]
    if bits == 16:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(integer).view(dtype)
        return every[every.isfinite()]
    leading = torch.arange(-(2**19), 2**19, dtype=torch.int64) << (bits - 20)
    trailing = torch.randint(0, 2 ** (bits - 20), leading.shape)
    every = (leading + trailing).to(integer).view(dtype)
    lowest, highest = (-110, 20) if dtype == torch.float32 else (-750, 40)
    lively = torch.rand(2**19, dtype=torch.float64) * (highest - lowest) + lowest
    return torch.cat([every[every.isfinite()], lively.to(dtype)])


def as_epilogue(x: Tensor) -> Tensor:
    """The sigmoid that ends a layer: with no features, of the bias alone."""
    return functional.linear_sigmoid(x.new_empty(1, 0), x.new_empty(x.numel(), 0), x)[0]


each_way = pytest.mark.parametrize(
    "sigmoid", [functional.sigmoid, as_epilogue], ids=["elementwise", "epilogue"]
)


@each_way
@each_dtype_with_reference
def test_accuracy_over_all_exponents(
    sigmoid: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    isa: str,
    record_property: Callable[[str, object], None],
) -> None:
    x = numbers_of_every_exponent(dtype)
    expected = sigmoid_reference(wide(x))
    ours = ulps(sigmoid(x), expected)
    # torch gives 0 for results below the normal range, except in float16.
    normal_range = expected >= torch.finfo(dtype).smallest_normal
    torchs = ulps(torch.sigmoid(x), expected)[normal_range]
    if sigmoid is functional.sigmoid:
        record_property(
            "figure",
            f"sigmoid {name_of(dtype):<9} {isa:<9} error: largest {ours.max():.4f} ULP "
            f"(torch {torchs.max():.4f}), mean {ours.mean():.4f} (torch {torchs.mean():.4f})",
        )
    if dtype.itemsize == 2:
        # One rounding to the type, of a value that f32 arithmetic got right to 1.5 of its own ULP.
        f32_ulp = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        assert ours.max() <= 0.5 + 1.5 * f32_ulp
        assert (ours > 0.5).mean() < 0.001
    else:
        assert ours.max() < 1.5
    assert ours.max() <= torchs.max() + 0.001
    assert ours[normal_range].mean() <= torchs.mean() + 0.001


@each_way
@each_dtype
def test_special_values(sigmoid: Callable[[Tensor], Tensor], dtype: torch.dtype, isa: str) -> None:
    info = torch.finfo(dtype)
    inf, nan, most, least = torch.inf, torch.nan, info.max, info.smallest_normal * info.eps
    values = [0.0, -0.0, inf, -inf, nan, -nan, most, -most, least, -least]
    expected = [0.5, 0.5, 1, 0, nan, nan, 1, 0, 0.5, 0.5]
    for repeat in (1, 4):
        x = torch.tensor(values * repeat, dtype=dtype)
        y = sigmoid(x)
        assert_same(y, torch.tensor(expected * repeat, dtype=dtype))
        assert not torch.signbit(y[~y.isnan()]).any()


@each_dtype
def test_results_below_the_normal_range_are_kept(dtype: torch.dtype, isa: str) -> None:
    """torch has them only in float16."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    x = torch.linspace(np.log(info.smallest_normal), np.log(smallest), 100, dtype=torch.float64)
    y = functional.sigmoid(x[1:-1].to(dtype))
    assert (y > 0).all()
    assert (y < info.smallest_normal).all()


@each_dtype
def test_an_element_depends_on_its_value_alone(dtype: torch.dtype, isa: str) -> None:
    """Not on its place, on how many there are, on their strides, or on the kernel it ends."""
    x = 10 * normal(200, dtype=dtype)
    one_by_one = torch.stack([functional.sigmoid(value) for value in x])
    assert_same(functional.sigmoid(x), one_by_one)
    for start in range(40):
        for length in (*range(1, 40), 64, 65, 127, 160):
            actual = functional.sigmoid(x[start : start + length])
            assert torch.equal(actual, one_by_one[start : start + length]), (start, length)
    for step in (2, 3, 7):
        assert_same(functional.sigmoid(x[::step]), one_by_one[::step], f"step {step}")
    assert_same(as_epilogue(x), one_by_one, "epilogue")
    assert_same(functional.sigmoid(x.repeat(2000)), one_by_one.repeat(2000), "on several threads")


def views(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of a tensor of four dimensions."""
    yield "contiguous", t
    yield "channels last", t.contiguous(memory_format=torch.channels_last)
    yield "permuted", t.permute(2, 0, 3, 1)
    yield "transposed", t.transpose(0, 3)
    yield "every second", t[..., ::2]
    yield "every second row", t[:, :, ::2]
    yield "sliced twice", t[:, 1:, :, 1:4]
    yield "permuted and sliced", t.permute(3, 1, 0, 2)[::2, :, 1:]
    yield "expanded in front", t[:1].expand(4, *t.shape[1:])
    yield "expanded within", t[:, :1].expand(t.shape)
    yield "expanded and permuted", t[:, :1].expand(t.shape).permute(1, 3, 0, 2)
    yield "expanded from one value", t[0, 0, 0, 0].expand(3, 4)
    yield "overlapping windows", t.flatten().unfold(0, 6, 2)
    yield "diagonal", t[0, 0].diagonal()
    yield "no dimensions", t[0, 0, 0, 0]
    yield "empty", t[:0]
    yield "empty within", t[:, :0].permute(3, 1, 0, 2)
    yield "sizes of one", t[:1, :, :1].permute(2, 1, 0, 3)
    yield "sizes of one, odd strides", t.as_strided((1, 3, 1, 2), (7, 5, 3, 2))
    yield "sizes of one, odd strides, dense", t.as_strided((4, 1), (1, 7))
    yield "sizes of one, odd strides, channels last", t.as_strided((1, 3, 2, 2), (5, 1, 6, 3))
    yield "unaligned", t.flatten()[1:]


@each_dtype
def test_values_and_strides_of_any_view(dtype: torch.dtype, isa: str) -> None:
    for name, x in views(normal(2, 3, 4, 5, dtype=dtype)):
        with uninitialised_memory_is_nan():
            y = functional.sigmoid(x)
        assert_same(y, functional.sigmoid(x.contiguous()), name)
        assert y.stride() == torch.sigmoid(x).stride(), name
        assert y.storage_offset() == 0, name


@each_dtype
def test_large_views_on_several_threads(dtype: torch.dtype, isa: str) -> None:
    x = normal(300, 500, dtype=dtype)
    expected = functional.sigmoid(x)
    assert_same(functional.sigmoid(x.T), expected.T)
    assert_same(functional.sigmoid(x[:, ::2]), expected[:, ::2])
    assert_same(functional.sigmoid(x[:, :1].expand(300, 500)), expected[:, :1].expand(300, 500))


@each_dtype
def test_the_input_is_left_alone(dtype: torch.dtype) -> None:
    x = normal(100, dtype=dtype)
    before = x.clone()
    y = functional.sigmoid(x)
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


# ---- the gradient


def gradient(sigmoid: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(sigmoid(leaf), leaf, dy)
    return dx


@each_dtype_with_reference
def test_gradient_within_bounds(dtype: torch.dtype, isa: str) -> None:
    arithmetic = Arithmetic(dtype)
    x, dy = 4 * normal(1003, dtype=dtype), normal(1003, dtype=dtype)
    y = arithmetic.stored(arithmetic.sigmoid(exact(x)))
    expected = arithmetic.stored(arithmetic.sigmoid_backward(exact(dy), y))
    assert_within(gradient(functional.sigmoid, x, dy), expected, "dx")
    # From the y that was stored there is nothing but the formula's own rounding.
    given = functional.sigmoid(x)
    expected = arithmetic.stored(arithmetic.sigmoid_backward(exact(dy), exact(given)))
    actual = torch.ops.neuron_ext.sigmoid_backward(dy, given)
    assert_within(actual, expected, "dx from y")


@each_dtype
def test_gradient_of_any_view(dtype: torch.dtype, isa: str) -> None:
    """Of the output, too."""
    for name, x in views(normal(2, 3, 4, 5, dtype=dtype)):
        dy = normal(*x.shape, dtype=dtype)
        expected = gradient(functional.sigmoid, x.contiguous(), dy)
        backwards = tuple(reversed(range(dy.dim())))
        grad_outputs = {
            "contiguous": dy,
            "like the input's": torch.empty_like(functional.sigmoid(x)).copy_(dy),
            "stepped": torch.stack([dy, dy], -1)[..., 1],
            "reversed": dy.permute(backwards).contiguous().permute(backwards),
        }
        for kind, view in grad_outputs.items():
            with uninitialised_memory_is_nan():
                actual = gradient(functional.sigmoid, x, view)
            assert_same(actual, expected, f"{name}, grad_output {kind}")
            if kind == "like the input's":
                assert actual.stride() == gradient(torch.sigmoid, x, view).stride(), name
        one = torch.ones((), dtype=dtype).expand(x.shape)
        actual = gradient(functional.sigmoid, x, one)
        assert_same(actual, gradient(functional.sigmoid, x, one.contiguous()), f"{name}, of a sum")


@each_dtype
def test_gradient_at_special_values(dtype: torch.dtype, isa: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([inf, -inf, nan, 0, 0, 0, 50, -50], dtype=dtype)
    dy = torch.tensor([1, 1, 1, inf, nan, -2, 0, 0], dtype=dtype)
    expected = torch.tensor([0, 0, nan, inf, nan, -0.5, 0, 0], dtype=dtype)
    assert_same(gradient(functional.sigmoid, x, dy), expected)
    assert_same(gradient(functional.sigmoid, x, dy), gradient(torch.sigmoid, x, dy))


def test_pending_negation(isa: str) -> None:
    x = torch.randn(40, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert_same(functional.sigmoid(x), functional.sigmoid(x.resolve_neg()))
    dy = torch.randn(40, dtype=torch.complex64).conj().imag
    assert_same(
        gradient(functional.sigmoid, x, dy),
        gradient(functional.sigmoid, x.resolve_neg(), dy.resolve_neg()),
    )
