"""Builds ``neuron_ext._C`` against the torch that can be imported; build_backend/ sees to which."""

import os
import runpy
import sys
from pathlib import Path

import setuptools

RECIPE = runpy.run_path(str(Path(__file__).with_name("neuron_ext") / "_extension.py"))
MEMORY_PER_JOB = 2 << 30  # bytes: g++ over torch's headers takes up to 1.5 GiB

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    if not {"egg_info", "sdist"} & set(sys.argv):
        sys.exit(f"neuron_ext is built against an installed torch: pip install '{RECIPE['TORCH']}'")
    torch = None


def say(message):
    """To stderr, which pip shows with -v or after a failure, and past pip to a terminal."""
    line = f"neuron_ext: {message}\n"
    sys.stderr.write(line)
    sys.stderr.flush()
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write("\r\033[K" + line)  # over pip's spinner
        except OSError:
            pass  # nobody is watching


def default_jobs():
    """As many compilers at once as there are cores and memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return cores
    return max(1, min(cores, memory // MEMORY_PER_JOB))


def torch_extension():
    try:
        RECIPE["check_torch"](torch.__version__)
        toolkit, cuda_line = RECIPE["decide_cuda"](torch)
    except ValueError as error:
        sys.exit(f"neuron_ext: {error}")
    sources = RECIPE["sources"](cuda=toolkit is not None)
    if toolkit:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's guess knows no scripts named nvcc

    class BuildNeuronExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                # setuptools compiles in a new folder each time; here only what changed is compiled.
                kind = f"{self.plat_name}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", f"temp.{kind}")

        def run(self):
            jobs = os.environ.setdefault("MAX_JOBS", str(default_jobs()))
            say(f"building against torch {torch.__version__} in {Path(torch.__file__).parent}")
            say(cuda_line)
            if not self.use_ninja:
                say("ninja is missing, so the files are compiled one by one: pip install ninja")
            say(f"compiling {len(sources)} files, {jobs} at a time (MAX_JOBS)")
            try:
                super().run()
            except RuntimeError as error:
                sys.exit(f"neuron_ext: {error}; the compiler's messages are above")
            library = Path(self.get_ext_fullpath("neuron_ext._C"))
            library.with_name("_build_info.py").write_text(RECIPE["build_info"](torch))
            say(f"built {library}")

    # torch's headers as system headers, so that their warnings don't drown ours.
    windows = sys.platform == "win32"
    system = [] if windows else [f"-isystem{path}" for path in cpp_extension.include_paths()]
    return {
        "ext_modules": [
            # With .cu files as without: CUDAExtension wants more libraries than the kernels do.
            cpp_extension.CppExtension(
                "neuron_ext._C",
                # Paths relative to setup.py, as setuptools wants them.
                [str(path.relative_to(RECIPE["ROOT"])) for path in sources],
                include_dirs=[str(path) for path in RECIPE["include_dirs"]()],
                extra_compile_args={
                    "cxx": RECIPE["compile_args"](cuda=toolkit is not None) + system,
                    "nvcc": RECIPE["nvcc_args"](),
                },
                extra_link_args=RECIPE["cuda_link_args"](toolkit) if toolkit else [],
            )
        ],
        "cmdclass": {"build_ext": BuildNeuronExt},
        # The C++ ABI of torch changes with its minor version.
        "install_requires": [RECIPE["minor_requirement"](torch.__version__)],
    }


setuptools.setup(
    version=RECIPE["version"](),
    **(torch_extension() if torch else {"install_requires": [RECIPE["TORCH"]]}),
)
