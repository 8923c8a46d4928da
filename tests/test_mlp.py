"""mlp, forward and backward, against exact arithmetic and against torch."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    Approx,
    Arithmetic,
    Array,
    assert_no_worse,
    assert_same_outcome,
    assert_within,
    each_dtype,
    each_dtype_with_reference,
    exact,
    layer,
    layer_backward,
    layouts,
    name_of,
    normal,
    outcome,
    relative_errors,
    uninitialised_memory_is_nan,
)
from torch import Tensor

from neuron_ext import functional

Biases = list[Tensor | None]

STACKS: dict[str, list[int]] = {
    "one layer": [5, 3],
    "one neuron after another": [1, 1, 1],
    "3-2-1": [3, 2, 1],
    "4-5-7-3": [4, 5, 7, 3],
    "widths around tiles": [33, 15, 97, 31, 14],
    "narrow in the middle": [65, 1, 65],
    "wide in the middle": [3, 257, 2],
    "deep": [8] * 13,
    "no inputs": [0, 4, 2],
    "no hidden neurons": [7, 0, 3],
    "no outputs": [7, 4, 0],
}
each_stack = pytest.mark.parametrize("widths", STACKS.values(), ids=STACKS.keys())
each_output = pytest.mark.parametrize("output_activation", [None, "sigmoid"])


def stack(
    widths: list[int], dtype: torch.dtype, biases: str = "all"
) -> tuple[list[Tensor], Biases]:
    weights = [max(n, 1) ** -0.5 * normal(m, n, dtype=dtype) for n, m in itertools.pairwise(widths)]
    return weights, [
        normal(m, dtype=dtype) if biases == "all" or (biases == "some" and i % 2) else None
        for i, m in enumerate(widths[1:])
    ]


def torch_mlp(
    input: Tensor, weights: list[Tensor], biases: Biases, output_activation: str | None
) -> Tensor:
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        input = F.linear(input, weight, bias)
        if i + 1 < len(weights) or output_activation == "sigmoid":
            input = torch.sigmoid(input)
    return input


def results(
    mlp: object, x: Tensor, weights: list[Tensor], biases: Biases, act: str | None, dy: Tensor
) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    assert callable(mlp)
    x = x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in weights]
    biases = [b if b is None else b.detach().requires_grad_() for b in biases]
    y = mlp(x, weights, biases, act)
    y.backward(dy)
    leaves = {"dx": x}
    leaves |= {f"dw{i}": w for i, w in enumerate(weights)}
    leaves |= {f"db{i}": b for i, b in enumerate(biases) if b is not None}
    return {"y": y} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def expected_results(
    x: Tensor, weights: list[Tensor], biases: Biases, act: str | None, dy: Tensor
) -> dict[str, Approx]:
    arithmetic = Arithmetic(x.dtype)
    depth = len(weights)
    sigmoid = [i + 1 < depth or act == "sigmoid" for i in range(depth)]
    outputs = [exact(x)]
    for weight, bias, s in zip(weights, biases, sigmoid, strict=True):
        b = None if bias is None else exact(bias)
        outputs.append(layer(arithmetic, outputs[-1], exact(weight), b, s))
    expected = {"y": outputs[-1]}
    gradient = exact(dy)
    for i in reversed(range(depth)):
        y = outputs[i + 1] if sigmoid[i] else None
        gradient, expected[f"dw{i}"], db = layer_backward(
            arithmetic, gradient, outputs[i], exact(weights[i]), y, stores_dz=i + 1 < depth
        )
        if biases[i] is not None:
            expected[f"db{i}"] = db
    return expected | {"dx": gradient}


@each_stack
@each_output
@each_dtype_with_reference
def test_forward_and_gradients_within_bounds(
    widths: list[int], output_activation: str | None, dtype: torch.dtype, isa: str
) -> None:
    for lead, biases in (
        ((17,), "all"),
        ((2, 3), "some"),
        ((1,), "none"),
        ((), "all"),
        ((0,), "all"),
    ):
        x, (w, b) = normal(*lead, widths[0], dtype=dtype), stack(widths, dtype, biases)
        dy = normal(*lead, widths[-1], dtype=dtype)
        with uninitialised_memory_is_nan():
            actual = results(functional.mlp, x, w, b, output_activation, dy)
        expected = expected_results(x, w, b, output_activation, dy)
        assert actual.keys() == expected.keys()
        for name, bound in expected.items():
            assert actual[name].dtype == dtype
            assert_within(actual[name], bound, f"{lead}, {biases} biases: {name}")
        forward = functional.mlp(x, w, b, output_activation)
        assert_within(forward, expected["y"], f"{lead}, {biases} biases: without a graph")


@each_output
@each_dtype_with_reference
def test_no_worse_than_torch(output_activation: str | None, dtype: torch.dtype, isa: str) -> None:
    """In units of the bound, of which a rounding is a hundredth: that is how long the sums are."""
    widths = [64, 128, 64, 10]
    errors: dict[str, list[tuple[Array, Array]]] = {}
    for _ in range(5):
        x, (w, b) = normal(100, 64, dtype=dtype), stack(widths, dtype)
        dy = normal(100, 10, dtype=dtype)
        expected = expected_results(x, w, b, output_activation, dy)
        ours = results(functional.mlp, x, w, b, output_activation, dy)
        torchs = results(torch_mlp, x, w, b, output_activation, dy)
        for name, bound in expected.items():
            assert_within(ours[name], bound, name)
            if name.startswith("db"):
                continue  # a layer's own, which test_linear compares
            pair = (relative_errors(t[name], bound).ravel() for t in (ours, torchs))
            errors.setdefault(name[:2], []).append(tuple(pair))
    for name, pairs in errors.items():
        our, their = (np.concatenate(e) for e in zip(*pairs, strict=True))
        assert_no_worse(our, their, f"{name} {name_of(dtype)}", unit=0.02)


@each_dtype_with_reference
def test_operands_of_any_layout(dtype: torch.dtype, isa: str) -> None:
    widths = [13, 17, 9]
    x, (w, b) = normal(11, 13, dtype=dtype), stack(widths, dtype)
    dy = normal(11, 9, dtype=dtype)
    expected = expected_results(x, w, b, "sigmoid", dy)
    assert b[0] is not None
    stepped: Biases = [torch.stack([b[0], b[0] * torch.nan], 1)[:, 0], b[1]]
    for views in zip(layouts(x), layouts(w[0]), layouts(w[1]), layouts(dy), strict=True):
        for chosen in itertools.product((False, True), repeat=4):
            x_view, w0, w1, dy_view = (
                view if use else t
                for (_, view), use, t in zip(views, chosen, (x, *w, dy), strict=True)
            )
            actual = results(functional.mlp, x_view, [w0, w1], stepped, "sigmoid", dy_view)
            for name, bound in expected.items():
                assert_within(actual[name], bound, f"{views[0][0]}, {chosen}: {name}")


@each_dtype_with_reference
def test_batches_that_do_not_fold_into_rows(dtype: torch.dtype, isa: str) -> None:
    w, b = stack([6, 7, 2], dtype)
    base = normal(4, 3, 5, 6, dtype=dtype)
    for x in (base.permute(2, 0, 1, 3), base[::2, :, 1::2], base[:, :1].expand(4, 3, 5, 6)):
        dy = normal(2, *x.shape[:-1], dtype=dtype).movedim(0, -1)
        expected = expected_results(x, w, b, None, dy)
        actual = results(functional.mlp, x, w, b, None, dy)
        for name, bound in expected.items():
            assert_within(actual[name], bound, name)
        assert actual["y"].is_contiguous()


def test_views_with_a_pending_negation(isa: str) -> None:
    """Of any argument; torch resolves them before a kernel, but not in lists of optionals."""

    def negated(*size: int) -> Tensor:
        view = torch.randn(size, dtype=torch.complex64).conj().imag
        assert view.is_neg()
        return view

    tensors = [negated(4, 3), negated(5, 3), negated(2, 5), negated(5), negated(2), negated(4, 2)]
    for pending in itertools.product([False, True], repeat=len(tensors)):
        views = [t if p else t.resolve_neg() for t, p in zip(tensors, pending, strict=True)]
        plain = [t.resolve_neg() for t in tensors]
        actual, expected = (
            {"without a graph": functional.mlp(x, [w0, w1], [b0, b1])}
            | results(functional.mlp, x, [w0, w1], [b0, b1], None, dy)
            for x, w0, w1, b0, b1, dy in (views, plain)
        )
        for name in expected:
            what = f"{name}, pending: {pending}"
            torch.testing.assert_close(actual[name], expected[name], msg=what)


@each_output
def test_only_wanted_gradients(output_activation: str | None) -> None:
    """Any subset of input, weights and biases; f64 gradients agree with torch's to 1e-12."""
    x, (w, b) = normal(5, 4, dtype=torch.float64), stack([4, 3, 2], torch.float64)
    for wanted in itertools.product([False, True], repeat=5):
        grads = []
        for mlp in (functional.mlp, torch_mlp):
            leaves = [
                t.clone().requires_grad_(want) for t, want in zip([x, *w, *b], wanted, strict=True)
            ]
            y = mlp(leaves[0], leaves[1:3], list(leaves[3:]), output_activation)
            assert y.requires_grad == any(wanted)
            if y.requires_grad:
                y.square().sum().backward()
            grads.append([t.grad for t in leaves])
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None), wanted
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_output
def test_gradients_of_a_long_batch(output_activation: str | None) -> None:
    """Rows go back in blocks; as torch's to 1e-12, whichever of them are wanted."""
    x, (w, b) = normal(33_000, 4, dtype=torch.float64), stack([4, 3, 6, 2], torch.float64)
    dy = normal(2, 33_000, dtype=torch.float64).T
    for wanted in (range(7), (0,), (1, 6), (2, 4), (3,)):
        grads = []
        for mlp in (functional.mlp, torch_mlp):
            leaves = [t.clone() for t in (x, *w, *b) if t is not None]
            inputs = [leaves[i].requires_grad_() for i in wanted]
            y = mlp(leaves[0], leaves[1:4], list(leaves[4:]), output_activation)
            grads.append(torch.autograd.grad(y, inputs, dy))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * len(x) ** 0.5)


@each_dtype
def test_gradients_of_a_sum_and_of_a_shared_weight(dtype: torch.dtype, isa: str) -> None:
    tolerance = 8 * torch.finfo(dtype).eps
    x, (w, b) = normal(7, 5, dtype=dtype), stack([5, 5], dtype)
    grads = []
    for mlp in (functional.mlp, torch_mlp):
        leaves = [t.clone().requires_grad_() for t in (x, w[0], b[0]) if t is not None]
        y = mlp(leaves[0], [leaves[1]] * 3, [leaves[2], None, leaves[2]], None)
        y.sum().backward()
        grads.append([y, *(t.grad for t in leaves)])
    for ours, theirs in zip(*grads, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    "bias_shape", [(), (1,), (3,), (1, 3), (1, 1), (5, 3), (5, 1), (2,)], ids=str
)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_bias_shapes_as_torch(
    bias_shape: tuple[int, ...], lead: tuple[int, ...], place: int
) -> None:
    x, w = (
        normal(*lead, 4, dtype=torch.float32),
        [
            normal(3, 4, dtype=torch.float32),
            normal(3, 3, dtype=torch.float32),
        ],
    )
    b: Biases = [None, None]
    b[place] = normal(*bias_shape, dtype=torch.float32)
    dy = torch.ones(*lead, 3)
    for run in (
        lambda mlp: mlp(x, w, b, "sigmoid"),
        lambda mlp: list(results(mlp, x, w, b, "sigmoid", dy).values()),
    ):
        assert_same_outcome(outcome(run, functional.mlp), outcome(run, torch_mlp))


def test_no_biases_can_be_said_in_three_ways(isa: str) -> None:
    x, (w, none) = normal(5, 4, dtype=torch.float32), stack([4, 3, 2], torch.float32, "none")
    expected = functional.mlp(x, w, none)
    assert torch.equal(functional.mlp(x, w), expected)
    assert torch.equal(functional.mlp(x, w, []), expected)
    assert torch.equal(functional.mlp(x, tuple(w), tuple(none)), expected)
    torch.testing.assert_close(expected, torch_mlp(x, w, none, None))


@each_output
def test_one_node_in_the_graph(output_activation: str | None) -> None:
    x, (w, b) = normal(5, 4, dtype=torch.float32), stack([4, 3, 3, 2], torch.float32)
    for t in w:
        t.requires_grad_()
    y = functional.mlp(x, w, b, output_activation)
    assert y.grad_fn is not None
    nodes = {node for node, _ in y.grad_fn.next_functions if node is not None}
    assert len(nodes) == len(w)
    assert all(type(node).__name__ == "AccumulateGrad" for node in nodes)


def test_the_output_is_its_own_memory(isa: str) -> None:
    x, (w, b) = normal(5, 4, dtype=torch.float32), stack([4, 4, 4], torch.float32)
    first = functional.mlp(x, w, b)
    kept = first.clone()
    second = functional.mlp(2 * x, w, b)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()
