"""Imports ``neuron_ext._C``, and explains it where that can't work."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from neuron_ext import _extension

NAME = "neuron_ext._C"
REBUILD = "build it again, in the folder of its sources: pip install ."
NOT_BUILT = (
    f"neuron_ext in {_extension.ROOT} has no compiled module for this Python yet. Build and "
    "install it (pip install .), or build it on the fly: neuron_ext.jit.load()"
)


def is_loaded() -> bool:
    return NAME in sys.modules


def load_extension() -> ModuleType | None:
    """The compiled module, or None in a checkout where there is none yet.

    Raises:
        ImportError: it was built for another torch, can't be loaded, or was lost from an
            installation.
    """
    if is_loaded():
        return sys.modules[NAME]
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        if _extension.CSRC.is_dir():
            return None
        raise ImportError(f"{NAME} is missing for Python {sys.version.split()[0]}; {REBUILD}")

    build = runpy.run_path(str(Path(spec.origin).with_name("_build_info.py")))
    built_for, found = build["TORCH_VERSION"], torch.__version__
    mismatch = (
        f"{spec.origin} was built for torch {built_for}, and torch {found} is installed; {REBUILD}"
    )
    if _extension.torch_minor(built_for) != _extension.torch_minor(found):
        raise ImportError(mismatch)
    if _extension.CSRC.is_dir() and build["SOURCES"] != _extension.digest():
        warnings.warn(
            f"{spec.origin} was built from other sources than {_extension.CSRC}; {REBUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
    try:
        return importlib.import_module(NAME)
    except ImportError as error:
        if spec.origin not in str(error):
            raise  # the module was loaded, and says itself what is wrong
        raise ImportError(mismatch) from error
