"""Derivatives of every order in both modes; masks, saved tensors, hooks and errors of autograd."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import layouts
from operations import (
    ALL,
    LINEAR,
    LINEAR_SIGMOID,
    MLP,
    MLP_NO_BIAS,
    SIGMOID,
    Operation,
    assert_close,
    each,
    mlp_in_torch,
    one_each,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import neuron_ext
from neuron_ext import functional

Function = Callable[..., Tensor]


def masks(operation: Operation) -> Iterator[tuple[bool, ...]]:
    """Every subset of requires_grad with at least one input in it."""
    for mask in itertools.product((False, True), repeat=len(operation.shapes)):
        if any(mask):
            yield mask


def gradients(
    function: Function,
    inputs: list[Tensor],
    grad_output: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Of those inputs that need them, None for the others and for those that get none."""
    output = function(*inputs)
    if grad_output is None:
        grad_output = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            output, wanted, grad_output, create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if t.requires_grad else None for t in inputs]


# ---- values


@each
def test_gradcheck(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    assert torch.autograd.gradcheck(
        operation.ours,
        inputs,
        check_forward_ad=True,
        check_backward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@each
def test_gradgradcheck(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    assert torch.autograd.gradgradcheck(
        operation.ours, inputs, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def three_derivatives(function: Function, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Gradients of a scalar, of a scalar of those, and of a scalar of these."""
    value = function(*inputs).sin().sum()
    orders = []
    for order in range(3):
        grads = torch.autograd.grad(value, inputs, create_graph=order < 2, materialize_grads=True)
        orders.append(list(grads))
        value = torch.stack(
            [(g + 0.5).pow(2).mul(0.3 + i).sum() for i, g in enumerate(grads)]
        ).sum()
    return orders


@each
def test_three_orders_of_derivatives_are_torchs(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    for ours, reference in zip(
        three_derivatives(operation.ours, inputs),
        three_derivatives(operation.torch, inputs),
        strict=True,
    ):
        assert_close(ours, reference)


@each
def test_every_subset_of_inputs_that_need_gradients(operation: Operation) -> None:
    for mask in masks(operation):
        inputs = operation.inputs(requires_grad=mask)
        assert_close(gradients(operation.ours, inputs), gradients(operation.torch, inputs))


@pytest.mark.parametrize("operation", [o for o in ALL if len(o.shapes) <= 4], ids=str)
def test_second_derivatives_of_every_subset(operation: Operation) -> None:
    """Also of every subset of the first derivatives, grad_output's among them."""
    for mask in masks(operation):
        inputs = operation.inputs(requires_grad=mask)
        wanted = [t for t in inputs if t.requires_grad]
        grad_output = operation.torch(*inputs).detach().cos().requires_grad_()
        firsts = [
            [
                g
                for g in gradients(function, inputs, grad_output, create_graph=True)
                if g is not None
            ]
            for function in (operation.ours, operation.torch)
        ]
        for chosen in itertools.product((False, True), repeat=len(wanted)):
            ours, reference = (
                torch.autograd.grad(
                    [g.sin().sum() for g, c in zip(grads, chosen, strict=True) if c],
                    [grad_output, *wanted],
                    retain_graph=True,
                    materialize_grads=True,
                )
                if any(g.requires_grad for g, c in zip(grads, chosen, strict=True) if c)
                else None
                for grads in firsts
            )
            assert_close(ours, reference)


def test_second_derivative_through_part_of_an_mlps_gradients() -> None:
    for kept in ([0], [2], [5], [1, 6], [4, 5, 6]):
        seconds = []
        for function in (MLP.ours, MLP.torch):
            inputs = MLP.inputs(requires_grad=True)
            grads = gradients(function, inputs, create_graph=True)
            value = torch.stack([grads[i].sin().sum() for i in kept]).sum()
            seconds.append(torch.autograd.grad(value, inputs, materialize_grads=True))
        assert_close(*seconds)


@each
def test_forward_mode(operation: Operation) -> None:
    for seed, mode in enumerate((nullcontext, torch.no_grad)):
        primals, tangents = operation.inputs(seed=seed), operation.inputs(seed=seed + 10)
        results = []
        for function in (operation.ours, operation.torch):
            with mode(), forward_ad.dual_level():
                duals = map(forward_ad.make_dual, primals, tangents)
                results.append(tuple(forward_ad.unpack_dual(function(*duals))))
        assert results[0][1] is not None
        assert_close(*results)


@each
def test_forward_mode_with_a_tangent_on_one_input_alone(operation: Operation) -> None:
    for i in range(len(operation.shapes)):
        results = []
        for function in (operation.ours, operation.torch):
            tensors = operation.inputs()
            with forward_ad.dual_level():
                tensors[i] = forward_ad.make_dual(tensors[i], torch.ones_like(tensors[i]))
                results.append(forward_ad.unpack_dual(function(*tensors)).tangent)
        assert results[0] is not None
        assert_close(*results)


@each
def test_forward_over_reverse(operation: Operation) -> None:
    results = []
    for function in (operation.ours, operation.torch):
        primals, tangents = operation.inputs(requires_grad=True), operation.inputs(seed=1)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
            grads = torch.autograd.grad(function(*duals).sin().sum(), duals)
            results.append([forward_ad.unpack_dual(g).tangent for g in grads])
    assert_close(*results)


@one_each
def test_a_tangent_that_comes_between_forward_and_backward(operation: Operation) -> None:
    """The forward pass ran on kernels; its backward meets a dual grad_output."""
    results = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(requires_grad=True)
        output = function(*inputs)
        with forward_ad.dual_level():
            grad_output = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
            grads = torch.autograd.grad(output, inputs, grad_output)
            results.append([forward_ad.unpack_dual(g).tangent for g in grads])
    assert results[0][0] is not None
    assert_close(*results)


@one_each
def test_hessian_and_jacobian_of_torch_autograd_functional(operation: Operation) -> None:
    inputs = tuple(operation.inputs())
    for vectorize, strategy in (
        (False, "reverse-mode"),
        (True, "reverse-mode"),
        (True, "forward-mode"),
    ):
        assert_close(
            torch.autograd.functional.jacobian(
                operation.ours, inputs, vectorize=vectorize, strategy=strategy
            ),
            torch.autograd.functional.jacobian(operation.torch, inputs),
        )
    assert_close(
        torch.autograd.functional.hessian(lambda *t: operation.ours(*t).sin().sum(), inputs),
        torch.autograd.functional.hessian(lambda *t: operation.torch(*t).sin().sum(), inputs),
    )


# ---- gradients that come and inputs that go in


@each
@pytest.mark.parametrize("rows", [1, 5])
def test_grad_outputs_of_any_layout(operation: Operation, rows: int) -> None:
    inputs = operation.inputs()
    inputs[0] = inputs[0][:rows]
    output = operation.torch(*inputs)
    dense = torch.randn(output.shape, dtype=torch.float64)
    for t in inputs:
        t.requires_grad_()
    expanded = [
        ("of sum", torch.ones((), dtype=torch.float64).expand(output.shape)),
        ("one row for all", dense[:1].expand(output.shape)),
        ("one column for all", dense[:, :1].expand(output.shape)),
    ]
    for name, grad_output in (*layouts(dense), *expanded):
        ours, reference = (
            gradients(f, inputs, grad_output) for f in (operation.ours, operation.torch)
        )
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023


@each
def test_inputs_of_any_layout_get_their_gradients(operation: Operation) -> None:
    originals = operation.inputs()
    for i, original in enumerate(originals):
        if original.dim() < 2:
            continue
        for _, view in layouts(original):
            inputs = [t.clone() for t in originals]
            inputs[i] = view
            inputs = [t.requires_grad_() for t in inputs]
            assert_close(gradients(operation.ours, inputs), gradients(operation.torch, inputs))


@each
def test_batches_of_several_dimensions(operation: Operation) -> None:
    base = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    for x in (
        base,
        base.transpose(0, 2),
        base[:, :0],
        base[0, 0, 0],
        base[::2, 1:],
        base[:1, :1, :1].expand(2, 3, 4, 3),
    ):
        inputs = [x.requires_grad_(), *operation.inputs(requires_grad=True)[1:]]
        assert_close(gradients(operation.ours, inputs), gradients(operation.torch, inputs))
        ours, reference = (three_derivatives(f, inputs) for f in (operation.ours, operation.torch))
        assert_close(ours, reference, 1e-11)  # sums over up to 24 rows


@pytest.mark.parametrize("operation", [LINEAR, LINEAR_SIGMOID, MLP], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 4)])
def test_broadcast_biases_get_gradients_of_their_shape(
    operation: Operation, shape: tuple[int, ...]
) -> None:
    first_bias = operation.names.index("bias" if "bias" in operation.names else "bias0")
    inputs = operation.inputs(requires_grad=True)
    inputs[first_bias] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = three_derivatives(operation.ours, inputs)
    assert ours[0][first_bias].shape == shape
    assert_close(ours, three_derivatives(operation.torch, inputs))


def test_weights_kept_as_in_out_get_gradients_of_that_shape() -> None:
    _, weight, bias = LINEAR.inputs(requires_grad=True)
    x = LINEAR.inputs()[0]
    stored = weight.detach().T.contiguous().requires_grad_()
    functional.linear_sigmoid(x, stored.T, bias).sum().backward()
    assert stored.grad is not None
    expected = torch.autograd.grad(torch.sigmoid(F.linear(x, weight, bias)).sum(), weight)[0]
    assert stored.grad.shape == (3, 4)
    assert_close(stored.grad, expected.T)


@each
def test_inputs_that_are_expanded_from_fewer_elements(operation: Operation) -> None:
    row, *others = operation.inputs()
    row = row[0].clone().requires_grad_()
    inputs = [row, *(t.requires_grad_() for t in others)]
    assert_close(
        gradients(lambda x, *rest: operation.ours(x.expand(6, 3), *rest), inputs),
        gradients(lambda x, *rest: operation.torch(x.expand(6, 3), *rest), inputs),
    )


def test_one_tensor_in_several_places() -> None:
    square = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    stacks = [
        lambda f, w, b: f(w, [w, w, w], [b, b, b], "sigmoid"),
        lambda f, w, b: f(w, [w, w.T], [b, None], None),
        lambda f, w, b: f(b, [w, w], [b, b], None),
    ]
    for stack in stacks:
        ours, reference = (
            three_derivatives(lambda w, b, f=f, stack=stack: stack(f, w, b), [square, bias])
            for f in (functional.mlp, mlp_in_torch)
        )
        assert_close(ours, reference)
    ours, reference = (
        three_derivatives(lambda w, b, f=f: f(w, w, b), [square, bias])
        for f in (functional.linear, F.linear)
    )
    assert_close(ours, reference)


def test_an_undefined_gradient_costs_nothing_and_gives_nothing() -> None:
    """A node between that returns None for the operation's output."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:  # type: ignore[override]
            return None

    for operation in ALL:
        inputs = operation.inputs(requires_grad=True)
        grads = torch.autograd.grad(
            Drop.apply(operation.ours(*inputs)).sum(), inputs, allow_unused=True
        )
        assert all(g is None for g in grads), operation.id


@each
def test_unused_inputs(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    output = operation.ours(*inputs).sum()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(output, [inputs[0], other], retain_graph=True)
    *_, none = torch.autograd.grad(output, [*inputs, other], allow_unused=True)
    assert none is None


@one_each
def test_gradients_accumulate(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    once = gradients(operation.ours, inputs, torch.ones_like(operation.ours(*inputs)))
    for _ in range(2):
        operation.ours(*inputs).sum().backward()
    assert_close([t.grad for t in inputs], [2 * g for g in once if g is not None])


def test_dtypes_of_gradients() -> None:
    for operation in ALL:
        for dtype, tolerance in (
            (torch.float32, 1e-5),
            (torch.bfloat16, 4e-2),
            (torch.float16, 5e-3),
        ):
            ours, reference = (
                gradients(f, operation.inputs(dtype=dtype, requires_grad=True))
                for f in (operation.ours, operation.torch)
            )
            assert_close(ours, reference, tolerance)


def test_dtypes_without_kernels_are_differentiated_by_torch() -> None:
    for operation in ALL:
        inputs = [
            torch.randn(shape, dtype=torch.complex128, requires_grad=True)
            for shape in operation.shapes
        ]
        output = operation.torch(*inputs)
        grad_output = torch.randn_like(output)
        assert_close(
            gradients(operation.ours, inputs, grad_output),
            gradients(operation.torch, inputs, grad_output),
        )


# ---- how much is computed and saved


class Calls(TorchDispatchMode):
    """The operations that reached the kernels, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "neuron_ext":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@each
def test_gradients_nobody_wants_are_not_computed(operation: Operation) -> None:
    for mask in masks(operation):
        inputs = operation.inputs(requires_grad=mask)
        with Calls() as calls:
            operation.ours(*inputs).sum().backward()
        forward, backward = calls.seen
        is_mlp = operation.op == "mlp"
        assert forward[0] == ("mlp_forward" if is_mlp else operation.op)
        assert backward[0] == f"{operation.op}_backward"
        if operation is SIGMOID:
            continue
        output_mask = list(backward[1][-1])  # type: ignore[call-overload]
        by_name = dict(zip(operation.names, mask, strict=True))
        every_name = (
            ["input", *(f"weight{i}" for i in range(3)), *(f"bias{i}" for i in range(3))]
            if is_mlp
            else ["input", "weight", "bias"]
        )
        assert output_mask == [by_name.get(name, False) for name in every_name]


def test_the_input_of_a_first_layer_costs_no_product() -> None:
    """torch counts what the masks leave: a frozen weight, an input that is data."""
    from torch.utils.flop_counter import FlopCounterMode

    for operation in (LINEAR, LINEAR_SIGMOID, MLP, MLP_NO_BIAS):
        for mask in masks(operation):
            counts = []
            for function in (operation.ours, operation.torch):
                inputs = operation.inputs(requires_grad=mask)
                with FlopCounterMode(display=False) as counter:
                    function(*inputs).sum().backward()
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1] > 0, mask


def saved_storages(function: Function, inputs: list[Tensor]) -> list[int]:
    """Which tensors a graph keeps, by the memory they are in."""
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(*inputs)
    known = {t.untyped_storage().data_ptr(): i for i, t in enumerate((*inputs, output))}
    return sorted(known.get(t.untyped_storage().data_ptr(), -1) for t in packed)


@pytest.mark.parametrize("operation", [o for o in ALL if o.op != "mlp"], ids=str)
def test_what_is_saved_is_what_torch_saves(operation: Operation) -> None:
    for mask in masks(operation):
        inputs = operation.inputs(requires_grad=mask)
        assert saved_storages(operation.ours, inputs) == saved_storages(operation.torch, inputs)


@pytest.mark.parametrize("operation", [o for o in ALL if o.op == "mlp"], ids=str)
def test_an_mlp_saves_its_hidden_layers_as_one_tensor(operation: Operation) -> None:
    for mask in masks(operation):
        inputs = operation.inputs(requires_grad=mask)
        ours = saved_storages(operation.ours, inputs)
        assert ours.count(-1) == 1
        assert len(ours) == len(set(ours)) <= 6, "input, three weights, output, hidden layers"


def test_a_frozen_weight_does_not_keep_the_input() -> None:
    for operation in (LINEAR, LINEAR_SIGMOID):
        inputs = operation.inputs(requires_grad=(True, False, True))
        saved = saved_storages(operation.ours, inputs)
        assert 0 not in saved
        assert 1 in saved


@one_each
def test_one_node(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    node = operation.ours(*inputs).grad_fn
    assert node is not None
    assert all(
        type(edge).__name__ == "AccumulateGrad"
        for edge, _ in node.next_functions
        if edge is not None
    )
    assert len([edge for edge, _ in node.next_functions if edge is not None]) == len(inputs)


@one_each
def test_graphs_are_freed(operation: Operation) -> None:
    """Nothing in a node points back at its output."""
    import gc
    import weakref

    gc.disable()
    try:
        inputs = operation.inputs(requires_grad=True)
        output = operation.ours(*inputs)
        grad = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)[0]
        watched = [weakref.ref(output.untyped_storage()), weakref.ref(output), weakref.ref(grad)]
        del output, grad
        assert [w() for w in watched[1:]] == [None, None]
    finally:
        gc.enable()


# ---- twice, in place, hooks


@one_each
def test_backward_twice(operation: Operation) -> None:
    messages = []
    for function in (operation.ours, operation.torch):
        output = function(*operation.inputs(requires_grad=True)).sum()
        output.backward(retain_graph=True)
        output.backward()
        with pytest.raises(RuntimeError) as caught:
            output.backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "second time" in messages[0]


def changed(
    function: Function, operation: Operation, mask: tuple[bool, ...], index: int
) -> list[Tensor | None] | str:
    """The gradients after a change in place of inputs[index] (-1: the output), or "refused"."""
    inputs = operation.inputs(requires_grad=mask)
    # In place isn't for leaves; what is after them is the operation's input.
    arguments = [t * 1 if t.requires_grad else t for t in inputs]
    output = function(*arguments)
    target = output if index < 0 else arguments[index]
    kept = output * 1
    with torch.no_grad():
        target.mul_(3)
    try:
        kept.sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return "refused"
    return [t.grad for t in inputs]


@each
def test_changes_in_place_are_refused_exactly_where_torch_refuses_them(
    operation: Operation,
) -> None:
    for mask in masks(operation):
        for index in range(-1, len(operation.shapes)):
            ours = changed(operation.ours, operation, mask, index)
            reference = changed(operation.torch, operation, mask, index)
            what = f"{mask}, {'output' if index < 0 else operation.names[index]} changed"
            assert (ours == "refused") == (reference == "refused"), what
            if reference != "refused":
                assert_close(ours, reference)


@pytest.mark.parametrize("operation", [LINEAR, LINEAR_SIGMOID, MLP], ids=str)
def test_a_bias_changed_before_backward_is_still_that_of_the_forward_pass(
    operation: Operation,
) -> None:
    """Its new history must not get into second derivatives."""
    index = next(i for i, name in enumerate(operation.names) if name.startswith("bias"))
    seconds = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(requires_grad=True)
        arguments = list(inputs)
        arguments[index] = inputs[index] * 1
        output = function(*arguments)
        arguments[index].mul_(2)
        grad = torch.autograd.grad(output.sin().sum(), inputs[0], create_graph=True)[0]
        seconds.append(torch.autograd.grad(grad.sin().sum(), inputs))
    assert_close(*seconds)


def test_an_output_may_be_changed_in_place() -> None:
    for operation in (LINEAR, MLP):  # whose output isn't saved
        results = []
        for function in (operation.ours, operation.torch):
            inputs = operation.inputs(requires_grad=True)
            output = function(*inputs)
            output.mul_(2).add_(1)
            results.append(torch.autograd.grad(output.pow(2).sum(), inputs))
        assert_close(*results)


@one_each
def test_hooks_on_tensors_and_nodes(operation: Operation) -> None:
    seen: list[str] = []
    inputs = operation.inputs(requires_grad=True)
    expected = gradients(operation.torch, inputs, torch.ones_like(operation.torch(*inputs)))

    def tensor_hook(grad: Tensor) -> Tensor:
        seen.append("tensor")
        return 2 * grad

    output = operation.ours(*inputs)
    node = output.grad_fn
    assert node is not None
    node.register_hook(lambda grad_inputs, grad_outputs: seen.append("node"))
    node.register_prehook(lambda grad_outputs: seen.append("before node"))
    output.register_hook(tensor_hook)
    for t in inputs:
        t.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    output.retain_grad()
    output.sum().backward()
    assert sorted(seen) == sorted(["tensor", "before node", "node", *["accumulated"] * len(inputs)])
    assert_close([t.grad for t in inputs], [2 * g for g in expected if g is not None])
    assert output.grad is not None
    assert_close(output.grad, torch.full_like(output, 2))


def test_module_hooks() -> None:
    seen: list[str] = []
    model = neuron_ext.MLP([3, 4, 2], output_activation="sigmoid")
    model.register_forward_hook(lambda *_: seen.append("forward"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    model[0].register_forward_hook(lambda *_: seen.append("first forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("first backward"))
    model(torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert seen == ["first forward", "forward", "first backward", "backward"]


@one_each
def test_saved_tensors_can_live_elsewhere(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    expected = gradients(operation.torch, inputs)
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(operation.ours, inputs), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        assert_close(gradients(operation.ours, inputs), expected)


@one_each
def test_saved_tensors_that_may_be_changed(operation: Operation) -> None:
    results = []
    for function in (operation.ours, operation.torch):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            inputs = operation.inputs(requires_grad=True)
            arguments = [t * 1 for t in inputs]
            output = function(*arguments)
            loss = output.sin().sum()
            for t in arguments:
                t.mul_(2)
            results.append(torch.autograd.grad(loss, inputs))
    assert_close(*results)


@one_each
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(operation: Operation, use_reentrant: bool) -> None:
    inputs = operation.inputs(requires_grad=True)
    expected = gradients(operation.torch, inputs)
    assert_close(
        gradients(lambda *t: checkpoint(operation.ours, *t, use_reentrant=use_reentrant), inputs)
        if not use_reentrant
        else _backward_gradients(
            lambda *t: checkpoint(operation.ours, *t, use_reentrant=True), inputs
        ),
        expected,
    )


def _backward_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor | None]:
    """By backward(), since reentrant checkpoints refuse autograd.grad."""
    output = function(*inputs)
    output.backward(torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape))
    return [t.grad for t in inputs]


@one_each
def test_anomaly_mode_names_the_node(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    expected = gradients(operation.torch, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            assert_close(gradients(operation.ours, inputs), expected)
            inputs[0].data[0, 0] = torch.nan
            output = operation.ours(*inputs)
            with pytest.raises(RuntimeError, match="returned nan values"):
                output.sum().backward()


# ---- modes


@contextmanager
def grad_mode_off() -> Iterator[None]:
    with torch.set_grad_enabled(False):
        yield


@each
@pytest.mark.parametrize("mode", [torch.no_grad, grad_mode_off, torch.inference_mode])
def test_no_graph_without_grad_mode(
    operation: Operation, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    inputs = operation.inputs(requires_grad=True)
    expected = operation.torch(*inputs).detach()
    with mode(), Calls() as calls:
        output = operation.ours(*inputs)
    assert output.grad_fn is None
    assert not output.requires_grad
    assert output.is_inference() == (mode is torch.inference_mode)
    assert [name for name, _ in calls.seen] == [operation.op]
    assert_close(output.clone(), expected)


@each
def test_inference_tensors_mix_as_they_do_in_torch(operation: Operation) -> None:
    """Refused where one would have to be saved, else used."""
    for mask in masks(operation):
        if all(mask):
            continue
        outcomes = []
        for function in (operation.ours, operation.torch):
            with torch.inference_mode():
                inputs = operation.inputs()
            normal = operation.inputs(requires_grad=True)
            inputs = [n if m else t for n, t, m in zip(normal, inputs, mask, strict=True)]
            try:
                outcomes.append(gradients(function, inputs))
            except RuntimeError as error:
                if "Inference tensors cannot be saved for backward" not in str(error):
                    raise
                outcomes.append("refused")
        assert (outcomes[0] == "refused") == (outcomes[1] == "refused"), mask
        if outcomes[1] != "refused":
            assert_close(*outcomes)


@one_each
def test_results_of_inference_mode_are_inference_tensors_outside_too(operation: Operation) -> None:
    with torch.inference_mode():
        inputs = operation.inputs()
    output = operation.ours(*inputs)
    assert not output.requires_grad
    assert_close(output, operation.torch(*inputs))


def test_enable_grad_inside_no_grad() -> None:
    inputs = MLP.inputs(requires_grad=True)
    with torch.no_grad(), torch.enable_grad():
        output = MLP.ours(*inputs)
    assert output.grad_fn is not None


@one_each
def test_non_leaves(operation: Operation) -> None:
    """Inputs with a history, and an output detached and made a leaf again."""
    leaves = operation.inputs(requires_grad=True)
    ours, reference = (
        gradients(lambda *t, f=f: f(*(a.tanh() for a in t)), leaves)
        for f in (operation.ours, operation.torch)
    )
    assert_close(ours, reference)
    again = operation.ours(*leaves).detach().requires_grad_()
    again.pow(2).sum().backward()
    assert again.grad is not None
    assert all(t.grad is None for t in leaves)


@one_each
def test_backward_in_many_threads(operation: Operation) -> None:
    """On one graph's leaves, and on graphs of their own."""
    inputs = operation.inputs(requires_grad=True)
    expected = gradients(operation.torch, inputs)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert_close(gradients(operation.ours, inputs), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@one_each
def test_one_graph_backward_in_many_threads(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    output = operation.ours(*inputs)
    expected = torch.autograd.grad(operation.torch(*inputs).sum(), inputs)
    threads = [
        threading.Thread(target=lambda: output.sum().backward(retain_graph=True)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close([t.grad for t in inputs], [4 * g for g in expected])


@one_each
def test_one_graph_freed_by_many_threads(operation: Operation) -> None:
    """Whoever comes too late is told so."""
    inputs = operation.inputs(requires_grad=True)
    expected = torch.autograd.grad(operation.torch(*inputs).sum(), inputs)
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(torch.autograd.grad(loss, inputs))
        except RuntimeError as error:
            outcomes.append(str(error))

    for _ in range(20):
        loss = operation.ours(*inputs).sum()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert any(not isinstance(outcome, str) for outcome in outcomes)
    for outcome in outcomes:
        if isinstance(outcome, str):
            assert "second time" in outcome
        else:
            assert_close(outcome, expected)


# ---- nodes

NODES = {
    "linear": "LinearBackward",
    "sigmoid": "SigmoidBackward",
    "linear_sigmoid": "LinearSigmoidBackward",
    "mlp": "MlpBackward",
}


@one_each
def test_nodes_have_names(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    output = operation.ours(*inputs)
    assert output.grad_fn is not None
    assert output.grad_fn.name() == NODES[operation.op]
    assert f"grad_fn=<{NODES[operation.op]}>" in repr(output)
    inputs[0].data.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            output = operation.ours(*inputs)
            with pytest.raises(RuntimeError, match=f"'{NODES[operation.op]}' returned nan"):
                output.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> None:
        return None


@one_each
def test_no_gradient_comes_of_none(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    output = NoGradient.apply(operation.ours(*inputs))
    assert not any(
        grad is not None
        for grad in torch.autograd.grad(output.sum(), inputs, allow_unused=True, retain_graph=True)
    )
    output.sum().backward()
    assert all(t.grad is None for t in inputs)


@one_each
def test_second_derivatives_twice(operation: Operation) -> None:
    messages = []
    for function in (operation.ours, operation.torch):
        inputs = operation.inputs(requires_grad=True)
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        loss = sum((grad.sin().sum() for grad in grads), torch.zeros(()))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@one_each
def test_copies_of_results(operation: Operation) -> None:
    copies = []
    for function in (operation.ours, operation.torch):
        output = function(*operation.inputs(requires_grad=True))
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(output)
        copies.append(pickle.loads(pickle.dumps(output)))
    assert_close(*copies)
    assert [c.requires_grad for c in copies] == [True, True]
    assert [c.grad_fn for c in copies] == [None, None]


@one_each
def test_hooks_of_created_nodes(operation: Operation) -> None:
    if not hasattr(torch.autograd.graph, "node_creation_hook"):
        pytest.skip("this torch has no such hooks")
    inputs = operation.inputs(requires_grad=True)
    seen: list[str] = []
    with torch.autograd.graph.node_creation_hook(lambda node: seen.append(node.name())):
        output = operation.ours(*inputs)
        torch.autograd.grad(output.sum(), inputs, create_graph=True)
    assert seen.count(NODES[operation.op]) == 1
    assert seen[-1] != NODES[operation.op], "the gradients' own nodes came after it"


@one_each
def test_a_gradient_in_place_of_the_hooked(operation: Operation) -> None:
    """What a hook on the node returns is what the inputs get."""
    inputs = operation.inputs(requires_grad=True)
    output = operation.ours(*inputs)
    node = output.grad_fn
    assert node is not None
    node.register_hook(lambda grads, _: tuple(None if g is None else 0 * g + 3 for g in grads))
    for t, grad in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert_close(grad, torch.full_like(t, 3))


# ---- the backward operations by themselves


def test_backward_operations_are_differentiable() -> None:
    ops = torch.ops.neuron_ext
    x, w, _ = LINEAR.inputs(requires_grad=True)
    grad = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    for mask in itertools.product((False, True), repeat=3):
        if not any(mask):
            continue

        def linear(g: Tensor, x: Tensor, w: Tensor, mask: object = mask) -> tuple[Tensor, ...]:
            grads = ops.linear_backward(g, x, w, mask)
            return tuple(t for t in grads if t is not None)

        def linear_sigmoid(
            g: Tensor, x: Tensor, w: Tensor, y: Tensor, mask: object = mask
        ) -> tuple[Tensor, ...]:
            grads = ops.linear_sigmoid_backward(g, x, w, y, mask)
            return tuple(t for t in grads if t is not None)

        # bgrad alone depends on neither input nor weight.
        assert torch.autograd.gradcheck(linear, (grad, x, w), check_forward_ad=True)
        assert torch.autograd.gradcheck(linear_sigmoid, (grad, x, w, y), check_forward_ad=True)
    assert torch.autograd.gradcheck(ops.sigmoid_backward, (grad, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ops.sigmoid_backward, (grad, y))


def test_mlp_forward_is_differentiable() -> None:
    x, *weights = MLP_NO_BIAS.inputs(requires_grad=True)

    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.neuron_ext.mlp_forward(
            x, list(weights), [None] * 3, "sigmoid"
        )
        return result

    assert torch.autograd.gradcheck(forward, (x, *weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(forward, (x, *weights))
