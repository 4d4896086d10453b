"""Tuning every arm by one rule, so that none is compared untuned.

Each arm is trained with each value at the comparison's first seed; the value with the lowest validation loss at the end
is the arm's own, of equal ones the first. All its runs then have that value, and are compared by their test loss:
nothing was chosen on that text.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.compare.arms import Arm, Settings, convert, separated, setting
from moelab.config import RunFailed, UsageError, flag


@dataclass(frozen=True)
class Sweep:
    """One setting, and the values of it that are tried."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Trial:
    """One value tried for one arm (of several settings: one of each)."""

    arm: str
    point: Settings
    folder: str
    loss: float | None
    """Validation loss at the end; None of a run whose loss did not stay finite."""


def parse_sweep(text: str) -> Sweep:
    """The sweep that `key=value,value,…` describes. Raises `UsageError` as `parse_arm`, and on less than two values."""
    where = f"sweep = {text}"
    written, _, rest = text.partition("=")
    key = setting(written.strip(), where)
    values = tuple(convert(key, value, where) for value in separated(rest))
    if len(values) < 2 or len(set(values)) < len(values):
        raise UsageError(f"{where}: give two or more values, each once")
    return Sweep(key, values)


def check_sweeps(sweeps: Sequence[Sweep], arms: Sequence[Arm]) -> None:
    """Raises `UsageError` on a setting swept twice, by no arm, or given to an arm that would sweep it."""
    keys = [sweep.key for sweep in sweeps]
    for key in keys:
        name = flag(key.partition(".")[2])
        if keys.count(key) > 1:
            raise UsageError(f"sweep = {name}: give all its values in one --sweep")
        if not any(arm.uses(key) for arm in arms):
            raise UsageError(f"sweep = {name}: no arm has a use for it; sweep another setting")
        for arm in arms:
            if key in dict(arm.overrides):
                raise UsageError(f"sweep = {name}: the arm {arm.name} is given one value of it; leave one of them out")


def points(sweeps: Sequence[Sweep], arm: Arm) -> list[Settings]:
    """Every combination of the swept values that an arm has a use for; none where it has for no setting."""
    own = [sweep for sweep in sweeps if arm.uses(sweep.key)]
    grid = itertools.product(*(sweep.values for sweep in own))
    return [tuple((sweep.key, value) for sweep, value in zip(own, values, strict=True)) for values in grid if own]


def label(point: Settings) -> str:
    """A point as a part of a folder's name."""
    words = "-".join(f"{flag(key.partition('.')[2])}={value}" for key, value in point)
    return re.sub(r"[^A-Za-z0-9._=+-]", "-", words.replace(",", "+"))


def choose(trials: Sequence[Trial]) -> Settings:
    """The point of the lowest loss of one arm's trials, the first of equals. Raises `RunFailed` if all diverged."""
    finite = [trial for trial in trials if trial.loss is not None and math.isfinite(trial.loss)]
    if not finite:
        raise RunFailed(f"{trials[0].arm}: no value of the sweep kept its loss finite; sweep lower values")
    return min(finite, key=lambda trial: (trial.loss, trials.index(trial))).point


def at_edge(sweeps: Sequence[Sweep], point: Settings) -> dict[str, str]:
    """The settings whose chosen value is the lowest or highest number tried, and which: a wider range may do better.

    A lowest value of 0 is no edge: there is nothing below it.
    """
    tried = {sweep.key: sweep.values for sweep in sweeps}
    found = {}
    for key, value in point:
        numbers = [one for one in tried[key] if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(numbers) == len(tried[key]) and value in (min(numbers), max(numbers)) and value != 0:
            found[key] = "lowest" if value == min(numbers) else "highest"
    return found


def sweep_results(
    sweeps: Sequence[Sweep], seed: int, trials: Mapping[str, Sequence[Trial]], chosen: Mapping[str, Settings]
) -> dict[str, Any]:
    """The entry `sweep` of results.json."""
    return {
        "keys": {sweep.key: list(sweep.values) for sweep in sweeps},
        "seed": seed,
        "arms": {
            arm: {
                "tried": [
                    {"values": dict(trial.point), "val_loss": trial.loss, "folder": trial.folder} for trial in found
                ],
                "chosen": dict(chosen[arm]),
                "at_edge": at_edge(sweeps, chosen[arm]),
            }
            for arm, found in trials.items()
        },
    }
