"""PEP 517 backend: setuptools, building against the torch that the user has.

pip builds in an isolated environment, which hides the user's torch and would be given one of its
own. An extension built against that one fits the user's only by luck, so this backend looks past
the isolation, and asks for a torch only where there is none.
"""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

RECIPE = runpy.run_path(str(Path(__file__).parent.parent / "neuron_ext" / "_extension.py"))
TORCH_WHERE_THERE_IS_NONE = "torch==2.13.0"

LOOK_FOR_TORCH = """
import importlib.metadata, importlib.util, json, os, sys
sys.path.remove("")
spec = importlib.util.find_spec("torch")
found = spec is not None and spec.origin is not None
print(json.dumps(found and {
    "version": importlib.metadata.version("torch"),
    "path": [os.path.dirname(os.path.dirname(spec.origin)), *sys.path],
}))
"""


def users_torch():
    """Version and import path of the torch in this interpreter's own environment; None without one.

    The isolation is made of environment variables, which -E ignores. So a child of the same
    interpreter sees what the user's programs see: site-packages, the user's own, and the system's
    under a virtual environment that shares them.
    """
    child = subprocess.run(
        [sys.executable, "-E", "-c", LOOK_FOR_TORCH],
        cwd=sys.prefix,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(child.stdout) or None


def make_torch_importable():
    if importlib.util.find_spec("torch") is None and (found := users_torch()):
        sys.path.extend(found["path"])


def get_requires_for_build_wheel(config_settings=None):
    found = users_torch()
    if found:
        try:
            RECIPE["check_torch"](found["version"])
        except ValueError as error:
            sys.exit(f"neuron_ext: {error}")
    return [] if found else [TORCH_WHERE_THERE_IS_NONE]


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    make_torch_importable()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    make_torch_importable()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    make_torch_importable()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    make_torch_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
