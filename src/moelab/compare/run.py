"""A finished run, as a comparison reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab.compare.statistics import Curve
from moelab.config import UsageError
from moelab.training.loop import finished_summary


@dataclass(frozen=True)
class Run:
    """Summary and metrics of one finished run, and the budget that it was trained for."""

    folder: str
    budget: str
    summary: dict[str, Any]
    lines: tuple[dict[str, Any], ...]

    @property
    def arm(self) -> str:
        return str(self.summary["arm"])

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats per token."""
        return float(self.summary["val_loss"])

    def reported(self, split: str) -> float:
        """Loss at the end on the split that a comparison is about: valid, or test where it was tuned on valid."""
        return float(self.summary["test_loss" if split == "test" else "val_loss"])

    def spent(self, budget: str) -> float:
        """What the whole run cost, in tokens, FLOPs or seconds."""
        return float(self._spent(self.summary, budget))

    def curve(self, budget: str) -> Curve:
        """Validation loss against tokens, FLOPs or seconds."""
        points = [(self._spent(line, budget), line["val_loss"]) for line in self.evaluations]
        if points and self.evaluations[-1]["step"] == self.summary["steps"]:
            points[-1] = (self.spent(budget), self.loss)  # metrics round their seconds, the summary does not
        spent, loss = np.array(points, np.float64).reshape(-1, 2).T
        return Curve(spent, loss)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics that have a validation loss."""
        return [line for line in self.lines if "val_loss" in line]

    def _spent(self, counts: dict[str, Any], budget: str) -> float:
        if budget == "flops":
            return float(counts["tokens"] * self.summary["flops_per_token"])
        return float(counts[budget])


def costs_of_arms(runs: Sequence[Run], budget: str) -> dict[str, float]:
    """By arm, what its runs of equal tokens cost, in tokens, FLOPs or seconds, as `Comparison.budget_runs` takes it.

    It is the least over seeds: FLOPs do not vary, and what disturbs a clock only adds seconds.
    """
    own = [run for run in runs if run.budget == "tokens"]
    return {arm: min(run.spent(budget) for run in own if run.arm == arm) for arm in {run.arm for run in own}}


def read_run(comparison: Path, folder: str, budget: str) -> Run:
    """Raises `UsageError` where there is no finished run with its metrics."""
    place = comparison / folder
    summary = finished_summary(place)
    try:
        lines = tuple(json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines())
    except (OSError, ValueError) as problem:
        raise UsageError(f"run = {place}: its metrics.jsonl cannot be read ({problem})") from None
    if summary is None:
        raise UsageError(f"run = {place}: it is not finished; run its comparison again to go on")
    return Run(folder, budget, summary, lines)
