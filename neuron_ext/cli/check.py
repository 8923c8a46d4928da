"""``python -m neuron_ext check``: does this installation compute what torch computes?"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import neuron_ext
from neuron_ext import backends, functional
from neuron_ext.cli import machine
from neuron_ext.cli.bounds import Layer, layer_bounds

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FAILURES_SHOWN = 20

_Compute = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], Tensor]


@dataclass(frozen=True)
class _Op:
    """An op of ours and of torch's as functions of the input, the weights and the biases."""

    name: str
    ours: _Compute
    torch: _Compute
    hidden: tuple[int, ...] | None  # widths between input and output; None: the op has no weights
    ends_in_sigmoid: bool


def _torch_mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.sigmoid(F.linear(x, weight, bias))
    return F.linear(x, weights[-1], biases[-1])


_LINEAR = _Op(
    "linear",
    lambda x, w, b: functional.linear(x, w[0], b[0]),
    lambda x, w, b: F.linear(x, w[0], b[0]),
    hidden=(),
    ends_in_sigmoid=False,
)
_OPS = (
    _LINEAR,
    _Op(
        "sigmoid",
        lambda x, w, b: functional.sigmoid(x),
        lambda x, w, b: torch.sigmoid(x),
        hidden=None,
        ends_in_sigmoid=True,
    ),
    _Op(
        "linear_sigmoid",
        lambda x, w, b: functional.linear_sigmoid(x, w[0], b[0]),
        lambda x, w, b: torch.sigmoid(F.linear(x, w[0], b[0])),
        hidden=(),
        ends_in_sigmoid=True,
    ),
    _Op(
        "mlp",
        lambda x, w, b: functional.mlp(x, w, b),
        _torch_mlp,
        hidden=(12, 7),
        ends_in_sigmoid=False,
    ),
)


@dataclass(frozen=True)
class _Case:
    """Shapes and strides of one comparison."""

    name: str
    input: tuple[int, ...]
    out_features: int
    bias: bool = True
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"


_CASES = (
    _Case("one neuron", (1, 5), 1),
    _Case("a vector", (5,), 3),
    _Case("odd sizes", (13, 37), 29),
    _Case("many rows", (131, 33), 17),
    _Case("long sums", (5, 1030), 9),
    _Case("a matrix engine's tiles", (70, 100), 75),
    _Case("no bias", (17, 9), 33, bias=False),
    _Case("batched", (2, 3, 7), 5),
    _Case("empty batch", (0, 7), 5),
    _Case("no features", (4, 0), 3),
    _Case("weights kept (in, out)", (6, 19), 21, weight_layout="transposed"),
    _Case("sliced", (20, 12), 6, True, "sliced", "sliced", "transposed"),
    _Case("expanded", (9, 11), 8, True, "expanded", "contiguous", "expanded"),
)


@dataclass(frozen=True)
class _Arguments:
    """The tensors of one comparison, leaves of autograd but for the gradient of the output."""

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    grad_output: Tensor

    def leaves(self) -> list[Tensor]:
        """The input, then each layer's weight and bias if any."""
        layers = zip(self.weights, self.biases, strict=True)
        return [self.input, *(tensor for layer in layers for tensor in layer if tensor is not None)]

    def result_names(self) -> list[str]:
        """What ``_results`` returns, in words."""
        parameters = [
            f"gradient of layer {layer}'s {name}"
            for layer, bias in enumerate(self.biases)
            for name in (("weight",) if bias is None else ("weight", "bias"))
        ]
        return ["output", "gradient of the input", *parameters]

    def double(self) -> _Arguments:
        """The same numbers in float64."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().double().requires_grad_()

        return _Arguments(
            leaf(self.input),
            [leaf(weight) for weight in self.weights],
            [None if bias is None else leaf(bias) for bias in self.biases],
            self.grad_output.double(),
        )


def run() -> int:
    """Runs the self-test and returns 0, or 1 if anything is wrong."""
    start = time.perf_counter()
    isas = backends.supported_cpu_isas()
    failures: list[str] = []
    print(f"neuron_ext {neuron_ext.__version__}, torch {torch.__version__}, {machine.cpu_name()}")
    print(
        "\nLargest error of output and gradients against torch in float64, in units of the most\n"
        "that rounding can cause: ours must be at most 1. Each op's last line is torch's own, in\n"
        f"the same dtype. {len(_CASES)} shapes and layouts: batched, empty, sliced, expanded, ...\n"
    )
    columns = "".join(f"{_name(dtype):>10}" for dtype in _DTYPES)
    print(f"  {'op':<16}{'kernels':<12}{columns}")
    ran: set[str] = set()
    for op in _OPS:
        _print_parity(op, isas, failures, ran)
    print(f"\n  kernels that ran: {', '.join(sorted(ran)) or 'none'}")
    if not ran:
        failures.append("no kernel of this build ran: torch computed everything")

    groups = {
        "sums of small integers, every tile edge": _exact_sums,
        "inf and nan stay where they belong": _special_values,
        "second derivatives": _second_derivatives,
        "the notebooks' 0.1595, -1.6619, 0.3171": _notebook_numbers,
    }
    print(f"\n  {'':<44}{''.join(f'{isa:>13}' for isa in isas)}")
    for title, group in groups.items():
        cells = []
        for isa in isas:
            with backends.use_cpu_isa(isa):
                wrong = group()
            failures += [f"{title}, {isa}: {what}" for what in wrong]
            cells.append("WRONG" if wrong else "correct")
        print(f"  {title:<44}{''.join(f'{cell:>13}' for cell in cells)}", flush=True)

    seconds = time.perf_counter() - start
    if failures:
        print(f"\nWRONG ({seconds:.1f} s):")
        for failure in failures[:_FAILURES_SHOWN]:
            print(f"  {failure}")
        if len(failures) > _FAILURES_SHOWN:
            print(f"  and {len(failures) - _FAILURES_SHOWN} more")
        return 1
    print(f"\nEverything is correct ({seconds:.1f} s).")
    return 0


def _print_parity(op: _Op, isas: Sequence[str], failures: list[str], ran: set[str]) -> None:
    """Prints an op's lines of the table: one for each instruction set, and torch's.

    Adds to ``failures`` what is wrong, and to ``ran`` the kernels used.
    """
    worst = {row: dict.fromkeys(_DTYPES, 0.0) for row in (*isas, "torch")}
    for dtype, case in itertools.product(_DTYPES, _CASES):
        arguments = _arguments(op, case, dtype)
        exact = arguments.double()
        reference = _results(op.torch, exact)
        bounds = _bounds(op, exact, dtype)
        torch_results = _results(op.torch, arguments)
        torch_errors = _in_bounds(torch_results, reference, bounds)
        worst["torch"][dtype] = max(worst["torch"][dtype], *torch_errors)
        for isa in isas:
            with backends.use_cpu_isa(isa):
                results = _results(op.ours, arguments)
                ran.update(filter(None, [backends.last_kernel()]))
            errors = _in_bounds(results, reference, bounds)
            worst[isa][dtype] = max(worst[isa][dtype], *errors)
            where = f"{op.name}, {isa}, {_name(dtype)}, {case.name}"
            for what, result, expected, error in zip(
                arguments.result_names(), results, torch_results, errors, strict=True
            ):
                if not error <= 1:
                    failures.append(f"{where}: {what} is wrong by {error:.3g} times the bound")
                if _form(result) != _form(expected):
                    failures.append(
                        f"{where}: {what} is {_form(result)}, torch's is {_form(expected)}"
                    )
            if _strides(results[0]) != _strides(torch_results[0]):
                failures.append(
                    f"{where}: strides {results[0].stride()}, torch's {torch_results[0].stride()}"
                )
    for row, errors_of in worst.items():
        cells = "".join(f"{errors_of[dtype]:>10.2f}" for dtype in _DTYPES)
        name = op.name if row == isas[0] else ""
        wrong = row != "torch" and not max(errors_of.values()) <= 1
        print(f"  {name:<16}{row:<12}{cells}{'  WRONG' if wrong else ''}", flush=True)


def _arguments(op: _Op, case: _Case, dtype: torch.dtype) -> _Arguments:
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def leaf(tensor: Tensor, layout: str = "contiguous") -> Tensor:
        return _lay_out(tensor.to(dtype), layout).requires_grad_()

    if op.hidden is None:
        grad = _lay_out(normal(*case.input).to(dtype), case.grad_layout)
        return _Arguments(leaf(8 * normal(*case.input), case.input_layout), [], [], grad)
    widths = (case.input[-1], *op.hidden, case.out_features)
    return _Arguments(
        leaf(normal(*case.input), case.input_layout),
        [leaf(normal(n, k), case.weight_layout) for k, n in itertools.pairwise(widths)],
        [leaf(normal(n)) if case.bias else None for n in widths[1:]],
        _lay_out(normal(*case.input[:-1], case.out_features).to(dtype), case.grad_layout),
    )


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The tensor over other strides; "expanded" repeats its first row."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


def _results(compute: _Compute, arguments: _Arguments) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    output = compute(arguments.input, arguments.weights, arguments.biases)
    gradients = torch.autograd.grad(output, arguments.leaves(), arguments.grad_output)
    return [output.detach(), *gradients]


def _bounds(op: _Op, exact: _Arguments, dtype: torch.dtype) -> list[Tensor]:
    """Bounds for the tensors of ``_results``, each of its tensor's shape or that of a matrix."""
    layers = [Layer(None, None, sigmoid=True)]
    if op.hidden is not None:
        depth = len(exact.weights)
        layers = [
            Layer(weight.detach(), None if bias is None else bias.detach(), sigmoid)
            for weight, bias, sigmoid in zip(
                exact.weights,
                exact.biases,
                [True] * (depth - 1) + [op.ends_in_sigmoid],
                strict=True,
            )
        ]
    return layer_bounds(
        _as_matrix(exact.input.detach()), layers, _as_matrix(exact.grad_output), dtype
    )


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _in_bounds(
    results: Sequence[Tensor], reference: Sequence[Tensor], bounds: Sequence[Tensor]
) -> list[float]:
    """The largest error of each result in units of its bound; infinite for a nan."""
    largest = []
    for result, expected, bound in zip(results, reference, bounds, strict=True):
        errors = (result.double() - expected).abs() / bound.reshape(expected.shape)
        largest.append(errors.nan_to_num(nan=torch.inf).max().item() if errors.numel() else 0.0)
    return largest


def _form(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {tuple(tensor.shape)}"


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact_sums() -> list[str]:
    """linear and its gradients on numbers whose sums are exact in every dtype.

    Any difference is then a wrong index, not rounding; the sizes lie on both sides of tiles' edges.
    """
    random = torch.Generator().manual_seed(7)
    wrong = []
    for dtype in _DTYPES:
        for m, n, k in itertools.product((1, 2, 7, 16, 33, 65), repeat=3):
            x, w, b, dy = (
                torch.randint(-1, 2, shape, generator=random).to(dtype)
                for shape in ((m, k), (n, k), (n,), (m, n))
            )
            arguments = _Arguments(
                x.requires_grad_(), [w.requires_grad_()], [b.requires_grad_()], dy
            )
            results = _results(_LINEAR.ours, arguments)
            expected = _results(_LINEAR.torch, arguments.double())
            if not all(torch.equal(r.double(), e) for r, e in zip(results, expected, strict=True)):
                wrong.append(f"{_name(dtype)}, ({m}, {k}) by ({n}, {k})")
    return wrong


def _special_values() -> list[str]:
    wrong = []
    for dtype in _DTYPES:
        input = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 6e4, -6e4], dtype=dtype)
        expected = torch.tensor([1, 0, torch.nan, 0.5, 0.5, 1, 0], dtype=dtype)
        if not torch.equal(functional.sigmoid(input).nan_to_num(-1), expected.nan_to_num(-1)):
            wrong.append(f"sigmoid, {_name(dtype)}: {functional.sigmoid(input).tolist()}")

        features = torch.ones(4, 33, dtype=dtype)
        features[1, 5], features[2, 6] = torch.inf, torch.nan
        output = functional.linear(features, torch.ones(3, 33, dtype=dtype))
        rows = torch.tensor([33, torch.inf, torch.nan, 33], dtype=dtype)
        expected = rows.unsqueeze(1).expand(4, 3)
        if not torch.equal(output.nan_to_num(-1), expected.nan_to_num(-1)):
            wrong.append(f"linear, {_name(dtype)}: rows {output[:, 0].tolist()}")
    return wrong


def _second_derivatives() -> list[str]:
    """In float64 against torch: roundings come to about 1e-14, a wrong formula to far more."""
    wrong = []
    for op in _OPS:
        arguments = _arguments(op, _Case("", (6, 19), 21), torch.float64)
        ours = _second_gradients(op.ours, arguments)
        expected = _second_gradients(op.torch, arguments)
        difference = max(
            ((a - b).abs().max() / (1 + b.abs().max())).item()
            for a, b in zip(ours, expected, strict=True)
        )
        if not difference <= 1e-12:
            wrong.append(f"{op.name}: {difference:.1e} away from torch's")
    return wrong


def _second_gradients(compute: _Compute, arguments: _Arguments) -> list[Tensor]:
    leaves = arguments.leaves()
    grad_output = arguments.grad_output.detach().requires_grad_()
    output = compute(arguments.input, arguments.weights, arguments.biases)
    gradients = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
    total = sum((gradient.sin().sum() for gradient in gradients), torch.zeros(()))
    return list(torch.autograd.grad(total, [*leaves, grad_output], materialize_grads=True))


def _notebook_numbers() -> list[str]:
    torch.manual_seed(7)
    features = torch.randn((1, 5))
    weights = torch.randn_like(features)
    bias = torch.randn((1, 1))
    computed = {
        "0.1595": functional.linear_sigmoid(features, weights, bias),
        "-1.6619": functional.linear(features, weights.view(5, 1).T, bias),
    }
    torch.manual_seed(7)
    features = torch.randn((1, 3))
    w1, w2 = torch.randn(3, 2), torch.randn(2, 1)
    b1, b2 = torch.randn((1, 2)), torch.randn((1, 1))
    computed["0.3171"] = functional.mlp(features, [w1.T, w2.T], [b1, b2], "sigmoid")
    return [
        f"{output.item():.6f} for {expected}"
        for expected, output in computed.items()
        if f"{output.item():.4f}" != expected
    ]
