"""One neuron layer, its parts, stacks of it and all its gradients, as hand-written kernels.

Importing the package loads the compiled module ``_C``, which registers ``torch.ops.neuron_ext``,
and changes nothing else in the process. In a source checkout where nothing was built yet it offers
only :mod:`neuron_ext.jit`, which can build ``_C``.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING

from neuron_ext import _extension

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Linear",
    "LinearSigmoid",
    "Sigmoid",
    "__version__",
    "backends",
    "functional",
    "fuse",
    "jit",
    "nn",
    "show_config",
    "unfuse",
]

if _extension.CSRC.is_dir():
    # A checkout that hides an installed package, as in `pip install . && python -m neuron_ext`,
    # takes the compiled module of that one.
    __path__ = extend_path(__path__, __name__)

from neuron_ext import _loader, jit

if _loader.load_extension():
    from neuron_ext import _C as _C
    from neuron_ext import backends, functional, nn
    from neuron_ext.backends import show_config
    from neuron_ext.fusion import fuse, unfuse
    from neuron_ext.nn import MLP, Linear, LinearSigmoid, Sigmoid

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Explains what is missing in a checkout without a compiled module."""
        if (name in __all__ or name == "_C") and not _loader.is_loaded():
            raise ImportError(_loader.NOT_BUILT)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
