"""The timings of whole steps as a table of 80 columns, and as a picture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from moelab.bench.parts import PARTS, TIMES
from moelab.bench.report import DASH
from moelab.compare.picture import ARM_COLOURS, LIGHT, STYLE

HEADINGS = {"attention": "atten-\ntion", "experts": "ex-\nperts", "optimizer": "opti-\nmizer"}


def print_step(results: dict[str, Any], console: Console) -> None:
    """Two tables, a row each size, arm and backend; below, what could not be timed and why, and what columns are."""
    timed = [row for row in results["rows"] if "ms" in row]
    if timed:
        _print_tables(timed, results, console)
    for row in results["rows"]:
        if "reason" in row:
            named = " ".join(filter(None, (row["size"], row["arm"], row["backend"])))
            console.print(f"{named}: no time: {row['reason']}", highlight=False, soft_wrap=True)
    if timed:
        _print_caption(timed, results, console)


def _print_tables(timed: list[dict[str, Any]], results: dict[str, Any], console: Console) -> None:
    speed = {
        "ms": lambda row: _ms(row["ms"]) + ("*" if _unsteady(row) else ""),
        "tokens\n/s": lambda row: _rate(row["tokens_per_second"]),
        "MFU": lambda row: _percent(row["mfu"]),
        "÷\ntwin": lambda row: f"{row['ratio']:.2f}" if "ratio" in row else "",
        "GiB": lambda row: f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else DASH,
        "batch": lambda row: f"{row['batch_size']}×{row['accumulation']}",
        "1st\ns": lambda row: f"{row['first_seconds']:.0f}",
    }
    console.print(_table(timed, speed))
    asked = results["settings"]["parts"]
    parts = {HEADINGS.get(name, name): functools.partial(_part, name) for name in PARTS if asked}
    console.print(_table(timed, {**parts, "idle": lambda row: _percent(row["idle"])}))


def _print_caption(timed: list[dict[str, Any]], results: dict[str, Any], console: Console) -> None:
    settings, environment, peak = results["settings"], results["environment"], results["peak_flops"]
    stated = f"{peak / 1e12:,.0f} TFLOP/s" if peak else "a peak that is not known"
    launched = {row["captured"] for row in timed}
    unsteady = any(_unsteady(row) for row in timed)
    how = (
        "captured as CUDA graphs" if launched == {True} else "not captured" if launched == {False} else "some captured"
    )
    console.print(
        f"{settings['sequences']} sequences a step, E = {settings['experts']}, K = {settings['top_k']}, "
        f"{environment['precision']}, on {environment['device']}, {how}. "
        f"ms: the median of {settings['rounds']} rounds of {settings['steps']} steps. "
        f"MFU: tokens/s · (6·P + 12·L·C·D), P active weights in products, over {stated}. "
        "÷ twin: of moe, tokens/s over dense-wide's; of moe-matched, over dense's, which have the same active FLOPs. "
        "batch: micro-batch × accumulation. 1st s: compiling and capturing. "
        "idle: no kernel ran, by the profiler in one round more."
        + (" experts: a dense model's feed-forward too; norms are with what they stand before. other: embedding, "
           "clipping and the rest. "
           f"Shares: medians of {TIMES} steps whose halves of the blocks are compiled each by itself."
           if settings["parts"] else "")
        + (" * Rounds differ by more than a tenth: something else disturbed the device." if unsteady else ""),
        style="dim", highlight=False,
    )  # fmt: skip


def _unsteady(row: dict[str, Any]) -> bool:
    return bool(max(row["rounds_ms"]) > 1.1 * min(row["rounds_ms"]))


def _table(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("size", "arm", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in rows:
        size = "" if row["size"] == shown else row["size"]
        backend = (row["backend"] or "").replace("-", "-\n")
        table.add_row(size, row["arm"], backend, *(show(row) for show in columns.values()))
        shown = row["size"]
    return table


def _part(name: str, row: dict[str, Any]) -> str:
    return _percent(row["parts"] and row["parts"][name])


def _share(row: dict[str, Any], part: str) -> float:
    """Of a bar; all of it is "other" but for what is idle where the parts are not known."""
    idle: float = row["idle"] or 0
    if part == "idle":
        return idle
    if row["parts"] is None:
        return 1 - idle if part == "other" else 0
    share: float = row["parts"][part]
    return share


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{share * 100:.0f}%"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _rate(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + unit if value < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.0f}"


def draw_step(results: dict[str, Any], path: Path) -> None:
    """A step's milliseconds, a bar each arm and backend, cut into its parts; a group of axes each size."""
    timed, asked = [row for row in results["rows"] if "ms" in row], results["settings"]["parts"]
    sizes = list(dict.fromkeys(row["size"] for row in timed))
    colours = dict(zip((*PARTS, "idle"), (*ARM_COLOURS[:4], LIGHT["muted"], LIGHT["line"]), strict=True))
    colours = {part: colour for part, colour in colours.items() if asked or part in ("other", "idle")}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 0.9 + 0.4 * len(timed) + 0.45 * len(sizes)), layout="constrained")
        heights = [sum(row["size"] == size for row in timed) + 0.6 for size in sizes]
        grid = figure.subplots(max(1, len(sizes)), squeeze=False, gridspec_kw={"height_ratios": heights or [1]})
        for size, axes in zip(sizes, grid[:, 0], strict=True):
            rows = [row for row in timed if row["size"] == size]
            names = ["\n".join(filter(None, (row["arm"], row["backend"]))) for row in rows]
            left = [0.0] * len(rows)
            for part, colour in colours.items():
                shares = [_share(row, part) for row in rows]
                widths = [share * row["ms"] for share, row in zip(shares, rows, strict=True)]
                axes.barh(names, widths, 0.8, left, color=colour, label=part if asked or part == "idle" else "kernels")
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for at, (end, row) in enumerate(zip(left, rows, strict=True)):
                axes.text(end, at, f" {_rate(row['tokens_per_second'])}", va="center", fontsize=8)
            axes.set_xlim(0, 1.14 * max(left))
            axes.invert_yaxis()
            axes.set_title(size, loc="left")
            axes.grid(visible=False, axis="y")
        if sizes:
            environment = results["environment"]
            axes.set_xlabel(
                "ms a step, and tokens/s\n"
                + ("its parts as in a step compiled in parts\n" if asked else "")
                + f"{environment['device']}, {environment['precision']}"
            )
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200)
