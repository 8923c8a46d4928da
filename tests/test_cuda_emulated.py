"""The CUDA kernels' own source on torch's CPU tensors, run by tests/cuda_emulator."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # as in DType
EPSILON = {torch.float32: 2**-24, torch.float64: 2**-53}  # of sums; 16-bit tensors' are f32


def smallest(dtype):
    """The distance between subnormal numbers."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


class Kernels:
    """The library of emulated kernels. Each call runs in another way that a GPU might take."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.neuron_ext_error.restype = ctypes.c_char_p
        settings = itertools.product(range(3), (False, True), (False, True), (-1, 0, 1))
        self.settings = itertools.cycle(settings)

    def call(self, name, *arguments):
        self.library.neuron_ext_set(*next(self.settings), 7)
        converted = [
            ctypes.c_void_p(argument.data_ptr())
            if isinstance(argument, torch.Tensor)
            else (ctypes.c_int64 * len(argument))(*argument)
            if isinstance(argument, (tuple, list))
            else argument
            for argument in arguments
        ]
        error = getattr(self.library, name)(*converted)
        assert error == 0, self.library.neuron_ext_error().decode()

    def gemm(self, a, b, bias=None, saved=None, applies_sigmoid=False, sums_a=False):
        """``a @ b + bias``, and the sums of a's rows; a times saved's sigmoid gradient if given."""
        (m, k), n = a.shape, b.shape[1]
        d = torch.full((m, n), float("nan"), dtype=a.dtype)
        a_sum = torch.full((m,), float("nan"), dtype=a.dtype) if sums_a else None
        strides = [*a.stride(), *b.stride(), d.stride(0)]
        strides += bias.stride() if bias is not None else [0]
        strides += saved.stride() if saved is not None else [0, 0]
        self.call(
            "neuron_ext_gemm",
            *(DTYPES.index(a.dtype), (m, n, k), strides, applies_sigmoid),
            *(a, b, bias, saved, d, a_sum),
        )
        return (d, a_sum) if sums_a else d

    def sigmoid(self, x, saved=None):
        """The sigmoid of x, or x times the sigmoid's gradient where it is `saved`."""
        y = torch.full(x.shape, float("nan"), dtype=x.dtype)
        # Dimension 0 is the innermost.
        describe = [t.stride()[::-1] for t in (x, x if saved is None else saved, y)]
        self.call(
            "neuron_ext_sigmoid",
            *(DTYPES.index(x.dtype), x.dim(), x.shape[::-1], *describe),
            *(x, saved, y),
        )
        return y


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "libcuda_kernels.so"
    csrc, emulator = ROOT / "csrc", ROOT / "tests" / "cuda_emulator"
    sources = [path for path in sorted(csrc.glob("cuda/*.cu")) if path.stem != "device"]
    names = ("async", "fiber", "library", "machine", "memory", "tensor_core")
    sources += [emulator / f"{name}.cpp" for name in names]
    folders = [csrc / "include", csrc / "cuda", csrc / "cpu", emulator]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-optimize-sibling-calls", "-w"]
    flags += ["-shared", "-fPIC", "-DNEURON_EXT_CUDA_EMULATOR", "-o", library, "-x", "c++"]
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run([compiler, *flags, *includes, *sources], check=True)
    return Kernels(library)


def layer(kernels, x, weight, bias):
    return kernels.gemm(x, weight.t(), bias, applies_sigmoid=True)


class Layer(torch.autograd.Function):
    """sigmoid(x wᵀ + b) and its gradients, all by the emulated kernels."""

    @staticmethod
    def forward(ctx, kernels, x, weight, bias):
        y = layer(kernels, x, weight, bias)
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, y = ctx.saved_tensors
        dx = ctx.kernels.gemm(dy, weight, saved=y)
        dweight, dbias = ctx.kernels.gemm(dy.t(), x, saved=y.t(), sums_a=True)
        return None, dx, dweight, dbias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_random_shapes_and_strides(kernels, dtype):
    for _ in range(12):
        m, n, k = torch.randint(1, 150, (3,)).tolist()
        step = torch.randint(1, 3, (1,)).item()
        x = torch.randn(m, k * step).to(dtype)[:, ::step]
        weight = (torch.randn(k, n) / k**0.5).to(dtype).t()
        bias = torch.randn(1).to(dtype).expand(n)
        y = layer(kernels, x, weight, bias)
        z = x.double() @ weight.double().t() + bias.double()
        magnitude = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
        exact = torch.sigmoid(z)
        sums = EPSILON.get(dtype, 2**-24) * (k + 4)
        bound = sums * magnitude / 4 + torch.finfo(dtype).eps * exact + smallest(dtype)
        assert ((y.double() - exact).abs() <= bound).all(), (m, n, k)


@pytest.mark.parametrize("shape", [(1, 5, 1), (3, 4, 2), (6, 2, 7)], ids=str)
def test_gradients(kernels, shape):
    batch, inputs, outputs = shape
    tensors = [
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((batch, inputs), (outputs, inputs), (outputs,))
    ]
    assert torch.autograd.gradcheck(lambda *t: Layer.apply(kernels, *t), tensors)
    # gradcheck is blind below a relative 1e-3; torch's own gradients aren't.
    dy = torch.randn(batch, outputs, dtype=torch.float64)
    ours = torch.autograd.grad(Layer.apply(kernels, *tensors), tensors, dy)
    y = torch.sigmoid(torch.nn.functional.linear(*tensors))
    for mine, theirs in zip(ours, torch.autograd.grad(y, tensors, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_long_batches_are_cut(kernels):
    x = torch.randint(-3, 4, (5000, 3)).float()
    dy = torch.randint(-3, 4, (5000, 2)).float()
    y = torch.full_like(dy, 0.5)
    dweight, dbias = kernels.gemm(dy.t(), x, saved=y.t(), sums_a=True)
    assert torch.equal(dweight, (dy / 4).t() @ x)
    assert torch.equal(dbias, dy.sum(0) / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_of_any_strides(kernels, dtype):
    base = (4 * torch.randn(5, 6, 7)).to(dtype)
    for x in (base, base.permute(2, 0, 1), base[:, ::2, 1:], base[0, 0, 0], base[:, :0]):
        y = kernels.sigmoid(x)
        # In f64 torch's sigmoid is off by up to 2.4 units of the last place itself.
        eps, atol = torch.finfo(dtype).eps, smallest(dtype)
        rtol = 4 * eps if dtype == torch.float64 else eps
        torch.testing.assert_close(y.double(), torch.sigmoid(x.double()), rtol=rtol, atol=atol)
        dx = kernels.sigmoid(x, saved=y)
        exact = x.double() * y.double() * (1 - y.double())
        torch.testing.assert_close(dx.double(), exact, rtol=2 * eps, atol=atol)
