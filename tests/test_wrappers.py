"""What wraps tensors, modules and processes: subclasses, modes, lazy views, torch.distributed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from operations import (
    ALL,
    LINEAR,
    LINEAR_SIGMOID,
    MLP_SOME_BIAS,
    SIGMOID,
    Operation,
    assert_close,
    each,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import neuron_ext
from neuron_ext import functional

# ---- subclasses


class Tagged(Tensor):
    """A subclass that leaves everything to torch."""


class Counting(Tensor):
    """One that watches torch's functions go by."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Refusing(Tensor):
    """One that knows only some of torch's functions, as DTensor and masked tensors do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (F.linear, torch.sigmoid, Tensor.sigmoid):
            plain = [a.as_subclass(Tensor) if isinstance(a, Refusing) else a for a in args]
            return func(*plain, **(kwargs or {})).as_subclass(cls)
        return NotImplemented


class Wrapped(Tensor):
    """Holds a tensor and passes on the operations that reach the dispatcher, ours among them."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def unwrap(t: object) -> object:
            return t.inner if isinstance(t, Wrapped) else t

        output = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda t: Wrapped(t) if isinstance(t, Tensor) else t, output)


@each
@pytest.mark.parametrize("which", ["input", "all"])
def test_plain_subclasses(operation: Operation, which: str) -> None:
    inputs = operation.inputs()
    count = 1 if which == "input" else len(inputs)
    tagged = [t.as_subclass(Tagged) if i < count else t for i, t in enumerate(inputs)]
    ours, reference = operation.ours(*tagged), operation.torch(*tagged)
    assert type(ours) is type(reference) is Tagged
    assert_close(ours, reference)


@each
def test_subclasses_see_functions(operation: Operation) -> None:
    inputs = operation.inputs()
    Counting.seen.clear()
    ours = operation.ours(inputs[0].as_subclass(Counting), *inputs[1:])
    assert isinstance(ours, Counting)
    assert "linear" in Counting.seen or "sigmoid" in Counting.seen
    assert_close(ours.as_subclass(Tensor), operation.torch(*inputs))


@each
def test_subclasses_that_know_only_torch(operation: Operation) -> None:
    inputs = operation.inputs()
    for i in range(len(inputs)):
        mixed = list(inputs)
        mixed[i] = mixed[i].as_subclass(Refusing)
        ours = operation.ours(*mixed)
        assert isinstance(ours, Refusing)
        assert_close(ours.as_subclass(Tensor), operation.torch(*inputs))


@each
def test_wrapper_subclasses(operation: Operation) -> None:
    inputs = operation.inputs()
    for i in range(len(inputs)):
        mixed = [Wrapped(t) if j == i else t for j, t in enumerate(inputs)]
        ours = operation.ours(*mixed)
        assert isinstance(ours, Wrapped)
        assert_close(ours.inner, operation.torch(*inputs))
    leaves = [Wrapped(t).requires_grad_() for t in inputs]
    operation.ours(*leaves).sum().backward()
    plain = operation.inputs(requires_grad=True)
    operation.torch(*plain).sum().backward()
    for leaf, t in zip(leaves, plain, strict=True):
        assert isinstance(leaf.grad, Wrapped)
        assert_close(leaf.grad.inner, t.grad)


def test_parameters_of_subclasses() -> None:
    module = neuron_ext.LinearSigmoid(3, 4, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.sigmoid(F.linear(x, module.weight, module.bias))
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Tagged))
    assert_close(module(x).as_subclass(Tensor), expected)
    module(x).sum().backward()
    assert module.weight.grad is not None


# ---- modes


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "neuron_ext":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


@each
def test_function_modes_see_the_operation(operation: Operation) -> None:
    inputs = operation.inputs()
    with Functions() as mode:
        output = operation.ours(*inputs)
    assert f"neuron_ext.{operation.op}.default" in mode.seen
    assert_close(output, operation.torch(*inputs))


@each
def test_dispatch_modes_see_the_operation_and_its_gradient(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    with Operations() as mode:
        operation.ours(*inputs).sum().backward()
    forward = "mlp_forward" if operation.op == "mlp" else operation.op
    assert mode.seen == [forward, f"{operation.op}_backward"]
    with Operations() as mode, torch.no_grad():
        operation.ours(*inputs)
    assert mode.seen == [operation.op]


@each
def test_the_profiler_names_operations(operation: Operation) -> None:
    inputs = operation.inputs(requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        operation.ours(*inputs).sum().backward()
        with torch.no_grad():
            operation.ours(*inputs)
    shapes = {event.name: event.input_shapes for event in profile.events()}
    assert f"neuron_ext::{operation.op}" in shapes
    assert f"neuron_ext::{operation.op}_backward" in shapes
    assert shapes[f"neuron_ext::{operation.op}"][0] == [5, 3]


@each
def test_flops(operation: Operation) -> None:
    """As many as torch counts for the same layers, forward and backward."""
    counts = []
    for function in (operation.ours, operation.torch):
        with FlopCounterMode(display=False) as counter:
            function(*operation.inputs(requires_grad=True)).sum().backward()
            function(*operation.inputs())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == (operation is not SIGMOID)


@each
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_fake_tensors(operation: Operation, device: str) -> None:
    # A torch without CUDA ends the process when autograd asks for the stream of a fake CUDA tensor.
    differentiable = device != "cuda" or torch.cuda.is_available()
    with FakeTensorMode():
        inputs = [
            torch.empty(s, device=device, requires_grad=differentiable) for s in operation.shapes
        ]
        output, reference = operation.ours(*inputs), operation.torch(*inputs)
        assert isinstance(output, FakeTensor)
        assert (output.shape, output.stride(), output.dtype, output.device) == (
            reference.shape,
            reference.stride(),
            reference.dtype,
            reference.device,
        )
        if differentiable:
            output.sum().backward()
            for t in inputs:
                assert t.grad is not None
                assert (t.grad.shape, t.grad.device) == (t.shape, t.device)


@each
def test_meta_tensors(operation: Operation) -> None:
    inputs = [torch.empty(s, device="meta", requires_grad=True) for s in operation.shapes]
    output = operation.ours(*inputs)
    assert output.is_meta
    assert output.shape == operation.torch(*inputs).shape
    output.sum().backward()
    assert all(t.grad is not None and t.grad.is_meta and t.grad.shape == t.shape for t in inputs)


def test_default_device_and_dtype() -> None:
    with torch.device("meta"):
        model = neuron_ext.MLP([3, 4, 2])
        assert model[0].weight.is_meta
        assert model(torch.empty(5, 3)).is_meta
    inputs = [t.float() for t in LINEAR_SIGMOID.inputs()]
    torch.set_default_dtype(torch.float64)
    try:
        assert neuron_ext.Linear(3, 4).weight.dtype == torch.float64
        assert functional.linear_sigmoid(*inputs).dtype == torch.float32
        assert functional.sigmoid(torch.ones(3, dtype=torch.int32)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_mode_changes_nothing_and_fills_no_gaps() -> None:
    """torch fills empty tensors with nan then: one read before it was written would show."""
    for operation in ALL:
        expected = gradients_of(operation.ours, operation.inputs(requires_grad=True))
        torch.use_deterministic_algorithms(True)
        try:
            now = gradients_of(operation.ours, operation.inputs(requires_grad=True))
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip(now, expected, strict=True):
            assert torch.equal(a, b), operation.id


def gradients_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs).sin().sum(), inputs)


# ---- views that are not memory


def negated(t: Tensor) -> Tensor:
    """The same values behind a lazy negation: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


@each
def test_lazily_negated_tensors(operation: Operation) -> None:
    plain = operation.inputs()
    for i in range(len(plain)):
        inputs = list(plain)
        inputs[i] = negated(plain[i])
        assert_close(operation.ours(*inputs), operation.torch(*plain))
        with torch.inference_mode():
            assert_close(operation.ours(*inputs).clone(), operation.torch(*plain).clone())
        assert_close(
            gradients_of(operation.ours, [t.requires_grad_() for t in inputs]),
            gradients_of(operation.torch, operation.inputs(requires_grad=True)),
        )
    output = operation.ours(*[t.requires_grad_() for t in operation.inputs()])
    grad = torch.randn_like(output)
    leaf = operation.inputs(requires_grad=True)
    assert_close(
        torch.autograd.grad(operation.ours(*leaf), leaf, negated(grad)),
        torch.autograd.grad(operation.torch(*leaf), leaf, grad),
    )


@each
def test_conjugated_tensors(operation: Operation) -> None:
    inputs = [torch.randn(s, dtype=torch.complex128) for s in operation.shapes]
    for i in range(len(inputs)):
        views = [t.conj() if i == j else t for j, t in enumerate(inputs)]
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode():
                assert_close(operation.ours(*views).clone(), operation.torch(*views).clone())


@each
def test_zero_tensors(operation: Operation) -> None:
    """Tensors without memory that autograd makes where a gradient is zero."""
    plain = operation.inputs()
    for i in range(len(plain)):
        inputs, zeroed = list(plain), list(plain)
        inputs[i] = torch._efficientzerotensor(plain[i].shape, dtype=torch.float64)
        zeroed[i] = torch.zeros_like(plain[i])
        assert_close(operation.ours(*inputs) + 0, operation.torch(*zeroed))
    leaves = operation.inputs(requires_grad=True)
    output = operation.ours(*leaves)
    zero = torch._efficientzerotensor(output.shape, dtype=torch.float64)
    for grad in torch.autograd.grad(output, leaves, zero):
        assert not (grad + 0).any()


def test_memory_shared_with_other_processes_and_numpy() -> None:
    for operation in ALL:
        inputs = operation.inputs()
        expected = operation.torch(*inputs)
        assert_close(operation.ours(*[t.share_memory_() for t in inputs]), expected)
        read_only = [torch.from_numpy(t.numpy()) for t in inputs]
        assert_close(operation.ours(*read_only), expected)


def test_copy_on_write_tensors_stay_uncopied() -> None:
    """Kernels read through const pointers."""
    for operation in ALL:
        inputs = operation.inputs()
        lazy = [torch._lazy_clone(t) for t in inputs]
        assert_close(operation.ours(*lazy), operation.torch(*inputs))
        for t in lazy:
            assert torch._C._is_cow_tensor(t), operation.id


# ---- modules moved and swapped


def test_swapped_parameters() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = neuron_ext.MLP([3, 4, 2])
        weight = model[0].weight
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight is weight
    x = torch.randn(5, 3, dtype=torch.float64)
    assert_close(model(x), child_by_child(x, model))
    other = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    torch.utils.swap_tensors(model[0].weight, other)
    assert not model[0].weight.any()
    assert_close(model(x), child_by_child(x, model))


def child_by_child(x: Tensor, model: torch.nn.Module) -> Tensor:
    for child in model.children():
        x = F.linear(x, child.weight, child.bias) if hasattr(child, "weight") else x.sigmoid()
    return x


def test_data_loader_workers() -> None:
    """Operations in forked and in spawned workers, after the parent used its threads."""
    functional.linear(torch.randn(256, 256), torch.randn(256, 256))
    data = Rows()
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            data, batch_size=8, num_workers=2, multiprocessing_context=context
        )
        rows = torch.cat(list(loader))
        assert_close(rows, torch.stack([data[i] for i in range(len(data))]), 1e-6)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
        self.w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return functional.linear_sigmoid(self.x[index], self.w)


def test_threads() -> None:
    expected = {o.id: o.torch(*o.inputs()) for o in ALL}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                for operation in ALL:
                    assert_close(operation.ours(*operation.inputs()), expected[operation.id])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- several processes


def two_towers() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network of ours and the same in torch, with the same parameters."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(
        neuron_ext.LinearSigmoid(4, 8), neuron_ext.MLP([8, 6, 2], output_activation="sigmoid")
    ).double()
    plain = torch.nn.Sequential(
        torch.nn.Linear(4, 8),
        torch.nn.Sigmoid(),
        torch.nn.Linear(8, 6),
        torch.nn.Sigmoid(),
        torch.nn.Linear(6, 2),
        torch.nn.Sigmoid(),
    ).double()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        a.data.copy_(b)
    return ours, plain


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def local(t: Tensor) -> Tensor:
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full


def test_tensor_parallel(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = torch.nn.Sequential(
        neuron_ext.LinearSigmoid(4, 8), neuron_ext.Linear(8, 2), neuron_ext.Sigmoid()
    ).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = model(x)
    grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    output = model(x)
    output.sum().backward()
    assert_close(local(output), expected)
    assert_close([local(p.grad) for p in model.parameters()], list(grads))


@each
def test_dtensors(one_rank: None, operation: Operation) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    inputs = operation.inputs()
    placements = [[Shard(0)], *([Replicate()] for _ in inputs[1:])]
    distributed = [
        distribute_tensor(t, mesh, p).requires_grad_()
        for t, p in zip(inputs, placements, strict=True)
    ]
    output = operation.ours(*distributed)
    assert isinstance(output, DTensor)
    assert_close(output.full_tensor(), operation.torch(*inputs))
    grads = torch.autograd.grad(output.sum(), distributed)
    leaves = operation.inputs(requires_grad=True)
    assert_close(
        [local(g) for g in grads],
        list(torch.autograd.grad(operation.torch(*leaves).sum(), leaves)),
    )


def test_distributed_data_parallel_on_one_rank(one_rank: None) -> None:
    ours, plain = two_towers()
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(ours))
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    assert_close([p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()])


def test_fully_sharded_on_one_rank(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours, plain = two_towers()
    mesh = init_device_mesh("cpu", (1,))
    for child in ours:
        fully_shard(child, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(2):
        ours.zero_grad()
        ours(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    assert_close([local(p.grad) for p in ours.parameters()], [p.grad for p in plain.parameters()])


TWO_RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from test_wrappers import two_towers
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ours, plain = two_towers()
wrapped = torch.nn.parallel.DistributedDataParallel(ours)
x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
wrapped(x[3 * rank : 3 * rank + 3]).pow(2).sum().backward()
(plain(x).pow(2).sum() / 2).backward()
torch.testing.assert_close(
    [p.grad for p in wrapped.parameters()], [p.grad for p in plain.parameters()],
    rtol=1e-12, atol=1e-12,
)
dist.barrier()
dist.destroy_process_group()
"""


def test_distributed_data_parallel_on_two_ranks(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    here = Path(__file__).parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), tmp_path / "store", here],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


# ---- what only torch computes


def test_layouts_without_kernels() -> None:
    x, w, b = LINEAR.inputs()
    assert_close(functional.linear(x.to_sparse(), w), F.linear(x.to_sparse(), w))
    sparse_weight = w.to_sparse_csr()
    assert_close(functional.linear(x, sparse_weight, b), F.linear(x, sparse_weight, b))
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    ours = functional.linear_sigmoid(nested, w, b)
    assert_close(ours.values(), torch.sigmoid(F.linear(nested, w, b)).values())
    mkldnn = x.float().to_mkldnn()
    assert_close(functional.sigmoid(mkldnn).to_dense(), torch.sigmoid(mkldnn).to_dense())


def test_some_bias_under_every_mode_at_once() -> None:
    """Autocast, checkpointing, compilation and a profiler around one call."""
    inputs = MLP_SOME_BIAS.inputs(dtype=torch.float32, requires_grad=True)
    compiled = torch.compile(lambda *t: MLP_SOME_BIAS.ours(*t), backend="aot_eager", fullgraph=True)
    with torch.profiler.profile(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = torch.utils.checkpoint.checkpoint(compiled, *inputs, use_reentrant=False)
    assert output.dtype == torch.bfloat16
    grads = torch.autograd.grad(output.float().sum(), inputs)
    expected = torch.autograd.grad(MLP_SOME_BIAS.torch(*inputs).sum(), inputs)
    assert_close(list(grads), list(expected), 5e-2)
