"""What the compile gate makes of the compilers' words. That it runs is for .ci/run to show."""

import runpy
from pathlib import Path
from typing import Any

import pytest

GATE = Path(__file__).resolve().parent.parent / "tools" / "cuda_gate.py"

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 4096 bytes smem, 536 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90a'
ptxas info    : Function properties for _Z3badPf
    96 bytes stack frame, 64 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""

SASS = """\
\tcode for sm_80
\t\tFunction : _Z4goodPf
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDG.E.128 R4, [R2.64] ;          /* 0x0000000402047981 */
                                                                    /* 0x000ea4000c1e1d00 */
        /*0010*/               @P0 EXIT ;                           /* 0x000000000000094d */
        /*0020*/              @!P1 HMMA.16816.F32 R4, R8, R2, R4 ;  /* 0x0000000208047236 */
\tcode for sm_90a
\t\tFunction : _Z3badPf
        /*0000*/                   STL [R1], R0 ;                   /* 0x0000000001007387 */
"""


@pytest.fixture
def gate() -> dict[str, Any]:
    return runpy.run_path(str(GATE))


@pytest.fixture
def kernels(gate: dict[str, Any]) -> tuple[Any, Any]:
    kernels = {(k.name, k.target): k for k in gate["read_ptxas"](PTXAS.splitlines())}
    for name, target, instruction in gate["read_sass"](SASS.splitlines()):
        kernels[name, target].instructions[instruction] += 1
    good, bad = kernels.values()
    return good, bad


def test_resources_and_instructions_are_read(kernels: tuple[Any, Any]) -> None:
    good, bad = kernels
    assert (good.name, good.target, good.registers, good.shared) == ("_Z4goodPf", "sm_80", 34, 4096)
    assert (good.stack, good.spilled) == (0, 0)
    assert (bad.stack, bad.spilled, bad.registers, bad.shared) == (96, 136, 255, 0)
    assert good.instructions == {"LDG.E.128": 1, "EXIT": 1, "HMMA.16816.F32": 1}
    assert [good.count(n) for n in ("LDG", "LDG.E.128", "LDG.E.1", "HMMA", "MMA")] == [
        1,
        1,
        0,
        1,
        0,
    ]
    assert not good.is_empty


def test_spills_and_local_memory_are_faults(gate: dict[str, Any], kernels: tuple[Any, Any]) -> None:
    good, bad = kernels
    assert gate["faults"](good) == []
    assert gate["faults"](bad) == ["spills 136 bytes", "uses local memory: 1 STL"]


def test_kernels_are_what_is_expected_of_them(
    gate: dict[str, Any], kernels: tuple[Any, Any]
) -> None:
    good, _ = kernels
    expected = gate["Expected"]
    names = gate["faults"].__globals__  # the table, as the functions see it
    names["EXPECTED"] = (
        expected("good", "sm_80", needs=("HMMA", "HGMMA"), forbids=("EXIT",)),
        expected("good", "sm_90a", needs=("UTMALDG",)),
    )
    assert gate["faults"](good) == ["has no HGMMA", "has EXIT"]
    assert gate["unmet"](kernels) == ["there is no kernel named good for sm_90a"]


def test_serialised_wgmmas_are_recognised(gate: dict[str, Any]) -> None:
    line = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are ..."
    )
    assert gate["SERIALISED"].search(line)
    assert not gate["SERIALISED"].search("ptxas info    : (C7520) something else")


def test_names_are_short(gate: dict[str, Any]) -> None:
    mangled = "_ZN10neuron_ext4cuda12_GLOBAL__N_110gemm_naiveIfEEvPKT_"
    assert gate["readable"]([mangled, "f32"]) == ["gemm_naive<float>", "f32"]
