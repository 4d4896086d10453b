"""A comparison's results on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moelab.compare.results import measured
from moelab.compare.statistics import estimate
from moelab.compare.words import DASH, headline, loss_name, quantity, signed


def print_table(results: dict[str, Any], console: Console) -> None:
    """One line an arm, its differences from the first arm beside it, and below them the headline."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    first = next(iter(results["arms"]))
    table.add_column("arm", overflow="fold", min_width=10)
    split = results.get("split", "valid")
    figures = ("test_loss", "test_bits_per_byte") if split == "test" else ("val_loss", "val_bits_per_byte")
    for heading in (
        "params\ntotal", "params\nactive", f"{split}\nloss", "bits/\nbyte", "tokens\n/s", "Δ loss\ntokens",
        "Δ loss\nFLOPs", "Δ loss\ntime",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, found in results["arms"].items():
        table.add_row(
            arm,
            quantity(found["parameters"]["total"]),
            quantity(found["parameters"]["active"]),
            *(_mean(found, figure, "{:.4f}".format) for figure in figures),
            _mean(found, "tokens_per_second", quantity),
            *(_difference(results, arm, first, budget) for budget in ("tokens", "flops", "seconds")),
        )
    console.print(table)
    seeds = len(results["seeds"])
    read_off = any(entry["interpolated"] for entry in results["comparisons"])
    means = f"mean of {seeds} seeds" if seeds > 1 else "a single run"
    console.print(
        f"Δ: difference of the {loss_name(results)} from {first} in nats per token at equal tokens, training FLOPs and "
        f"time; {means}"
        + ("; * read off the curve." if read_off else "."),
        style="dim", highlight=False,
    )  # fmt: skip
    for sentence in headline(results):
        console.print()
        console.print(sentence, highlight=False, markup=False)


def _mean(arm: dict[str, Any], figure: str, form: Callable[[float], str]) -> str:
    found = estimate(measured(arm, figure))
    return form(found.mean) if found else DASH


def _difference(results: dict[str, Any], arm: str, first: str, budget: str) -> str:
    for entry in results["comparisons"]:
        if (entry["arm"], entry["against"], entry["budget"]) == (arm, first, budget):
            mark = "*" if entry["interpolated"] and entry["difference"] is not None else ""
            return signed(entry["difference"]) + mark
    return ""
