"""Says which build, kernels and random numbers the tests ran with, and how exact they were."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

from neuron_ext import backends

# Work for threads that sleep between calls is cut less finely; tests take the finest cuts. (OpenMP
# has read this when torch was imported.)
os.environ.pop("OMP_WAIT_POLICY", None)


def pytest_report_header() -> str:
    return backends.show_config()


@pytest.fixture(params=backends.supported_cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set whose kernels this machine can run, in turn."""
    with backends.use_cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh random numbers in each run; pytest shows the line below when a test fails."""
    seed = int(os.environ.get("NEURON_EXT_TEST_SEED", secrets.randbits(32)))
    print(f"NEURON_EXT_TEST_SEED={seed} repeats these inputs")
    torch.manual_seed(seed)
    return seed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests recorded with ``record_property("figure", text)``."""
    figures = [
        str(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "figure" and report.when == "call"
    ]
    if figures:
        terminalreporter.section("accuracy")
        terminalreporter.write_line("\n".join(figures))
