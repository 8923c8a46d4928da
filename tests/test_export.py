"""torch.export: strict and not, any batch, loaded elsewhere, decomposed and run without us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import ALL, MLP, Operation, assert_close, each, one_each
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

import neuron_ext
from neuron_ext import functional


class Call(torch.nn.Module):
    """An operation of its input and of parameters."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        _, *others = operation.inputs()
        self.others = torch.nn.ParameterList(others)

    def forward(self, x: Tensor) -> Tensor:
        others = [self.others[i] for i in range(len(self.others))]  # which torch 2.11 can trace
        return self.operation.ours(x, *others)


class Network(torch.nn.Module):
    """All modules of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.first = neuron_ext.LinearSigmoid(3, 6)
        self.second = neuron_ext.Linear(6, 4)
        self.sigmoid = neuron_ext.Sigmoid()
        self.rest = neuron_ext.MLP([4, 5, 2])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rest(self.sigmoid(self.second(self.first(x))))
        return output


NETWORK_OPS = ["linear_sigmoid", "linear", "sigmoid", "mlp"]


def ours_in(program: ExportedProgram) -> list[str]:
    return [
        node.target._opname
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "neuron_ext"
    ]


def decomposed(program: ExportedProgram) -> ExportedProgram:
    table = torch.export.default_decompositions()
    table.update(functional.decomposition_table())
    return program.run_decompositions(table)


def batch_of(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 3, dtype=dtype)


strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
any_batch = {"x": {0: Dim("batch")}}


@each
@strictness
def test_any_batch(operation: Operation, strict: bool) -> None:
    module = Call(operation)
    program = export(module, (batch_of(5),), dynamic_shapes=any_batch, strict=strict)
    assert ours_in(program) == [operation.op]
    for rows in (5, 2, 17):
        x = batch_of(rows)
        assert_close(program.module()(x), operation.torch(x, *module.others))


@each
@strictness
def test_decompositions_leave_only_aten(operation: Operation, strict: bool) -> None:
    module = Call(operation)
    program = decomposed(export(module, (batch_of(5),), dynamic_shapes=any_batch, strict=strict))
    assert all(
        node.target.namespace == "aten"
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    for rows in (5, 2, 17):
        x = batch_of(rows)
        assert_close(program.module()(x), operation.torch(x, *module.others))


def test_decompositions_of_gradients() -> None:
    """The backward operations too: a traced training step without a trace of us."""
    from torch.fx.experimental.proxy_tensor import make_fx

    for operation in ALL:

        def step(*tensors: Tensor, operation: Operation = operation) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(operation.ours(*leaves).sin().sum(), leaves)

        inputs = operation.inputs()
        graph = make_fx(step, decomposition_table=functional.decomposition_table())(*inputs)
        assert not [
            node
            for node in graph.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "neuron_ext"
        ], operation.id
        assert_close(graph(*inputs), step(*inputs))


def test_the_table_has_every_operation() -> None:
    names = {op.name() for op in functional.decomposition_table()}
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("neuron_ext::")
    }
    assert names == registered


RUN = """
import sys, torch
{imports}
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected, rtol=1e-6, atol=1e-6)
assert ("neuron_ext" in sys.modules) == {with_us}
"""


@strictness
@pytest.mark.parametrize("with_us", [True, False])
def test_saved_and_loaded_in_another_process(tmp_path: Path, strict: bool, with_us: bool) -> None:
    """With the package it runs on our kernels, and once decomposed, without it."""
    network = Network()
    program = export(
        network, (batch_of(5, torch.float32),), dynamic_shapes=any_batch, strict=strict
    )
    assert ours_in(program) == NETWORK_OPS
    if not with_us:
        program = decomposed(program)
    torch.export.save(program, tmp_path / "network.pt2")
    x = batch_of(11, torch.float32)
    torch.save((x, network(x).detach()), tmp_path / "expected.pt")
    script = RUN.format(imports="import neuron_ext" if with_us else "", with_us=with_us)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "network.pt2", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@strictness
def test_state_is_that_of_the_module(strict: bool) -> None:
    network = Network()
    program = export(network, (batch_of(5, torch.float32),), strict=strict)
    assert program.state_dict.keys() == network.state_dict().keys()


@strictness
def test_an_exported_module_trains(strict: bool) -> None:
    """The graph holds the forward operations; their gradients come with them."""
    network = Network()
    x = batch_of(5, torch.float32)
    exported = export(network, (x,), dynamic_shapes=any_batch, strict=strict).module()
    x = batch_of(7, torch.float32)
    exported(x).pow(2).sum().backward()
    now = {name: p.grad for name, p in exported.named_parameters()}
    network.zero_grad()
    network(x).pow(2).sum().backward()
    assert_close(now, {name: p.grad for name, p in network.named_parameters()}, 1e-6)


@one_each
def test_any_number_of_dimensions_is_its_own_program(operation: Operation) -> None:
    module = Call(operation)
    for x in (
        torch.randn(3).double(),
        torch.randn(2, 4, 3).double(),
        torch.randn(4, 2, 3).double().transpose(0, 1),
    ):
        program = export(module, (x,))
        assert_close(program.module()(x), operation.torch(x, *module.others))


def test_several_dynamic_sizes() -> None:
    module = Call(MLP)
    a, b = Dim("a"), Dim("b")
    program = export(module, (torch.randn(2, 4, 3).double(),), dynamic_shapes={"x": {0: a, 1: b}})
    for lead in ((2, 4), (5, 3), (3, 7)):
        x = torch.randn(*lead, 3, dtype=torch.float64)
        assert_close(program.module()(x), MLP.torch(x, *module.others))


@strictness
def test_autocast_is_exported(strict: bool) -> None:
    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = neuron_ext.LinearSigmoid(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output: Tensor = self.layer(x)
            return output

    module, x = Cast(), batch_of(5, torch.float32)
    output = export(module, (x,), strict=strict).module()(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, module(x))
