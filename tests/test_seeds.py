"""The notebooks' systems, with the numbers they print."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuron_ext
from neuron_ext import functional


def assert_prints(actual: Tensor, expected: float) -> None:
    assert actual.shape == (1, 1)
    assert f"{actual.item():.4f}" == f"{expected:.4f}"


@pytest.fixture
def neuron() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    features = torch.randn((1, 5))
    weights = torch.randn_like(features)
    return features, weights, torch.randn((1, 1))


def test_the_single_neuron(neuron: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    features, weights, bias = neuron
    assert_prints(functional.linear_sigmoid(features, weights, bias), 0.1595)
    assert_prints(functional.sigmoid(torch.sum(features * weights) + bias), 0.1595)
    assert_prints(functional.sigmoid((features * weights).sum() + bias), 0.1595)
    assert_prints(functional.sigmoid(torch.mm(features, weights.view(5, 1)) + bias), 0.1595)
    assert_prints(functional.mlp(features, [weights], [bias], "sigmoid"), 0.1595)


def test_the_linear_neuron(neuron: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    features, weights, bias = neuron
    assert_prints(functional.linear(features, weights, bias), -1.6619)
    assert_prints(functional.mlp(features, [weights], [bias]), -1.6619)


def test_weights_turned_in_every_way(neuron: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """The notebooks turn weights into (in, out); the layer takes them turned back."""
    features, weights, bias = neuron
    turned = (weights.view(5, 1), weights.reshape(5, 1), weights.clone().resize_(5, 1), weights.T)
    for column in turned:
        assert column.shape == (5, 1)
        assert_prints(functional.linear_sigmoid(features, column.T, bias), 0.1595)
        with pytest.raises(RuntimeError, match=r"weight has shape \(5, 1\).*pass weight\.T"):
            functional.linear_sigmoid(features, column, bias)


def test_the_3_2_1_network(isa: str) -> None:
    torch.manual_seed(7)
    features = torch.randn((1, 3))
    n_input, n_hidden, n_output = features.shape[1], 2, 1
    w1, w2 = torch.randn(n_input, n_hidden), torch.randn(n_hidden, n_output)
    b1, b2 = torch.randn((1, n_hidden)), torch.randn((1, n_output))
    hidden = functional.linear_sigmoid(features, w1.T, b1)
    assert_prints(functional.linear_sigmoid(hidden, w2.T, b2), 0.3171)
    assert_prints(functional.mlp(features, [w1.T, w2.T], [b1, b2], "sigmoid"), 0.3171)

    network = neuron_ext.MLP([3, 2, 1], output_activation="sigmoid")
    state = {"0.weight": w1.T, "0.bias": b1[0], "2.weight": w2.T, "2.bias": b2[0]}
    network.load_state_dict(state)
    assert_prints(network(features), 0.3171)


class Network(nn.Module):
    """The notebooks' 4-5-7-3 module, its layers of a given kind."""

    def __init__(self, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.layer1 = linear(4, 5)
        self.layer2 = linear(5, 7)
        self.layer3 = linear(7, 3)


class TorchNetwork(Network):
    def __init__(self) -> None:
        super().__init__(nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.layer1(x))
        x = torch.sigmoid(self.layer2(x))
        x = torch.sigmoid(self.layer3(x))
        return x


class OurNetwork(Network):
    def __init__(self) -> None:
        super().__init__(neuron_ext.LinearSigmoid)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return y


@pytest.mark.parametrize("lead", [(1,), (5,)], ids=str)
def test_the_4_5_7_3_module_trains_as_torchs(lead: tuple[int, ...], isa: str) -> None:
    torch.manual_seed(7)
    theirs, ours = TorchNetwork(), OurNetwork()
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(*lead, 4), torch.rand(*lead, 3)
    losses: dict[nn.Module, list[float]] = {}
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        losses[module] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.MSELoss()(module(x), target)
            loss.backward()
            optimizer.step()
            losses[module].append(loss.item())
    assert losses[ours] == pytest.approx(losses[theirs], rel=1e-5)
    assert losses[ours][-1] < losses[ours][0]


def test_an_array_that_shares_memory(isa: str) -> None:
    """A change in NumPy is seen by the next call, and no call changes the array."""
    array = np.random.rand(4, 3)
    tensor = torch.from_numpy(array)
    weight = torch.randn(2, 3, dtype=torch.float64)
    kept = array.copy()
    for change in (1.0, 2.0, -0.5):
        array *= change
        kept *= change
        for ours, theirs in (
            (functional.linear(tensor, weight), F.linear(tensor, weight)),
            (functional.sigmoid(tensor), torch.sigmoid(tensor)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
        assert np.array_equal(array, kept)
    tensor.mul_(3)
    assert np.array_equal(array, 3 * kept)
    shared = functional.sigmoid(tensor).numpy()
    assert not np.shares_memory(shared, array)
