"""The compiled module. Use :mod:`neuron_ext.functional` and :mod:`neuron_ext.backends` instead.

The four operations take exact ``torch.Tensor`` and ``Parameter`` arguments and return
NotImplemented for anything else, which ``torch.ops.neuron_ext`` then takes.
"""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    cplusplus: int
    cuda: bool | str
    openmp: bool

def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
def sigmoid(input: Tensor) -> Tensor: ...
def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    output_activation: str | None,
) -> Tensor: ...
def cpu_isa() -> str: ...
def supported_cpu_isas() -> Sequence[str]: ...
def set_cpu_isa(name: str) -> None: ...
def kernels() -> Sequence[tuple[str, str, Sequence[str], bool]]: ...
def last_kernel() -> str: ...
def build_info() -> BuildInfo: ...
