"""autocast: the dtypes, values and gradients that torch's own layers have under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases import name_of
from operations import (
    ALL,
    LINEAR,
    MLP,
    SIGMOID,
    Operation,
    assert_close,
    each,
    one_each,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import neuron_ext
from neuron_ext import functional

LOW = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}

each_low = pytest.mark.parametrize("low", LOW, ids=name_of)


@each
@each_low
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of
)
def test_outputs(operation: Operation, low: torch.dtype, dtype: torch.dtype) -> None:
    inputs = operation.inputs(dtype=dtype)
    with torch.autocast("cpu", dtype=low):
        ours, reference = operation.ours(*inputs), operation.torch(*inputs)
    assert ours.dtype == reference.dtype
    assert ours.dtype == (dtype if dtype == torch.float64 or operation is SIGMOID else low)
    assert_close(ours, reference, TOLERANCE.get(ours.dtype, 1e-6))


@each_low
def test_what_is_cast_runs_on_kernels(low: torch.dtype) -> None:
    """One rounding of the sum: better than sigmoid after linear can be."""
    x, w, b = (t.float() for t in LINEAR.inputs())
    with torch.autocast("cpu", dtype=low):
        ours = functional.linear_sigmoid(x, w, b)
    with torch.autocast("cpu", enabled=False):
        expected = functional.linear_sigmoid(x.to(low), w.to(low), b.to(low))
    assert torch.equal(ours, expected)


@each
@each_low
@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradients(operation: Operation, low: torch.dtype, backward_inside: bool) -> None:
    results = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", dtype=low):
            loss = function(*inputs).float().pow(2).sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)
        results.append([t.grad for t in inputs])
    assert_close(*results, tolerance=4 * TOLERANCE[low])


@one_each
def test_second_derivatives(operation: Operation) -> None:
    results = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.float16):
            first = torch.autograd.grad(
                function(*inputs).float().sin().sum(), inputs, create_graph=True
            )
            loss = torch.stack([g.float().pow(2).sum() for g in first]).sum()
        results.append(torch.autograd.grad(loss, inputs))
        assert all(g.dtype == torch.float32 for g in results[-1])
    assert_close(*results, tolerance=3e-2)


@one_each
def test_mixed_dtypes_are_allowed_inside_and_refused_outside(operation: Operation) -> None:
    if operation is SIGMOID:
        return
    inputs = operation.inputs(dtype=torch.float32)
    inputs[0] = inputs[0].half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operation.ours(*inputs).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"dtype|float"):
        operation.ours(*inputs)


@one_each
def test_nested_and_disabled(operation: Operation) -> None:
    inputs = operation.inputs(dtype=torch.float32)

    def dtypes(function: Callable[..., Tensor]) -> list[torch.dtype]:
        seen = [function(*inputs).dtype]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(function(*inputs).dtype)
            with torch.autocast("cpu", dtype=torch.float16):
                seen.append(function(*inputs).dtype)
            with torch.autocast("cpu", enabled=False):
                seen.append(function(*inputs).dtype)
            seen.append(function(*inputs).dtype)
        return [*seen, function(*inputs).dtype]

    assert dtypes(operation.ours) == dtypes(operation.torch)


class Casts(TorchDispatchMode):
    """How many conversions ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", [LINEAR, MLP], ids=str)
@pytest.mark.parametrize("cache_enabled", [True, False])
def test_parameters_are_cast_once_where_torch_casts_them_once(
    operation: Operation, cache_enabled: bool
) -> None:
    counts = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(dtype=torch.float32, requires_grad=True)
        inputs[0].requires_grad_(False)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled),
            Casts() as casts,
        ):
            for _ in range(3):
                function(*inputs)
        counts.append(casts.count)
    assert counts[0] == counts[1]


def test_a_cached_weight_serves_torch_too() -> None:
    """One cache, and gradients through it from both users add up."""
    x, w, b = (t.detach().float().requires_grad_() for t in LINEAR.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (functional.linear(x, w, b) + F.linear(x, w, b)).float().sum().backward()
    both = w.grad
    w.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.linear(x, w, b).float().sum().backward()
    assert both is not None
    assert w.grad is not None
    assert_close(both, 2 * w.grad, 3e-2)


def test_modules_train_under_autocast() -> None:
    torch.manual_seed(0)
    ours = neuron_ext.MLP([3, 8, 1], output_activation="sigmoid")
    reference = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 1), torch.nn.Sigmoid()
    )
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(32, 3)
    target = (x.sum(-1, keepdim=True) > 0).float()

    def losses(model: torch.nn.Module) -> Sequence[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=3)
        seen = []
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(x)
            loss = F.mse_loss(output.float(), target)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    ours_losses, reference_losses = losses(ours), losses(reference)
    assert ours_losses[-1] < 0.7 * ours_losses[0]
    assert ours_losses[-1] == pytest.approx(reference_losses[-1], rel=0.2)


@each_low
def test_grad_scaler(low: torch.dtype) -> None:
    model = neuron_ext.LinearSigmoid(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(5, 3)
    with torch.autocast("cpu", dtype=low):
        loss = model(x).float().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert model.weight.grad is not None
    expected = torch.autograd.grad(
        torch.sigmoid(F.linear(x, model.weight, model.bias)).sum(), model.weight
    )[0]
    assert_close(model.weight.grad, expected, 4 * TOLERANCE[low])


def test_the_rule_for_cuda() -> None:
    """On fake tensors, which need no GPU; the dtype is CUDA's own."""
    for operation in ALL:
        with FakeTensorMode() as mode:
            inputs = [torch.empty(shape, device="cuda") for shape in operation.shapes]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                ours, reference = operation.ours(*inputs), operation.torch(*inputs)
            assert isinstance(ours, type(mode.from_tensor(torch.empty(1))))
        assert (ours.dtype, ours.device, ours.shape) == (
            reference.dtype,
            reference.device,
            reference.shape,
        )


@pytest.mark.parametrize("name", ["linear", "linear_sigmoid", "mlp"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_rules_are_registered(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"neuron_ext::{name}", key)


def test_custom_forward_functions() -> None:
    """torch.amp.custom_fwd around our operations in a user's autograd.Function."""

    class Layer(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx, x, w):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, w)
            return functional.linear(x, w)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, w = ctx.saved_tensors
            return functional.linear(grad, w.T), functional.linear(grad.T, x.T)

    x, w, _ = (t.float().requires_grad_() for t in LINEAR.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Layer.apply(x.detach().bfloat16().requires_grad_(), w)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
