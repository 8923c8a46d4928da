"""The command line: ``python -m neuron_ext [demo | info | check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_ext import __version__

_PROGRAM = "python -m neuron_ext"

_DESCRIPTION = """\
Neuron layers, y = sigmoid(x W^T + b), as hand-written kernels for PyTorch.
Without a command, the demo runs: small networks and two trainings, each beside plain torch."""

_EPILOG = """\
examples:
  python -m neuron_ext                      the demo, on a GPU if this build has kernels for it
  python -m neuron_ext --output /tmp/plots  the demo, its pictures saved elsewhere
  python -m neuron_ext info                 what to put into a bug report
  python -m neuron_ext check                is this installation computing correctly?

exit code:
  0 if everything agreed with torch, 1 if something didn't, 2 if the command can't run"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"neuron_ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")

    demo = commands.add_parser(
        "demo",
        help="networks and trainings beside plain torch (the default)",
        description="Compute five small systems and train two models, with neuron_ext and with "
        "plain torch from the same start, compare them, and save the loss curves and a confusion "
        "matrix.",
    )
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto, the default, is cuda if this build has kernels for it and "
        "there is a GPU",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("neuron_ext_demo"),
        metavar="DIR",
        help="folder for the pictures, made if missing (default: ./neuron_ext_demo)",
    )
    demo.add_argument("--quick", action="store_true", help="train only a few epochs")

    commands.add_parser(
        "info",
        help="this build and this machine",
        description="Print the versions, the kernels and the settings that matter here.",
    )
    commands.add_parser(
        "check",
        help="self-test of this installation, in seconds",
        description="Compare every op and its gradients, for every dtype and every instruction set "
        "that this machine can run, with torch in float64. Errors are given in units of the most "
        "that rounding can cause.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    ``argv`` is what follows ``python -m neuron_ext``; None stands for ``sys.argv[1:]``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (
        arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")
    ):
        arguments.insert(0, "demo")
    options = _parser().parse_args(arguments)

    try:
        from neuron_ext.cli import check, demo, info
    except ImportError as error:  # a checkout that nobody has built: the message says how to
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    if options.command == "info":
        return info.run()
    if options.command == "check":
        return check.run()
    return demo.run(device=options.device, output=options.output, quick=options.quick)
