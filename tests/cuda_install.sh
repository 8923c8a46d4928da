#!/usr/bin/env bash
# Builds and installs the package against the CUDA build of torch, without a GPU, and runs what needs
# none: imports, and operations on fake CUDA tensors.
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
    print(runpy.run_path("neuron_ext/_extension.py")["find_toolkit"]().version)
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
pip install --quiet numpy pytest
python - <<'PYTHON'
import torch

assert torch.version.cuda is not None, f"torch {torch.__version__} is not a CUDA build"
PYTHON
NEURON_EXT_CUDA=1 pip install .
cp -r tests "$folder/cuda/tests" # away from the checkout, which has no compiled module
cd "$folder/cuda/tests"
python -m neuron_ext info
python -m pytest -q test_cuda.py
