"""Packed weights (neuron_ext.backends) are never stale, bounded, and gone when they should be."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import each_dtype, normal
from torch import Tensor, nn

import neuron_ext
from neuron_ext import backends, functional

ROWS = 40  # a batch that is worth packing for


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    with backends.use_packed_weights(1 << 26):
        yield
    assert backends.packed_weights() == (0, 0, 0)


@pytest.fixture
def x() -> Tensor:
    return normal(ROWS, 50, dtype=torch.float32)


def parameter(out: int = 30, features: int = 50) -> nn.Parameter:
    return nn.Parameter(normal(out, features, dtype=torch.float32))


@torch.no_grad()
def without(x: Tensor, w: Tensor) -> Tensor:
    """The layer's output with nothing kept from call to call."""
    return functional.linear(x, w.clone())


def count() -> int:
    return backends.packed_weights().weights


@each_dtype
@pytest.mark.parametrize("rows", [1, 3, 8, 33, 100])
def test_the_same_within_rounding(rows: int, dtype: torch.dtype, isa: str) -> None:
    """And the same bits, where the batch is large enough to be packed for anyway. All layers fill
    AMX's tiles well: those that do so in long batches only run other kernels in short ones."""
    x, w, v = (normal(*size, dtype=dtype) for size in ((rows, 300), (70, 300), (15, 70)))
    w, v = w / 300**0.5, v / 70**0.5
    b = normal(70, dtype=dtype)
    with torch.no_grad():
        for _ in range(2):
            packed = functional.linear_sigmoid(x, w, b), functional.mlp(x, [w, v], [b, None])
        with backends.use_packed_weights(0):
            plain = functional.linear_sigmoid(x, w, b), functional.mlp(x, [w, v], [b, None])
    for actual, expected in zip(packed, plain, strict=True):
        if rows > 32:
            assert torch.equal(actual, expected)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=64 * eps)


@torch.no_grad()
def test_packed_once(x: Tensor) -> None:
    w = parameter()
    first = functional.linear(x, w)
    kept = backends.packed_weights()
    assert kept.weights == 1
    assert kept.bytes >= w.numel() * w.element_size()
    for _ in range(3):
        assert torch.equal(functional.linear(x, w), first)
    assert backends.packed_weights() == kept
    functional.linear_sigmoid(x, w)
    functional.mlp(x, [w])
    assert backends.packed_weights() == kept


@torch.no_grad()
def test_every_counted_change_is_seen(x: Tensor) -> None:
    model = neuron_ext.LinearSigmoid(50, 30)
    w = model.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}

    def step() -> None:
        with torch.enable_grad():
            model(x).sum().backward()
        optimizer.step()

    def replace() -> None:
        w.data = torch.randn(30, 50)

    changes = {
        "in place": lambda: w.mul_(2),
        "through a view": lambda: w[3].add_(1),
        "through a view of a view": lambda: w.T[2:].view(-1, 30)[0].zero_(),
        "through detach": lambda: w.detach().neg_(),
        "copy": lambda: w.copy_(torch.randn(30, 50)),
        "out=": lambda: torch.add(w.detach(), 1, out=w.detach()),
        "foreach": lambda: torch._foreach_mul_([w], 3.0),
        "optimizer": step,
        "load_state_dict": lambda: model.load_state_dict(state),
        "assign": lambda: model.load_state_dict(state, assign=True),
        "other data": replace,
        "other data again": replace,
        "inference mode": lambda: torch.inference_mode()(lambda: w.sub_(1))(),
        "init": lambda: nn.init.normal_(w),
    }
    for name, change in changes.items():
        w = model.weight
        functional.linear(x, w)
        change()
        w = model.weight
        assert torch.equal(functional.linear(x, w), without(x, w)), name


@torch.no_grad()
def test_views_of_one_tensor(x: Tensor) -> None:
    whole = parameter(90)
    for _ in range(2):
        for part in whole.chunk(3):
            assert torch.equal(functional.linear(x, part), without(x, part))
    assert count() == 3
    whole.add_(1)
    for part in whole.chunk(3):
        assert torch.equal(functional.linear(x, part), without(x, part))
    assert count() == 3
    stored_in_out = parameter(50, 30)
    for _ in range(3):
        stored_in_out.mul_(2)
        assert torch.equal(functional.linear(x, stored_in_out.T), without(x, stored_in_out.T))
    assert count() == 4


@torch.no_grad()
def test_data_counts_for_itself(x: Tensor) -> None:
    """Each `.data` is a tensor that counts its own changes: it never gets what another packed."""
    w = parameter()
    functional.linear(x, w)
    for _ in range(3):
        w.add_(1)
        assert torch.equal(functional.linear(x, w.data), without(x, w))
        alias = w.data
        functional.linear(x, alias)
        alias.mul_(2)
        assert torch.equal(functional.linear(x, alias), without(x, w))


@torch.no_grad()
def test_changes_that_nobody_counts_need_a_call(x: Tensor) -> None:
    """What the documentation says can't be seen, and what it says to do then."""
    array = np.random.default_rng(3).standard_normal((30, 50), dtype=np.float32)
    w = torch.from_numpy(array)
    before = functional.linear(x, w)
    array *= 2
    assert torch.equal(functional.linear(x, w), before)
    limit = backends.packed_weights().max_bytes
    backends.set_packed_weights(0)
    backends.set_packed_weights(limit)
    assert torch.equal(functional.linear(x, w), without(x, w))


def test_not_where_gradients_are_recorded(x: Tensor) -> None:
    w = parameter()
    functional.linear(x, w).sum().backward()
    functional.linear_sigmoid(x.clone().requires_grad_(), w.detach())
    functional.mlp(x, [w, parameter(5, 30)])
    assert count() == 0
    functional.linear(x, w.detach())
    frozen = w.detach()
    functional.linear(x, frozen)
    assert count() > 0


def test_inference_tensors_count_nothing(x: Tensor) -> None:
    with torch.inference_mode():
        w = torch.randn(30, 50)
        functional.linear(x, w)
        w.mul_(2)
        assert torch.equal(functional.linear(x, w), without(x, w))
        assert count() == 0
        p = parameter()
    with torch.inference_mode():
        functional.linear(x, p)


@torch.no_grad()
def test_gone_with_its_tensor(x: Tensor) -> None:
    for _ in range(20):
        w = parameter()
        assert torch.equal(functional.linear(x, w), without(x, w))
        del w
        gc.collect()
        # The next tensor is likely to lie where this one lay.
    assert count() == 0


@torch.no_grad()
def test_bounded(x: Tensor) -> None:
    weights = [parameter() for _ in range(6)]
    functional.linear(x, weights[0])
    size = backends.packed_weights().bytes
    backends.set_packed_weights(3 * size)
    for w in weights:
        functional.linear(x, w)
        functional.linear(x, weights[0])  # used all the time, it stays
    assert backends.packed_weights() == (3 * size, 3 * size, 3)
    backends.set_packed_weights(2 * size)
    assert backends.packed_weights() == (2 * size, 2 * size, 2)
    backends.set_packed_weights(size - 1)
    functional.linear(x, weights[0])
    assert backends.packed_weights() == (size - 1, 0, 0)
    with pytest.raises(ValueError, match="max_bytes is -1"):
        backends.set_packed_weights(-1)


@torch.no_grad()
def test_another_instruction_set(x: Tensor) -> None:
    w = parameter()
    for _ in range(2):
        for isa in backends.supported_cpu_isas():
            with backends.use_cpu_isa(isa):
                assert torch.equal(functional.linear(x, w), without(x, w))
                assert isa in backends.last_kernel() or isa == "avx512_bf16"


@torch.no_grad()
def test_threads_at_once(x: Tensor) -> None:
    weights = [parameter() for _ in range(8)]
    expected = [without(x, w) for w in weights]
    functional.linear(x, weights[0])
    size = backends.packed_weights().bytes

    def work(turn: int) -> bool:
        if turn % 5 == 0:
            backends.set_packed_weights((1 + turn % 4) * size)
        i = turn % len(weights)
        with torch.no_grad():
            return torch.equal(functional.linear(x, weights[i]), expected[i])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))
    assert backends.packed_weights().bytes <= 4 * size
