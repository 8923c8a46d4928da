"""What is timed: the same work said in our words and in torch's, on the same random data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuron_ext
from benchmarks import machine
from benchmarks.ceilings import Work
from neuron_ext import functional

Function = Callable[..., Any]  # an operation or a module
Call = Callable[[], Any]  # what is timed

_MOST_COPIES = 1 << 30  # bytes of weights that must not be in a cache


@dataclass(frozen=True)
class Problem:
    """Two functions that compute the same; ``bind`` makes either a timed call.

    Where a compiler may take the weights for constants, ``constant`` is a module that holds them,
    and ``bind_constant`` makes it, or what it was compiled to, a timed call.
    """

    ours: Function
    torch: Function
    bind: Callable[[Function], Call]
    grad: bool = False  # whether autograd is on
    constant: nn.Module | None = None
    bind_constant: Callable[[Function], Call] | None = None


@dataclass(frozen=True)
class Case:
    """A line of the benchmark for each dtype and number of threads.

    ``name`` is family/shape/direction.
    """

    name: str
    build: Callable[[torch.dtype], Problem]
    work: Work
    quick: bool = False
    on_demand: bool = False

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    @property
    def direction(self) -> str:
        return self.name.rpartition("/")[2]


def all_cases() -> list[Case]:
    """In the order in which they run."""
    return [
        *_neuron(),
        *_network(),
        *_square(64, 128, 256, 512, 1024, 2048),
        *_square(4096, on_demand=True),
        *_layer((128, 784, 512), (4096, 1024, 1024), (2048, 4096, 4096)),
        *_skinny(1024, 4096),
        *_narrow(),
        *_strided(),
        *_sigmoid(),
        *_training(),
    ]


def gpu_cases() -> list[Case]:
    """The same kinds of work in sizes that occupy a GPU, and small ones as CUDA graphs too."""
    small = [*_neuron(), *_network(), *_square(64, 128, 256)]
    return [
        *(variant for case in small for variant in (case, _graphed(case))),
        *_square(512, 1024, 2048, 4096, 6144, 8192),
        *_layer((8192, 256, 4096), (8192, 512, 4096), (8192, 1024, 8192), (4096, 4096, 1024)),
        *_skinny(4096, 8192),
        *_narrow(),
        *_strided(),
        *_sigmoid(),
        *_long_batches(),
        *_training(),
    ]


def _graphed(case: Case) -> Case:
    """The case with its calls captured in CUDA graphs."""

    def build(dtype: torch.dtype) -> Problem:
        problem = case.build(dtype)

        def bind(f: Function) -> Call:
            call = problem.bind(f)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()

            def replay() -> object:
                graph.replay()
                return result

            return replay

        return Problem(problem.ours, problem.torch, bind, problem.grad)

    return Case(f"{case.name}, graph", build, case.work, case.quick, case.on_demand)


# ---- one neuron, and the 4-5-7-3 network: what a call costs


def _neuron() -> Iterator[Case]:
    def functions(k: int, n: int, dtype: torch.dtype) -> Problem:
        return _forward(functional.linear_sigmoid, _torch_layer, *_tensors(1, k, n, dtype))

    def gradients(dtype: torch.dtype) -> Problem:
        tensors = [t.requires_grad_() for t in _tensors(1, 5, 1, dtype)]
        return _forward_backward(
            functional.linear_sigmoid, _torch_layer, tensors, wanted=lambda f: tensors
        )

    def modules(dtype: torch.dtype, grad: bool) -> Problem:
        theirs = nn.Sequential(nn.Linear(5, 1, dtype=dtype), nn.Sigmoid())
        ours = neuron_ext.LinearSigmoid(5, 1, dtype=dtype)
        ours.load_state_dict(theirs[0].state_dict())
        return _forward(ours, theirs, torch.randn(1, 5, dtype=dtype), grad=grad)

    yield Case("neuron/1x5-1/forward", partial(functions, 5, 1), _layer_work(1, 5, 1), quick=True)
    yield Case("neuron/1x3-2/forward", partial(functions, 3, 2), _layer_work(1, 3, 2))
    yield Case("neuron/1x5-1/module", partial(modules, grad=True), _layer_work(1, 5, 1), quick=True)
    yield Case("neuron/1x5-1/module, no grad", partial(modules, grad=False), _layer_work(1, 5, 1))
    yield Case("neuron/1x5-1/forward+backward", gradients, _layer_work(1, 5, 1, products=3))


def _stack(family: str, features: Sequence[int], batch: int, quick: bool) -> Iterator[Case]:
    """The outputs of a network, and the gradients of its parameters."""

    def build(grad: bool, dtype: torch.dtype) -> Problem:
        ours, theirs = _stacks(features, dtype)
        input = torch.randn(batch, features[0], dtype=dtype)
        if not grad:
            return _forward(ours, theirs, input)
        return _forward_backward(ours, theirs, [input], wanted=_parameters)

    name = f"{family}/{batch}x{'-'.join(map(str, features))}"
    yield Case(f"{name}/forward", partial(build, False), _stack_work(features, batch, 1), quick)
    work = _stack_work(features, batch, products=3)
    yield Case(f"{name}/forward+backward", partial(build, True), work, quick)


def _network() -> Iterator[Case]:
    for batch in (1, 32):
        yield from _stack("network", (4, 5, 7, 3), batch, quick=True)


def _long_batches() -> Iterator[Case]:
    for width, exponent in itertools.product((64, 128), (14, 17, 20)):
        yield from _stack("stack", (width,) * 5, 2**exponent, quick=exponent == 17)


# ---- layers: what a matrix product costs


def _square(*sizes: int, on_demand: bool = False) -> Iterator[Case]:
    for size in sizes:
        quick = size in (256, 512, 1024)
        yield from _layer_cases(f"square/{size}", (size, size, size), quick, on_demand)


def _layer(*shapes: tuple[int, int, int]) -> Iterator[Case]:
    for m, k, n in shapes:
        yield from _layer_cases(f"layer/{m}x{k}-{n}", (m, k, n), quick=m == 128)


def _narrow() -> Iterator[Case]:
    """Long batches of layers with one or two neurons."""
    for m, k, n in ((100_000, 64, 1), (1_000_000, 3, 2)):
        yield from _layer_cases(f"narrow/{m}x{k}-{n}", (m, k, n), quick=True)


def _layer_cases(
    name: str, shape: tuple[int, int, int], quick: bool = False, on_demand: bool = False
) -> Iterator[Case]:
    def forward(dtype: torch.dtype) -> Problem:
        return _constant_layer(*_tensors(*shape, dtype))

    def backward(dtype: torch.dtype) -> Problem:
        return _backward(functional.linear_sigmoid, _torch_layer, *_tensors(*shape, dtype))

    m, _, n = shape
    yield Case(f"{name}/forward", forward, _layer_work(*shape), quick, on_demand)
    work = _layer_work(*shape, products=2, extra_read=m * n)  # y beside dy
    yield Case(f"{name}/backward", backward, work, quick, on_demand)


def _skinny(*sizes: int) -> Iterator[Case]:
    """Few rows, and weights that come from memory: each call takes the next of many copies."""

    def build(m: int, size: int, dtype: torch.dtype) -> Problem:
        input, weight, bias = _tensors(m, size, size, dtype)
        cold = min(4 * machine.last_level_cache(), _MOST_COPIES)
        count = max(2, -(-cold // (weight.numel() * dtype.itemsize)))
        copies = list(weight.expand(count, size, size).contiguous())

        def bind(f: Function) -> Call:
            following = itertools.cycle(copies)
            return lambda: f(input, next(following), bias)

        return Problem(functional.linear_sigmoid, _torch_layer, bind)

    for size in sizes:
        for m in (1, 2, 4, 8, 16):
            yield Case(
                f"skinny/{m}x{size}-{size}/forward",
                partial(build, m, size),
                _layer_work(m, size, size, cold=True),
                quick=size == 4096 and m in (1, 8),
            )


def _strided() -> Iterator[Case]:
    """512 cubed with operands that aren't contiguous matrices."""
    size = 512

    def forward(change: Callable[[Tensor], Tensor], which: int, dtype: torch.dtype) -> Problem:
        tensors = list(_tensors(size, size, size, dtype))
        tensors[which] = change(tensors[which])
        return _forward(functional.linear_sigmoid, _torch_layer, *tensors)

    def backward(grad: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Problem:
        tensors = _tensors(size, size, size, dtype)
        return _backward(functional.linear_sigmoid, _torch_layer, *tensors, change=grad)

    def transposed(t: Tensor) -> Tensor:
        return t.T.contiguous().T

    def sliced(t: Tensor) -> Tensor:
        return t.new_empty(len(t), t.shape[1] + 24)[:, 8:-16].copy_(t)

    def stepped(t: Tensor) -> Tensor:
        return t.new_empty(len(t), 2 * t.shape[1])[:, ::2].copy_(t)

    def expanded(t: Tensor) -> Tensor:
        return t[:1, :1].expand_as(t)

    work = _layer_work(size, size, size)
    for what, change in (
        ("transposed", transposed),
        ("sliced", sliced),
        ("stepped", stepped),
    ):
        for which, operand in enumerate(("input", "weight")):
            build = partial(forward, change, which)
            yield Case(f"strided/{operand}, {what}/forward", build, work)
    work = _layer_work(size, size, size, products=2, extra_read=size * size)
    for what, change in (("transposed", transposed), ("one value", expanded)):
        yield Case(f"strided/gradient, {what}/backward", partial(backward, change), work)


# ---- sigmoid alone, and everything together


def _sigmoid() -> Iterator[Case]:
    def forward(count: int, dtype: torch.dtype) -> Problem:
        return _forward(functional.sigmoid, torch.sigmoid, torch.randn(count, dtype=dtype))

    def backward(count: int, dtype: torch.dtype) -> Problem:
        return _backward(functional.sigmoid, torch.sigmoid, torch.randn(count, dtype=dtype))

    for exponent in range(3, 9):
        count = 10**exponent
        name = f"sigmoid/1e{exponent}"
        quick = exponent in (4, 7)
        yield Case(f"{name}/forward", partial(forward, count), Work(0, count, count, count), quick)
        work = Work(0, 2 * count, count, count)
        yield Case(f"{name}/backward", partial(backward, count), work, quick)


def _training() -> Iterator[Case]:
    """Whole steps: zero_grad, mean squared error, backward, SGD."""

    def build(features: Sequence[int], batch: int, dtype: torch.dtype) -> Problem:
        ours, theirs = _stacks(features, dtype)
        input = torch.randn(batch, features[0], dtype=dtype)
        target = torch.rand(batch, features[-1], dtype=dtype)

        def bind(model: Function) -> Call:
            optimizer = torch.optim.SGD(_parameters(model), lr=0.01)

            def step() -> Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(model(input), target)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                return loss.detach()

            return step

        return Problem(ours, theirs, bind, grad=True)

    for features, batch in (
        ((784, 128, 64, 10), 64),
        ((784, 512, 256, 10), 1024),
        ((512, 512, 256, 1), 2048),
        ((1024, 1024, 1024, 1024), 1024),
    ):
        yield Case(
            f"training/{batch}x{'-'.join(map(str, features))}/step",
            partial(build, features, batch),
            _stack_work(features, batch, products=3),
            quick=batch == 64,
        )


# ---- the functions in torch's words


def _torch_layer(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(input, weight, bias))


def _stacks(features: Sequence[int], dtype: torch.dtype) -> tuple[neuron_ext.MLP, nn.Sequential]:
    """The same sigmoid network twice, with the same parameters."""
    children: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(features):
        children += [nn.Linear(in_features, out_features, dtype=dtype), nn.Sigmoid()]
    theirs = nn.Sequential(*children[:-1])
    ours = neuron_ext.MLP(features, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


# ---- random data, and the least that must be done with it


def _tensors(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias. Weights as torch initialises them, so that no sigmoid saturates."""
    bound = k**-0.5
    return (
        torch.randn(m, k, dtype=dtype),
        torch.empty(n, k, dtype=dtype).uniform_(-bound, bound),
        torch.empty(n, dtype=dtype).uniform_(-bound, bound),
    )


def _layer_work(
    m: int, k: int, n: int, products: int = 1, extra_read: int = 0, cold: bool = False
) -> Work:
    """``products`` is 1 for the output, 2 for both gradients, 3 for all of them."""
    operands, result = m * k + k * n + n, m * n
    if products == 2:
        largest = max(m * k, k * n)
        return Work(4 * m * n * k, operands + result + extra_read, operands, largest)
    return Work(2 * products * m * n * k, operands + extra_read, result, result, cold)


def _stack_work(features: Sequence[int], batch: int, products: int) -> Work:
    """With ``products`` 3 the parameters' gradients too; the input wants none."""
    sizes = [a * b for a, b in itertools.pairwise(features)]
    flops = 2 * batch * (products * sum(sizes) - (sizes[0] if products == 3 else 0))
    read = batch * features[0] + sum(sizes)
    return Work(flops, read, batch * features[-1] if products == 1 else sum(sizes))


def _gradient_like(output: Tensor) -> Tensor:
    """Positive: sums over a long batch that cancel could not be compared with torch's."""
    return torch.rand_like(output, requires_grad=False)


# ---- from functions to timed calls


def _forward(ours: Function, theirs: Function, *args: Tensor, grad: bool = False) -> Problem:
    return Problem(ours, theirs, lambda f: partial(f, *args), grad)


class _ConstantLayer(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        return _torch_layer(input, self.weight, self.bias)


def _constant_layer(input: Tensor, weight: Tensor, bias: Tensor) -> Problem:
    return Problem(
        functional.linear_sigmoid,
        _torch_layer,
        bind=lambda f: partial(f, input, weight, bias),
        constant=_ConstantLayer(weight, bias),
        bind_constant=lambda f: partial(f, input),
    )


def _backward(
    ours: Function,
    theirs: Function,
    *args: Tensor,
    change: Callable[[Tensor], Tensor] = lambda t: t,
) -> Problem:
    """The gradients of all arguments, again and again from a graph that is built once.

    ``change`` makes the gradient of the output what it should be in memory.
    """
    leaves = [arg.requires_grad_() for arg in args]
    grad_output = change(_gradient_like(theirs(*args)))

    def bind(f: Function) -> Call:
        return partial(torch.autograd.grad, f(*leaves), leaves, grad_output, retain_graph=True)

    return Problem(ours, theirs, bind, grad=True)


def _forward_backward(
    ours: Function,
    theirs: Function,
    args: Sequence[Tensor],
    wanted: Callable[[Function], Sequence[Tensor]],
) -> Problem:
    """The output and the gradients of what is ``wanted`` of a function, a new graph each time."""
    grad_output = _gradient_like(theirs(*args))

    def bind(f: Function) -> Call:
        inputs = wanted(f)
        return lambda: torch.autograd.grad(f(*args), inputs, grad_output)

    return Problem(ours, theirs, bind, grad=True)


def _parameters(module: Function) -> list[Tensor]:
    assert isinstance(module, nn.Module)
    return list(module.parameters())
