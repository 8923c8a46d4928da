"""The build, what it leaves in the package, and what the package says when the two don't fit."""

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import neuron_ext
from neuron_ext import jit

ROOT = Path(__file__).resolve().parent.parent
RECIPE = runpy.run_path(str(ROOT / "neuron_ext" / "_extension.py"))


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, which also finds the programs installed beside Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources where nothing was built."""
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "*.so", "_build_info.py", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def put_compiled_module(package: Path, torch_version: str = torch.__version__) -> None:
    """Puts the compiled module under test, as if built for another torch, into another package."""
    compiled = Path(neuron_ext._C.__file__)
    shutil.copy(compiled, package)
    info = compiled.with_name("_build_info.py").read_text()
    info = info.replace(torch.__version__, torch_version)
    (package / "_build_info.py").write_text(info)


# ---- sources ------------------------------------------------------------------------------------


def test_version_is_the_same_everywhere() -> None:
    assert neuron_ext.__version__ == RECIPE["version"]()
    assert neuron_ext.__version__ == importlib.metadata.version("neuron_ext")
    assert neuron_ext.__version__ == neuron_ext._C.build_info()["version"]


def test_source_archive_is_complete(checkout: Path, tmp_path: Path) -> None:
    (checkout / "neuron_ext" / "_C.so").touch()
    code = f"import torch_build; print(torch_build.build_sdist({str(tmp_path)!r}))"
    done = run(code, checkout, PYTHONPATH=str(checkout / "build_backend"))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("build_backend", "cmake", "csrc", "neuron_ext", "tests")
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    wanted -= {"neuron_ext/_C.so"}
    wanted |= {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert wanted - packed == set()
    assert [name for name in packed if name.endswith(("_C.so", "_build_info.py"))] == []


# ---- which torch, which kernels ------------------------------------------------------------------


def ask_backend(
    question: str, tmp_path: Path, torch_version: str | None
) -> subprocess.CompletedProcess[str]:
    """Asks the backend in an environment with this torch, isolated from it as pip does it."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site_packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    if torch_version:
        metadata = site_packages / f"torch-{torch_version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
        (site_packages / "torch").mkdir()
        (site_packages / "torch" / "__init__.py").touch()
    hide = f"import sys; sys.path.remove({str(site_packages)!r})"
    (tmp_path / "sitecustomize.py").write_text(hide)
    setuptools_at = Path(setuptools.__file__).parent.parent
    path = os.pathsep.join(map(str, [tmp_path, setuptools_at, ROOT / "build_backend"]))
    return subprocess.run(
        [python, "-c", f"import torch_build; {question}"],
        env=os.environ | {"PYTHONNOUSERSITE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_backend_finds_the_users_torch(tmp_path: Path) -> None:
    question = "import json; print(json.dumps(torch_build.users_torch()))"
    done = ask_backend(question, tmp_path, "2.12.1+cpu")
    found = json.loads(done.stdout)
    assert found["version"] == "2.12.1+cpu"
    assert Path(found["path"][0]).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("torch_version", "requires"), [(None, "['torch==2.13.0']"), ("2.12.1", "[]")]
)
def test_backend_asks_for_torch_only_where_there_is_none(
    torch_version: str | None, requires: str, tmp_path: Path
) -> None:
    question = "print(torch_build.get_requires_for_build_wheel())"
    done = ask_backend(question, tmp_path, torch_version)
    assert done.stdout.strip() == requires, done.stderr


@pytest.mark.parametrize("torch_version", ["2.10.0", "2.16.0", "3.0.0"])
def test_backend_refuses_other_torches(torch_version: str, tmp_path: Path) -> None:
    question = "torch_build.get_requires_for_build_wheel()"
    done = ask_backend(question, tmp_path, torch_version)
    assert done.returncode == 1
    assert f"torch {torch_version} is installed" in done.stderr
    assert "torch>=2.11,<2.16" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "minor"), [("2.13.0+cpu", "2.13"), ("2.11.0a0+git1", "2.11"), ("2.15.2", "2.15")]
)
def test_package_requires_the_torch_minor_it_was_built_with(version: str, minor: str) -> None:
    assert RECIPE["minor_requirement"](version) == f"torch=={minor}.*"


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit whose nvcc does as NVIDIA's but compiles nothing; CUDA_HOME leads to it."""
    home = tmp_path / "cuda-13.0"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    write_program(
        home / "bin" / "nvcc",
        f"""case $1 in
--dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
esac""",
    )
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("NEURON_EXT_CUDA", raising=False)
    return home


def write_program(path: Path, commands: str) -> None:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)


def torch_for(cuda: str | None) -> ModuleType:
    """As much of a torch as the recipe looks at."""
    torch = ModuleType("torch")
    torch.__version__ = "2.13.0" if cuda is None else f"2.13.0+cu{cuda.replace('.', '')}"
    torch.version = SimpleNamespace(cuda=cuda)
    return torch


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """The recipe of a checkout that has a CUDA kernel."""
    copy = tmp_path / "with_kernels"
    (copy / "neuron_ext").mkdir(parents=True)
    (copy / "csrc" / "cuda").mkdir(parents=True)
    (copy / "csrc" / "cuda" / "gemm.cu").touch()
    shutil.copy(ROOT / "neuron_ext" / "_extension.py", copy / "neuron_ext")
    return runpy.run_path(str(copy / "neuron_ext" / "_extension.py"))


def refusal(recipe: dict[str, Any], torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why there will be no CUDA kernels: as the line that is printed, and where they're forced."""
    monkeypatch.delenv("NEURON_EXT_CUDA", raising=False)
    toolkit, line = recipe["decide_cuda"](torch)
    assert toolkit is None
    assert "\n" not in line
    monkeypatch.setenv("NEURON_EXT_CUDA", "1")
    with pytest.raises(ValueError, match=r"^NEURON_EXT_CUDA=1, but ") as forced:
        recipe["decide_cuda"](torch)
    why = line.removeprefix("CPU only: ")
    assert str(forced.value) == f"NEURON_EXT_CUDA=1, but {why}"
    return why


def test_cuda_switch(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = recipe["decide_cuda"]
    found, line = decide(torch_for("13.2"))
    assert found == (toolkit, "13.0")
    assert line == f"CPU and CUDA: nvcc 13.0 in {toolkit}"
    monkeypatch.setenv("NEURON_EXT_CUDA", "1")
    assert decide(torch_for("13.0")).toolkit == found
    monkeypatch.setenv("NEURON_EXT_CUDA", "0")
    assert decide(torch_for("13.0")) == (None, "CPU only: NEURON_EXT_CUDA=0")
    monkeypatch.setenv("NEURON_EXT_CUDA", "yes")
    with pytest.raises(ValueError, match="must be 0, 1 or unset, not 'yes'"):
        decide(torch_for("13.0"))


def test_cpu_torch_gets_no_cuda_kernels(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(recipe, torch_for(None), monkeypatch) == "torch 2.13.0 is not a CUDA build"


def test_toolkit_of_another_major_version(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = refusal(recipe, torch_for("12.8"), monkeypatch)
    assert f"nvcc in {toolkit} is of CUDA 13.0" in why
    assert "torch 2.13.0+cu128 was built with CUDA 12.8" in why
    assert "CUDA_HOME" in why


def test_nvcc_on_path_that_is_a_script(
    recipe: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    write_program(shims / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(shims), prepend=os.pathsep)
    assert recipe["decide_cuda"](torch_for("13.0")).toolkit == (toolkit, "13.0")


def test_there_is_no_nvcc(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toolkit / "bin" / "nvcc").unlink()
    why = refusal(recipe, torch_for("13.0"), monkeypatch)
    assert why.startswith(f"CUDA_HOME ({toolkit}) has no bin/nvcc")


def test_nvcc_that_is_no_compiler(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(toolkit / "bin" / "nvcc", "echo hello")
    why = refusal(recipe, torch_for("13.0"), monkeypatch)
    assert "doesn't say where its toolkit is" in why
    (toolkit / "bin" / "nvcc").write_bytes(b"\x7fELF")
    assert "doesn't run" in refusal(recipe, torch_for("13.0"), monkeypatch)


def test_toolkit_that_compiles_nothing(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = toolkit / "bin" / "nvcc"
    last_lines = (
        "\n*) echo 'host_config.h:1: #error -- unsupported GNU version!' >&2; exit 1 ;;\nesac"
    )
    write_program(nvcc, nvcc.read_text().partition("\n")[2].replace("\nesac", last_lines))
    why = refusal(recipe, torch_for("13.0"), monkeypatch)
    assert "can't compile an empty kernel: host_config.h:1: #error -- unsupported GNU" in why


def test_toolkit_without_a_runtime_to_link(
    recipe: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toolkit / "lib64" / "libcudart.so").unlink()
    assert "there is no libcudart.so in" in refusal(recipe, torch_for("13.0"), monkeypatch)
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart.so.13").touch()  # as NVIDIA's wheels have it
    monkeypatch.delenv("NEURON_EXT_CUDA")
    found = recipe["decide_cuda"](torch_for("13.0")).toolkit
    assert recipe["cuda_link_args"](found) == [f"{toolkit}/lib/libcudart.so.13"]


def test_targets_keep_torch_from_looking_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cpp_extension._get_cuda_arch_flags(RECIPE["nvcc_args"]()) == []


def test_object_files_have_names_of_their_own() -> None:
    """setuptools keeps folders and drops suffixes; building on the fly drops the folders."""
    sources = RECIPE["sources"](cuda=True)
    assert len({path.with_suffix("") for path in sources}) == len(sources)
    assert len({path.name for path in sources}) == len(sources)


# ---- the compiled module and the package ---------------------------------------------------------


def test_import_changes_nothing_and_is_quick(tmp_path: Path) -> None:
    code = """
import os, sys, threading, time, warnings
import torch

def state():
    nn = torch.nn
    places = [torch, torch.Tensor, nn, nn.Linear, nn.Sigmoid, nn.functional]
    return {
        "environment": dict(os.environ),
        "warning filters": list(warnings.filters),
        "threads": (threading.active_count(), len(os.listdir("/proc/self/task"))),
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "random state": torch.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "subnormal numbers": (2.0**-1074 * 1.0, (torch.tensor(2.0**-1022).double() / 4).item()),
    }, [{k: id(v) for k, v in vars(place).items()} for place in places]

settings, functions = state()
modules = set(sys.modules)
started = time.process_time()
import neuron_ext
took = time.process_time() - started

settings_after, functions_after = state()
assert settings == settings_after, (settings, settings_after)
for before, after in zip(functions, functions_after):
    assert before == {k: after.get(k) for k in before}
foreign = {name.partition(".")[0] for name in set(sys.modules) - modules}
foreign -= {"neuron_ext", "torch"} | sys.stdlib_module_names
assert not foreign, foreign
assert took < 0.2, took
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_module_built_for_another_torch(checkout: Path) -> None:
    put_compiled_module(checkout / "neuron_ext", "2.1.0")
    done = run("import neuron_ext", checkout)
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert f"built for torch 2.1.0, and torch {torch.__version__} is installed" in last_line
    assert "pip install ." in last_line


def test_module_that_does_not_load(checkout: Path) -> None:
    put_compiled_module(checkout / "neuron_ext")
    next((checkout / "neuron_ext").glob("_C*.so")).write_bytes(b"not a library")
    done = run("import neuron_ext", checkout)
    assert "file too short" in done.stderr or "invalid ELF header" in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert f"built for torch {torch.__version__}" in last_line
    assert "pip install ." in last_line


# Hides an installed neuron_ext, editable or not.
NOT_INSTALLED = """
import pkgutil, sys
pkgutil.extend_path = lambda path, name: path
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


def test_checkout_without_compiled_module(checkout: Path) -> None:
    code = """
import neuron_ext
assert callable(neuron_ext.jit.load)
for use in ("neuron_ext.Linear", "from neuron_ext import fuse", "import neuron_ext.functional"):
    try:
        exec(use)
    except ImportError as error:
        assert "pip install ." in str(error), error
        assert "neuron_ext.jit.load()" in str(error), error
    else:
        raise AssertionError(use)
assert not hasattr(neuron_ext, "no_such_name")
"""
    done = run(NOT_INSTALLED + code, checkout)
    assert done.returncode == 0, done.stderr


def test_checkout_takes_the_installed_module(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "neuron_ext"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    put_compiled_module(installed)
    code = "import neuron_ext; print(neuron_ext.__file__); print(neuron_ext._C.__file__)"
    done = run(code, checkout, PYTHONPATH=str(installed.parent))
    package, compiled = map(Path, done.stdout.splitlines())
    assert package.parent == checkout / "neuron_ext"
    assert compiled.parent == installed
    assert done.stderr == ""

    (checkout / "csrc" / "cpu" / "gemm.cpp").write_text("// edited\n")
    done = run(code, checkout, PYTHONPATH=str(installed.parent))
    assert "RuntimeWarning" in done.stderr
    assert "was built from other sources than" in done.stderr


# ---- building on the fly ------------------------------------------------------------------------


@pytest.mark.skipif(
    RECIPE["torch_minor"](torch.__version__) >= (2, 14), reason="this torch leaves no stale lock"
)
def test_stale_lock_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**_: object) -> ModuleType:
        assert not (tmp_path / "lock").exists(), "torch would wait forever"
        return ModuleType("built")

    monkeypatch.setattr(cpp_extension, "load", load)
    (tmp_path / "lock").touch()
    with pytest.warns(RuntimeWarning, match=r"lock was left behind by a build that was killed"):
        jit._build(verbose=False, directory=tmp_path)


@pytest.mark.slow
def test_building_on_the_fly(checkout: Path, tmp_path: Path) -> None:
    code = """
import torch
import neuron_ext
assert neuron_ext.jit.load() is neuron_ext
assert neuron_ext.jit.load() is neuron_ext
x = torch.randn(3, 5)
layer = neuron_ext.LinearSigmoid(5, 2)
expected = torch.sigmoid(torch.nn.functional.linear(x, layer.weight, layer.bias))
torch.testing.assert_close(layer(x), expected)
torch.testing.assert_close(torch.ops.neuron_ext.sigmoid(x), torch.sigmoid(x))
"""
    folder = str(tmp_path / "extensions")
    done = run(NOT_INSTALLED + code, checkout, TORCH_EXTENSIONS_DIR=folder, MAX_JOBS="2")
    assert done.returncode == 0, done.stderr
