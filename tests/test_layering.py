"""The law of the source tree: kernels know nothing of torch, Python, threads or each other."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = [
    path
    for folder in ("include", "cpu", "cuda")
    for path in sorted((CSRC / folder).rglob("*"))
    if path.suffix in {".h", ".cpp", ".cuh", ".cu"}
]

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
FRAMEWORK = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^(Python|structmember)\.h$")
STARTS_THREADS = re.compile(
    r"#\s*pragma\s+omp|\bomp_|\bpthread_create\b|\bstd::(thread|jthread|async)\b|"
    r"^\s*#\s*include\s*<(thread|future|omp\.h|pthread\.h)>",
    re.MULTILINE,
)


def code(path: Path) -> str:
    """The file without its comments."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.fixture(params=SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_kernels_include_no_framework(source: Path) -> None:
    assert [name for name in INCLUDE.findall(code(source)) if FRAMEWORK.search(name)] == []


def test_kernels_start_no_thread(source: Path) -> None:
    assert STARTS_THREADS.findall(code(source)) == []


def test_layers_know_only_the_public_headers_and_themselves(source: Path) -> None:
    layers = {layer_of(name, source) for name in INCLUDE.findall(code(source))}
    assert layers <= {source.relative_to(CSRC).parts[0], "include", None}


def test_torch_side_needs_no_cuda_headers() -> None:
    """ATen's and c10's for CUDA include cublas, cusparse and cusolver, which few toolkits have."""
    cuda = re.compile(r"^(ATen/|c10/)?(cuda|cublas|cusparse|cusolver)")
    for path in sorted((CSRC / "torch").iterdir()):
        assert [name for name in INCLUDE.findall(code(path)) if cuda.search(name)] == [], path


def layer_of(name: str, source: Path) -> str | None:
    """The folder of csrc that an included file is in; None for the standard library's."""
    for folder in (source.parent, CSRC / "include", CSRC):
        target = (folder / name).resolve()
        if target.is_file() and target.is_relative_to(CSRC):
            return target.relative_to(CSRC).parts[0]
    return None


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in SOURCES} >= {"include", "cpu"}
