"""linear and linear_sigmoid, forward and backward, against exact arithmetic and against torch."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EMPTY_SHAPES,
    LARGE_SHAPES,
    SMALL_SHAPES,
    TILE_EDGES,
    Approx,
    Arithmetic,
    Array,
    Shape,
    assert_no_worse,
    assert_same,
    assert_same_outcome,
    assert_within,
    each_dtype,
    each_dtype_with_reference,
    each_shape,
    exact,
    integers,
    layer,
    layer_backward,
    layer_inputs,
    layouts,
    name_of,
    normal,
    outcome,
    relative_errors,
    sample,
    uninitialised_memory_is_nan,
    wide,
)
from torch import Tensor

from neuron_ext import backends, functional

Layer = Callable[..., Tensor]
ops = torch.ops.neuron_ext


def torch_linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.sigmoid(F.linear(input, weight, bias))


OURS: dict[str, Layer] = {
    "linear": functional.linear,
    "linear_sigmoid": functional.linear_sigmoid,
}
TORCHS: dict[str, Layer] = {"linear": F.linear, "linear_sigmoid": torch_linear_sigmoid}
each_op = pytest.mark.parametrize("op", OURS)


def with_gradients(
    function: Layer, inputs: tuple[Tensor | None, ...], grad_output: Tensor | None
) -> list[Tensor]:
    """The output, then the gradients of the inputs that aren't None."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    output.backward(torch.ones_like(output) if grad_output is None else grad_output)
    return [output, *(t.grad for t in leaves if t is not None and t.grad is not None)]


def expected_results(
    op: str, x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor
) -> dict[str, Approx]:
    arithmetic = Arithmetic(x.dtype)
    sigmoid = op == "linear_sigmoid"
    y = layer(arithmetic, exact(x), exact(w), None if b is None else exact(b), sigmoid)
    dx, dw, db = layer_backward(arithmetic, exact(dy), exact(x), exact(w), y if sigmoid else None)
    return {"y": y, "dx": dx, "dw": dw} | ({} if b is None else {"db": db})


# ---- accuracy


@each_op
@each_shape(SMALL_SHAPES | EMPTY_SHAPES)
@each_dtype_with_reference
def test_forward_and_gradients_within_bounds(
    op: str, shape: Shape, dtype: torch.dtype, isa: str
) -> None:
    for bias in (True, False):
        x, w, b = layer_inputs(shape, dtype, bias)
        dy = normal(*shape[0], shape[2], dtype=dtype)
        results = with_gradients(OURS[op], (x, w, b), dy)
        expected = expected_results(op, x, w, b, dy)
        for (name, bound), actual in zip(expected.items(), results, strict=True):
            assert actual.dtype == dtype
            assert_within(actual, bound, name)


@each_op
@each_dtype_with_reference
def test_large_within_bounds_and_no_worse_than_torch(
    op: str, dtype: torch.dtype, isa: str, record_property: Callable[[str, object], None]
) -> None:
    """The comparison is in units of eps (|A||B| + |b|), where A counts an error of eps in y."""
    info = torch.finfo(dtype)
    errors: dict[str, list[tuple[Array, Array]]] = {}
    for label, shape in LARGE_SHAPES.items():
        x, w, b = layer_inputs(shape, dtype)
        assert b is not None
        dy = normal(*shape[0], shape[2], dtype=dtype)
        ours = with_gradients(OURS[op], (x, w, b), dy)
        torchs = with_gradients(TORCHS[op], (x, w, b), dy)
        expected = expected_results(op, x, w, b, dy)
        z = np.abs(wide(x)) @ np.abs(wide(w)).T + np.abs(wide(b))
        dz = np.abs(wide(dy))
        if op == "linear_sigmoid":
            y = expected["y"].value
            z = z * y * (1 - y) + y
            dz = dz * (y * (1 - y) + np.abs(1 - 2 * y) * y)
        rows = dz.reshape(-1, dz.shape[-1])
        magnitudes = {
            "y": z,
            "dx": dz @ np.abs(wide(w)),
            "dw": rows.T @ np.abs(wide(x)).reshape(-1, x.shape[-1]),
            "db": rows.sum(0),
        }
        for (name, bound), our, their in zip(expected.items(), ours, torchs, strict=True):
            assert_within(our, bound, f"{label}: {name}")
            scale = Approx(bound.value, info.eps * (magnitudes[name] + info.smallest_normal))
            errors.setdefault(name, []).append(
                (relative_errors(our, scale).ravel(), relative_errors(their, scale).ravel())
            )
    for name, pairs in errors.items():
        our_errors, their_errors = (np.concatenate(e) for e in zip(*pairs, strict=True))
        if op == "linear" and name == "y":
            record_property(
                "figure",
                f"linear  {name_of(dtype):<9} {isa:<9} error: largest {our_errors.max():.2f} "
                f"(torch {their_errors.max():.2f}), mean {our_errors.mean():.3f} "
                f"(torch {their_errors.mean():.3f}) eps (|x||W| + |b|)",
            )
        assert_no_worse(our_errors, their_errors, name, unit=1)


@each_dtype_with_reference
@pytest.mark.parametrize("rows", [16, 100, 256, 3001])
def test_bias_gradient_no_worse_than_torch(rows: int, dtype: torch.dtype, isa: str) -> None:
    """torch sums columns pairwise, which a running sum doesn't match for more than a few rows."""
    x, (w, b) = (
        normal(rows, 2, dtype=dtype),
        (normal(3000, 2, dtype=dtype), normal(3000, dtype=dtype)),
    )
    dy = normal(rows, 3000, dtype=dtype)
    ours, torchs = (with_gradients(f, (x, w, b), dy)[3] for f in (functional.linear, F.linear))
    scale = Approx(wide(dy).sum(0), torch.finfo(dtype).eps * np.abs(wide(dy)).sum(0))
    errors = relative_errors(ours, scale), relative_errors(torchs, scale)
    assert_no_worse(*errors, "db", unit=errors[1].mean())


@each_dtype_with_reference
def test_gradients_of_a_long_batch_no_worse_than_torch(dtype: torch.dtype, isa: str) -> None:
    """Where all terms have one sign, a running sum would lose a thousand times more."""
    x, dy = (torch.rand(100001, n, dtype=torch.float64).to(dtype) for n in (5, 3))
    w, b = normal(3, 5, dtype=dtype), normal(3, dtype=dtype)
    ours, torchs = (with_gradients(f, (x, w, b), dy) for f in (functional.linear, F.linear))
    eps = torch.finfo(dtype).eps
    for name, i, exact_sum in (("dw", 2, wide(dy).T @ wide(x)), ("db", 3, wide(dy).sum(0))):
        scale = Approx(exact_sum, eps * exact_sum)
        our, their = (relative_errors(t[i], scale) for t in (ours, torchs))
        assert our.max() <= their.max() + 2, name


@each_dtype_with_reference
@pytest.mark.parametrize(("features", "out"), [(16, 16), (13, 5), (1, 40), (40, 1)])
def test_gradients_of_rows_in_blocks(features: int, out: int, dtype: torch.dtype, isa: str) -> None:
    """A long batch may go back in blocks of rows, of which each forms dz once."""
    x, w, b = layer_inputs(((9001,), features, out), dtype)
    for dy in (
        normal(9001, out, dtype=dtype),
        normal(9001, out + 3, dtype=dtype)[:, 1:-2],
        normal(1, 1, dtype=dtype).expand(9001, out),
    ):
        results = with_gradients(functional.linear_sigmoid, (x, w, b), dy)
        for (name, bound), actual in zip(
            expected_results("linear_sigmoid", x, w, b, dy).items(), results, strict=True
        ):
            assert_within(actual, bound, name)


@each_dtype_with_reference
def test_rows_of_very_different_size(dtype: torch.dtype, isa: str) -> None:
    """The bound is for each element: a large row may not spoil a small one."""
    power = {torch.float64: 200, torch.float16: 2}.get(dtype, 30)
    x, w, _ = layer_inputs(((37,), 65, 19), dtype, bias=False)
    x = (x.double() * 10.0 ** torch.randint(-power, power + 1, (37, 1)).double()).to(dtype)
    dy = normal(37, 19, dtype=dtype)
    results = with_gradients(functional.linear, (x, w, None), dy)
    for (name, bound), actual in zip(
        expected_results("linear", x, w, None, dy).items(), results, strict=True
    ):
        assert_within(actual, bound, name)


@each_dtype_with_reference
def test_sums_that_cancel(dtype: torch.dtype, isa: str) -> None:
    half = normal(9, 150, dtype=dtype)
    x = torch.cat([half, half[:, :1], -half, half[:, 1:]], dim=1)
    w = normal(1, 1, dtype=dtype).expand(7, 450)
    dy = normal(9, 7, dtype=dtype)
    results = with_gradients(functional.linear, (x, w, None), dy)
    for (name, bound), actual in zip(
        expected_results("linear", x, w, None, dy).items(), results, strict=True
    ):
        assert_within(actual, bound, name)


# ---- whole numbers: exact in every order, so nothing may differ


def rounded(sums: Tensor, op: str, dtype: torch.dtype) -> Tensor:
    """What a layer makes of exact sums: one sigmoid of the unrounded sum, one rounding."""
    z = sums.to(torch.promote_types(dtype, torch.float32))
    return (functional.sigmoid(z) if op == "linear_sigmoid" else z).to(dtype)


@each_op
@each_dtype
def test_sizes_around_tile_edges_exactly(op: str, dtype: torch.dtype, isa: str) -> None:
    largest = 70
    x, w = integers(largest, largest, dtype=dtype), integers(largest, largest, dtype=dtype)
    b = integers(largest, dtype=dtype)
    for k in (0, 1, 2, 3, 4, 7, 8, 16, 17, 33) if op == "linear" else (0, 5):
        sums = x[:, :k].double() @ w[:, :k].double().T + b.double()
        expected = rounded(sums, op, dtype)
        for m, n in itertools.product(TILE_EDGES, TILE_EDGES):
            actual = OURS[op](x[:m, :k], w[:n, :k], b[:n])
            assert torch.equal(actual, expected[:m, :n]), (m, n, k)
    with uninitialised_memory_is_nan():
        for m, n, k in torch.randint(1, largest + 1, (200, 3)).tolist():
            sums = x[:m, :k].double() @ w[:n, :k].double().T
            assert torch.equal(OURS[op](x[:m, :k], w[:n, :k]), rounded(sums, op, dtype)), (m, n, k)


@each_dtype
def test_gradients_around_tile_edges_exactly(dtype: torch.dtype, isa: str) -> None:
    """With y in {0, 1/2, 1} and dy a multiple of 4, dz = dy y (1 - y) is whole too."""
    sizes = (*TILE_EDGES, 97)
    largest = max(sizes)
    dy = 4 * integers(largest, largest, dtype=dtype, largest=1)
    y = torch.randint(0, 3, (largest, largest)).to(dtype) / 2
    x, w = integers(largest, largest, dtype=dtype), integers(largest, largest, dtype=dtype)
    dz = dy.double() * y.double() * (1 - y.double())
    with uninitialised_memory_is_nan():
        for m, n, k in sample(itertools.product(sizes, sizes, sizes), 400):
            expected = (
                dz[:m, :n] @ w[:n, :k].double(),
                dz[:m, :n].T @ x[:m, :k].double(),
                dz[:m, :n].sum(0),
            )
            actual = ops.linear_sigmoid_backward(
                dy[:m, :n], x[:m, :k], w[:n, :k], y[:m, :n], [True, True, True]
            )
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e.to(dtype)), (m, n, k)


@each_op
@each_dtype
@pytest.mark.parametrize("size", [(1, 33, 40), (5, 17, 29), (33, 16, 17)], ids=str)
def test_operands_of_any_layout_exactly(
    op: str, dtype: torch.dtype, size: tuple[int, int, int], isa: str
) -> None:
    m, n, k = size
    x, w, b = integers(m, k, dtype=dtype), integers(n, k, dtype=dtype), integers(n, dtype=dtype)
    expected = rounded(x.double() @ w.double().T + b.double(), op, dtype)
    biases = {
        "contiguous": b,
        "stepped": torch.stack([b, torch.full_like(b, torch.nan)], 1)[:, 0],
        "of shape (1, n)": b[None],
    }
    for (x_name, x_view), (w_name, w_view), (b_name, b_view) in itertools.product(
        layouts(x), layouts(w), biases.items()
    ):
        actual = OURS[op](x_view, w_view, b_view)
        assert_same(actual, expected, f"input {x_name}, weight {w_name}, bias {b_name}")
        assert actual.is_contiguous()


@each_dtype
@pytest.mark.parametrize("size", [(1, 33, 40), (33, 1, 17), (17, 15, 29), (257, 260, 256)], ids=str)
def test_gradients_of_any_layout_exactly(
    dtype: torch.dtype, size: tuple[int, int, int], isa: str
) -> None:
    m, n, k = size
    dy = 4 * integers(m, n, dtype=dtype, largest=1)
    y = torch.randint(0, 3, (m, n)).to(dtype) / 2
    x, w = integers(m, k, dtype=dtype), integers(n, k, dtype=dtype)
    dz = dy.double() * y.double() * (1 - y.double())
    expected = (dz @ w.double(), dz.T @ x.double(), dz.sum(0))
    combinations = itertools.product(layouts(dy), layouts(x), layouts(w), layouts(y))
    for views in sample(combinations, 100 if m < 100 else 8):
        names = [name for name, _ in views]
        actual = ops.linear_sigmoid_backward(*(view for _, view in views), [True, True, True])
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e.to(dtype), f"grad_output, input, weight, output: {names}")


@each_dtype
def test_gradients_through_autograd_of_any_layout_exactly(dtype: torch.dtype, isa: str) -> None:
    """What autograd hands to a backward: views of stride 0 from sum, narrow ones from cat, ..."""
    x, w, b = integers(6, 5, dtype=dtype), integers(7, 5, dtype=dtype), integers(7, dtype=dtype)
    grad_outputs = dict(layouts(integers(6, 7, dtype=dtype)))
    grad_outputs["all one value"] = torch.ones((), dtype=dtype).expand(6, 7)
    grad_outputs["one row"] = integers(1, 7, dtype=dtype).expand(6, 7)
    grad_outputs["one column"] = integers(6, 1, dtype=dtype).expand(6, 7)
    for name, dy in grad_outputs.items():
        actual = with_gradients(functional.linear, (x, w, b), dy)
        wide_inputs = tuple(t.double() for t in (x, w, b))
        expected = with_gradients(F.linear, wide_inputs, dy.double())
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e.to(dtype), name)

    def through_sum(f: Layer) -> Layer:
        return lambda *inputs: f(*inputs).sum()

    def through_cat(f: Layer) -> Layer:
        return lambda *inputs: torch.cat([f(*inputs), 2 * f(*inputs)], 1).square().sum()

    def through_transpose(f: Layer) -> Layer:
        return lambda *inputs: (f(*inputs).T * torch.arange(6)).sum()

    for through in (through_sum, through_cat, through_transpose):
        actual = with_gradients(through(functional.linear), (x, w, b), None)
        expected = with_gradients(through(F.linear), (x, w, b), None)
        for a, e in zip(actual[1:], expected[1:], strict=True):
            assert_same(a, e, through.__name__)


@each_op
@each_dtype
def test_batches_of_any_layout_exactly(op: str, dtype: torch.dtype, isa: str) -> None:
    """Leading dimensions that fold into one row stride, and those that don't."""
    base = integers(4, 3, 5, 6, dtype=dtype)
    w, b = integers(7, 6, dtype=dtype), integers(7, dtype=dtype)
    inputs = {
        "contiguous": base,
        "permuted, not collapsible": base.permute(1, 0, 2, 3),
        "permuted twice": base.permute(2, 1, 0, 3),
        "rows sliced": base[:, ::2],
        "rows sliced twice": base[::2, :, 1::2],
        "expanded in front": base[0].expand(2, 3, 5, 6),
        "expanded between": base[:, :1].expand(4, 3, 5, 6),
        "one row for all": base[0, 0, 0].expand(4, 3, 5, 6),
        "sizes of one": base[:1, :, :1],
        "sizes of one, odd strides": base.permute(1, 0, 2, 3)[:, :1].as_strided(
            (3, 1, 5, 6), (30, 7, 6, 1)
        ),
        "overlapping windows": base.flatten()[:50].unfold(0, 6, 2),
        "one row": base[0, 0, 0],
        "one row, stepped": base.flatten()[:30:5],
        "features in front": base.flatten()[:120].view(6, 4, 5).permute(1, 2, 0),
    }
    for name, x in inputs.items():
        expected = rounded(x.double() @ w.double().T + b.double(), op, dtype)
        actual = OURS[op](x, w, b)
        assert_same(actual, expected, name)
        assert actual.stride() == TORCHS[op](x, w, b).stride(), name
        if op == "linear":
            dy = integers(*actual.shape, dtype=dtype, largest=1)
            gradients = with_gradients(functional.linear, (x, w, b), dy)
            doubles = with_gradients(F.linear, (x.double(), w.double(), b.double()), dy.double())
            for a, e in zip(gradients, doubles, strict=True):
                assert_same(a, e.to(dtype), name)


@each_dtype
def test_a_weight_of_stride_zero(dtype: torch.dtype, isa: str) -> None:
    x = integers(5, 6, dtype=dtype)
    for w in (
        integers(1, 6, dtype=dtype).expand(7, 6),
        integers(7, 1, dtype=dtype).expand(7, 6),
        integers(1, 1, dtype=dtype).expand(7, 6),
    ):
        for bias in (None, integers(1, dtype=dtype).expand(7)):
            sums = x.double() @ w.double().T + (0 if bias is None else bias.double())
            assert_same(functional.linear(x, w, bias), sums.to(dtype))


@each_op
@each_dtype
def test_arguments_that_are_the_same_tensor(op: str, dtype: torch.dtype, isa: str) -> None:
    t = integers(6, 6, dtype=dtype, largest=1)
    assert_same(OURS[op](t, t, t[0]), rounded(t.double() @ t.double().T + t[0], op, dtype))

    def of_one(f: Layer) -> Layer:
        return lambda a: f(a, a, a[0])

    actual = with_gradients(of_one(OURS["linear"]), (t,), None)
    expected = with_gradients(of_one(F.linear), (t.double(),), None)
    assert_same(actual[1], expected[1].to(dtype))


@each_op
def test_views_with_a_pending_negation(op: str, isa: str) -> None:
    x, w = (torch.randn(4, 3, dtype=torch.complex64).conj().imag for _ in range(2))
    assert x.is_neg()
    assert w.is_neg()
    actual = with_gradients(OURS[op], (x, w, None), None)
    expected = with_gradients(OURS[op], (x.resolve_neg(), w.resolve_neg(), None), None)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


# ---- which gradients there are


@each_op
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(op: str, wanted: tuple[bool, bool, bool]) -> None:
    x, w, b = layer_inputs(((4,), 5, 3), torch.float64)
    assert b is not None

    def run(f: Layer) -> tuple[Tensor, list[Tensor | None]]:
        inputs = [t.clone().requires_grad_(want) for t, want in zip((x, w, b), wanted, strict=True)]
        output = f(*inputs)
        if output.requires_grad:
            output.sum().backward()
        return output, [t.grad for t in inputs]

    (actual, grads), (expected, torch_grads) = run(OURS[op]), run(TORCHS[op])
    assert actual.requires_grad == expected.requires_grad == any(wanted)
    for mine, theirs in zip(grads, torch_grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@each_op
@each_shape(EMPTY_SHAPES)
def test_zero_features_or_rows_as_torch(op: str, shape: Shape, isa: str) -> None:
    """No inputs leave the bias; no rows leave gradients of zero."""
    x, w, b = layer_inputs(shape, torch.float32)
    actual = with_gradients(OURS[op], (x, w, b), None)
    expected = with_gradients(TORCHS[op], (x, w, b), None)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
        assert a.stride() == e.stride()
    if shape[1] == 0 and op == "linear":
        assert b is not None
        assert_same(actual[0].detach(), b.expand(actual[0].shape))


# ---- the bias as torch takes it

BIAS_SHAPES = [(), (1,), (2,), (3,), (4,), (1, 1), (1, 3), (4, 3), (4, 1), (2, 3), (3, 1), (5,)]
BIAS_SHAPES += [(1, 1, 3), (1, 4, 3), (2, 4, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1, 3), (0,), (0, 3)]


@each_op
@pytest.mark.parametrize("features", [(5, 3), (5, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (1,), (2, 4), (0,), (2, 2, 4)], ids=str)
def test_bias_shapes_as_torch(op: str, lead: tuple[int, ...], features: tuple[int, int]) -> None:
    """The same result, or an error of the same type, with and without a graph."""
    in_features, out_features = features
    x = integers(*lead, in_features, dtype=torch.float32)
    stepped = torch.stack([x, x], -1)[..., 0]
    w = integers(out_features, in_features, dtype=torch.float32)
    for bias_shape, input in itertools.product(BIAS_SHAPES, (x, stepped)):
        b = integers(*bias_shape, dtype=torch.float32)
        what = f"bias {bias_shape}, input strides {input.stride()}"
        ours, torchs = (outcome(f, input, w, b) for f in (OURS[op], TORCHS[op]))
        assert_same_outcome(ours, torchs, what)
        ours, torchs = (
            outcome(with_gradients, f, (input, w, b), None) for f in (OURS[op], TORCHS[op])
        )
        assert_same_outcome(ours, torchs, what)


@each_op
@pytest.mark.parametrize("x_shape", [(5,), (2, 5), (2, 3, 5), ()], ids=str)
@pytest.mark.parametrize("bias_shape", [None, (), (1,), (2,), (5,), (2, 3)], ids=str)
def test_weight_vectors_as_torch(
    op: str, x_shape: tuple[int, ...], bias_shape: tuple[int, ...] | None
) -> None:
    x, w = integers(*x_shape, dtype=torch.float32), integers(5, dtype=torch.float32)
    b = None if bias_shape is None else integers(*bias_shape, dtype=torch.float32)
    for run in (lambda f: f(x, w, b), lambda f: with_gradients(f, (x, w, b), None)):
        assert_same_outcome(outcome(run, OURS[op]), outcome(run, TORCHS[op]))


# ---- values at the edge of the number range


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 inf, -1 -inf, 2 nan."""
    kind = t.isposinf().int() - t.isneginf().int()
    return torch.where(t.isnan(), 2, kind)


@each_op
@each_dtype
@pytest.mark.parametrize("size", [(1, 9, 13), (9, 1, 33), (7, 17, 29), (33, 31, 1)], ids=str)
def test_inf_and_nan_go_where_arithmetic_sends_them(
    op: str, dtype: torch.dtype, size: tuple[int, int, int], isa: str
) -> None:
    m, n, k = size
    for where in ("input", "weight", "bias", "all"):
        x, w, b = integers(m, k, dtype=dtype), integers(n, k, dtype=dtype), integers(n, dtype=dtype)
        for name, t in (("input", x), ("weight", w), ("bias", b)):
            if where in (name, "all"):
                special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0]).to(dtype)
                t.view(-1)[torch.randint(t.numel(), (3,))] = special[torch.randint(4, (3,))]
        sums = (x.double()[:, None] * w.double()).sum(-1) + b.double()
        expected = rounded(sums, op, dtype)
        assert_same(OURS[op](x, w, b), expected, f"special values in {where}")
        if op == "linear":
            dy = integers(m, n, dtype=dtype, largest=1)
            gradients = with_gradients(functional.linear, (x, w, b), dy)
            dx = (dy.double()[:, :, None] * w.double()).sum(1)
            dw = (dy.double()[:, :, None] * x.double()[:, None]).sum(0)
            assert_same(gradients[1], dx.to(dtype), f"dx, special values in {where}")
            assert_same(gradients[2], dw.to(dtype), f"dw, special values in {where}")


@each_dtype
def test_nan_in_one_row_stays_there(dtype: torch.dtype, isa: str) -> None:
    for k in (*range(1, 40), 63, 64, 65, 127, 129, 257):
        x, w = integers(5, k, dtype=dtype), integers(6, k, dtype=dtype)
        clean = functional.linear(x, w)
        x[2] = torch.nan
        actual = functional.linear(x, w)
        assert actual[2].isnan().all()
        assert_same(actual[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], f"K = {k}")


@each_dtype
def test_largest_and_smallest_numbers(dtype: torch.dtype, isa: str) -> None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    extremes = [info.max, -info.max, info.smallest_normal, -2 * smallest, 6 * smallest, 0.0]
    x = torch.tensor(extremes, dtype=dtype)[:, None]
    assert_same(functional.linear(x, torch.ones(17, 1, dtype=dtype)), x.expand(6, 17))
    halves = torch.full((17, 2), 0.5, dtype=dtype)
    assert_same(functional.linear(x.expand(6, 2), halves), x.expand(6, 17), "sum of halves")

    too_large = torch.full((3, 2), info.max, dtype=dtype)
    ones = torch.ones(2, 2, dtype=dtype)
    assert functional.linear(too_large, ones).isposinf().all()
    assert functional.linear_sigmoid(too_large, ones).eq(1).all()
    assert functional.linear_sigmoid(-too_large, ones).eq(0).all()


# ---- results


@each_op
@each_dtype
def test_the_output_is_a_new_contiguous_tensor(op: str, dtype: torch.dtype) -> None:
    x, w = integers(3, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    for inputs in ((x, w), (x.T.expand(2, 3).T[:, :1], w)):
        actual, expected = OURS[op](*inputs), TORCHS[op](*inputs)
        assert actual.stride() == expected.stride()
        assert actual.storage_offset() == 0
        assert actual.data_ptr() not in {t.data_ptr() for t in inputs}
        assert not actual.requires_grad
        assert actual._version == 0


@each_op
def test_the_kernel_that_ran_is_named(op: str, isa: str) -> None:
    x, w, b = layer_inputs(((4,), 5, 3), torch.float32)
    OURS[op](x, w, b)
    rows = {kernel.name: kernel for kernel in backends.kernels()}
    assert "f32" in rows[backends.last_kernel()].dtypes
    assert rows[backends.last_kernel()].runnable
