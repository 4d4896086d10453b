"""A layer's timings as a table of 80 columns, and as a picture."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from moelab.bench.layer import PROFILED
from moelab.compare.picture import ARM_COLOURS, STYLE

DASH = "–"


def print_layer(results: dict[str, Any], console: Console) -> None:
    """A row each width and backend; below, what could not be timed and why, and what the columns are."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("D", "backend"):
        table.add_column(heading, no_wrap=True)
    columns = {
        "wall\nms": "wall_ms", "busy\nms": "busy_ms", "graph\nms": "captured_ms", "fwd\nms": "forward_ms",
        "bwd\nms": "backward_ms", "÷\ntwin": "ratio", "TFLOP\n/s": "tflops", "peak\nMiB": "peak_mib",
        "kept\nMiB": "kept_mib",
    }  # fmt: skip
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in sorted(results["rows"], key=itemgetter("width")):
        if "wall_ms" not in row:
            continue
        table.add_row(
            "" if row["width"] == shown else str(row["width"]), row["backend"].replace("-", "-\n"),
            *(_number(row[name]) for name in columns.values()),
        )  # fmt: skip
        shown = row["width"]
    console.print("", table, "", sep="\n")
    reasons: dict[tuple[str, str], tuple[int, ...]] = {}
    for row in results["rows"]:
        if "reason" in row:
            case = row["backend"], row["reason"]
            reasons[case] = (*reasons.get(case, ()), row["width"])
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (name, reason), widths in reasons.items():
        alike.setdefault((reason, widths), []).append(name)
    every = len({row["width"] for row in results["rows"]})
    for (reason, widths), names in alike.items():
        where = "" if len(widths) == every else f"D = {', '.join(map(str, widths))}, "
        console.print(f"{where}{', '.join(names)}: no time: {reason}", highlight=False, soft_wrap=True)
    settings, environment = results["settings"], results["environment"]
    rounds, medians = settings["rounds"], f"medians of {settings['rounds']} rounds of {settings['steps']} steps"
    if any(row.get("busy_ms") for row in results["rows"]):
        medians = f"wall and graph: {medians}; busy, fwd, bwd, ÷ twin and TFLOP/s: of the first {min(PROFILED, rounds)}"
    over = ", ".join(f"{row['backend']} at D = {row['width']}" for row in busier_than_their_step(results["rows"]))
    console.print(
        f"T = {results['tokens']:,}, E = {settings['experts']}, K = {settings['top_k']}, "
        f"F = {settings['multiple']:g}·D, {settings['activation']}, {environment['precision']}, "
        f"routing: {settings['routing']}. Router, forward and backward on {environment['device']}; {medians}. "
        "busy: the kernels' time; graph: a captured step; fwd, bwd and ÷ twin are of busy time (of wall on a CPU). "
        "TFLOP/s on 12·T·K·D·F (18 for swiglu). kept: held for the backward pass."
        + (f" busy is above the captured (or wall) time of: {over}: the GPU ran at other clocks; compare graph ms."
           if over else ""),
        style="dim", highlight=False,
    )  # fmt: skip


def busier_than_their_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose kernels ran for over 3 % longer than their step took, captured where it was.

    In one stream that cannot be: the device throttled in the one measurement more than in the other.
    """
    return [
        row for row in rows if row.get("busy_ms") and row["busy_ms"] > 1.03 * (row["captured_ms"] or row["wall_ms"])
    ]


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    if value < 0.001:
        return "<.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def draw_layer(results: dict[str, Any], path: Path) -> None:
    """Time over the dense twin's, a group of bars each width; the twin is the line at 1."""
    widths = sorted({row["width"] for row in results["rows"]})
    names = list(dict.fromkeys(row["backend"] for row in results["rows"] if "ratio" in row))[1:]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 0.6 + 0.24 * len(names) * len(widths)), 3.4), layout="constrained")
        axes = figure.subplots()
        thick = 0.8 / max(1, len(names))
        for place, name in enumerate(names):
            found = {row["width"]: row["ratio"] for row in results["rows"] if row["backend"] == name and "ratio" in row}
            at = [widths.index(width) + (place - (len(names) - 1) / 2) * thick for width in found]
            colour, hatch = ARM_COLOURS[1:6][place % 5], "////" if place >= 5 else None  # the first is the twin's
            bars = axes.bar(
                at,
                list(found.values()),
                0.92 * thick,
                color=colour,
                edgecolor="white",
                linewidth=0,
                hatch=hatch,
                label=name,
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, rotation=90 if len(names) > 4 else 0)
        axes.axhline(1, color=ARM_COLOURS[0], linewidth=1.2, label="dense twin")
        axes.set_xticks(range(len(widths)), [f"D = {width}" for width in widths])
        axes.set_ylabel("time ÷ dense twin's")
        axes.set_xlabel(f"{results['environment']['device']}, {results['environment']['precision']}")
        axes.grid(visible=False, axis="x")
        axes.set_ylim(top=1.12 * axes.get_ylim()[1])
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, dpi=200)
