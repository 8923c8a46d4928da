#!/usr/bin/env bash
# Installs the package in every way there is into one environment with torch, and uses it each time.
#
#   tests/install_cases.sh PYTHON     # of a virtual environment
#
# The case without a torch is the first command of the README, which .ci/run runs. The ways share the object
# files in build/, so only the first takes its time. Nothing stays installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
bin=$(dirname "$python")
export PATH=$bin:$PATH

torch_state() {
  (cd / && "$python" -c 'import os, torch; print(torch.__version__, os.stat(torch.__file__))')
}

use() {
  (cd / && "$python" - <<'PYTHON'
import torch
import neuron_ext

x = torch.randn(8, 5)
layer = neuron_ext.LinearSigmoid(5, 3)
y = layer(x)
torch.testing.assert_close(y, torch.sigmoid(torch.nn.functional.linear(x, layer.weight, layer.bias)))
y.sum().backward()
print("    works:", neuron_ext._C.__file__)
PYTHON
  )
}

uninstall() {
  "$python" -m pip uninstall --quiet --yes neuron_ext
  rm -f neuron_ext/_C*.so neuron_ext/_build_info.py
}

case_of() {
  echo "--- pip install $*"
  uninstall
  "$python" -m pip install --quiet "$@"
  use
}

before=$(torch_state)
case_of .
"$python" -m pip install --quiet 'setuptools>=77' ninja
case_of --no-build-isolation .
case_of --editable .
case_of --no-build-isolation --editable .
test "$before" = "$(torch_state)" || { echo "an installation touched torch" >&2; exit 1; }

echo "--- torch.utils.cpp_extension.load"
uninstall
TORCH_EXTENSIONS_DIR=$(mktemp -d) "$python" - <<'PYTHON'
from glob import glob

import torch
from torch.utils.cpp_extension import load

neuron = load(
    name="neuron_ext_C",
    sources=glob("csrc/cpu/*.cpp") + glob("csrc/torch/*.cpp"),
    extra_include_paths=["csrc/include"],
    extra_cflags=["-O3", "-std=c++20", "-fopenmp"],
)

x, w, b = torch.randn(8, 5), torch.randn(3, 5), torch.randn(3)
z = torch.nn.functional.linear(x, w, b)
torch.testing.assert_close(neuron.linear(x, w, b), z)
torch.testing.assert_close(neuron.sigmoid(z), torch.sigmoid(z))
torch.testing.assert_close(neuron.linear_sigmoid(x, w, b), torch.sigmoid(z))
torch.testing.assert_close(neuron.mlp(x, [w], [b], None), z)
print("    works:", neuron.__file__)
PYTHON
