"""With neuron_ext.backends.set_batch_invariant, a row's bits don't depend on its batch."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import each_dtype, normal
from torch import Tensor

from neuron_ext import backends, functional

Layer = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    threads = torch.get_num_threads()
    with backends.use_batch_invariant():
        yield
    torch.set_num_threads(threads)


def functions(features: int, out: int, dtype: torch.dtype) -> dict[str, tuple[Layer, int]]:
    """Each operation on `features`, and how many it gives."""
    w, v, u = (normal(*size, dtype=dtype) for size in ((out, features), (24, out), (features, out)))
    b, c = normal(out, dtype=dtype), normal(1, dtype=dtype)
    return {
        "linear": (lambda x: functional.linear(x, w, b), out),
        "linear of (in, out)": (lambda x: functional.linear(x, u.T), out),
        "linear_sigmoid": (lambda x: functional.linear_sigmoid(x, w, c), out),
        "mlp": (lambda x: functional.mlp(x, [w, v], [b, None]), 24),
        "mlp, sigmoid": (lambda x: functional.mlp(x, [w, v], [None, c], "sigmoid"), 24),
    }


def output_and_gradient(f: Layer, x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = f(x)
    (dx,) = torch.autograd.grad(y, x, grad_output)
    return y.detach(), dx


@each_dtype
@pytest.mark.parametrize(
    ("features", "out"),
    [(1, 1), (3, 2), (5, 40), (40, 3), (64, 64), (300, 20), (1030, 1), (33, 300), (9000, 2)],
)
def test_any_rows_of_a_batch(
    features: int, out: int, dtype: torch.dtype, isa: str, seed: int
) -> None:
    chosen = random.Random(seed)
    batch = 1000 if features < 1000 else 200
    x = normal(batch, features, dtype=dtype)
    for name, (f, width) in functions(features, out, dtype).items():
        grad = normal(batch, width, dtype=dtype)
        torch.set_num_threads(4)
        y, dx = output_and_gradient(f, x, grad)
        torch.set_num_threads(chosen.choice((1, 2, 3)))
        for count in (1, 2, 7, 33, chosen.randint(1, batch)):
            rows = torch.tensor(chosen.sample(range(batch), count))
            first = chosen.randint(0, batch - count)
            for part in (rows, slice(first, first + count), slice(first, None, 3)):
                y_part, dx_part = output_and_gradient(f, x[part], grad[part])
                assert torch.equal(y_part, y[part]), f"{name}: {count} rows"
                assert torch.equal(dx_part, dx[part]), f"{name}: gradient of {count} rows"
                with torch.no_grad():
                    assert torch.equal(f(x[part]), y[part]), f"{name}: {count} rows, no grad"


@each_dtype
def test_any_batch_dimensions(dtype: torch.dtype, isa: str) -> None:
    x = normal(6, 5, 70, dtype=dtype)
    for name, (f, _) in functions(70, 30, dtype).items():
        y = f(x)
        assert torch.equal(f(x.reshape(30, 70)).reshape(y.shape), y), name
        assert torch.equal(f(x.transpose(0, 1)), y.transpose(0, 1)), name
        assert torch.equal(f(x[4, 2]), y[4, 2]), name
        assert torch.equal(f(x[:, 3:4].expand(6, 9, 70)), y[:, 3:4].expand(6, 9, -1)), name


@each_dtype
def test_with_packed_weights(dtype: torch.dtype, isa: str) -> None:
    x = normal(300, 130, dtype=dtype)
    for name, (f, _) in functions(130, 90, dtype).items():
        with torch.no_grad(), backends.use_packed_weights(1 << 24):
            y = f(x)
        for count in (1, 5, 40):
            assert torch.equal(f(x[:count]), y[:count]), name


def test_a_row_that_is_odd_stays_alone() -> None:
    """Infinities, nans and numbers near zero of other rows don't choose another way for a row."""
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(20, 300, dtype=dtype)
        odd = x.clone()
        odd[3, 7], odd[4, 8], odd[5] = float("inf"), float("nan"), 1e-38
        rest = torch.tensor([i for i in range(20) if i not in (3, 4, 5)])
        for name, (f, _) in functions(300, 40, dtype).items():
            assert torch.equal(f(odd)[rest], f(x)[rest]), f"{name} {dtype}"


def test_the_setting() -> None:
    assert backends.batch_invariant()
    with backends.use_batch_invariant(False):
        assert not backends.batch_invariant()
        with backends.use_batch_invariant():
            assert backends.batch_invariant()
        assert not backends.batch_invariant()
    backends.set_batch_invariant(False)
    assert not backends.batch_invariant()
    backends.set_batch_invariant(True)
    with pytest.raises(KeyError), backends.use_batch_invariant(False):
        raise KeyError
    assert backends.batch_invariant()
