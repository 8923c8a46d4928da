"""The functions as objects: what calls them or looks at them finds a Python function's ways."""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
import pydoc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neuron_ext import _C, functional

Function = Callable[..., Any]
NAMES = ("linear", "sigmoid", "linear_sigmoid", "mlp")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def function(name: str) -> Function:
    found: Function = getattr(functional, name)
    return found


@pytest.fixture
def python(function: Function) -> Function:
    found: Function = inspect.unwrap(function)
    return found


def arguments(name: str) -> dict[str, Any]:
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    if name == "sigmoid":
        return {"input": x}
    if name == "mlp":
        return {"input": x, "weights": [w], "biases": [b], "output_activation": "sigmoid"}
    return {"input": x, "weight": w, "bias": b}


def test_what_it_says_of_itself(name: str, function: Function, python: Function) -> None:
    assert inspect.isfunction(python)
    assert inspect.isroutine(function)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(function, attribute) == getattr(python, attribute)
    assert f"{function.__module__}.{function.__qualname__}" == f"neuron_ext.functional.{name}"
    assert inspect.signature(function) == inspect.signature(python)
    assert repr(function) == repr(python)
    for described in (function, functional):
        text = pydoc.plain(pydoc.render_doc(described))
        assert f"{name}(" in text
        assert (inspect.getdoc(python) or "").splitlines()[0] in text


def test_it_is_its_own_copy(function: Function) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(function, protocol)) is function
    assert copy.copy(function) is function
    assert copy.deepcopy(function) is function
    assert weakref.ref(function)() is function


def test_every_way_to_call_it(name: str, function: Function, python: Function) -> None:
    named = arguments(name)
    args = list(named.values())
    expected = python(*args)
    for output in (
        function(*args),
        function(**named),
        function(*args[:1], **dict(list(named.items())[1:])),
        operator.methodcaller("__call__", *args)(function),
        partial(function, *args)(),
        next(map(function, *([arg] for arg in args))),
        type("Class", (), {"method": function})().method.__func__(*args),
    ):
        assert torch.equal(output, expected)


def test_wrong_arguments(function: Function, python: Function) -> None:
    x = torch.randn(2, 3)
    calls: tuple[Callable[[Function], Any], ...] = (
        lambda f: f(),
        lambda f: f(*[x] * 7),
        lambda f: f(x, inputs=x),
        lambda f: f(x, input=x),
    )
    for call in calls:
        messages = []
        for f in (function, python):
            with pytest.raises(TypeError) as error:
                call(f)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


class Holder(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_trace_it(name: str, function: Function) -> None:
    """Given to torch.compile, met in what is compiled, or held by a module."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    named = arguments(name)
    args = list(named.values())
    calls: tuple[Function, ...] = (
        function,
        lambda *args: partial(function, *args)(),
        lambda *args: function(**dict(zip(named, args, strict=True))),
        Holder(function),
    )
    for call in calls:
        graphs.clear()
        output = torch.compile(call, fullgraph=True, backend=backend)(*args)
        assert torch.equal(output, function(*args))
        targets = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
        assert targets == [getattr(torch.ops.neuron_ext, name).default]


def test_symbolic_tracing_sees_torchs_functions() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w: functional.linear_sigmoid(x, w)).graph
    targets = [n.target for n in graph.nodes if n.op == "call_function"]
    assert targets == [F.linear, torch.sigmoid]


def test_its_type_is_made_once() -> None:
    """With what compilers trace as __call__, which nothing can change."""
    kind: Any = type(functional.linear)
    assert _C.function_type(print) is kind
    assert inspect.isfunction(inspect.getattr_static(kind, "__call__"))
    with pytest.raises(TypeError):
        type.__setattr__(kind, "__call__", print)
