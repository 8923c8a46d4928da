"""The modules beside torch's: state, initialisation, wrappers, hooks, and training step by step."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, name_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, stateless

import neuron_ext

WIDTHS = [4, 5, 7, 3]


def torch_mlp(
    widths: list[int], output_activation: str | None = None, **kwargs: Any
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m, **kwargs), nn.Sigmoid()]
    return nn.Sequential(*(layers if output_activation else layers[:-1]))


def torch_linear_sigmoid(*args: Any, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(*args, **kwargs), nn.Sigmoid())


class TorchLinearSigmoid(nn.Linear):
    """With the keys of one linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(input))


# name -> our module and torch's, each made from keyword arguments
PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "Linear": (
        lambda **kw: neuron_ext.Linear(4, 3, **kw),
        lambda **kw: nn.Linear(4, 3, **kw),
    ),
    "LinearSigmoid": (
        lambda **kw: neuron_ext.LinearSigmoid(4, 3, **kw),
        lambda **kw: TorchLinearSigmoid(4, 3, **kw),
    ),
    "MLP": (
        lambda **kw: neuron_ext.MLP(WIDTHS, **kw),
        lambda **kw: torch_mlp(WIDTHS, **kw),
    ),
    "MLP ending in a sigmoid": (
        lambda **kw: neuron_ext.MLP(WIDTHS, output_activation="sigmoid", **kw),
        lambda **kw: torch_mlp(WIDTHS, "sigmoid", **kw),
    ),
}
each_pair = pytest.mark.parametrize(("ours", "torchs"), PAIRS.values(), ids=PAIRS.keys())
Make = Callable[..., nn.Module]


def twins(ours: Make, torchs: Make, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """One of each from the same place in the random stream."""
    state = torch.get_rng_state()
    mine = ours(**kwargs)
    torch.set_rng_state(state)
    return mine, torchs(**kwargs)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same_parameters(ours: nn.Module, torchs: nn.Module) -> None:
    mine, theirs = dict(ours.named_parameters()), dict(torchs.named_parameters())
    assert list(mine) == list(theirs)
    for name in mine:
        assert type(mine[name]) is nn.Parameter
        assert torch.equal(mine[name], theirs[name]), name


# ---- what they are


def test_they_are_torchs_modules() -> None:
    assert issubclass(neuron_ext.Linear, nn.Linear)
    assert issubclass(neuron_ext.LinearSigmoid, nn.Linear)
    assert issubclass(neuron_ext.Sigmoid, nn.Sigmoid)
    assert issubclass(neuron_ext.MLP, nn.Sequential)


@each_pair
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_initialisation_and_random_stream(ours: Make, torchs: Make, bias: bool) -> None:
    torch.manual_seed(11)
    mine, next_of_mine = ours(bias=bias), torch.rand(3)
    torch.manual_seed(11)
    theirs, next_of_theirs = torchs(bias=bias), torch.rand(3)
    assert_same_parameters(mine, theirs)
    assert torch.equal(next_of_mine, next_of_theirs)
    for module in (*mine.modules(), *theirs.modules()):
        if isinstance(module, nn.Linear):
            torch.manual_seed(12)
            module.reset_parameters()
    assert_same_parameters(mine, theirs)


@each_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dtype_and_device_arguments(ours: Make, torchs: Make, dtype: torch.dtype) -> None:
    mine, theirs = twins(ours, torchs, dtype=dtype, device="cpu")
    assert_same_parameters(mine, theirs)
    assert {p.dtype for p in mine.parameters()} == {dtype}
    on_meta = ours(device="meta", dtype=dtype)
    assert all(p.is_meta for p in on_meta.parameters())
    assert on_meta(torch.empty(2, 4, device="meta", dtype=dtype)).shape == (2, 3)


def test_repr() -> None:
    assert repr(neuron_ext.Linear(4, 3)) == repr(nn.Linear(4, 3))
    assert neuron_ext.LinearSigmoid(4, 3, bias=False).extra_repr() == (
        "in_features=4, out_features=3, bias=False"
    )
    assert repr(neuron_ext.LinearSigmoid(4, 3)) == (
        "LinearSigmoid(in_features=4, out_features=3, bias=True)"
    )
    assert repr(neuron_ext.Sigmoid()) == repr(nn.Sigmoid())
    assert repr(neuron_ext.MLP(WIDTHS)) == repr(torch_mlp(WIDTHS)).replace("Sequential", "MLP")


# ---- state


@each_pair
def test_state_goes_both_ways(ours: Make, torchs: Make) -> None:
    mine, theirs, x = ours(), torchs(), torch.randn(5, 4)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    assert_close(mine(x), theirs(x))
    mine = ours()
    theirs.load_state_dict(mine.state_dict())
    assert_close(mine(x), theirs(x))
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata


@each_pair
def test_loading_by_assignment(ours: Make, torchs: Make) -> None:
    mine, theirs, x = ours(device="meta"), torchs(), torch.randn(5, 4)
    mine.load_state_dict(theirs.state_dict(), assign=True)
    assert_close(mine(x), theirs(x))
    for name, parameter in mine.named_parameters():
        assert parameter.data_ptr() == theirs.state_dict()[name].data_ptr()
    mine.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()}, assign=True)
    assert mine(x.double()).dtype == torch.float64


@each_pair
def test_wrong_state_is_refused_as_by_torch(ours: Make, torchs: Make) -> None:
    mine, theirs = ours(), torchs()
    state = mine.state_dict()
    first = next(iter(state))
    for wrong in (
        {k: v for k, v in state.items() if k != first},
        state | {"more": torch.ones(1)},
        state | {first: torch.ones(9, 9)},
    ):
        for module in (mine, theirs):
            with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
                module.load_state_dict(wrong)


@pytest.mark.parametrize(
    "module",
    [
        neuron_ext.Linear(4, 3),
        neuron_ext.LinearSigmoid(4, 3, bias=False),
        neuron_ext.Sigmoid(),
        neuron_ext.MLP(WIDTHS),
        neuron_ext.MLP(WIDTHS, output_activation="sigmoid").eval(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_copies(module: nn.Module) -> None:
    def through_file(m: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(m, file)
        file.seek(0)
        loaded: nn.Module = torch.load(file, weights_only=False)
        return loaded

    x = torch.randn(5, 4)
    for make in (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_file):
        twin = make(module)
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert twin.training == module.training
        assert torch.equal(twin(x), module(x))
    twin = copy.deepcopy(module)
    for p, q in zip(twin.parameters(), module.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr()
        assert p.requires_grad


@each_pair
def test_moving_and_converting(ours: Make, torchs: Make) -> None:
    for convert in (
        lambda m: m.double(),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.half().float(),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.requires_grad_(False),
        lambda m: m.share_memory(),
    ):
        mine, theirs = twins(ours, torchs)
        before = list(mine.parameters())
        mine, theirs = convert(mine), convert(theirs)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert (p.dtype, p.device, p.requires_grad) == (q.dtype, q.device, q.requires_grad)
        kept = [a is b for a, b in zip(before, mine.parameters(), strict=True)]
        assert len(set(kept)) == 1
        with torch.no_grad():
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                q.copy_(p.fill_(0.25))
        x = torch.randn(5, 4).to(next(mine.parameters()).dtype)
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-2, atol=1e-2)


@each_pair
def test_skip_init(ours: Make, torchs: Make) -> None:
    state = torch.get_rng_state()
    for cls, args in (
        (neuron_ext.Linear, (4, 3)),
        (neuron_ext.LinearSigmoid, (4, 3)),
        (neuron_ext.MLP, (WIDTHS,)),
    ):
        module = nn.utils.skip_init(cls, *args)
        assert type(module) is cls
        assert all(p.device.type == "cpu" for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_state_under_a_default_device_and_dtype() -> None:
    with torch.device("meta"):
        assert neuron_ext.MLP(WIDTHS)[0].weight.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        module = neuron_ext.Linear(4, 3)
        assert module.weight.dtype == torch.float64
        assert module(torch.randn(4)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# ---- calling


@each_pair
@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 3)], ids=str)
def test_forward_and_gradients_as_torch(
    ours: Make, torchs: Make, lead: tuple[int, ...], isa: str
) -> None:
    for bias in (True, False):
        modules = twins(ours, torchs, bias=bias)
        x = torch.randn(*lead, 4)
        outputs, grads = [], []
        for module in modules:
            leaf = x.clone().requires_grad_()
            outputs.append(module(leaf))
            outputs[-1].square().sum().backward()
            grads.append([leaf.grad, *(p.grad for p in module.parameters())])
        assert_close(*outputs)
        for mine, theirs in zip(*grads, strict=True):
            assert mine is not None
            assert theirs is not None
            assert_close(mine, theirs)


def test_sigmoid_module() -> None:
    x = torch.randn(3, 4).T
    assert_close(neuron_ext.Sigmoid()(x), nn.Sigmoid()(x))
    assert list(neuron_ext.Sigmoid().state_dict()) == []


@each_pair
def test_functional_call(ours: Make, torchs: Make) -> None:
    mine, theirs, x = ours(), torchs(), torch.randn(5, 4)
    new = {k: torch.randn_like(v) for k, v in mine.state_dict().items()}
    expected = torch.func.functional_call(theirs, new, (x,))
    assert_close(torch.func.functional_call(mine, new, (x,)), expected)
    with pytest.warns(FutureWarning):
        assert_close(stateless.functional_call(mine, new, (x,)), expected)
    assert not torch.equal(mine(x), expected)


@each_pair
def test_parameters_changed_in_place_or_replaced(ours: Make, torchs: Make) -> None:
    modules = twins(ours, torchs)
    x = torch.randn(5, 4)
    before = modules[0](x)
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.mul_(2).add_(0.125)
    assert not torch.equal(modules[0](x), before)
    assert_close(modules[0](x), modules[1](x))
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.Linear):
                child.weight = nn.Parameter(torch.full_like(child.weight, 0.5))
                child.bias = None
    assert_close(modules[0](x), modules[1](x))


# ---- wrappers that replace the parameters or watch the call


def each_linear(module: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


WRAPPERS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "own parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m, "weight", nn.Tanh()
    ),
    "parametrized bias": lambda m: nn.utils.parametrize.register_parametrization(
        m, "bias", nn.Tanh()
    ),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@each_pair
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_wrapped_parameters(ours: Make, torchs: Make, wrap: Callable[[nn.Linear], Any]) -> None:
    modules = twins(ours, torchs)
    for module in modules:
        for linear in list(each_linear(module)):
            torch.manual_seed(5)
            wrap(linear)
    mine, theirs = modules
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for _ in range(2):
        x = torch.randn(5, 4)
        outputs = []
        for module in modules:
            torch.manual_seed(6)
            outputs.append(module(x))
            outputs[-1].square().sum().backward()
        assert_close(*outputs)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in (*mine.parameters(), *theirs.parameters()):
                p.add_(0.01)


def record(calls: list[str], name: str, register: str, change: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, *args: Any) -> Any:
        calls.append(f"{name} {type(module).__name__.removeprefix('Torch')}")
        if not change:
            return None
        # A full backward hook gets and may change grad_input, the others their last argument.
        value = args[0] if register == "register_full_backward_hook" else args[-1]
        return tuple(2 * v for v in value) if isinstance(value, tuple) else 2 * value

    return hook


@each_pair
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_all_children_run(ours: Make, torchs: Make, register: str, change: bool) -> None:
    """Once each, in torch's order, and what they return counts."""
    modules = twins(ours, torchs, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    seen, results = [], []
    for module in modules:
        calls: list[str] = []
        handles = [
            getattr(child, register)(record(calls, str(i), register, change))
            for i, child in enumerate(module.modules())
            if i or not isinstance(module, nn.Sequential)
        ]
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        seen.append(calls)
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        for handle in handles:
            handle.remove()
        module(x)
        assert len(calls) == len(handles)
    assert seen[0] == seen[1]
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None
        assert_close(mine, theirs)


def test_a_hook_on_one_child_and_on_the_stack() -> None:
    mlp, x, calls = neuron_ext.MLP(WIDTHS), torch.randn(5, 4), []
    mlp[2].register_forward_hook(lambda *_: calls.append("child"))
    mlp.register_forward_hook(lambda *_: calls.append("stack"))
    mlp.register_forward_pre_hook(lambda *_: calls.append("before"))
    mlp(x)
    assert calls == ["before", "child", "stack"]


def test_global_hooks_see_all_children() -> None:
    mlp, x = neuron_ext.MLP(WIDTHS), torch.randn(5, 4)
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(type(module).__name__)
    )
    try:
        mlp(x)
    finally:
        handle.remove()
    assert calls == ["Linear", "Sigmoid", "Linear", "Sigmoid", "Linear", "MLP"]


def test_replaced_children_run() -> None:
    x = torch.randn(5, 4)
    replacements: dict[str, Callable[[nn.Sequential], Any]] = {
        "ReLU for a sigmoid": lambda m: m.__setitem__(1, nn.ReLU()),
        "torch's own classes": lambda m: m.__setitem__(1, nn.Sigmoid()),
        "a linear layer of torch": lambda m: m.__setitem__(2, nn.Linear(5, 7)),
        "an identity for a layer": lambda m: m.__setitem__(4, nn.Identity()),
        "dropout after it": lambda m: m.append(nn.Dropout(0.0)),
        "one more sigmoid": lambda m: m.append(neuron_ext.Sigmoid()),
        "two layers in a row": lambda m: m.append(neuron_ext.Linear(3, 3)),
        "without the last": lambda m: m.pop(-1),
        "without a sigmoid": lambda m: m.__delitem__(1),
        "one in front": lambda m: m.insert(0, nn.Tanh()),
        "a subclass": lambda m: m.__setitem__(0, Doubled(4, 5)),
        "a layer with its own forward": lambda m: setattr(m[0], "forward", lambda t: t.new_ones(5)),
        "a fused layer": lambda m: m.__setitem__(0, neuron_ext.LinearSigmoid(4, 5)),
        "no children": lambda m: [m.pop(0) for _ in list(m)],
    }
    for name, replace in replacements.items():
        mlp = neuron_ext.MLP(WIDTHS)
        replace(mlp)
        expected = x
        for child in mlp:
            expected = child(expected)
        assert_close(mlp(x), expected)
        assert repr(mlp), name


class Doubled(neuron_ext.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_indexing_and_slicing() -> None:
    mlp, x = neuron_ext.MLP(WIDTHS, output_activation="sigmoid"), torch.randn(5, 4)
    reference = torch_mlp(WIDTHS, "sigmoid")
    reference.load_state_dict(mlp.state_dict())
    assert len(mlp) == len(reference) == 6
    for index in (0, 1, -1, -2):
        assert mlp[index] is list(mlp)[index]
    for index in (slice(0, 2), slice(None, 3), slice(None, -1), slice(None)):
        part = mlp[index]
        assert [id(m) for m in part] == [id(m) for m in list(mlp)[index]]
        assert_close(part(x), reference[index](x))
    assert_close(mlp[2:](mlp[:2](x)), mlp(x))
    with pytest.raises(IndexError):
        mlp[6]
    assert len(neuron_ext.MLP(WIDTHS) + nn.Sequential(nn.ReLU())) == 6


# ---- training


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    ],
    ids=["SGD", "momentum", "Adam", "AdamW"],
)
@each_pair
def test_training_step_by_step(
    ours: Make, torchs: Make, optimizer: Callable[..., torch.optim.Optimizer], isa: str
) -> None:
    """In float64, where what rounding adds in 25 steps stays far below 1e-9."""
    modules = twins(ours, torchs, dtype=torch.float64)
    optimizers = [optimizer(module.parameters()) for module in modules]
    x, target = torch.randn(16, 4, dtype=torch.float64), torch.rand(16, 3, dtype=torch.float64)
    first = None
    for _ in range(25):
        losses = []
        for module, steps in zip(modules, optimizers, strict=True):
            steps.zero_grad()
            loss = nn.functional.mse_loss(module(x), target)
            loss.backward()
            steps.step()
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
        first = losses[0] if first is None else first
    assert first is not None
    assert losses[0] < first
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_training_in_every_dtype_learns(dtype: torch.dtype, isa: str) -> None:
    """A neuron learns which side of a line points lie on."""
    module = neuron_ext.LinearSigmoid(2, 1, dtype=dtype)
    x = torch.randn(64, 2, dtype=torch.float64)
    target = (x.sum(1, keepdim=True) > 0).to(dtype)
    steps = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(200):
        steps.zero_grad()
        (module(x.to(dtype)) - target).square().mean().backward()
        steps.step()
    assert ((module(x.to(dtype)) > 0.5) == (target > 0.5)).float().mean() > 0.9


def test_gradients_accumulate_and_frozen_layers_stay() -> None:
    mine, theirs = twins(lambda: neuron_ext.MLP(WIDTHS), lambda: torch_mlp(WIDTHS))
    for module in (mine, theirs):
        module[0].requires_grad_(False)
        for _ in range(2):
            torch.manual_seed(1)
            module(torch.randn(5, 4)).sum().backward()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not q.requires_grad)
        if p.grad is not None and q.grad is not None:
            assert_close(p.grad, q.grad)


def test_inside_torchs_containers() -> None:
    x = torch.randn(5, 4)
    mlp = neuron_ext.MLP(WIDTHS)
    model = nn.Sequential(
        mlp, nn.Softmax(dim=-1), nn.ModuleDict({"a": neuron_ext.Linear(3, 2)})["a"]
    )
    expected = mlp[2:](mlp[:2](x)).softmax(-1) @ model[2].weight.T + model[2].bias
    assert_close(model(x), expected)
    assert sum(p.numel() for p in model.parameters()) == 25 + 42 + 24 + 8
