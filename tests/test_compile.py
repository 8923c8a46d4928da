"""torch.compile: one graph with our operations in it, eager's results and strides, any shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from operations import (
    ALL,
    LINEAR,
    MLP,
    MLP_SIGMOID,
    Operation,
    assert_close,
    each,
    one_each,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils._python_dispatch import TorchDispatchMode

import neuron_ext
from neuron_ext import functional

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing is left from earlier tests, nor on disk from earlier builds of ours."""
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()


def ours_in(graph: torch.fx.GraphModule) -> list[str]:
    return [
        node.target._opname
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "neuron_ext"
    ]


class Graphs:
    """A backend that runs what it gets and remembers our operations in it, before and after AOT."""

    def __init__(self) -> None:
        self.captured: list[list[str]] = []
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Function:
        self.captured.append(ours_in(graph))

        def keep(to: list[list[str]]) -> Function:
            def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Function:
                to.append(ours_in(graph))
                function: Function = (
                    torch._dynamo.backends.common.make_boxed_func(graph.forward) if False else graph
                )
                return function

            return compiler

        def boxed(to: list[list[str]]) -> Function:
            def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Function:
                to.append(ours_in(graph))
                function: Function = make_boxed_func(graph.forward)
                return function

            return compiler

        return aot_module_simplified(
            graph, inputs, fw_compiler=boxed(self.forward), bw_compiler=boxed(self.backward)
        )


def gradients(function: Function, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs).sin().sum(), inputs)


@each
@pytest.mark.parametrize("dynamic", [None, True])
def test_forward(operation: Operation, dynamic: bool | None) -> None:
    graphs = Graphs()
    compiled = torch.compile(
        lambda *t: operation.ours(*t), backend=graphs, fullgraph=True, dynamic=dynamic
    )
    first, *others = operation.inputs()
    for rows in (5, 5, 9, 2):
        x = first[:1].expand(rows, 3).cumsum(0)
        assert_close(compiled(x, *others), operation.torch(x, *others))
    shapes = 1 if dynamic else 2  # a second shape makes torch assume any
    assert graphs.captured == graphs.forward == [[operation.op]] * shapes
    assert graphs.backward == []


@each
@pytest.mark.parametrize("dynamic", [None, True])
def test_training(operation: Operation, dynamic: bool | None) -> None:
    graphs = Graphs()
    compiled = torch.compile(
        lambda *t: operation.ours(*t), backend=graphs, fullgraph=True, dynamic=dynamic
    )
    first, *others = operation.inputs(requires_grad=True)
    for rows in (5, 9, 7):
        x = first.detach()[:1].repeat(rows, 1).cumsum(0).requires_grad_()
        assert_close(gradients(compiled, [x, *others]), gradients(operation.torch, [x, *others]))
    shapes = 1 if dynamic else 2
    forward = "mlp_forward" if operation.op == "mlp" else operation.op
    assert graphs.forward == [[forward]] * shapes
    assert graphs.backward == [[f"{operation.op}_backward"]] * shapes


@one_each
def test_no_grad_runs_the_forward_operation_alone(operation: Operation) -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda *t: operation.ours(*t), backend=graphs, fullgraph=True)
    inputs = operation.inputs(requires_grad=True)
    with torch.no_grad():
        assert_close(compiled(*inputs), operation.torch(*inputs))
    with torch.inference_mode():
        assert_close(compiled(*inputs).clone(), operation.torch(*inputs).clone())
    assert {tuple(g) for g in graphs.forward} == {(operation.op,)}


@one_each
def test_no_grad_inside(operation: Operation) -> None:
    def function(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            scale = operation.ours(*tensors).abs().mean()
        return operation.ours(*tensors) / scale

    def reference(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            scale = operation.torch(*tensors).abs().mean()
        return operation.torch(*tensors) / scale

    inputs = operation.inputs(requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled, inputs), gradients(reference, inputs))


def test_frozen_weights_stay_frozen() -> None:
    inputs = LINEAR.inputs(requires_grad=(True, False, True))
    wanted = [inputs[0], inputs[2]]
    compiled = torch.compile(functional.linear_sigmoid, backend="aot_eager", fullgraph=True)
    output = compiled(*inputs)
    expected = torch.sigmoid(torch.nn.functional.linear(*inputs))
    assert_close(
        torch.autograd.grad(output.sin().sum(), wanted),
        torch.autograd.grad(expected.sin().sum(), wanted),
    )


STRIDED: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 6, 3),
    "transposed batch": lambda: torch.randn(6, 4, 3).transpose(0, 1),
    "features outermost": lambda: torch.randn(3, 4, 6).permute(1, 2, 0),
    "stepped": lambda: torch.randn(8, 6, 6)[::2, :, ::2],
    "expanded": lambda: torch.randn(4, 1, 3).expand(4, 6, 3),
    "one row": lambda: torch.randn(1, 1, 3),
    "empty": lambda: torch.randn(4, 0, 3),
    "vector": lambda: torch.randn(3),
    "channels last": lambda: torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last),
}


@one_each
@pytest.mark.parametrize("dynamic", [False, True])
def test_strides_are_those_of_eager(operation: Operation, dynamic: bool) -> None:
    others = operation.inputs(dtype=torch.float32)[1:]
    for name, make in STRIDED.items():
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *t: operation.ours(*t), backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        x = make()
        eager, now = operation.ours(x, *others), compiled(x, *others)
        assert now.shape == eager.shape, name
        assert now.stride() == eager.stride(), name
        assert torch.equal(now, eager), name
        assert operation.torch(x, *others).stride() == eager.stride(), name


def test_a_marked_dimension_compiles_once() -> None:
    for operation in ALL:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda *t: operation.ours(*t), backend=counter, fullgraph=True)  # noqa: B023
        others = operation.inputs()[1:]
        for rows in (7, 3, 11):
            x = torch.randn(rows, 3, dtype=torch.float64)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(compiled(x, *others), operation.torch(x, *others))
        assert counter.frame_count == 1, operation.id


def test_a_changing_batch_compiles_twice() -> None:
    model = neuron_ext.MLP([3, 4, 2])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (5, 6, 7, 8, 100):
        x = torch.randn(rows, 3)
        assert_close(compiled(x), model(x), 1e-6)
    assert counter.frame_count == 2


def test_all_sizes_dynamic() -> None:
    """Features too."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        functional.linear_sigmoid, backend=counter, fullgraph=True, dynamic=True
    )
    for rows, inputs, outputs in ((5, 3, 4), (6, 7, 2), (9, 4, 8)):
        x, w, b = (
            torch.randn(s, dtype=torch.float64, requires_grad=True)
            for s in ((rows, inputs), (outputs, inputs), (outputs,))
        )
        assert_close(
            gradients(compiled, [x, w, b]),
            gradients(lambda *t: torch.sigmoid(torch.nn.functional.linear(*t)), [x, w, b]),
        )
    assert counter.frame_count == 1


def test_wrong_shapes_raise_when_compiled_too() -> None:
    compiled = torch.compile(functional.linear, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="weight"):
        compiled(torch.randn(1, 5), torch.randn(5, 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modules(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        neuron_ext.LinearSigmoid(3, 8),
        neuron_ext.Linear(8, 8),
        neuron_ext.Sigmoid(),
        neuron_ext.MLP([8, 4, 2], output_activation="sigmoid"),
    )
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 3)
    for _ in range(2):
        model.zero_grad()
        compiled(x).pow(2).sum().backward()
        now = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(x).pow(2).sum().backward()
        assert_close(now, [p.grad for p in model.parameters()], 1e-6)


def test_an_mlp_whose_children_have_hooks() -> None:
    seen: list[str] = []
    model = neuron_ext.MLP([3, 4, 2])
    model[0].register_forward_hook(lambda m, args, output: output * 2)
    model.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3)
    expected = torch.nn.functional.linear(
        torch.sigmoid(2 * torch.nn.functional.linear(x + 1, model[0].weight, model[0].bias)),
        model[2].weight,
        model[2].bias,
    )
    assert_close(model(x), expected, 1e-6)
    assert_close(compiled(x), expected, 1e-6)
    model[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    torch.compile(model, backend="eager")(x).sum().backward()
    assert seen == ["backward"]


def test_double_backward_of_a_compiled_graph_of_gradients() -> None:
    """create_graph through compiled code isn't offered by torch; inside of it, it is."""

    def penalty(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        first = torch.func.grad(lambda x: functional.linear_sigmoid(x, w, b).sin().sum())(x)
        return first.pow(2).sum()

    inputs = LINEAR.inputs(requires_grad=True)
    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    assert_close(
        torch.autograd.grad(compiled(*inputs), inputs),
        torch.autograd.grad(penalty(*inputs), inputs),
    )


@one_each
def test_transforms_inside(operation: Operation) -> None:
    batch, *parameters = operation.inputs()

    def per_sample(x: Tensor, *rest: Tensor) -> Tensor:
        inner = torch.func.grad(lambda row, *r: operation.ours(row, *r).sin().sum())
        result: Tensor = torch.func.vmap(inner, (0, *(None for _ in rest)))(x, *rest)
        return result

    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    assert_close(compiled(batch, *parameters), per_sample(batch, *parameters))


def test_autocast_inside() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.linear_sigmoid(x, w, b)

    inputs = LINEAR.inputs(dtype=torch.float32, requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    output = compiled(*inputs)
    assert output.dtype == torch.bfloat16
    assert_close(output, function(*inputs), 1e-2)
    assert_close(gradients(compiled, inputs), gradients(function, inputs), 2e-2)


def test_compiled_autograd() -> None:
    model = neuron_ext.MLP([3, 4, 2], output_activation="sigmoid")
    layer = neuron_ext.LinearSigmoid(2, 2)
    x = torch.randn(5, 3)

    def step() -> list[Tensor]:
        for p in (*model.parameters(), *layer.parameters()):
            p.grad = None
        functional.sigmoid(layer(model(x))).pow(2).sum().backward()
        return [p.grad for p in (*model.parameters(), *layer.parameters()) if p.grad is not None]

    expected = step()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert_close(torch.compile(step, backend="aot_eager")(), expected, 1e-6)
    assert counters["compiled_autograd"]["captures"] == 1


def test_compiled_autograd_of_what_ran_eagerly() -> None:
    model = neuron_ext.MLP([3, 4, 2])
    x = torch.randn(5, 3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).pow(2).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        assert_close(gradients(), expected, 1e-6)


@one_each
def test_compiled_autograd_of_second_derivatives(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        for t in inputs:
            t.grad = None
        loss = torch.stack([grad.sin().sum() for grad in first]).sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        return [t.grad for t in inputs if t.grad is not None]

    assert_close(second(operation.ours), second(operation.torch))


@one_each
def test_compiled_autograd_with_hooks(operation: Operation) -> None:
    """On tensors, on nodes and on what is saved."""
    inputs = operation.inputs(requires_grad=True)
    expected = torch.autograd.grad(operation.torch(*inputs).sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: 2 * t, lambda t: t / 2):
        output = operation.ours(*inputs)
    node = output.grad_fn
    assert node is not None
    node.register_prehook(lambda grads: tuple(3 * g for g in grads))
    output.register_hook(lambda grad: 2 * grad)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        output.sum().backward()
    assert_close([t.grad for t in inputs], [6 * g for g in expected])


def test_inductor() -> None:
    """One compilation of all operations, forward and backward, for any batch."""
    layer = neuron_ext.LinearSigmoid(3, 6)
    model = neuron_ext.MLP([6, 5, 2])

    def function(x: Tensor) -> Tensor:
        h = layer(x) * 2 - 1
        return functional.sigmoid(model(h.transpose(0, 1)).relu() + 1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    parameters = [*layer.parameters(), *model.parameters()]
    for rows in (4, 9):
        x = torch.randn(rows, 7, 3)
        now, eager = compiled(x), function(x)
        assert_close(now, eager, 1e-6)
        assert now.stride() == eager.stride()
        assert_close(
            torch.autograd.grad(now.pow(2).sum(), parameters),
            torch.autograd.grad(eager.pow(2).sum(), parameters),
            1e-5,
        )


def test_inductor_without_grad() -> None:
    model = neuron_ext.MLP([3, 5, 2], output_activation="sigmoid")
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-6)


@one_each
def test_jit_trace(operation: Operation) -> None:
    inputs = tuple(operation.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda *t: operation.ours(*t), inputs)
    assert "neuron_ext::" in str(traced.graph)
    more = torch.randn(9, 3, dtype=torch.float64)
    assert_close(traced(more, *inputs[1:]), operation.torch(more, *inputs[1:]))
    leaves = operation.inputs(requires_grad=True)
    assert_close(gradients(traced, leaves), gradients(operation.torch, leaves))


@torch.jit.script
def scripted(
    x: Tensor, w: Tensor, b: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> Tensor:
    y = torch.ops.neuron_ext.linear_sigmoid(x, w, b)
    return torch.ops.neuron_ext.sigmoid(
        torch.ops.neuron_ext.mlp(y, weights, biases, "sigmoid")
    ) + torch.ops.neuron_ext.linear(x, w)


def test_jit_script_of_functions() -> None:
    x, w, b = LINEAR.inputs(requires_grad=True)
    square = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, w, b, square]
    assert_close(
        gradients(lambda x, w, b, s: scripted(x, w, b, [s, s], [b, None]), inputs),
        gradients(
            lambda x, w, b, s: (
                torch.sigmoid(
                    torch.sigmoid(torch.sigmoid(torch.sigmoid(x @ w.T + b) @ s.T + b) @ s.T)
                )
                + x @ w.T
            ),
            inputs,
        ),
    )


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "neuron_ext":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_compiled_code_calls_the_operations_at_run_time() -> None:
    compiled = torch.compile(lambda *t: MLP_SIGMOID.ours(*t), backend="aot_eager", fullgraph=True)
    inputs = MLP.inputs(requires_grad=True)
    compiled(*inputs)
    with torch.profiler.profile() as profile:
        compiled(*inputs).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"neuron_ext::mlp_forward", "neuron_ext::mlp_backward"} <= names
