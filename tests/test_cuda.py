"""CUDA: without a GPU what can be asked of fake tensors; with one, everything.

Skipped where the build has no CUDA kernels; what needs a GPU, where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import cases
import operations
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import neuron_ext
from neuron_ext import backends, functional

pytestmark = pytest.mark.skipif(
    not backends.cuda_is_built(), reason="this build has no CUDA kernels"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="there is one GPU or none"
)

GPU = torch.device("cuda")
OPS = ("linear", "sigmoid", "linear_sigmoid")


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().to(GPU).requires_grad_(t.requires_grad) for t in tensors]


# ---- fake tensors: no GPU needed


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize("op", [*OPS, *(f"{op}_backward" for op in OPS), "mlp", "mlp_forward"])
def test_operations_have_cuda_kernels(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"neuron_ext::{op}", "CUDA")


@cases.each_dtype
@pytest.mark.usefixtures("fake")
def test_results_are_on_the_gpu(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(size, dtype=dtype) for size in ((2, 7, 5), (3, 5), (3,)))
    for y in (
        functional.linear(x, w, b),
        functional.linear_sigmoid(x, w, b),
        functional.mlp(x, [w], [b], "sigmoid"),
    ):
        assert (y.device.type, y.shape, y.dtype) == ("cuda", (2, 7, 3), dtype)
    assert functional.sigmoid(x.transpose(0, 2)).stride() == x.transpose(0, 2).stride()
    layer = neuron_ext.LinearSigmoid(5, 3, dtype=dtype)
    assert layer(x).device.type == "cuda"


def test_graphs_have_the_operations_in_them() -> None:
    def step(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear_sigmoid(x, w, b), functional.sigmoid(x)

    with FakeTensorMode() as mode, torch.device("cuda"):
        args = [torch.randn(size) for size in ((7, 5), (3, 5), (3,))]
        del mode
        graph = make_fx(step)(*args).graph
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    ops = torch.ops.neuron_ext
    assert called == {ops.linear_sigmoid.default, ops.sigmoid.default}


@pytest.mark.usefixtures("fake")
def test_backward_operations() -> None:
    dy, x, w, y = (torch.randn(size) for size in ((7, 3), (7, 5), (3, 5), (7, 3)))
    ops = torch.ops.neuron_ext
    grads = ops.linear_sigmoid_backward(dy, x, w, y, [True, True, True])
    assert [g.shape for g in grads] == [x.shape, w.shape, (3,)]
    assert {g.device.type for g in grads} == {"cuda"}
    assert ops.sigmoid_backward(dy, y).shape == y.shape


# ---- values, on a GPU


# All three products on tensor cores, in several tiles with edges; where rows aren't aligned, f32's.
TILED_SHAPES: dict[str, cases.Shape] = {
    "several tiles": ((392,), 264, 520),
    "several tiles, odd": ((389,), 261, 517),
}


@needs_gpu
@cases.each_dtype_with_reference
@cases.each_shape(cases.SHAPES | TILED_SHAPES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["linear", "linear_sigmoid"])
def test_layer_and_gradients(shape: cases.Shape, dtype: torch.dtype, sigmoid: bool) -> None:
    x, w, b = cases.layer_inputs(shape, dtype)
    assert b is not None
    dy = cases.normal(*x.shape[:-1], len(w), dtype=dtype)
    arithmetic = cases.Arithmetic(dtype)
    layer = functional.linear_sigmoid if sigmoid else functional.linear

    gpu = on_gpu(x, w, b)
    leaves = [t.requires_grad_() for t in gpu]
    with cases.uninitialised_memory_is_nan():
        y = layer(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(GPU))
    expected = cases.layer(arithmetic, *(cases.exact(t) for t in (x, w, b)), sigmoid)
    cases.assert_within(y.cpu(), expected, "y")
    wanted = cases.layer_backward(
        arithmetic,
        *(cases.exact(t) for t in (dy, x, w)),
        cases.exact(y.cpu()) if sigmoid else None,
        stores_dz=True,  # for tensor cores
    )
    for name, grad, bound in zip(("dx", "dw", "db"), grads, wanted, strict=True):
        cases.assert_within(grad.cpu(), bound, name)


@needs_gpu
@cases.each_dtype
@pytest.mark.parametrize("m", cases.TILE_EDGES)
def test_whole_numbers_are_exact_at_every_edge(m: int, dtype: torch.dtype) -> None:
    """Sizes around multiples of tiles; a wrong index shows, since no rounding hides it."""
    for n in (1, 7, 64, 65, 127, 129):
        for k in (1, 8, 31, 64, 129):
            x, w = (cases.integers(size, k, dtype=dtype) for size in (m, n))
            b = cases.integers(n, dtype=dtype)
            ours = functional.linear(*on_gpu(x, w, b)).cpu()
            exact = F.linear(x.double(), w.double(), b.double())
            cases.assert_same(ours, exact.to(dtype), f"{m} x {k} -> {n}")


@needs_gpu
@cases.each_dtype
def test_every_layout(dtype: torch.dtype) -> None:
    x, w, b = cases.layer_inputs(((33,), 70, 45), dtype)
    assert b is not None
    plain = [*on_gpu(x, w), torch.rand(33, 45, device=GPU).to(dtype)]
    bias = b.to(GPU)

    def results(x: Tensor, w: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = functional.linear_sigmoid(*leaves, bias)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    expected = results(*plain)
    for which, operand in enumerate(plain):
        with GPU:
            views = list(cases.layouts(operand))
        for name, view in views:
            ours = results(*(view if i == which else t for i, t in enumerate(plain)))
            for a, e in zip(ours, expected, strict=True):
                cases.assert_same_outcome(a, e, f"operand {which}, {name}")


@needs_gpu
@cases.each_dtype
@pytest.mark.parametrize(
    "features",
    [(4, 5, 7, 3), (64,) * 5, (784, 128, 64, 10), (128,) * 9],
    ids=lambda features: "-".join(map(str, features)),
)
def test_stack_and_gradients(features: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the layers one by one, whose rounding may differ in each."""
    for rows in (1, 33, 5000):
        weights = [cases.normal(n, k, dtype=dtype) / k**0.5 for k, n in pairwise(features)]
        biases = [cases.normal(n, dtype=dtype) for n in features[1:]]
        x = cases.normal(rows, features[0], dtype=dtype)
        leaves = [t.requires_grad_() for t in on_gpu(x, *weights, *biases)]
        parameters = leaves[1 : len(features)], leaves[len(features) :]
        with torch.no_grad():
            alone = functional.mlp(leaves[0], *parameters)
        with cases.uninitialised_memory_is_nan():
            y = functional.mlp(leaves[0], *parameters)
        cases.assert_same(y, alone, "a row's bits, whatever is kept")
        h = leaves[0]
        for i, (w, b) in enumerate(zip(*parameters, strict=True)):
            last = i + 2 == len(features)
            h = functional.linear(h, w, b) if last else functional.linear_sigmoid(h, w, b)
        dy = torch.rand_like(y)
        eps = torch.finfo(dtype).eps
        for ours, by_layers in zip(
            [y, *torch.autograd.grad(y, leaves, dy)],
            [h, *torch.autograd.grad(h, leaves, dy)],
            strict=True,
        ):
            scale = by_layers.abs().max().item()
            torch.testing.assert_close(ours, by_layers, rtol=16 * eps, atol=16 * eps * scale)


@needs_gpu
@cases.each_dtype_with_reference
def test_sigmoid_and_gradient(dtype: torch.dtype) -> None:
    arithmetic = cases.Arithmetic(dtype)
    for size in ((1,), (0,), (1000003,), (7, 5, 3), (2, 3, 4, 5, 6)):
        x, dy = (4 * cases.normal(*size, dtype=dtype) for _ in range(2))
        leaf = x.to(GPU).requires_grad_()
        y = functional.sigmoid(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy.to(GPU))
        expected = arithmetic.stored(arithmetic.sigmoid(cases.exact(x)))
        cases.assert_within(y.cpu(), expected, "y")
        bound = arithmetic.sigmoid_backward(cases.exact(dy), cases.exact(y.cpu()))
        cases.assert_within(dx.cpu(), arithmetic.stored(bound), "dx")


@needs_gpu
def test_sigmoid_of_every_layout() -> None:
    t = torch.randn(4, 6, 10, 12, device=GPU)
    views = (
        t.permute(3, 1, 0, 2),
        t[::2, 1:, :, ::3],
        t[:, :1].expand(4, 5, 10, 12),
        t.to(memory_format=torch.channels_last),
        torch.randn((2,) * 10, device=GPU).permute(*range(9, -1, -1))[..., ::2],
        torch.tensor(0.5, device=GPU),
    )
    for view in views:
        ours, theirs = functional.sigmoid(view), torch.sigmoid(view)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@needs_gpu
@pytest.mark.parametrize("m", [2**31 + 5])
def test_more_elements_than_an_int_can_count(m: int) -> None:
    x = torch.zeros(m, 1, dtype=torch.bfloat16, device=GPU)
    x[-1] = 2
    w, b = torch.ones(1, 1, dtype=x.dtype, device=GPU), torch.zeros(1, device=GPU).bfloat16()
    y = functional.linear_sigmoid(x, w, b)
    assert y[0].item() == 0.5
    assert y[-1].item() == torch.sigmoid(torch.tensor(2.0)).bfloat16().item()
    del y
    y = functional.sigmoid(x)
    assert y[-2].item() == 0.5
    assert y[-1].item() == torch.sigmoid(torch.tensor(2.0)).bfloat16().item()


# ---- what torch does to functions, on a GPU


@needs_gpu
@operations.each
def test_derivatives(operation: operations.Operation) -> None:
    inputs = on_gpu(*operation.inputs(requires_grad=True))
    assert torch.autograd.gradcheck(operation.ours, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operation.ours, inputs)


@needs_gpu
@operations.each
def test_operations_are_what_they_are_in_torch(operation: operations.Operation) -> None:
    inputs = on_gpu(*operation.inputs())
    operations.assert_close(operation.ours(*inputs), operation.torch(*inputs))


@needs_gpu
def test_compiled() -> None:
    model = neuron_ext.MLP([5, 16, 3], output_activation="sigmoid", device=GPU)
    x = torch.randn(9, 5, device=GPU)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@needs_gpu
def test_autocast() -> None:
    x, w, b = on_gpu(*(torch.randn(size) for size in ((7, 5), (3, 5), (3,))))
    with torch.autocast("cuda", torch.bfloat16):
        assert functional.linear_sigmoid(x, w, b).dtype == torch.bfloat16
        assert functional.sigmoid(x).dtype == torch.float32


# ---- devices, streams, graphs, errors


@needs_gpu
@pytest.mark.parametrize("which", range(3))
def test_tensors_on_different_devices(which: int) -> None:
    args = on_gpu(*(torch.randn(size) for size in ((7, 5), (3, 5), (3,))))
    args[which] = args[which].cpu()
    with pytest.raises(RuntimeError, match="same device"):
        functional.linear_sigmoid(*args)


@needs_two_gpus
def test_the_tensors_decide_on_the_gpu() -> None:
    args = [t.to("cuda:1") for t in operations.LINEAR_SIGMOID.inputs()]
    y = functional.linear_sigmoid(*args)
    assert y.device.index == 1
    assert torch.cuda.current_device() == 0
    operations.assert_close(y, operations.LINEAR_SIGMOID.torch(*args))


@needs_gpu
def test_the_current_stream_is_used() -> None:
    x, w, b = on_gpu(*(torch.randn(size) for size in ((512, 512), (512, 512), (512,))))
    expected = functional.linear_sigmoid(x, w, b)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(x)
        torch.cuda._sleep(
            50_000_000
        )  # a kernel on another stream would read `late` before the copy
        late.copy_(x)
        y = functional.linear_sigmoid(late, w, b)
    stream.synchronize()
    cases.assert_same(y, expected)


def training_step(
    model: torch.nn.Module, x: Tensor, optimizer: torch.optim.Optimizer
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@needs_gpu
def test_steps_can_be_captured_in_a_graph() -> None:
    def make() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        torch.manual_seed(0)
        model = neuron_ext.MLP([64, 128, 32, 1], output_activation="sigmoid", device=GPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, training_step(model, torch.randn(100, 64, device=GPU), optimizer)

    eager_model, eager = make()
    for _ in range(3 + 5):
        eager()

    model, step = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
    for ours, theirs in zip(model.parameters(), eager_model.parameters(), strict=True):
        cases.assert_same(ours.detach(), theirs.detach())


@needs_gpu
def test_nothing_waits_for_the_gpu() -> None:
    args = on_gpu(*(torch.randn(s, requires_grad=True) for s in ((64, 64), (64, 64), (64,))))
    dy = torch.ones(64, 64, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(functional.linear_sigmoid(*args), args, dy)
        functional.sigmoid(args[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@cases.each_dtype
def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    for shape in (((1,), 4096, 4096), ((8,), 4097, 33), ((5000,), 64, 3), ((300,), 700, 500)):
        leaves = [t.requires_grad_() for t in on_gpu(*cases.layer_inputs(shape, dtype))]
        y = functional.linear_sigmoid(*leaves)
        dy = torch.rand_like(y)
        first = [y, *torch.autograd.grad(y, leaves, dy, retain_graph=True)]
        for _ in range(3):
            again = functional.linear_sigmoid(*leaves)
            for a, e in zip([again, *torch.autograd.grad(again, leaves, dy)], first, strict=True):
                cases.assert_same(a, e)


@needs_gpu
def test_the_kernel_is_named() -> None:
    functional.linear(*on_gpu(torch.ones(8, 8), torch.ones(8, 8)))
    rows = {kernel.name: kernel for kernel in backends.kernels()}
    assert rows[backends.last_kernel()].device == "cuda"
    assert rows[backends.last_kernel()].runnable
