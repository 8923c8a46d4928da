"""Builds the compiled module on the fly: in a source checkout, without installing anything."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from neuron_ext import _extension, _loader

__all__ = ["load"]


def load(
    verbose: bool = False, build_directory: str | os.PathLike[str] | None = None
) -> ModuleType:
    """Compiles ``csrc`` with :func:`torch.utils.cpp_extension.load` into this package's ``_C``.

    The first call takes a minute or two, a call in a later process a second as long as the sources
    and torch stay the same. Where ``_C`` is loaded already, nothing is built.

    Args:
        verbose: show what is run and what the compiler says.
        build_directory: a folder to compile in, used for nothing else. By default one for this
            checkout, Python and torch, under ``TORCH_EXTENSIONS_DIR`` or torch's cache folder.

    Returns:
        The package ``neuron_ext``, complete.

    Raises:
        RuntimeError: there are no sources beside the package, no ninja, or the compiler fails.
        ValueError: ``NEURON_EXT_CUDA`` asks for what can't be built.
    """
    import neuron_ext

    if _loader.is_loaded():
        return neuron_ext
    if not _extension.CSRC.is_dir():
        raise RuntimeError(f"{_extension.ROOT} has no csrc: jit.load() needs a source checkout")
    sys.modules[_loader.NAME] = _build(verbose, Path(build_directory or _default_directory()))
    return importlib.reload(neuron_ext)  # __init__ now finds a compiled module


def _build(verbose: bool, directory: Path) -> ModuleType:
    from filelock import FileLock
    from torch.utils import cpp_extension

    toolkit, cuda_line = _extension.decide_cuda(torch)
    if toolkit:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's guess knows no scripts named nvcc
    directory.mkdir(parents=True, exist_ok=True)
    print(f"neuron_ext: {cuda_line}; building in {directory}", file=sys.stderr)
    # The operating system releases this lock when its holder dies, however it dies. torch's own, up
    # to torch 2.13, is a file that a killed process leaves behind and that is then waited for
    # forever. Whoever builds here holds our lock first, so a lock of torch's is now nobody's.
    with FileLock(directory / "neuron_ext.lock"):
        torch_lock = directory / "lock"
        if _extension.torch_minor(torch.__version__) < (2, 14) and torch_lock.exists():
            warnings.warn(
                f"{torch_lock} was left behind by a build that was killed; removed it",
                RuntimeWarning,
                stacklevel=3,
            )
            torch_lock.unlink()
        module: ModuleType = cpp_extension.load(
            name="neuron_ext_C",
            sources=[str(path) for path in _extension.sources(cuda=bool(toolkit))],
            extra_include_paths=[str(path) for path in _extension.include_dirs()],
            extra_cflags=_extension.compile_args(cuda=bool(toolkit)),
            extra_cuda_cflags=_extension.nvcc_args(),
            extra_ldflags=_extension.cuda_link_args(toolkit) if toolkit else [],
            build_directory=str(directory),
            verbose=verbose,
        )
    return module


def _default_directory() -> Path:
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    where = f"{_extension.ROOT} {torch.__version__} {sys.implementation.cache_tag}"
    return Path(root, "neuron_ext_" + hashlib.sha256(where.encode()).hexdigest()[:12])
