"""The choice of CPU kernels, and what is said about them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DTYPES, name_of

import neuron_ext
from neuron_ext import backends, functional

SHORT_NAMES = dict(zip(DTYPES, ("f32", "f64", "bf16", "f16"), strict=True))
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
COMPLETE = ISAS[:3]  # with kernels for every dtype; what else there is adds some for a few
IMPRECISE = ("f32_bf16_", "f32_bf16x3_")  # kernels that torch's precision must allow


def test_supported_isas_are_in_order() -> None:
    supported = backends.supported_cpu_isas()
    assert supported[0] == "portable"
    assert list(supported) == [isa for isa in ISAS if isa in supported]
    assert backends.cpu_isa() in supported


def test_the_best_isa_is_the_default() -> None:
    assert run("print(backends.cpu_isa())") == backends.supported_cpu_isas()[-1]


def test_setting_the_isa() -> None:
    before = backends.cpu_isa()
    try:
        for isa in backends.supported_cpu_isas():
            backends.set_cpu_isa(isa)
            assert backends.cpu_isa() == isa
    finally:
        backends.set_cpu_isa(before)
    for isa in backends.supported_cpu_isas():
        with backends.use_cpu_isa(isa):
            assert backends.cpu_isa() == isa
            with backends.use_cpu_isa("portable"):
                assert backends.cpu_isa() == "portable"
            assert backends.cpu_isa() == isa
    with pytest.raises(KeyError), backends.use_cpu_isa("portable"):
        raise KeyError
    assert backends.cpu_isa() == before


@pytest.mark.parametrize("wrong", ["", "AVX2", "sse", "avx512 "], ids=repr)
def test_an_unknown_isa_is_refused(wrong: str) -> None:
    before = backends.cpu_isa()
    with pytest.raises(ValueError, match=f"'{wrong}'.*portable"):
        backends.set_cpu_isa(wrong)
    with pytest.raises(ValueError, match=f"'{wrong}'"), backends.use_cpu_isa(wrong):
        pass
    assert backends.cpu_isa() == before
    with pytest.raises(TypeError):
        backends.set_cpu_isa(None)


@pytest.mark.skipif(
    len(backends.supported_cpu_isas()) == len(ISAS), reason="this CPU has every instruction set"
)
def test_an_isa_that_this_cpu_lacks_is_refused() -> None:
    for isa in set(ISAS) - set(backends.supported_cpu_isas()):
        with pytest.raises(ValueError, match=isa):
            backends.set_cpu_isa(isa)


def test_kernels_are_rows_best_first() -> None:
    everything = backends.kernels()
    assert len({row.name for row in everything}) == len(everything)
    assert ("cuda" in {row.device for row in everything}) == backends.cuda_is_built()
    rows = [row for row in everything if row.device == "cpu"]
    assert {row.isa for row in rows} <= set(ISAS)
    order = [ISAS.index(row.isa) for row in rows]
    assert order == sorted(order, reverse=True)
    for row in rows:
        assert row.runnable == (row.isa in backends.supported_cpu_isas())
        assert row.isa in row.name
        assert set(row.dtypes) <= set(SHORT_NAMES.values())
    for isa in COMPLETE:
        of_isa = [row for row in rows if row.isa == isa]
        assert {d for row in of_isa for d in row.dtypes} == set(SHORT_NAMES.values()), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_kernels_that_run_are_of_the_chosen_isa(dtype: torch.dtype, isa: str) -> None:
    """Or, where it has none for the dtype, of the best below it that has."""
    allowed = ISAS[: ISAS.index(isa) + 1]

    def best(kind: str) -> str:
        return next(
            row.isa
            for row in backends.kernels()
            if row.isa in allowed and SHORT_NAMES[dtype] in row.dtypes and kind in row.name
            if not any(name in row.name for name in IMPRECISE)
        )

    x, w = torch.ones(40, 30, dtype=dtype), torch.ones(50, 30, dtype=dtype)
    rows = {row.name: row for row in backends.kernels()}
    for kind, call in (
        ("gemm_", lambda: functional.linear(x, w)),
        ("gemm_narrow_", lambda: functional.linear(x[:1], w)),
        ("gemm_", lambda: functional.linear_sigmoid(x, w)),
        ("gemm_", lambda: functional.mlp(x, [w])),
    ):
        call()
        row = rows[backends.last_kernel()]
        assert row.isa == best(kind)
        assert row.isa == isa or isa not in COMPLETE
        assert SHORT_NAMES[dtype] in row.dtypes


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("precision", "loss"), [("highest", 0), ("high", 2**-15), ("medium", 2**-7)]
)
def test_torchs_precision_of_float32_is_obeyed(
    precision: str, loss: float, isa: str, seed: int, restored_precision: None
) -> None:
    x, w = torch.randn(130, 300), torch.randn(90, 300)
    torch.set_float32_matmul_precision(precision)
    y = functional.linear(x, w)
    splits = isa == "amx" or (isa == "avx512_bf16" and precision == "medium")
    assert ("f32_bf16" in backends.last_kernel()) == splits
    exact, largest = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    bound = (torch.finfo().eps * 8 + (loss if splits else 0)) * largest
    error = (y - exact).abs()
    assert (error <= bound).all()
    if splits and precision == "medium":
        assert (error > torch.finfo().eps * 8 * largest).any()


def test_the_precision_of_torchs_cpu_products_alone_is_obeyed() -> None:
    """Of other operations and devices it isn't our concern."""
    code = """
x = torch.randn(99, 99)
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
functional.linear(x, x)
medium = backends.last_kernel()
torch.backends.mkldnn.matmul.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"
functional.linear(x, x)
full = backends.last_kernel()
print("f32_bf16_" in medium, "f32_bf16_" in full)
"""
    has_bf16 = "avx512_bf16" in backends.supported_cpu_isas()
    assert run(code).splitlines()[-1] == f"{has_bf16} False"


def test_small_and_special_values_at_any_precision(seed: int, restored_precision: None) -> None:
    """Rows that bf16 can't hold are computed in float32, and no other row notices."""
    x, w = torch.randn(70, 200), torch.randn(64, 200)
    torch.set_float32_matmul_precision("medium")
    usual = functional.linear(x, w)
    x[3, 5], x[40], x[41, 7], x[42, 0] = torch.inf, 1e-41, torch.nan, torch.finfo().max
    y = functional.linear(x, w)
    rows = torch.tensor([3, 40, 41, 42])
    others = torch.ones(70, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(y[others], usual[others])
    exact = (x.double() @ w.double().T).float()
    torch.testing.assert_close(y[rows], exact[rows], rtol=1e-3, atol=1e-41, equal_nan=True)


def test_the_last_kernel_is_of_this_thread() -> None:
    functional.linear(torch.ones(40, 30), torch.ones(50, 30))
    here = backends.last_kernel()
    assert here
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.last_kernel).result() == ""
        pool.submit(
            functional.linear, torch.ones(9, 9).double(), torch.ones(9, 9).double()
        ).result()
        assert "f64" in pool.submit(backends.last_kernel).result()
    assert backends.last_kernel() == here


def test_isas_agree(seed: int) -> None:
    """On the same inputs: sums to the accuracy of sums, sigmoids to an ULP or two."""
    x, w, b = torch.randn(67, 129), torch.randn(93, 129), torch.randn(93)
    results = []
    for isa in backends.supported_cpu_isas():
        with backends.use_cpu_isa(isa):
            results.append((functional.linear(x, w, b), functional.sigmoid(x)))
    largest = x.abs() @ w.abs().T + b.abs()
    for linear, sigmoid in results[1:]:
        assert ((linear - results[0][0]).abs() <= 8 * torch.finfo().eps * largest).all()
        torch.testing.assert_close(sigmoid, results[0][1], rtol=3 * torch.finfo().eps, atol=0)


def test_show_config() -> None:
    text = neuron_ext.show_config()
    for part in (neuron_ext.__version__, torch.__version__, backends.cpu_isa(), "CUDA kernels"):
        assert part in text
    for row in backends.kernels():
        assert row.name in text
    assert isinstance(backends.cuda_is_built(), bool)


CUDA_TENSORS = """
import torch
from torch._subclasses import FakeTensorMode
from neuron_ext import functional

with FakeTensorMode():
    x, w = torch.empty(2, 5, device="cuda"), torch.empty(3, 2, device="cuda")
    outputs = [functional.linear(x, x), functional.sigmoid(x), functional.mlp(x, [x, w])]
print([str(y.device) for y in outputs])
"""


@pytest.mark.skipif(backends.cuda_is_built(), reason="this build has CUDA kernels")
def test_without_cuda_kernels_torch_computes_and_one_warning_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CUDA_TENSORS], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "['cuda:0', 'cuda:0', 'cuda:0']"
    assert (result.stdout + result.stderr).count("without CUDA kernels") == 1


# ---- the environment


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, or what it ended with."""
    program = f"import torch\nfrom neuron_ext import backends, functional\n{code}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NEURON_EXT_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout.strip() if result.returncode == 0 else result.stderr.strip()


@pytest.mark.parametrize("chosen", backends.supported_cpu_isas())
def test_the_environment_chooses_the_isa(chosen: str) -> None:
    code = (
        "x = torch.ones(64, 64).bfloat16(); functional.linear(x, x); print(backends.last_kernel())"
    )
    assert run(code, NEURON_EXT_CPU_ISA=chosen).endswith(f"_{chosen}")


def test_an_isa_in_the_environment_that_does_not_exist() -> None:
    *_, message = run("print('imported')", NEURON_EXT_CPU_ISA="mmx").splitlines()
    for part in ("NEURON_EXT_CPU_ISA", "mmx", "portable"):
        assert part in message


def test_the_environment_can_insist_on_float32_arithmetic() -> None:
    code = """
torch.set_float32_matmul_precision("medium")
functional.linear(torch.ones(99, 99), torch.ones(99, 99))
print("bf16" in backends.last_kernel())
"""
    splits = "avx512_bf16" in backends.supported_cpu_isas()
    assert run(code).splitlines()[-1] == str(splits)
    assert run(code, NEURON_EXT_FP32="strict") == "False"
    *_, message = run("print('imported')", NEURON_EXT_FP32="sloppy").splitlines()
    assert "NEURON_EXT_FP32=sloppy" in message


STATE = """
import os, sys
import torch
from torch import nn

def state():
    smallest = torch.tensor([1e-40]) * 0.5, 5e-324 / 2 + 5e-324  # gone where they are flushed to 0
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    modes = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    defaults = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    functions = nn.functional.linear, torch.sigmoid, nn.Linear.forward, nn.Sigmoid.forward
    process = dict(os.environ), sys.flags, sys.getswitchinterval(), torch.get_rng_state().tolist()
    return smallest, threads, modes, defaults, functions, process

before = state()
import neuron_ext
print(before == state())
"""


def test_importing_changes_nothing_else() -> None:
    """Threads, rounding of small numbers, random numbers, modes, environment, torch's functions."""
    result = subprocess.run(
        [sys.executable, "-c", STATE], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "True", result.stderr
