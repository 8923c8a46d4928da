"""Threads of every kind: torch's, Python's, and processes. The result is always the same bits."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DTYPES, Shape, each_dtype
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import neuron_ext
from neuron_ext import backends, functional

SHAPES: dict[str, Shape] = {
    "one neuron": ((1,), 5, 1),
    "many rows": ((3001,), 33, 17),
    "few rows, long sum": ((3,), 5000, 130),
    "square": ((257,), 257, 257),
    "few outputs, many rows": ((4097,), 64, 3),
    "rows in blocks": ((33_000,), 13, 4),
}


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def everything(dtype: torch.dtype, shape: Shape, seed: int) -> list[Tensor]:
    """All results and gradients of all operations on inputs made from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    lead, n, m = shape

    def make(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    x, w, v, b = make(*lead, n), make(m, n), make(7, m), make(m)
    outputs = [
        functional.linear(x, w, b),
        functional.linear_sigmoid(x, w, b),
        functional.sigmoid(x),
        functional.mlp(x, [w, v], [b, None]),
    ]
    results = list(outputs)
    for output in outputs:
        grads = torch.autograd.grad(output.square().sum(), (x, w, v, b), allow_unused=True)
        results += [g for g in grads if g is not None]
    return [r.detach() for r in results]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_number_of_threads(dtype: torch.dtype, shape: Shape, seed: int, isa: str) -> None:
    torch.set_num_threads(1)
    expected = everything(dtype, shape, seed)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert same(everything(dtype, shape, seed), expected), f"{threads} threads"


@each_dtype
def test_repeated_calls(dtype: torch.dtype, seed: int) -> None:
    torch.set_num_threads(4)
    expected = everything(dtype, SHAPES["square"], seed)
    for _ in range(10):
        assert same(everything(dtype, SHAPES["square"], seed), expected)


def test_python_threads_at_once(seed: int) -> None:
    """Each with sizes and numbers of its own, so that a shared buffer would show."""
    torch.set_num_threads(2)
    jobs = [
        (dtype, ((17 + 31 * i,), 64 + 9 * i, 33 + 5 * i), seed + i)
        for i in range(6)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    expected = [everything(*job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for actual, right in zip(
                pool.map(lambda job: everything(*job), jobs), expected, strict=True
            ):
                assert same(actual, right)


def test_python_threads_share_a_module() -> None:
    module = neuron_ext.MLP([64, 128, 10])
    inputs = [torch.randn(50, 64) for _ in range(16)]
    expected = [module(x).detach() for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda x: module(x).detach(), inputs))
    assert same(actual, expected)


def test_the_isa_may_change_under_running_calls() -> None:
    """Each call uses one instruction set from beginning to end."""
    x, w = torch.randn(257, 257), torch.randn(257, 257)
    possible = []
    for isa in backends.supported_cpu_isas():
        with backends.use_cpu_isa(isa):
            possible.append(functional.linear(x, w))
    stop = threading.Event()
    before = backends.cpu_isa()

    def switch() -> None:
        while not stop.is_set():
            for isa in backends.supported_cpu_isas():
                backends.set_cpu_isa(isa)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(100):
            actual = functional.linear(x, w)
            assert any(torch.equal(actual, p) for p in possible)
    finally:
        stop.set()
        thread.join()
        backends.set_cpu_isa(before)


def test_inside_torchs_own_parallel_work() -> None:
    """autograd runs backward on threads of its own where there are several devices or calls."""
    module = neuron_ext.MLP([33, 65, 9])

    def step(seed: int) -> list[Tensor]:
        torch.set_num_threads(2)
        x = torch.randn(100, 33, generator=torch.Generator().manual_seed(seed))
        return list(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))

    expected = [step(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for actual, right in zip(pool.map(step, range(8)), expected, strict=True):
            assert same(actual, right)


# ---- processes


FORK = """
import os, signal, sys
import torch
from neuron_ext import functional

def ours(x, w):
    return functional.sigmoid(functional.linear_sigmoid(x, w))

def torchs(x, w):
    return torch.sigmoid(torch.sigmoid(torch.nn.functional.linear(x, w)))

torch.set_num_threads(int(sys.argv[2]))
compute = {"ours": ours, "torchs": torchs}[sys.argv[1]]
x, w = torch.randn(600, 300), torch.randn(400, 300)
expected = compute(x, w) if sys.argv[3] == "worked" else None
pid = os.fork()
if pid == 0:
    signal.alarm(5)
    actual = compute(x, w)
    right = torch.equal(compute(x, w), actual if expected is None else expected)
    os._exit(0 if right else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("right" if status == 0 else "hung" if status == -signal.SIGALRM else "wrong")
"""


PARTIES = ("ours", "torchs")


def outcome_of_fork(what: str, threads: int, before: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", FORK, what, str(threads), before],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("threads", [1, 4])
def test_a_child_of_a_parent_that_did_nothing_yet(threads: int) -> None:
    assert outcome_of_fork("ours", threads, "idle") == "right"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_of_a_parent_that_worked_on_one_thread() -> None:
    assert outcome_of_fork("ours", 1, "worked") == "right"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_of_a_parent_that_worked_in_parallel() -> None:
    """The OpenMP runtime may not survive this; then it doesn't in torch's operations either."""
    with ThreadPoolExecutor() as pool:
        ours, theirs = pool.map(lambda whose: outcome_of_fork(whose, 4, "worked"), PARTIES)
    assert ours in ("right", theirs)


class Neurons(Dataset[Tensor]):
    """Computes its items with our operations, in whatever process it is asked."""

    def __init__(self) -> None:
        self.module = neuron_ext.MLP([6, 5, 4], output_activation="sigmoid").requires_grad_(False)
        self.inputs = torch.randn(12, 40, 6)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        output: Tensor = self.module(self.inputs[index])
        return functional.sigmoid(output)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_of_a_data_loader(method: str) -> None:
    dataset = Neurons()
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = DataLoader(
        dataset, batch_size=3, num_workers=2, multiprocessing_context=method, timeout=100
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def test_calls_leave_the_process_as_it_was() -> None:
    """Threads, rounding of small numbers, random numbers, grad mode."""

    def state() -> tuple[object, ...]:
        tiny = torch.tensor([1e-40]) * 0.5
        return (
            torch.get_num_threads(),
            tiny.item(),
            5e-324 + 5e-324,
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    before = state()
    for dtype in DTYPES:
        everything(dtype, ((40,), 30, 20), seed=1)
    assert state() == before
