"""torch.func: every transform, nested, over every subset of arguments, and tracing with make_fx."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
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
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx

import neuron_ext

Function = Callable[..., Tensor]

MODELS = {
    "Linear": (lambda: neuron_ext.Linear(3, 4), lambda: torch.nn.Linear(3, 4)),
    "LinearSigmoid": (
        lambda: neuron_ext.LinearSigmoid(3, 4),
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sigmoid()),
    ),
    "MLP": (
        lambda: neuron_ext.MLP([3, 5, 4]),
        lambda: torch.nn.Sequential(
            torch.nn.Linear(3, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 4)
        ),
    ),
}
each_model = pytest.mark.parametrize("model", MODELS)


def scalar(function: Function) -> Function:
    return lambda *tensors: function(*tensors).sin().sum()


def all_arguments(operation: Operation) -> tuple[int, ...]:
    return tuple(range(len(operation.shapes)))


def pairs(operation: Operation) -> Iterator[Function]:
    yield operation.ours
    yield operation.torch


@each
def test_grad_and_value(operation: Operation) -> None:
    argnums = all_arguments(operation)
    ours, reference = (
        grad_and_value(scalar(f), argnums)(*operation.inputs()) for f in pairs(operation)
    )
    assert_close(ours, reference)


@each
def test_vjp(operation: Operation) -> None:
    results = []
    for function in pairs(operation):
        output, pull = vjp(function, *operation.inputs())
        results.append(
            (output, pull(output.cos()), pull(torch.ones(()).double().expand_as(output)))
        )
    assert_close(*results)


@each
def test_jvp_and_linearize(operation: Operation) -> None:
    primals, tangents = tuple(operation.inputs()), tuple(operation.inputs(seed=1))
    ours, reference = (jvp(f, primals, tangents) for f in pairs(operation))
    assert_close(ours, reference)
    output, push = linearize(operation.ours, *primals)
    assert_close((output, push(*tangents)), reference)


@each
def test_jacobians_and_hessian(operation: Operation) -> None:
    argnums, inputs = all_arguments(operation), operation.inputs()
    expected = jacrev(operation.torch, argnums)(*inputs)
    assert_close(jacrev(operation.ours, argnums)(*inputs), expected)
    assert_close(jacrev(operation.ours, argnums, chunk_size=2)(*inputs), expected)
    assert_close(jacfwd(operation.ours, argnums)(*inputs), expected)
    assert_close(
        hessian(scalar(operation.ours), argnums)(*inputs),
        hessian(scalar(operation.torch), argnums)(*inputs),
    )


@each
def test_vmap_over_every_subset_of_arguments(operation: Operation) -> None:
    generator = torch.Generator().manual_seed(0)
    for subset in itertools.product((False, True), repeat=len(operation.shapes)):
        if not any(subset):
            continue
        for at in (0, -1):
            tensors = [
                torch.randn(
                    *((6, *s) if at == 0 else (*s, 6)) if chosen else s,
                    generator=generator,
                    dtype=torch.float64,
                )
                for s, chosen in zip(operation.shapes, subset, strict=True)
            ]
            in_dims = tuple(at if chosen else None for chosen in subset)
            ours, reference = (
                vmap(f, in_dims, out_dims=at, chunk_size=4 if at else None)(*tensors)
                for f in pairs(operation)
            )
            assert_close(ours, reference)


@each
def test_nested_vmap(operation: Operation) -> None:
    first, *others = operation.inputs()
    batch = torch.randn(2, 7, *first.shape, dtype=torch.float64)
    in_dims = (0, *(None for _ in others))
    ours, reference = (vmap(vmap(f, in_dims), in_dims)(batch, *others) for f in pairs(operation))
    assert_close(ours, reference)
    stacked = [t.expand(3, *t.shape) + torch.arange(3.0).view(3, *[1] * t.dim()) for t in others]
    if others:
        ours, reference = (
            vmap(vmap(f, in_dims), (None, *(0 for _ in others)))(batch[0], *stacked)
            for f in pairs(operation)
        )
        assert_close(ours, reference)


@each
def test_per_sample_gradients(operation: Operation) -> None:
    """And that they are those of a loop."""
    batch, *parameters = operation.inputs()
    argnums = all_arguments(operation)
    in_dims = (0, *(None for _ in parameters))
    ours, reference = (
        vmap(grad(scalar(f), argnums), in_dims)(batch, *parameters) for f in pairs(operation)
    )
    assert_close(ours, reference)
    one_by_one = [grad(scalar(operation.ours), argnums)(row, *parameters) for row in batch]
    assert_close(ours, tuple(torch.stack(g) for g in zip(*one_by_one, strict=True)))


@each
def test_vmap_of_jvp_of_grad(operation: Operation) -> None:
    """Hessian-vector products of a batch."""
    batch, *parameters = operation.inputs()
    tangent = torch.ones_like(batch[0])

    def product(function: Function, row: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = jvp(
            lambda r: grad(scalar(function))(r, *parameters), (row,), (tangent,)
        )
        return result

    ours, reference = (vmap(lambda row, f=f: product(f, row))(batch) for f in pairs(operation))
    assert_close(ours, reference)


@each
def test_three_transforms_of_each_mode(operation: Operation) -> None:
    inputs = operation.inputs()
    for nest in (
        lambda f: grad(lambda *t: grad(lambda *u: grad(scalar(f))(*u).sin().sum())(*t).sum()),
        lambda f: jacfwd(jacrev(grad(scalar(f)))),
        lambda f: jacrev(jacfwd(jacfwd(scalar(f)))),
    ):
        ours, reference = (nest(f)(*inputs) for f in pairs(operation))
        assert_close(ours, reference)


@one_each
def test_transforms_inside_autograd_and_autograd_inside_transforms(operation: Operation) -> None:
    results = []
    for function in pairs(operation):
        leaves = operation.inputs(requires_grad=True)
        batch, *parameters = leaves
        per_sample = vmap(grad(scalar(function)), (0, *(None for _ in parameters)))(
            batch, *parameters
        )
        inside = grad(
            lambda x, f=function, p=parameters: (
                torch.autograd.grad(f(x, *p).sin().sum(), x, create_graph=True)[0].sin().sum()
            )
        )(batch)
        results.append(
            (inside, torch.autograd.grad(per_sample.pow(2).sum(), leaves, materialize_grads=True))
        )
    assert_close(*results)


@one_each
def test_vmap_over_autograd_grad(operation: Operation) -> None:
    """Batched gradients of one graph, in the new way and in the old one."""
    inputs = operation.inputs(requires_grad=True)
    results = []
    for function in pairs(operation):
        output = function(*inputs)
        grads = torch.stack([output.detach().cos(), torch.ones_like(output)])
        results.append(
            (
                vmap(lambda g, o=output: torch.autograd.grad(o, inputs, g, retain_graph=True))(
                    grads
                ),
                torch.autograd.grad(
                    output, inputs, grads, is_grads_batched=True, retain_graph=True
                ),
                torch.stack(
                    [torch.autograd.grad(output, inputs[0], g, retain_graph=True)[0] for g in grads]
                ),
            )
        )
    assert_close(*results)


@one_each
def test_batched_gradients_can_be_differentiated(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    results = []
    for function in pairs(operation):
        output = function(*inputs)
        grads = torch.stack([output.detach().cos(), torch.ones_like(output)])
        firsts = (
            vmap(lambda g, o=output: torch.autograd.grad(o, inputs, g, create_graph=True))(grads),
            torch.autograd.grad(output, inputs, grads, is_grads_batched=True, create_graph=True),
        )
        results.append(
            [
                torch.autograd.grad(
                    torch.stack([g.sin().sum() for g in first]).sum(),
                    inputs,
                    retain_graph=True,
                    materialize_grads=True,
                )
                for first in firsts
            ]
        )
    assert_close(*results)


# ---- modules


@each_model
def test_functional_call(model: str) -> None:
    ours, reference = (make() for make in MODELS[model])
    x = torch.randn(5, 3)
    parameters = {k: torch.randn_like(v) for k, v in ours.named_parameters()}
    expected = dict(zip(dict(reference.named_parameters()), parameters.values(), strict=True))
    results = [
        grad_and_value(lambda p, m=m: functional_call(m, p, (x,)).sin().sum())(p)
        for m, p in ((ours, parameters), (reference, expected))
    ]
    assert_close(results[0][1], results[1][1], 1e-5)
    assert_close(list(results[0][0].values()), list(results[1][0].values()), 1e-5)


@each_model
@pytest.mark.parametrize("shared_input", [True, False])
def test_ensembles(model: str, shared_input: bool) -> None:
    models = [MODELS[model][0]() for _ in range(4)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(*(() if shared_input else (4,)), 5, 3)
    base = MODELS[model][0]().to("meta")
    outputs = vmap(
        lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None if shared_input else 0)
    )(parameters, buffers, x)
    expected = torch.stack([m(x if shared_input else x[i]) for i, m in enumerate(models)])
    assert_close(outputs, expected, 1e-5)


@each_model
def test_per_sample_gradients_of_modules(model: str) -> None:
    module = MODELS[model][0]()
    parameters = dict(module.named_parameters())
    x = torch.randn(6, 3)
    per_sample = vmap(
        grad(lambda p, row: functional_call(module, p, (row,)).sin().sum()), (None, 0)
    )(parameters, x)
    for i, row in enumerate(x):
        module.zero_grad()
        module(row).sin().sum().backward()
        assert_close(
            {k: v[i] for k, v in per_sample.items()},
            {k: v.grad for k, v in module.named_parameters()},
            1e-5,
        )


# ---- tracing


def ops_in(graph: torch.fx.GraphModule) -> list[str]:
    return [
        node.target._opname
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "neuron_ext"
    ]


@each
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(operation: Operation, mode: str) -> None:
    inputs = operation.inputs()
    graph = make_fx(lambda *t: operation.ours(*t), tracing_mode=mode)(*inputs)
    assert ops_in(graph) == [operation.op]
    assert_close(graph(*inputs), operation.torch(*inputs))
    if mode == "symbolic":
        more = torch.randn(9, 3, dtype=torch.float64)
        assert_close(graph(more, *inputs[1:]), operation.torch(more, *inputs[1:]))


@each
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_training_step(operation: Operation, mode: str) -> None:
    def step(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves).sin().sum(), leaves)

    inputs = operation.inputs()
    graph = make_fx(lambda *t: step(operation.ours, *t), tracing_mode=mode)(*inputs)
    forward = "mlp_forward" if operation.op == "mlp" else operation.op
    assert ops_in(graph) == [forward, f"{operation.op}_backward"]
    batches = [inputs[0]] + ([torch.randn(9, 3).double()] if mode == "symbolic" else [])
    for x in batches:
        assert_close(graph(x, *inputs[1:]), step(operation.torch, x, *inputs[1:]))


@each
def test_make_fx_of_second_derivatives(operation: Operation) -> None:
    def penalty(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), leaves)

    inputs = operation.inputs()
    graph = make_fx(lambda *t: penalty(operation.ours, *t), tracing_mode="symbolic")(*inputs)
    x = torch.randn(9, 3, dtype=torch.float64)
    assert_close(graph(x, *inputs[1:]), penalty(operation.torch, x, *inputs[1:]))


@each
def test_make_fx_of_transforms(operation: Operation) -> None:
    batch, *parameters = operation.inputs()
    in_dims = (0, *(None for _ in parameters))
    per_sample = vmap(grad(scalar(operation.ours)), in_dims)
    graph = make_fx(per_sample)(batch, *parameters)
    assert ops_in(graph) == []  # transforms are computed by ATen
    expected = vmap(grad(scalar(operation.torch)), in_dims)(batch, *parameters)
    assert_close(graph(batch, *parameters), expected)


@each
def test_functionalize(operation: Operation) -> None:
    """With changes in place around the operation."""

    def surrounded(function: Function) -> Function:
        def call(first: Tensor, *others: Tensor) -> Tensor:
            first = first.clone()
            first[0].mul_(2)
            output = function(first, *others)
            output.add_(1)
            return output

        return call

    inputs = operation.inputs()
    expected = surrounded(operation.torch)(*inputs)
    functional = functionalize(surrounded(operation.ours), remove="mutations_and_views")
    assert_close(functional(*inputs), expected)
    graph = make_fx(functional)(*inputs)
    assert not [n for n in graph.graph.nodes if str(n.target).split(".")[0].endswith("_")]
    assert_close(graph(*inputs), expected)


def test_cond_and_while_loop_around_operations() -> None:
    inputs = SIGMOID.inputs()
    assert_close(
        torch.cond(
            inputs[0].sum() > 1e9, lambda x: x.clone(), lambda x: SIGMOID.ours(x), tuple(inputs)
        ),
        SIGMOID.torch(*inputs),
    )


def test_vmap_gives_torchs_errors_for_wrong_shapes() -> None:
    for operation in ALL:
        if operation is SIGMOID:
            continue
        wrong = [torch.randn(2, 5, 7).double(), *operation.inputs()[1:]]
        with pytest.raises(RuntimeError):
            vmap(operation.ours, (0, *(None for _ in wrong[1:])))(*wrong)


def test_jvp_of_a_parameter_alone() -> None:
    """Symbolically zero tangents elsewhere."""
    for operation in (LINEAR, MLP):
        x, weight, *others = operation.inputs()
        ours, reference = (
            jvp(
                lambda w, f=f, x=x, others=others: f(x, w, *others),
                (weight,),
                (weight.cos(),),
            )
            for f in pairs(operation)
        )
        assert_close(ours, reference)
