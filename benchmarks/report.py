"""The table, the JSON file and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.measure import NOISY, Line

_COMPILED = ("compile", "max-autotune")
_NOT_A_LIMIT = 0.5e-6  # seconds: work as short as this is nothing beside the call itself
_WORST = 12

HEADING = (
    f"{'case':<38}{'dtype':>5}{'thr':>4}{'ours':>10}{'torch':>10}{'torch/ours':>12}"
    f"{'spread':>7}{'compile':>9}{'autotune':>9}{'rate':>14}{'limit':>6}"
)

LEGEND = """\
ours, torch   median time of a call; torch is eager torch
torch/ours    how many times faster ours is; compile, autotune: the same against torch.compile, its
              default and (weights constant) max-autotune
spread        the larger interquartile range of ours and torch's, over the median
rate, limit   work done by ours, and how much that is of the most that this machine was measured to
              do (above); data that fits into a cache is compared with that cache; not said of
              work below half a microsecond, where the call is what counts"""


def short(dtype: torch.dtype) -> str:
    """f32, f64, bf16 or f16."""
    return str(dtype).removeprefix("torch.").replace("float", "f")


def row(line: Line) -> str:
    """A line of the table."""
    start = f"{line.case.name:<38}{short(line.dtype):>5}{line.threads:>4}"
    if not line.times:
        return f"{start}  not run: {line.not_run['ours']}"
    ours = line.times["ours"].median
    rate = f"{_rate(line):>14}{line.least_seconds / ours:>6.0%}"
    return (
        f"{start}{_time(ours):>10}{_time(line.times['torch'].median):>10}"
        f"{_ratio(line.ratio()):>12}{line.spread:>6.0%}{'?' if line.spread > NOISY else ' '}"
        + "".join(f"{_ratio(line.ratio(side)):>9}" for side in _COMPILED)
        + (rate if line.least_seconds > _NOT_A_LIMIT else "")
    )


def ceilings_table(ceilings: Iterable[Ceilings]) -> str:
    """What was measured, per number of threads."""
    rows = []
    for measured in ceilings:
        threads = f"{measured.threads} thread{'s' if measured.threads > 1 else ''}"
        for name, rate in measured.peaks.items():
            rows.append(f"  {threads:<11}{name:<12}{rate / 1e9:9.1f} GFLOP/s")
        for b in measured.bandwidths:
            rows.append(
                f"  {threads:<11}{b.level:<12}{b.read / 1e9:9.1f} GB/s read"
                f"{b.copy / 1e9:10.1f} GB/s copied (read + written)"
            )
        if measured.fresh:
            rows.append(f"  {threads:<11}fresh memory{measured.fresh / 1e9:9.1f} GB/s")
        for name, reason in measured.not_measured.items():
            rows.append(f"  {threads:<11}{name}: not measured: {reason}")
    return "\n".join(rows)


def geometric_mean(lines: Iterable[Line], side: str = "torch") -> float | None:
    """Of the ratios to ``side``; None where there are none."""
    ratios = [ratio for line in lines if (ratio := line.ratio(side)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def summary(lines: Sequence[Line]) -> str:
    """Geometric means, the worst lines, and what didn't run."""
    timed = [line for line in lines if line.times]
    if not timed:
        return "nothing was timed"
    parts = [
        f"torch/ours, geometric mean of {len(timed)} lines: {_ratio(geometric_mean(timed))}"
        + "".join(
            f"; against {side}: {_ratio(geometric_mean(timed, side))}"
            for side in _COMPILED
            if geometric_mean(timed, side)
        )
    ]
    threads = sorted({line.threads for line in timed})
    dtypes = list(dict.fromkeys(line.dtype for line in timed))
    columns = [(dtype, count) for dtype in dtypes for count in threads]
    parts.append(f"  {'family':<12}" + "".join(f"{f'{short(d)}, {t} thr':>13}" for d, t in columns))
    for family in (*dict.fromkeys(line.case.family for line in timed), "all"):
        means = [
            geometric_mean(
                line
                for line in timed
                if (line.dtype, line.threads) == column and family in (line.case.family, "all")
            )
            for column in columns
        ]
        parts.append(f"  {family:<12}" + "".join(f"{_ratio(mean):>13}" for mean in means))

    slower = sum((line.ratio() or 0) < 1 for line in timed)
    parts.append(f"\nslower than torch: {slower} of {len(timed)}. The worst:\n{HEADING}")
    parts += map(row, sorted(timed, key=lambda line: line.ratio() or 0)[:_WORST])
    noisy = sum(line.spread > NOISY for line in timed)
    parts.append(f"noisy (spread above {NOISY:.0%}, marked ?): {noisy} of {len(timed)}")

    missing: dict[str, list[str]] = {}
    for line in lines:
        for side, reason in line.not_run.items():
            where = f"{line.case.name} {short(line.dtype)} {line.threads} thr"
            missing.setdefault(f"{side}: {reason}", []).append(where)
    if missing:
        parts.append("\nnot run:")
        parts += [f"  {what}\n    {'; '.join(where)}" for what, where in missing.items()]
    return "\n".join(parts)


def write_json(
    path: Path,
    machine: dict[str, Any],
    settings: dict[str, Any],
    ceilings: Sequence[Ceilings],
    lines: Sequence[Line],
) -> None:
    """Everything that was measured, times in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "machine": machine,
        "settings": settings,
        "ceilings": [dataclasses.asdict(measured) for measured in ceilings],
        "geometric_mean": geometric_mean(lines),
        "lines": [
            {
                "case": line.case.name,
                "dtype": short(line.dtype),
                "threads": line.threads,
                "kernel": line.kernel,
                "times": {side: dataclasses.asdict(times) for side, times in line.times.items()},
                "ratio": line.ratio(),
                "work": dataclasses.asdict(line.case.work),
                "least_seconds": line.least_seconds,
                "ceiling": line.ceiling,
                "not_run": line.not_run,
            }
            for line in lines
        ],
    }
    path.write_text(json.dumps(contents, indent=1) + "\n")


def draw(path: Path, title: str, lines: Sequence[Line]) -> None:
    """A bar from 1 to each ratio, on a logarithmic scale: one group per case, one column of panels
    per number of threads.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    timed = [line for line in lines if line.times]
    threads = sorted({line.threads for line in timed})
    dtypes = list(dict.fromkeys(line.dtype for line in timed))
    families: dict[str, list[str]] = {}
    for line in timed:
        names = families.setdefault(line.case.family, [])
        if line.case.name not in names:
            names.append(line.case.name)
    heights = [0.8 + len(names) for names in families.values()]
    ratios = [line.ratio() or 1 for line in timed]
    low, high = min(0.8, *ratios) / 1.3, max(1.25, *ratios) * 1.4

    inches = 1.2 + sum(heights) * (0.08 * max(2.5, len(dtypes)) + 0.04)
    figure = Figure(figsize=(3.2 + 5 * len(threads), inches), layout="constrained")
    panels = figure.subplots(
        len(families), len(threads), squeeze=False, sharex=True, height_ratios=heights
    )
    thickness = 0.84 / len(dtypes)
    for (family, names), in_row in zip(families.items(), panels, strict=True):
        for panel, count in zip(in_row, threads, strict=True):
            for i, dtype in enumerate(dtypes):
                bars = [
                    (names.index(line.case.name) + (i + 0.5) * thickness - 0.42, line.ratio() or 1)
                    for line in timed
                    if (line.case.family, line.dtype, line.threads) == (family, dtype, count)
                ]
                places, lengths = [place for place, _ in bars], [ratio - 1 for _, ratio in bars]
                panel.barh(places, lengths, thickness, left=1, color=f"C{i}", label=short(dtype))
                for place, ratio in bars:
                    panel.annotate(
                        f"{ratio:#.2g}" if ratio < 9.95 else f"{ratio:.0f}",
                        (ratio, place),
                        (2 if ratio >= 1 else -2, 0),
                        textcoords="offset points",
                        ha="left" if ratio >= 1 else "right",
                        va="center_baseline",
                        fontsize=5.5,
                        color="black" if ratio >= 1 else "red",
                    )
            labels = [name.removeprefix(f"{family}/") for name in names]
            panel.set_yticks(range(len(names)), labels, fontsize=7)
            panel.set_ylim(len(names) - 0.4, -0.6)
            panel.set(xscale="log", xlim=(low, high))
            panel.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.tick_params(axis="x", labelsize=7, labelbottom=True)
            panel.axvline(1, color="black", linewidth=1)
            panel.grid(axis="x", alpha=0.3)
            panel.set_title(
                f"{family}, {count} thread{'s' if count > 1 else ''}", fontsize=8, loc="left"
            )
            if panel is not in_row[0]:
                panel.tick_params(axis="y", labelleft=False)
    handles, names_of_dtypes = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        names_of_dtypes,
        title=title,
        title_fontsize=10,
        loc="outside upper center",
        ncols=len(dtypes),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _ticks(low: float, high: float) -> list[float]:
    steps = (mantissa * 10.0**e for e in range(-3, 5) for mantissa in (1, 2, 5))
    return [tick for tick in steps if low < tick < high]


def _time(seconds: float) -> str:
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            value = seconds * scale
            return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"
    return f"{seconds:.2f} s"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _rate(line: Line) -> str:
    work, seconds = line.case.work, line.times["ours"].median
    if work.flops:
        return f"{work.flops / seconds / 1e9:.1f} GFLOP/s"
    moved = (work.read + work.written) * line.dtype.itemsize
    return f"{moved / seconds / 1e9:.1f} GB/s"
