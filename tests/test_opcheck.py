"""torch.library.opcheck, all five utilities, on every operation and every backward operation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, layouts, name_of
from torch import Tensor

Arguments = tuple[Any, ...]

ops = torch.ops.neuron_ext


def tensor(*size: int, dtype: torch.dtype = torch.float32, needs_grad: bool = True) -> Tensor:
    return torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_(needs_grad)


def layers(dtype: torch.dtype, needs_grad: bool) -> Iterator[Arguments]:
    """Arguments of linear and linear_sigmoid."""

    def t(*size: int) -> Tensor:
        return tensor(*size, dtype=dtype, needs_grad=needs_grad)

    yield t(5, 3), t(4, 3), t(4)
    yield t(5, 3), t(4, 3)
    yield t(5, 3), t(3, 4).T, None
    yield t(3, 5).T, t(4, 3), t(1, 4)
    yield t(3), t(4, 3), t(4)
    yield t(2, 0, 3), t(4, 3), t(4)
    yield t(2, 3, 5, 3).transpose(0, 2), t(4, 3), t(1)
    yield t(1, 3).expand(6, 3), t(4, 3), t()
    yield t(5, 0), t(4, 0), t(4)
    yield t(5, 3), t(0, 3), t(0)


def stacks(dtype: torch.dtype, needs_grad: bool) -> Iterator[Arguments]:
    """Arguments of mlp."""

    def t(*size: int) -> Tensor:
        return tensor(*size, dtype=dtype, needs_grad=needs_grad)

    weights = [t(4, 3), t(2, 4), t(3, 2)]
    for x in (t(5, 3), t(3), t(2, 4, 3), t(0, 3), t(3, 5).T):
        yield x, weights, [t(4), t(2), t(3)], None
    yield t(5, 3), weights, [None, t(1, 2), None], "sigmoid"
    yield t(5, 3), weights, [None, None, None], "sigmoid"
    yield t(5, 3), weights[:1], [t(4)]
    yield t(5, 3), weights[:1], [None], "sigmoid"


UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def check(op: torch._ops.OpOverload, arguments: Arguments) -> None:
    results = torch.library.opcheck(op, arguments, test_utils=UTILITIES)
    assert results == dict.fromkeys(UTILITIES, "SUCCESS")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
needs_grad = pytest.mark.parametrize("needs_grad", [True, False], ids=["grad", "no_grad"])


@each_dtype
@needs_grad
@pytest.mark.parametrize("name", ["linear", "linear_sigmoid"])
def test_layers(name: str, dtype: torch.dtype, needs_grad: bool) -> None:
    for arguments in layers(dtype, needs_grad):
        check(getattr(ops, name).default, arguments)
        if dtype != torch.float32:
            break


@each_dtype
@needs_grad
def test_sigmoid(dtype: torch.dtype, needs_grad: bool) -> None:
    for _, view in layouts(tensor(3, 4, dtype=dtype, needs_grad=False)):
        check(ops.sigmoid.default, (view.requires_grad_(needs_grad),))
    for t in (tensor(), tensor(0), tensor(7)[::2], tensor(1, 4).expand(3, 4)):
        check(ops.sigmoid.default, (t.detach().requires_grad_(needs_grad),))


@each_dtype
@needs_grad
def test_mlp(dtype: torch.dtype, needs_grad: bool) -> None:
    for arguments in stacks(dtype, needs_grad):
        check(ops.mlp.default, arguments)
        check(ops.mlp_forward.default, arguments)
        if dtype != torch.float32:
            break


@needs_grad
@pytest.mark.parametrize("sigmoid", [False, True])
def test_layer_backward(sigmoid: bool, needs_grad: bool) -> None:
    op = (ops.linear_sigmoid_backward if sigmoid else ops.linear_backward).default

    def t(*size: int) -> Tensor:
        return tensor(*size, needs_grad=needs_grad)

    for mask in itertools.product((False, True), repeat=3):
        if not any(mask):
            continue
        x, w = t(5, 3) if mask[1] else None, t(4, 3) if mask[0] else None
        for grad in (t(5, 4), t(4, 5).T, t(1, 4).expand(5, 4)):
            check(op, (grad, x, w, *([torch.rand(5, 4)] if sigmoid else []), mask))
    for lead in ((), (0,), (2, 3)):
        output = [torch.rand(*lead, 4)] if sigmoid else []
        check(op, (t(*lead, 4), t(*lead, 3), t(4, 3), *output, (True, True, True)))


@needs_grad
def test_sigmoid_backward(needs_grad: bool) -> None:
    for size in ((3, 4), (), (0, 2)):
        for grad in (tensor(*size), tensor().expand(size)):
            y = torch.rand(size).requires_grad_(needs_grad)
            check(ops.sigmoid_backward.default, (grad.detach().requires_grad_(needs_grad), y))


@needs_grad
def test_mlp_backward(needs_grad: bool) -> None:
    def t(*size: int) -> Tensor:
        return tensor(*size, needs_grad=needs_grad)

    for biased, activation in ((True, None), (False, "sigmoid")):
        weights, biases = [t(4, 3), t(2, 4)], [t(4) if biased else None, t(2)]
        x = t(5, 3)
        with torch.no_grad():
            output, hidden = ops.mlp_forward(x, weights, biases, activation)
        known = (output if activation else None, hidden, [4])
        frozen, data = [w.detach() for w in weights], x.detach()
        nowhere: list[Tensor | None] = [None] * 5
        for arguments in (
            (x, weights, [None, None, None, *biases], *known, [True, True, True, biased, True]),
            (
                data,
                [None, weights[1]],
                nowhere,
                *known,
                [False, True, True, False, False],
            ),
            (None, frozen, nowhere, *known, [True, False, False, False, False]),
            (
                None,
                [None, None],
                [None, None, None, None, biases[1]],
                *known,
                [False, False, True, False, True],
            ),
        ):
            check(ops.mlp_backward.default, (t(5, 2), *arguments))


def test_every_operation_was_checked_here() -> None:
    registered = {
        name.removeprefix("neuron_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("neuron_ext::")
    }
    assert registered == {
        "linear",
        "linear_backward",
        "linear_sigmoid",
        "linear_sigmoid_backward",
        "mlp",
        "mlp_backward",
        "mlp_forward",
        "sigmoid",
        "sigmoid_backward",
    }
