"""Learns XOR with plain tensors and ``torch.func``: no nn.Module, no optimizer.

The weights are kept as (in_features, out_features) and passed as ``W.T``, which copies nothing.
"""

import torch
from torch import Tensor

from neuron_ext import functional

features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
targets = torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def predict(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
    return functional.mlp(
        features,
        [parameters["W1"].T, parameters["W2"].T],
        [parameters["b1"], parameters["b2"]],
        output_activation="sigmoid",
    )


def loss(parameters: dict[str, Tensor], features: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy(predict(parameters, features), targets)


torch.manual_seed(7)
parameters = {
    "W1": torch.randn(2, 4),
    "b1": torch.randn(4),
    "W2": torch.randn(4, 1),
    "b2": torch.randn(1),
}
gradients_of = torch.func.grad(loss)
for step in range(1001):
    if step % 200 == 0:
        print(f"step {step:4}: loss {loss(parameters, features, targets).item():.4f}")
    gradients = gradients_of(parameters, features, targets)
    parameters = {name: p - 2.0 * gradients[name] for name, p in parameters.items()}

for row, output in zip(features.tolist(), predict(parameters, features).tolist(), strict=True):
    print(f"{row[0]:.0f} xor {row[1]:.0f} = {output[0]:.3f}")

per_sample = torch.func.vmap(gradients_of, in_dims=(None, 0, 0))(parameters, features, targets)
norms = torch.linalg.matrix_norm(per_sample["W1"])
print("norm of W1's gradient, by sample:", ", ".join(f"{norm:.4f}" for norm in norms.tolist()))
