#!/usr/bin/env bash
# Builds the package against the CUDA build of torch, without a GPU, in every way there is: installed
# by pip, compiled on the fly, and by CMake. Runs what needs no GPU: imports, operations on fake CUDA
# tensors, and a libtorch program.
#
#   tests/cuda_install.sh FOLDER     # for a virtual environment of 6 GB
#
# Says why and does nothing where that can't be: without an nvcc of that torch's CUDA, or disk for it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
torch=2.14.1 cuda=13 gigabytes=12 # to download, install and build

skip() {
  echo "SKIPPED: $1"
  exit 0
}

toolkit=$(python - <<'PYTHON'
import runpy

try:
    found = runpy.run_path("neuron_ext/_extension.py")["find_toolkit"]()
    print(found.version, found.home)
except ValueError as error:
    print(error)
PYTHON
)
[[ $toolkit == "$cuda".* ]] || skip "torch $torch needs an nvcc of CUDA $cuda; here: $toolkit"
free=$(($(df --output=avail -k "$folder" | tail -n 1) >> 20))
((free >= gigabytes)) || skip "torch $torch and the build take $gigabytes GB, and $free are free"

python -m venv "$folder/cuda"
source "$folder/cuda/bin/activate"
pip install --quiet "torch==$torch" || skip "pip can't install torch $torch"
pip install --quiet cmake ninja numpy pytest
python - <<'PYTHON'
import torch

assert torch.version.cuda is not None, f"torch {torch.__version__} is not a CUDA build"
PYTHON
export NEURON_EXT_CUDA=1
# No kernel runs here; tools/cuda_gate.py compiles them as users do, which takes four times as long.
export NVCC_APPEND_FLAGS=--Ofast-compile=max

# First, since the package in a checkout takes an installed one's compiled module.
TORCH_EXTENSIONS_DIR=$folder/cuda/jit python - <<'PYTHON'
from neuron_ext import jit

neuron_ext = jit.load()
print(neuron_ext.show_config())
assert "/jit/" in neuron_ext._C.__file__ and neuron_ext.backends.cuda_is_built()
PYTHON

pip install .

export CMAKE_BUILD_PARALLEL_LEVEL=${MAX_JOBS:-$(nproc)}
torch_cmake=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
cmake -S . -B "$folder/cuda/build" -DBUILD_TESTING=OFF -DNEURON_EXT_CUDA=ON \
  -DCMAKE_PREFIX_PATH="$torch_cmake"
cmake --build "$folder/cuda/build"
cmake --install "$folder/cuda/build" --prefix "$folder/cuda/prefix"
# A libtorch program finds the toolkit around the nvcc on PATH.
PATH=${toolkit#* }/bin:$PATH cmake -S tests/libtorch -B "$folder/cuda/program" \
  -DCMAKE_PREFIX_PATH="$folder/cuda/prefix;$torch_cmake"
cmake --build "$folder/cuda/program"
ctest --test-dir "$folder/cuda/program" --output-on-failure

cp -r tests "$folder/cuda/tests" # away from the checkout
cd "$folder/cuda/tests"
python -m neuron_ext info
python -m pytest -q test_cuda.py
