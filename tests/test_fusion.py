"""fuse() and unfuse(): what runs as one operation, what is left alone and why, what stays."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import neuron_ext
from neuron_ext import LinearSigmoid, fuse, unfuse

SCALE = 2.0


class Seed(nn.Module):
    """A 4-5-7-3 network, its sigmoids written out in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 5)
        self.fc2 = nn.Linear(5, 7)
        self.fc3 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = torch.sigmoid(x)
        x = self.fc2(x)
        x = torch.sigmoid(x)
        x = self.fc3(x)
        return torch.sigmoid(x)


class Parts(nn.Module):
    """Submodules for a forward to be written with: square, so that every order fits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4, bias=False)
        self.act = nn.Sigmoid()
        self.dropout = nn.Dropout(0.5)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        self.shift = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.ones(4))
        self.scale = 2.0
        self.seen: list[Tensor] = []


def with_forward(forward: Callable[..., Any]) -> Parts:
    torch.manual_seed(0)
    model: Parts = type("Net", (Parts,), {"forward": forward})()
    return model


class CountSigmoids(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoids = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.sigmoids += func is torch.ops.aten.sigmoid.default
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """How many fused operations and how many sigmoids of torch one forward runs."""
    spy: AbstractContextManager[mock.Mock] = mock.patch.object(
        neuron_ext.functional, "linear_sigmoid", wraps=neuron_ext.functional.linear_sigmoid
    )
    with spy as fused, CountSigmoids() as mode:
        model(*inputs)
    return fused.call_count, mode.sigmoids


def outcome(model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """Output and all gradients of one run in training mode with a fixed seed."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    model.zero_grad()
    torch.manual_seed(1)
    output = model(*inputs)
    output.square().sum().backward()
    return [output.detach(), *(t.grad for t in (*inputs, *model.parameters()))]


def assert_same(model: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    torch.testing.assert_close(outcome(model, *inputs), outcome(reference, *inputs))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sigmoid())


x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


# ---- neighbours in a Sequential ------------------------------------------------------------------


def test_sequential_pairs_become_one_module_and_an_identity() -> None:
    model = sequential()
    reference = copy.deepcopy(model)
    assert fuse(model) is model
    assert [type(m) for m in model] == [LinearSigmoid, nn.Identity] * 2
    assert count(model, x) == (2, 0)
    assert count(reference, x) == (0, 2)
    assert_same(model, reference, x)


def test_sequential_at_any_depth_keeps_keys_and_parameters() -> None:
    class Block(nn.Sequential):
        """A subclass without a forward of its own is a Sequential."""

    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(linear=nn.Linear(4, 4), squash=nn.Sigmoid()))
    blocks = nn.ModuleDict({"a": Block(nn.Linear(4, 4), nn.Sigmoid(), nn.Sequential(inner))})
    reference = copy.deepcopy(blocks)
    parameters = dict(blocks.named_parameters())
    fuse(blocks)
    assert count(blocks["a"], x) == (2, 0)
    assert list(blocks.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in blocks.named_modules()] == [
        name for name, _ in reference.named_modules()
    ]
    for name, parameter in blocks.named_parameters():
        assert parameter is parameters[name]
    assert_same(blocks["a"], reference["a"], x)


def test_sequential_without_bias_and_with_our_own_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False), neuron_ext.Sigmoid(), neuron_ext.Linear(5, 3), nn.Sigmoid()
    )
    reference = copy.deepcopy(model)
    fuse(model)
    assert count(model, x) == (2, 0)
    assert list(model.state_dict()) == ["0.weight", "2.weight", "2.bias"]
    assert_same(model, reference, x)


def test_only_pairs_are_fused() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Sigmoid(), nn.Linear(4, 4))
    classes = [type(m) for m in model]
    assert [type(m) for m in fuse(model)] == classes
    linear = nn.Linear(4, 4)
    assert type(fuse(linear)) is nn.Linear


def test_flags_and_attributes_stay() -> None:
    model = sequential()
    model[0].eval()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[0].note = "kept"
    fuse(model)
    assert [m.training for m in model] == [False, True, True, False]
    assert not model[0].weight.requires_grad
    assert model[0].note == "kept"
    unfuse(model)
    assert [m.training for m in model] == [False, True, True, False]
    assert model[0].note == "kept"


def test_a_sigmoid_may_be_in_several_places() -> None:
    sigmoid = nn.Sigmoid()
    model = nn.Sequential(nn.Linear(4, 4), sigmoid, nn.Linear(4, 4), sigmoid, nn.ReLU(), sigmoid)
    reference = copy.deepcopy(model)
    fuse(model)
    assert model[5] is sigmoid
    assert count(model, x) == (2, 1)
    assert_same(model, reference, x)


def test_layers_may_share_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid())
    model[2].weight = model[0].weight
    reference = copy.deepcopy(model)
    fuse(model)
    assert count(model, x) == (2, 0)
    assert model[2].weight is model[0].weight
    assert_same(model, reference, x)


def test_the_layer_itself_stays_linear_for_who_holds_it() -> None:
    model = sequential()
    linear = model[0]
    fuse(model)
    torch.testing.assert_close(linear(x), functional.linear(x, model[0].weight, model[0].bias))
    model[0].register_forward_hook(lambda *_: pytest.fail("not a hook of the old layer"))
    linear(x)


# ---- a forward of the user's own -----------------------------------------------------------------


def functions(self: Any, x: Tensor) -> Tensor:
    return functional.sigmoid(self.fc1(torch.sigmoid(self.fc2(x))))


def method(self: Any, x: Tensor) -> Tensor:
    return self.fc2(x).sigmoid()


def expit(self: Any, x: Tensor) -> Tensor:
    return torch.special.expit(self.fc1(x))


def long_names(self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.sigmoid(self.fc1(x))


def one_module_for_all(self: Any, input: Tensor) -> Tensor:
    return self.act(self.fc1(self.act(self.fc2(input))))


def branches(self: Any, x: Tensor) -> Tensor:
    z1, z2 = self.fc1(x), self.fc2(x)
    return torch.cat([torch.sigmoid(z2), torch.sigmoid(z1), z2.relu() * 0], -1)


def same_layer_twice(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(torch.sigmoid(self.fc1(x)))) + self.fc1(x)


def loop(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = torch.sigmoid(layer(x))
    return x


def loop_to_the_last_but_one(self: Any, x: Tensor) -> Tensor:
    for i, layer in enumerate(self.layers):
        x = layer(x)
        if i < len(self.layers) - 1:
            x = torch.sigmoid(x)
    return x


def slices(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers[:-1]:
        x = torch.sigmoid(layer(x))
    return self.layers[-1](x)


def own_state(self: Any, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).to(torch.float32)
    return torch.sigmoid(self.fc1(x + self.offset)) * self.shift + self.fc2.weight.sum()


def dropout_and_sequential(self: Any, x: Tensor) -> Tensor:
    return self.net(self.dropout(torch.sigmoid(self.fc1(x))))


@pytest.mark.parametrize(
    ("forward", "fused", "left"),
    [
        (functions, 2, 0),
        (method, 1, 0),
        (expit, 1, 0),
        (long_names, 1, 0),
        (one_module_for_all, 2, 0),
        (branches, 1, 1),
        (same_layer_twice, 2, 0),
        (loop, 3, 0),
        (loop_to_the_last_but_one, 2, 0),
        (slices, 2, 0),
        (own_state, 1, 0),
        (dropout_and_sequential, 2, 0),
    ],
)
def test_forward_is_fused(forward: Callable[..., Any], fused: int, left: int) -> None:
    model = with_forward(forward)
    reference = copy.deepcopy(model)
    fuse(model)
    assert count(model, x) == (fused, left)
    assert_same(model, reference, x)
    assert list(model.state_dict()) == list(reference.state_dict())


def test_seed_network_is_fused_and_stays_what_it_is() -> None:
    torch.manual_seed(0)
    model = Seed()
    reference = copy.deepcopy(model)
    parameters = list(model.parameters())
    assert fuse(model) is model
    assert isinstance(model, Seed)
    assert type(model).__name__ == "Seed"
    assert count(model, x) == (3, 0)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == repr(reference)
    assert_same(model, reference, x)
    assert_same(model.double(), reference.double(), x.double())
    assert model.eval().training is False
    assert model(x=x.double()).shape == (6, 3)
    with pytest.raises(TypeError):
        model(y=x)


def test_class_without_source() -> None:
    namespace: dict[str, Any] = {"torch": torch, "Seed": Seed}
    body = "class Net(Seed):\n    def forward(self, x): return torch.sigmoid(self.fc1(x))\n"
    exec(body, namespace)
    model = fuse(namespace["Net"]())
    assert count(model, x) == (1, 0)


def test_each_module_is_judged_by_itself() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([with_forward(functions), with_forward(uses_training)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Outer()
    reference = copy.deepcopy(model)
    fuse(model)
    assert count(model, x) == (2, 1)
    assert_same(model, reference, x)


def test_other_methods_still_get_a_linear_layer() -> None:
    class AutoEncoder(Seed):
        def encode(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc1(x))

    model = AutoEncoder()
    expected = model.encode(x)
    fuse(model)
    assert count(model, x) == (3, 0)
    torch.testing.assert_close(model.encode(x), expected)


# ---- what is left as it is, and why --------------------------------------------------------------


def uses_training(self: Any, x: Tensor) -> Tensor:
    x = torch.sigmoid(self.fc1(x))
    return x if self.training else 2 * x


def functional_dropout(self: Any, x: Tensor) -> Tensor:
    return functional.dropout(torch.sigmoid(self.fc1(x)), training=self.training)


def plain_attribute(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)) * self.scale


def global_value(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)) * SCALE


def keeps_activations(self: Any, x: Tensor) -> Tensor:
    x = torch.sigmoid(self.fc1(x))
    self.seen.append(x)
    return x


def writes_attribute(self: Any, x: Tensor) -> Tensor:
    x = torch.sigmoid(self.fc1(x))
    self.last = x
    return x


def writes_buffer(self: Any, x: Tensor) -> Tensor:
    self.offset *= 1
    return torch.sigmoid(self.fc1(x)) * self.offset


def in_place(self: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(self.fc1(x)) * 2
    y += 1
    return y


def noise(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)) + torch.rand(4)


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = torch.sigmoid(self.fc1(x))
    return x * self.shift


def set_grad(self: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(torch.is_grad_enabled())
    return torch.sigmoid(self.fc1(x))


def prints(self: Any, x: Tensor) -> Tensor:
    print(end="")
    return torch.sigmoid(self.fc1(x))


def optional_argument(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = torch.sigmoid(self.fc1(x))
    return x if mask is None else x * mask


def on_values(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)) if x.sum() > 0 else self.fc1(x)


def on_shape(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)) if x.shape[0] > 3 else self.fc1(x)


def our_functions(self: Any, x: Tensor) -> Tensor:
    return neuron_ext.functional.sigmoid(self.fc1(x))


def star_arguments(self: Any, *args: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(*args))


def keyword_only(self: Any, x: Tensor, *, times: int = 1) -> Tensor:
    return torch.sigmoid(self.fc1(x)) * times


def swallows_errors(self: Any, x: Tensor) -> Tensor:
    try:
        return torch.sigmoid(self.fc1(x)) if x else x
    except RuntimeError:
        return torch.sigmoid(self.fc2(x))


def closure(self: Any, x: Tensor) -> Tensor:
    return (lambda z: torch.sigmoid(z))(self.fc1(x))


@torch.no_grad()
def decorated(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(x)).detach() * self.shift


def output_used_twice(self: Any, x: Tensor) -> Tensor:
    z = self.fc1(x)
    return torch.sigmoid(z) + z


def keyword_call(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.fc1(input=x))


def member_of_sequential(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.net(x)) + self.net[0](x)


def members_of_sequential(self: Any, x: Tensor) -> Tensor:
    outputs = [x]
    for layer in self.net:
        outputs.append(layer(outputs[-1]))
    return torch.cat(outputs)


def children_of_sequential(self: Any, x: Tensor) -> Tensor:
    return torch.cat([layer(x) for layer in self.net.children()])


def members_of_children(self: Any, x: Tensor) -> Tensor:
    return torch.cat([child[0](x) for child in self.children() if isinstance(child, nn.Sequential)])


def member_by_path(self: Any, x: Tensor) -> Tensor:
    layer: Tensor = self.get_submodule("net.0")(x)
    return layer


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (uses_training, "attribute training"),
        (functional_dropout, "attribute training"),
        (plain_attribute, "attribute scale"),
        (global_value, "SCALE"),
        (keeps_activations, "attribute seen"),
        (writes_attribute, "STORE_ATTR"),
        (writes_buffer, "that a graph doesn't record"),
        (in_place, "that a graph doesn't record"),
        (noise, ".rand"),
        (no_grad, ".no_grad"),
        (set_grad, ".set_grad_enabled"),
        (prints, "print"),
        (optional_argument, "that a graph doesn't record"),
        (on_values, "can't be traced"),
        (on_shape, "can't be traced"),
        (our_functions, "neuron_ext"),
        (star_arguments, "can't be traced"),
        (keyword_only, "keyword-only"),
        (swallows_errors, "that a graph doesn't record"),
        (closure, "contains functions"),
        (output_used_twice, "fc1 left as it is: its output is used elsewhere"),
        (keyword_call, "fc1 left as it is: it or its sigmoid is called with keyword"),
        (member_of_sequential, "looks up members"),
        (members_of_sequential, "looks up members"),
        (children_of_sequential, "looks up members"),
        (members_of_children, "looks up members"),
        (member_by_path, "looks up members"),
    ],
)
def test_forward_is_left_alone(
    forward: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_forward(forward)
    reference = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    attributes = dict(vars(model))
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        fuse(model)
    assert reason in caplog.text
    assert type(model) is type(reference)
    assert vars(model) == attributes
    assert model.seen == []
    assert torch.equal(torch.get_rng_state(), random_state)
    assert count(model, x)[0] == 0
    assert_same(model, reference, x)


def test_decorated_forward_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = with_forward(decorated)
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        fuse(model)
    assert "decorated" in caplog.text
    assert not model(x).requires_grad


def test_members_looked_up_by_another_method_stay(caplog: pytest.LogCaptureFixture) -> None:
    class Net(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        @property
        def first(self) -> nn.Module:
            return self.net[0]

    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        model = fuse(Net())
    assert "looks up members" in caplog.text
    assert type(model.first) is nn.Linear


def test_members_called_in_a_loop_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(sequential() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                y = block[0](x)
            return y

    model = fuse(Net())
    assert type(model.blocks[0][0]) is nn.Linear


def test_methods_that_keep_members_inside_are_no_obstacle() -> None:
    class Net(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def optimizer(self) -> torch.optim.Optimizer:
            self.net.train()
            return torch.optim.SGD(self.net.parameters(), 0.1)

    assert count(fuse(Net()), x) == (1, 0)


def hook(*_: Any) -> None:
    """Takes whatever a hook is given and changes nothing."""


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]
STATE_DICT_HOOKS = [
    "register_state_dict_post_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
]


@pytest.mark.parametrize("register", HOOKS + STATE_DICT_HOOKS)
@pytest.mark.parametrize("where", [0, 1])
def test_hooked_neighbours_are_left_alone(
    register: str, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = sequential()
    called = mock.Mock(return_value=None)
    getattr(model[where], register)(called)
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        fuse(model)
    assert "[0] left as it is" in caplog.text
    assert "hooks" in caplog.text
    assert count(model, x) == (1, 1)
    model(x.clone().requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert called.called


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("where", ["fc1", "act"])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_a_forward_are_not_bypassed(register: str, where: str, late: bool) -> None:
    model = with_forward(one_module_for_all)
    if late:
        fuse(model)
        assert count(model, x) == (2, 0)
    called = mock.Mock(return_value=None)
    handle = getattr(model.get_submodule(where), register)(called)
    fuse(model)
    # A hook on the sigmoid concerns both layers.
    assert count(model, x) == ((1, 1) if where == "fc1" else (0, 2))
    model(x.clone().requires_grad_()).sum().backward()
    assert called.called
    handle.remove()
    if late:
        assert count(model, x) == (2, 0)


def test_hooks_of_containers_and_parameters_stay() -> None:
    model = nn.Sequential(sequential())
    called = mock.Mock(return_value=None)
    model[0].register_forward_hook(called)
    model[0][0].weight.register_hook(called)
    fuse(model)
    assert count(model, x) == (2, 0)
    called.reset_mock()
    model(x).sum().backward()
    assert called.call_count == 2


def test_global_hooks_see_every_module(caplog: pytest.LogCaptureFixture) -> None:
    fused = fuse(with_forward(functions))
    seen: list[type] = []
    with register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
            model = fuse(sequential())
        assert "hooks" in caplog.text
        assert count(fused, x) == (0, 2)
    assert [type(m) for m in model] == [nn.Linear, nn.Sigmoid] * 2
    assert seen[:2] == [nn.Linear, nn.Linear]


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnSigmoid(nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnSequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for module in self:
            input = 2 * module(input)
        return input


def replaced_forward() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = lambda input: 2 * input  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    "linear",
    [
        lambda: OwnLinear(4, 4),
        replaced_forward,
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        lambda: nn.LazyLinear(4),
        lambda: LinearSigmoid(4, 4),
    ],
)
def test_other_linear_layers_are_left_alone(
    linear: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(linear(), nn.Sigmoid())
    classes = [type(m) for m in model]
    functional_model = with_forward(functions)
    functional_model.fc1 = functional_model.fc2 = linear()
    cls = type(functional_model)
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        fuse(model)
        fuse(functional_model)
    assert caplog.text.count("left as it is") == 3
    assert [type(m) for m in model] == classes
    assert type(functional_model) is cls
    assert model(x).shape == (6, 4)


def test_subclasses_of_sigmoid_and_sequential_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), OwnSigmoid(), OwnSequential(nn.Linear(4, 4), nn.Sigmoid())
    )
    reference = copy.deepcopy(model)
    fuse(model)
    assert type(model[0]) is nn.Linear
    assert [type(m) for m in model[2]] == [nn.Linear, nn.Sigmoid]
    assert_same(model, reference, x)


def test_a_layer_in_several_places_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Sigmoid(), nn.Sequential(linear, nn.Sigmoid()))
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        fuse(model)
    assert caplog.text.count("several places") == 2
    assert model[0] is linear
    assert_same(model, reference, x)


def test_a_container_in_several_places_is_one_place() -> None:
    shared = sequential()[:2]
    model = nn.ModuleList([shared, shared])
    fuse(model)
    assert model[0] is model[1]
    assert type(model[0][0]) is LinearSigmoid


@pytest.mark.parametrize("late", [False, True])
def test_parametrizations_are_not_bypassed(late: bool) -> None:
    model = Seed()
    if late:
        fuse(model)
    parametrizations.weight_norm(model.fc2)
    reference = copy.deepcopy(model)
    fuse(model)
    assert count(model, x) == (2, 1)
    assert_same(model, reference, x)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_before_fuse() -> None:
    model = with_forward(own_state)
    parametrize.register_parametrization(model, "shift", Double())
    cls = type(model)
    assert type(fuse(model)) is cls


def test_parametrized_after_fuse() -> None:
    model = fuse(with_forward(own_state))
    cls, before = type(model), model(x)
    parametrize.register_parametrization(model, "shift", Double())
    shifted = model(x)
    assert type(unfuse(model)) is not cls
    torch.testing.assert_close(model(x), shifted)
    torch.testing.assert_close(copy.deepcopy(model)(x), shifted)
    parametrize.remove_parametrizations(model, "shift", leave_parametrized=False)
    assert type(model) is cls
    torch.testing.assert_close(model(x), before)


def test_submodules_replaced_later_are_used() -> None:
    model = fuse(Seed())
    model.fc2 = OwnLinear(5, 7)
    model.fc3 = nn.Linear(7, 2)
    expected = model.fc1(x)
    for layer in (model.fc2, model.fc3):
        expected = layer(torch.sigmoid(expected))
    torch.testing.assert_close(model(x), torch.sigmoid(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_modules_are_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(sequential()))
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_classes_that_pickle_themselves_are_left_alone() -> None:
    class Net(Seed):
        def __reduce__(self) -> Any:
            return Net, ()

    assert count(fuse(Net()), x) == (0, 3)


# ---- what stays the same -------------------------------------------------------------------------


def models() -> Iterable[nn.Module]:
    torch.manual_seed(0)
    return [
        sequential(),
        Seed(),
        nn.Sequential(Seed(), nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())),
    ]


all_models = pytest.mark.parametrize("index", range(3))


@all_models
def test_an_optimizer_made_before_goes_on(index: int) -> None:
    model = list(models())[index]
    reference = copy.deepcopy(model)
    target = torch.rand(6, 1)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            functional.mse_loss(model(x), target.expand_as(model(x))).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    expected = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9)
    steps(reference, expected, 6)
    steps(model, optimizer, 2)
    fuse(model)
    assert count(model, x)[1] == 0
    steps(model, optimizer, 2)
    unfuse(model)
    steps(model, optimizer, 2)
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))


@all_models
def test_fusing_twice_changes_nothing(index: int) -> None:
    model = fuse(list(models())[index])
    before = {path: (id(m), type(m)) for path, m in model.named_modules()}
    fuse(model)
    assert {path: (id(m), type(m)) for path, m in model.named_modules()} == before


@all_models
def test_unfuse_restores_plain_torch_modules(index: int) -> None:
    model = list(models())[index]
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert unfuse(fuse(model)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert repr(model) == repr(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert_same(model, reference, x)
    assert pickle.dumps(model).count(b"neuron_ext") == 0


def copies(model: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "copy": copy.copy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "oldest pickle": pickle.loads(pickle.dumps(model, protocol=0)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@all_models
def test_copies_are_fused_and_stand_alone(index: int) -> None:
    model = fuse(list(models())[index])
    expected = outcome(model, x)
    for how, twin in copies(model).items():
        assert type(twin) is type(model), how
        assert count(twin, x) == count(model, x), how
        torch.testing.assert_close(outcome(twin, x), expected)
        if how != "copy":
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(twin(x), torch.full_like(twin(x), 0.5)), how
    torch.testing.assert_close(outcome(model, x), expected)


def test_unpickled_with_an_edited_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pickle.dumps(fuse(Seed()))
    monkeypatch.setattr(Seed, "forward", lambda self, x: self.fc1(x) * 2)
    model = pickle.loads(stored)
    assert type(model) is Seed
    assert model(x).shape == (6, 5)


@all_models
def test_state_dicts_go_both_ways(index: int) -> None:
    plain, fused = list(models())[index], fuse(list(models())[index])
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain(x), fused(x))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fused.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(plain(x), fused(x))


@all_models
def test_wrappers_and_transforms(index: int) -> None:
    model = fuse(list(models())[index])
    reference = list(models())[index]
    halves = {name: p / 2 for name, p in model.named_parameters()}
    call = torch.func.functional_call
    torch.testing.assert_close(call(model, halves, x), call(reference, halves, x))
    torch.testing.assert_close(torch.func.vmap(model)(x), reference(x))
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype)(x.to(dtype)).dtype is dtype
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta", torch.bfloat16)).shape == reference(x).shape


@all_models
def test_compile_in_one_graph(index: int) -> None:
    torch.compiler.reset()
    model = fuse(list(models())[index])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(compiled, copy.deepcopy(model), x)


@all_models
def test_tracing_again(index: int) -> None:
    model = fuse(list(models())[index])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@all_models
@pytest.mark.parametrize("strict", [False, True])
def test_export(index: int, strict: bool) -> None:
    model = fuse(list(models())[index])
    expected = count(model, x)[0]
    program = torch.export.export(model, (x,), strict=strict)
    if strict:
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("neuron_ext.linear_sigmoid.default") == expected
    torch.testing.assert_close(program.module()(x), model(x))


@all_models
def test_one_autograd_node_per_layer(index: int) -> None:
    todo, seen = [fuse(list(models())[index])(x).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    names = [node.name() for node in seen if "AccumulateGrad" not in node.name()]
    assert len(names) == [2, 3, 4][index]
    assert not any(name.startswith("SigmoidBackward") for name in names)


# ---- unfuse of modules written by hand -----------------------------------------------------------


def test_unfuse_turns_our_modules_into_torchs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        neuron_ext.MLP([4, 5, 3], output_activation="sigmoid"),
        neuron_ext.Linear(3, 3),
        neuron_ext.Sigmoid(),
    )
    called = mock.Mock(return_value=None)
    model[1].register_forward_hook(called)
    reference = copy.deepcopy(model)
    unfuse(model)
    assert [type(m) for m in model] == [nn.Sequential, nn.Linear, nn.Sigmoid]
    assert [type(m) for m in model[0]] == [nn.Linear, nn.Sigmoid] * 2
    assert list(model.state_dict()) == list(reference.state_dict())
    assert_same(model, reference, x)
    assert called.called


def test_fuse_leaves_an_mlp_whole() -> None:
    model = nn.Sequential(neuron_ext.MLP([4, 5, 3], output_activation="sigmoid"))
    fuse(model)
    assert type(model[0]) is neuron_ext.MLP
    assert [type(m) for m in model[0]] == [neuron_ext.Linear, neuron_ext.Sigmoid] * 2


def test_unfuse_of_the_module_itself() -> None:
    linear = neuron_ext.Linear(4, 4)
    assert unfuse(linear) is linear
    assert type(linear) is nn.Linear


def test_unfuse_leaves_what_has_no_plain_counterpart(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(LinearSigmoid(4, 4), nn.ReLU(), LinearSigmoid(4, 4), nn.Identity())
    model[2].register_forward_hook(hook)
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "neuron_ext.fusion"):
        unfuse(model)
    assert "0 stays a LinearSigmoid" in caplog.text
    assert "2 stays a LinearSigmoid" in caplog.text
    assert [type(m) for m in model] == [type(m) for m in reference]
    assert_same(model, reference, x)
