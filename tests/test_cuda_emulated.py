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
    """The library of emulated kernels. Each call runs in another way that a GPU, or an older one,
    might take."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.neuron_ext_error.restype = ctypes.c_char_p
        settings = itertools.product(range(3), (False, True), (False, True), (-1, 0, 1), (90, 80))
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

    def mlp(self, x, weights, biases, output_activation=None, keeps_hidden=True, saved=None):
        """The outputs of a stack's layers; those of hidden ones are nan if they aren't kept.

        With ``saved`` outputs of layers, theirs are multiplied by the sigmoid's gradient instead,
        and the sums of those outputs' columns are returned as well.
        """
        widths = [x.shape[1], *(len(weight) for weight in weights)]
        outputs = [torch.full((len(x), n), float("nan"), dtype=x.dtype) for n in widths[1:]]
        sums = [torch.full((n,), float("nan"), dtype=x.dtype) for n in widths[1:]]
        has_saved = [y is not None for y in saved or [None] * len(weights)]
        strides = [*x.stride()]
        for weight, bias in zip(weights, biases, strict=True):
            strides += [*weight.stride(), bias.stride(0) if bias is not None else 0]
        kept = [keeps_hidden] * (len(weights) - 1) + [True]
        self.call(
            "neuron_ext_mlp",
            *(DTYPES.index(x.dtype), len(weights), (len(x), *widths), strides),
            *(output_activation == "sigmoid", x),
            [weight.data_ptr() for weight in weights],
            [bias.data_ptr() if bias is not None else 0 for bias in biases],
            [y.data_ptr() if y is not None else 0 for y in saved or [None] * len(weights)],
            [y.data_ptr() if keep else 0 for y, keep in zip(outputs, kept, strict=True)],
            [y.data_ptr() if has else 0 for y, has in zip(sums, has_saved, strict=True)],
        )
        return outputs if saved is None else (outputs, sums)

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


def assert_layer(y, x, weight, bias, applies_sigmoid=True):
    """Within what sums and one rounding may be off by."""
    b = torch.zeros(1) if bias is None else bias
    exact = x.double() @ weight.double().t() + b.double()
    magnitude = x.double().abs() @ weight.double().abs().t() + b.double().abs()
    if applies_sigmoid:
        exact, magnitude = torch.sigmoid(exact), magnitude / 4
    sums = EPSILON.get(y.dtype, 2**-24) * (x.shape[1] + 4)
    bound = sums * magnitude + torch.finfo(y.dtype).eps * exact.abs() + smallest(y.dtype)
    assert ((y.double() - exact).abs() <= bound).all(), (x.shape, weight.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_random_shapes_and_strides(kernels, dtype):
    for turn in range(12):
        # Multiples of 8: rows that begin at multiples of 16 bytes, for tensor cores.
        unit = 8 if turn % 4 < 2 else 1
        m, n, k = (unit * torch.randint(1, 150 // unit, (3,))).tolist()
        step = torch.randint(1, 3, (1,)).item()
        x = torch.randn(m, k * step).to(dtype)[:, ::step]
        weight = (torch.randn(k, n) / k**0.5).to(dtype).t()
        bias = torch.randn(1).to(dtype).expand(n)
        y = layer(kernels, x, weight, bias)
        assert_layer(y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacks_of_random_shapes_and_strides(kernels, dtype):
    for turn in range(8):
        rows, depth = torch.randint(1, 70, ()).item(), torch.randint(1, 5, ()).item()
        widths = torch.randint(1, 150 if turn % 4 == 0 else 129, (depth + 1,)).tolist()
        x = torch.randn(widths[0], rows).to(dtype).t() if turn % 2 else torch.randn(rows, widths[0])
        x = x.to(dtype)
        weights, biases = [], []
        for k, n in itertools.pairwise(widths):
            weight = (torch.randn(n, 2 * k) / k**0.5).to(dtype)[:, ::2]
            weights.append(weight if turn % 3 else weight.contiguous())
            biases.append(torch.randn(n).to(dtype) if len(biases) % 3 != 1 else None)
        activation = "sigmoid" if turn % 2 else None
        outputs = kernels.mlp(x, weights, biases, activation)
        inputs = [x, *outputs[:-1]]
        for i, (y, *of_layer) in enumerate(zip(outputs, inputs, weights, biases, strict=True)):
            assert_layer(y, *of_layer, applies_sigmoid=i + 1 < depth or activation == "sigmoid")
        if dtype == torch.float64:  # no approximations, and one kernel, both of which vary here
            alone = kernels.mlp(x, weights, biases, activation, keeps_hidden=False)
            assert torch.equal(alone[-1], outputs[-1])
            assert all(hidden.isnan().all() for hidden in alone[:-1])


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 600, 40), (5, 70, 300), (40, 128, 72), (300, 9, 2), (200, 3, 70)], ids=str
)
def test_layers_with_few_rows_or_columns(kernels, shape, dtype):
    batch, inputs, outputs = shape
    x = torch.randint(-3, 4, (batch, inputs)).to(dtype)
    weight = torch.randint(-3, 4, (outputs, inputs)).to(dtype)
    dy = torch.randint(-3, 4, (batch, outputs)).to(dtype)
    assert torch.equal(kernels.gemm(x, weight.t()), (x.double() @ weight.t().double()).to(dtype))
    y = torch.full_like(dy, 0.5)
    dz = dy.double() / 4
    assert torch.equal(kernels.gemm(dy, weight, saved=y), (dz @ weight.double()).to(dtype))
    dweight, dbias = kernels.gemm(dy.t(), x, saved=y.t(), sums_a=True)
    assert torch.equal(dweight, (dz.t() @ x.double()).to(dtype))
    assert torch.equal(dbias, dz.sum(0).to(dtype))


def test_gradients_of_a_stack(kernels):
    widths = (5, 17, 33, 8, 16, 3)
    x = torch.randn(21, widths[0], dtype=torch.float64, requires_grad=True)
    shapes = [(n, k) for k, n in itertools.pairwise(widths)]
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    y = x
    for weight in weights:
        y = torch.nn.functional.linear(torch.sigmoid(y) if y is not x else y, weight)
    dy = torch.randn_like(y)
    dx, *dweights = torch.autograd.grad(y, [x, *weights], dy)

    *hidden, _ = kernels.mlp(x, weights, [None] * len(weights))
    transposed = [weight.t() for weight in reversed(weights)]
    saved = [*reversed(hidden), None]
    (*dz, ours), sums = kernels.mlp(dy, transposed, [None] * len(weights), saved=saved)
    torch.testing.assert_close(ours, dx, rtol=1e-12, atol=1e-14)
    for of_layer, db in zip(dz, sums, strict=False):
        torch.testing.assert_close(db, of_layer.sum(0), rtol=1e-12, atol=1e-14)
    inputs = [x, *hidden]
    for of_layer, h, dweight in zip([*reversed(dz), dy], inputs, dweights, strict=True):
        torch.testing.assert_close(of_layer.t() @ h, dweight, rtol=1e-12, atol=1e-14)


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
