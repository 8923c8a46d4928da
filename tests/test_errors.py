"""What the kernels don't take gives what torch gives; what torch doesn't take raises an error that
names the argument, what came and what was expected. Nothing crashes."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, assert_same_outcome, integers, name_of, outcome, sample
from torch import Tensor

import neuron_ext
from neuron_ext import functional

ops = torch.ops.neuron_ext

OTHER_DTYPES = (
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
each_other_dtype = pytest.mark.parametrize("other", OTHER_DTYPES, ids=name_of)


def torch_linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.sigmoid(F.linear(input, weight, bias))


def two_layers(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.mlp(input, [weight, weight], [bias, bias])


def torch_two_layers(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(torch_linear_sigmoid(input, weight, bias), weight, bias)


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (functional.linear, F.linear),
    "linear_sigmoid": (functional.linear_sigmoid, torch_linear_sigmoid),
    "mlp": (two_layers, torch_two_layers),
}
each_layer = pytest.mark.parametrize(("ours", "torchs"), PAIRS.values(), ids=PAIRS.keys())


def both(ours: Callable[..., Any], torchs: Callable[..., Any], *args: Any, what: str = "") -> None:
    """The same result or the same kind of error, forward and, where it can be, backward."""
    expected = outcome(torchs, *args)
    assert_same_outcome(outcome(ours, *args), expected, what)
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return

    def gradients(f: Callable[..., Any]) -> list[Tensor]:
        leaves = [
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in args
        ]
        y = f(*leaves)
        y.backward(torch.ones_like(y))
        return [a.grad for a in leaves if isinstance(a, Tensor) and a.grad is not None]

    assert_same_outcome(outcome(gradients, ours), outcome(gradients, torchs), f"{what}, gradients")


# ---- other dtypes, layouts and classes of tensors: torch's result or torch's error


@each_layer
@each_other_dtype
def test_layers_of_other_dtypes(ours: Any, torchs: Any, other: torch.dtype) -> None:
    x, w, b = (torch.randint(0, 3, size).to(other) for size in ((4, 3), (3, 3), (3,)))
    both(ours, torchs, x, w, b)
    both(ours, torchs, x, w)
    for dtype in DTYPES:
        for args in itertools.product((x, x.to(dtype)), (w, w.to(dtype)), (b, b.to(dtype), None)):
            both(ours, torchs, *args, what=str([a if a is None else a.dtype for a in args]))


@each_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_layers_of_mixed_dtypes(ours: Any, torchs: Any, dtype: torch.dtype) -> None:
    x, w, b = (integers(*size, dtype=torch.float32) for size in ((4, 3), (3, 3), (3,)))
    for args in itertools.product((x, x.to(dtype)), (w, w.to(dtype)), (b, b.to(dtype), None)):
        both(ours, torchs, *args, what=str([a if a is None else a.dtype for a in args]))


@each_other_dtype
def test_sigmoid_of_other_dtypes(other: torch.dtype) -> None:
    x = integers(4, 3, dtype=torch.float32).to(other)
    for view in (x, x.T, x[:, ::2], x[:0], x[0, 0]):
        both(functional.sigmoid, torch.sigmoid, view)


def test_sigmoid_of_integers_follows_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        both(functional.sigmoid, torch.sigmoid, torch.arange(5))
        assert functional.sigmoid(torch.arange(5)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def of_another_kind(t: Tensor) -> dict[str, Tensor]:
    return {
        "COO": t.to_sparse(),
        "CSR": t.to_sparse_csr(),
        "CSC": t.to_sparse_csc(),
        "mkldnn": t.to_mkldnn(),
        "quantized": torch.quantize_per_tensor(t, 0.1, 10, torch.quint8),
        "conjugate": torch.complex(t, t).conj(),
        "negated view": torch.complex(t, t).conj().imag,
    }


@each_layer
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_of_other_layouts(ours: Any, torchs: Any) -> None:
    x, w, b = (integers(*size, dtype=torch.float32) for size in ((4, 3), (3, 3), (3,)))
    xs, ws = {"plain": x} | of_another_kind(x), {"plain": w} | of_another_kind(w)
    for (x_name, input), (w_name, weight) in itertools.product(xs.items(), ws.items()):
        for bias in (None, b):
            both(ours, torchs, input, weight, bias, what=f"input {x_name}, weight {w_name}")


@each_layer
def test_layers_on_meta(ours: Any, torchs: Any) -> None:
    for dtype, lead in itertools.product((*DTYPES, torch.int64), [(), (4,), (0,), (2, 4)]):
        sizes = ((*lead, 3), (3, 3), (3,))
        x, w, b = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
        both(ours, torchs, x, w, b)
        both(ours, torchs, x.expand(2, *x.shape).mT, w.T, None)
        both(functional.sigmoid, torch.sigmoid, x.expand(2, *x.shape).mT)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sigmoid_of_other_layouts() -> None:
    for name, x in of_another_kind(integers(4, 3, dtype=torch.float32)).items():
        both(functional.sigmoid, torch.sigmoid, x, what=name)


@each_layer
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(ours: Any, torchs: Any, layout: torch.layout) -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    w, b = torch.randn(3, 3), torch.randn(3)
    for mine, theirs, args in ((ours, torchs, (w, b)), (functional.sigmoid, torch.sigmoid, ())):
        actual, expected = outcome(mine, x, *args), outcome(theirs, x, *args)
        if isinstance(expected, Exception):
            assert type(actual) is type(expected)
            continue
        assert isinstance(actual, Tensor)
        assert isinstance(expected, Tensor)
        assert actual.layout == expected.layout
        for a, e in zip(actual.unbind(), expected.unbind(), strict=True):
            torch.testing.assert_close(a, e)


class Named(Tensor):
    """A subclass with nothing of its own: torch's functions give the same class."""


@each_layer
def test_subclasses(ours: Any, torchs: Any) -> None:
    plain = [integers(*size, dtype=torch.float32) for size in ((4, 3), (3, 3), (3,))]
    for special in itertools.product([False, True], repeat=3):
        args = [t.as_subclass(Named) if s else t for t, s in zip(plain, special, strict=True)]
        both(ours, torchs, *args, what=str(special))
    both(functional.sigmoid, torch.sigmoid, plain[0].as_subclass(Named))


def test_parameters_and_buffers_give_plain_tensors() -> None:
    x, w = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(2, 3))
    for y in (functional.linear(x, w), functional.linear_sigmoid(x, w), functional.sigmoid(x)):
        assert type(y) is Tensor
        assert y.requires_grad
    buffer = torch.nn.Buffer(torch.randn(4, 3))
    both(functional.linear, F.linear, buffer, w)


# ---- anything at all


def zoo() -> list[Tensor]:
    shapes = [(), (0,), (1,), (3,), (4,), (1, 1), (3, 3), (4, 3), (3, 4), (0, 3), (3, 0), (2, 4, 3)]
    shapes += [(1, 3), (3, 1), (2, 1, 1, 3)]
    tensors = [integers(*shape, dtype=torch.float32) for shape in shapes]
    tensors += [t.double() for t in tensors] + [t.bfloat16() for t in tensors[::3]]
    tensors += [t.to(torch.int64) for t in tensors[:12:3]]
    tensors += [t.mT for t in tensors if t.dim() >= 2] + [t[::2] for t in tensors if t.dim() >= 1]
    tensors += [torch.zeros(()).expand(3, 3), torch.ones(3, 3).to_sparse(), torch.ones(3) > 0]
    tensors += [t.to(torch.complex64) for t in tensors[:12:3]]
    return tensors


@each_layer
def test_any_tensors_as_torch(ours: Any, torchs: Any) -> None:
    tensors = zoo()
    anything = itertools.product(tensors, tensors, [None, *tensors])
    fitting = (
        (x, w, b)
        for x, w, b in itertools.product(tensors, tensors, [None, *tensors])
        if x.dim() > 0 and w.dim() == 2 and x.shape[-1] == w.shape[1] and x.dtype == w.dtype
    )
    for x, w, b in sample(anything, 500) + sample(fitting, 700):
        what = ", ".join("None" if t is None else f"{t.dtype} {t.shape}" for t in (x, w, b))
        assert_same_outcome(outcome(ours, x, w, b), outcome(torchs, x, w, b), what)


def test_any_tensor_through_sigmoid_and_its_gradient() -> None:
    tensors = zoo()
    for x in tensors:
        both(functional.sigmoid, torch.sigmoid, x, what=f"{x.dtype, x.shape}")
    for dy, y in sample(itertools.product(tensors, tensors), 500):
        result = outcome(ops.sigmoid_backward, dy, y)
        assert isinstance(result, (Tensor, RuntimeError)), f"{dy.shape, y.shape}: {result!r}"
        if isinstance(result, Tensor) and dy.shape == y.shape and dy.dtype == y.dtype:
            assert result.shape == y.shape


def test_backward_operations_refuse_what_does_not_fit() -> None:
    tensors = zoo()
    choices = itertools.product(tensors, [None, *tensors], [None, *tensors])
    masks = list(itertools.product([False, True], repeat=3))
    for dy, x, w in sample(choices, 1000):
        mask = sample(masks, 1)[0]
        result = outcome(ops.linear_backward, dy, x, w, mask)
        assert isinstance(result, (tuple, RuntimeError)), repr(result)
        if isinstance(result, RuntimeError):
            continue
        assert [g is not None for g in result] == list(mask)
        if {(t.dtype, t.layout) for t in (dy, x, w) if t is not None} == {
            (torch.float32, torch.strided)
        }:
            for wanted, grad, of in zip(mask[:2], result[:2], (w, x), strict=True):
                assert not wanted or grad.shape[-1] == of.shape[-1]


# ---- messages


def message_of(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        function(*args)
    return str(raised.value)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["linear", "linear_sigmoid"])
def test_messages_name_the_argument_what_came_and_what_was_expected(name: str, grad: bool) -> None:
    layer = getattr(functional, name)

    def message(x: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...] | None = None) -> str:
        return message_of(
            layer,
            torch.randn(x, requires_grad=grad),
            torch.randn(w),
            None if b is None else torch.randn(b),
        )

    turned = message((1, 5), (5, 1))
    for part in (f"{name}:", "input has shape (1, 5)", "5 features", "weight has shape (5, 1)"):
        assert part in turned
    for part in ("in_features = 1", "(out_features, in_features)", "weight.T"):
        assert part in turned
    assert "weight.T" not in message((1, 5), (4, 3))

    apart = message((2, 5), (4, 3))
    for part in ("input has shape (2, 5)", "weight has shape (4, 3)", "in_features = 3"):
        assert part in apart
    assert re.search(r"input has shape \(\), expected \(\*, in_features\)", message((), (4, 3)))
    assert "weight is float32 of shape (2, 4, 3)" in message((2, 3), (2, 4, 3))
    for bias in ((3,), (2, 3), (5,), (1, 2)):
        wrong = message((2, 3), (4, 3), bias)
        shape = "(" + ", ".join(map(str, bias)) + ("," if len(bias) == 1 else "") + ")"
        assert re.search(rf"bias (has|is float32 of) shape {re.escape(shape)}", wrong)
        assert re.search(r"expected \(4,\)|expanded size of the tensor \(4\)", wrong)


def test_messages_about_dtypes_and_devices() -> None:
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    for name in ("linear", "linear_sigmoid"):
        layer = getattr(functional, name)
        mixed = message_of(layer, x, w.double(), b)
        for part in (name, "input is float32", "weight is float64", "bias is float32"):
            assert part in mixed
        assert "bias is float16" in message_of(layer, x, w, b.half())
    mixed = message_of(functional.mlp, x, [w, torch.randn(2, 4).double()], [b, None])
    assert "float32" in mixed
    assert "float64" in mixed


def test_messages_of_mlp_name_the_layer() -> None:
    x, w, v = torch.randn(2, 3), torch.randn(4, 3), torch.randn(5, 4)
    mlp = functional.mlp
    with pytest.raises(ValueError, match="weights is empty"):
        mlp(x, [])
    with pytest.raises(ValueError, match="biases has 1 entries, expected 2"):
        mlp(x, [w, v], [None])
    with pytest.raises(ValueError, match="biases has 3 entries, expected 2"):
        mlp(x, [w, v], [None, None, None])
    with pytest.raises(ValueError, match="output_activation is 'relu', expected None or 'sigmoid'"):
        mlp(x, [w, v], None, "relu")
    with pytest.raises(ValueError, match="output_activation is ''"):
        mlp(x, [w, v], None, "")
    with pytest.raises(RuntimeError, match=r"layer 0: input has shape \(2, 4\).*\(4, 3\)"):
        mlp(torch.randn(2, 4), [w, v])
    with pytest.raises(
        RuntimeError, match=r"layer 1: weight has shape \(4, 5\).*layer 0.*\(4, 3\)"
    ):
        mlp(x, [w, v.T])
    with pytest.raises(RuntimeError, match=r"layer 1: bias has shape \(4,\), expected \(5,\)"):
        mlp(x, [w, v], [None, torch.randn(4)])
    for grad in (False, True):
        with pytest.raises(RuntimeError, match=r"layer 0: bias has shape \(3,\), expected \(4,\)"):
            mlp(x, [w.clone().requires_grad_(grad), v], [torch.randn(3), None])


NOT_TENSORS: list[Any] = [
    "features",
    None,
    3,
    2.5,
    [1.0, 2.0, 3.0],
    np.ones((2, 3), np.float32),
    {},
]


@pytest.mark.parametrize("wrong", NOT_TENSORS, ids=repr)
def test_arguments_that_are_no_tensors(wrong: Any) -> None:
    """The error names the argument and what came in its place."""
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    kind = "None" if wrong is None else type(wrong).__name__
    for layer in (functional.linear, functional.linear_sigmoid):
        assert re.search(rf"input.*{kind}", message_of(layer, wrong, w), re.S)
        assert re.search(rf"weight.*{kind}", message_of(layer, x, wrong), re.S)
        if wrong is not None:
            assert re.search(rf"bias.*{kind}", message_of(layer, x, w, wrong), re.S)
    assert re.search(rf"input.*{kind}", message_of(functional.sigmoid, wrong), re.S)
    assert re.search(rf"input.*{kind}", message_of(functional.mlp, wrong, [w]), re.S)
    assert re.search(r"weights", message_of(functional.mlp, x, [wrong]), re.S)
    if wrong is not None:
        assert re.search(r"biases", message_of(functional.mlp, x, [w], [wrong]), re.S)
        assert re.search(
            r"output_activation", message_of(functional.mlp, x, [w], None, wrong), re.S
        )


@pytest.mark.parametrize("wrong", [None, 3, "weights"], ids=repr)
def test_lists_that_are_no_lists(wrong: Any) -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    assert message_of(functional.mlp, x, wrong)
    if wrong is not None:
        assert message_of(functional.mlp, x, [w], wrong)


def test_the_number_of_arguments() -> None:
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    for call in (
        lambda: functional.linear(x),
        lambda: functional.linear(x, w, b, b),
        lambda: functional.sigmoid(),
        lambda: functional.sigmoid(x, x),
        lambda: functional.mlp(x),
        lambda: functional.linear(x, w, wrong=b),
    ):
        with pytest.raises(TypeError):
            call()
    torch.testing.assert_close(functional.linear(bias=b, weight=w, input=x), F.linear(x, w, b))


# ---- modules


@pytest.mark.parametrize("module", [neuron_ext.Linear, neuron_ext.LinearSigmoid])
def test_module_arguments_as_torch(module: type[torch.nn.Linear]) -> None:
    for args in (("3", 2), (-1, 2), (2, None), (2.5, 2), (), (2,)):
        mine, theirs = outcome(module, *args), outcome(torch.nn.Linear, *args)
        assert type(mine) is type(theirs), args
    for kwargs in ({"dtype": torch.int64}, {"device": "nowhere"}, {"bias": None}, {"wrong": 1}):
        mine = outcome(module, 3, 2, **kwargs)
        theirs = outcome(torch.nn.Linear, 3, 2, **kwargs)
        assert isinstance(theirs, Exception) == isinstance(mine, Exception), kwargs
        if isinstance(theirs, Exception):
            assert type(mine) is type(theirs), kwargs


def test_arguments_of_mlp() -> None:
    with pytest.raises(ValueError, match="features has 1 widths, expected at least 2"):
        neuron_ext.MLP([3])
    with pytest.raises(ValueError, match="features has 0 widths"):
        neuron_ext.MLP([])
    with pytest.raises(ValueError, match="output_activation is 'relu', expected None or 'sigmoid'"):
        neuron_ext.MLP([3, 2], output_activation="relu")
    for wrong in ("ab", [3, "2"], 3, None, [3, None]):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            neuron_ext.MLP(wrong)


@pytest.mark.parametrize("wrong", ["x", None, [1.0], np.ones((2, 3), np.float32)], ids=repr)
def test_modules_called_with_no_tensor(wrong: Any) -> None:
    kind = "None" if wrong is None else type(wrong).__name__
    for module in (
        neuron_ext.Linear(3, 2),
        neuron_ext.Sigmoid(),
        neuron_ext.LinearSigmoid(3, 2),
        neuron_ext.MLP([3, 2, 1]),
    ):
        assert re.search(rf"input.*{kind}", message_of(module, wrong), re.S)


def test_modules_called_with_the_wrong_shape() -> None:
    for module in (
        neuron_ext.Linear(3, 2),
        neuron_ext.LinearSigmoid(3, 2),
        neuron_ext.MLP([3, 2, 1]),
    ):
        assert re.search(
            r"input has shape \(2, 5\).*\(2, 3\)", message_of(module, torch.ones(2, 5))
        )
        assert "float64" in message_of(module, torch.ones(2, 3, dtype=torch.float64))


def test_an_error_leaves_the_next_call_alone() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    expected = F.linear(x, w)
    for _ in range(3):
        message_of(functional.linear, x, w.T)
        message_of(functional.mlp, x, [w, w])
        torch.testing.assert_close(functional.linear(x, w), expected)
