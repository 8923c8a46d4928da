"""Runs a command on a CPU that has AMX, or that emulator.cpp makes look as if it had.

python tests/amx_emulator/run.py python -m neuron_ext check
"""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("emulator.cpp")
LIBRARY = Path(__file__).parents[2] / "build" / "amx_emulator" / "libamx_emulator.so"


def build() -> None:
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared"]
    # libstdc++ too: its functions are looked up in what this library is linked to.
    compiler = [os.environ.get("CXX", "c++"), *flags, "-Wl,--no-as-needed", str(SOURCE)]
    subprocess.run([*compiler, "-o", str(LIBRARY)], check=True)


def main(command: list[str]) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "amx_bf16" not in flags:
        if "avx512_bf16" not in flags:
            print("not run: AMX is emulated on CPUs with AVX512_BF16, which this one doesn't have")
            return
        build()
        os.environ["LD_PRELOAD"] = str(LIBRARY)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
