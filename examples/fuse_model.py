"""Speeds up an existing torch model in one line, in the middle of its training.

The model below knows nothing of neuron_ext. ``fuse`` makes each linear layer and its sigmoid one
operation and keeps the parameters themselves, so the optimizer made before simply goes on, and
``unfuse`` gives back plain torch modules for a checkpoint that needs only torch.
"""

import torch
from torch import Tensor, nn

import neuron_ext


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(4, 5)
        self.layer2 = nn.Linear(5, 7)
        self.layer3 = nn.Linear(7, 3)

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.layer1(features))
        hidden = torch.sigmoid(self.layer2(hidden))
        output: Tensor = self.layer3(hidden)
        return output


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(features), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


torch.manual_seed(7)
features = torch.randn(64, 4)
targets = torch.sin(features[:, :3] + features[:, 1:])

model: nn.Module = Network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
print(f"plain torch, 500 steps: loss {train(model, optimizer, 500):.4f}")

model = neuron_ext.fuse(model)
print(f"fused, 500 steps more:  loss {train(model, optimizer, 500):.4f}")

with torch.no_grad():
    fused = model(features)
    plain = neuron_ext.unfuse(model)(features)
print(f"fused against plain torch: {(fused - plain).abs().max().item():.1e} apart at most")
