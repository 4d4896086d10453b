"""What the routers of a run did, from its metrics; what of it a report says, and when it calls it unhealthy.

Letters in shapes: M measurements, L MoE layers, E experts, S types of tokens. The figures are those of
`moelab.evaluation.routing`, which also says what each is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.compare.run import Run

# Beyond these an arm's routing is called unhealthy.
UNBALANCED = 1.0
"""Max violation: the busiest expert gets more than twice its share."""
COLLAPSED = 0.1
"""An expert's load over 1 / E: it gets hardly any tokens."""
DROPPED = 0.05
"""Share of the slots that found their expert full."""
LARGE_LOGITS = 50.0
"""Root mean square of the logits: their differences are then lost in bf16, and the softmax has no gradient."""
UNLIKE = 2.0
"""Largest norm of a layer's experts over the smallest: they were not trained alike."""

FINAL_FIGURES = ("max_violation", "min_load", "logit_rms", "dropped")


@dataclass(frozen=True)
class Routing:
    """The measurements of one run; the last is of its last step."""

    seed: int
    layers: tuple[int, ...]
    """Numbers of the MoE layers."""
    steps: np.ndarray
    """(M,)"""
    max_violation: np.ndarray
    """(M, L); so are the next three."""
    mean_violation: np.ndarray
    entropy: np.ndarray
    """Nats."""
    logit_rms: np.ndarray
    load: np.ndarray
    """(L, E) at the end."""
    weight_norm: np.ndarray
    """(L, E) at the end."""
    overlap: np.ndarray
    """(L, E, E) at the end."""
    dropped: np.ndarray | None
    """(D, L) at the steps `dropped_steps`, between one line of metrics and the next; None without a capacity."""
    dropped_steps: np.ndarray

    @property
    def experts(self) -> int:
        return int(self.load.shape[1])


def read_routing(run: Run, layers: Sequence[int]) -> Routing | None:
    """The measurements of a run whose MoE layers are `layers`; None where there are none, as in runs of moelab 0.1."""
    measured = [line for line in run.lines if "routing" in line]
    if not measured:
        return None
    last = measured[-1]["routing"]
    drops = [line for line in run.lines if "dropped" in line]
    series = {
        name: np.array([line["routing"][name] for line in measured], np.float64)
        for name in ("max_violation", "mean_violation", "entropy", "logit_rms")
    }
    final = {name: np.array(last[name], np.float64) for name in ("load", "weight_norm", "overlap")}
    return Routing(
        seed=run.seed,
        layers=tuple(layers),
        steps=np.array([line["step"] for line in measured]),
        dropped=np.array([line["dropped"] for line in drops], np.float64) if drops else None,
        dropped_steps=np.array([line["step"] for line in drops]),
        **series,
        **final,
    )


def final_figures(run: Run) -> dict[str, float | None]:
    """A run's routing at its end, in one number each; None for what was not measured.

    Returns:
        max_violation: of the worst layer.
        min_load: load of the idlest expert of any layer, over 1 / E.
        logit_rms: of the layer where it is largest.
        dropped: share of all layers' slots that were dropped in training, since the line of metrics before; None
            without a capacity.
    """
    found: dict[str, float | None] = dict.fromkeys(FINAL_FIGURES)
    measured = [line["routing"] for line in run.lines if "routing" in line]
    if measured:
        last = measured[-1]
        found["max_violation"] = max(last["max_violation"])
        found["min_load"] = min(min(layer) * len(layer) for layer in last["load"])
        found["logit_rms"] = max(last["logit_rms"])
    drops = [line["dropped"] for line in run.lines if "dropped" in line]
    if drops:
        found["dropped"] = sum(drops[-1]) / len(drops[-1])
    return found


def routing_notes(results: dict[str, Any]) -> list[str]:
    """A note for each arm whose routing was unhealthy at the end of a run: what was, and which setting helps."""
    return [note for arm, facts in results["arms"].items() if (note := _unhealthy(arm, facts["runs"]))]


def _unhealthy(arm: str, runs: Sequence[dict[str, Any]]) -> str:
    own = [run for run in runs if run["budget"] == "tokens"]
    ill = [run for run in own if any(_found(run).values())]
    if not ill:
        return ""
    what, help_by = [], []
    for about, (words, settings) in _COMPLAINTS.items():
        if any(_found(run)[about] for run in ill):
            what.append(words.format(**_worst(ill)))
            help_by += [setting for setting in settings if setting not in help_by]
    seeds = f" in {len(ill)} of {len(own)} seeds" if len(ill) < len(own) else " in every seed" if len(own) > 1 else ""
    return (
        f"The routing of {arm} was unhealthy at the end{seeds}: {', '.join(what)}. Its loss is that of experts used "
        f"badly; another {_either(help_by)} may help."
    )


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


_BALANCE = ("--balance-loss", "--bias-rate")
_COMPLAINTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "collapsed": ("the idlest expert got {min_load:.0%} of its fair share (under 10% is collapsed)", _BALANCE),
    "unbalanced": ("the busiest expert got {busiest:.1f} times its fair share (over 2 is unbalanced)", _BALANCE),
    "dropped": ("{dropped:.1%} of the slots were dropped (over 5% is many)", (*_BALANCE, "--capacity-factor")),
    "large": ("the router's logits had a size of {logit_rms:.0f} (over 50 is too large for bf16)", ("--z-loss",)),
}


def _found(run: dict[str, Any]) -> dict[str, bool]:
    """Which limits a run of results.json is beyond; what was not measured is beyond none."""

    def beyond(name: str, limit: float) -> bool:
        return run.get(name) is not None and run[name] > limit

    return {
        "collapsed": run.get("min_load") is not None and run["min_load"] < COLLAPSED,
        "unbalanced": beyond("max_violation", UNBALANCED),
        "dropped": beyond("dropped", DROPPED),
        "large": beyond("logit_rms", LARGE_LOGITS),
    }


def _worst(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The worst of each figure over some runs."""
    values = {name: [run[name] for run in runs if run.get(name) is not None] for name in FINAL_FIGURES}
    worst = {name: min(found) if name == "min_load" else max(found) for name, found in values.items() if found}
    return worst | {"busiest": 1 + worst.get("max_violation", 0.0)}


def pairs_over_chance(overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often two experts are chosen together, against how often they would be if only their loads mattered.

    Chance is quasi-independence: e_ij = a_i a_j for i ≠ j, with a such that each expert has as many partners in e as in
    the overlap. (The product of the loads would not do: a token never chooses one expert twice, so that it expects too
    much of every pair.)

    Args:
        overlap: (E, E), share of the tokens that chose both; its diagonal is not read.

    Returns:
        overlap / e, 1 where e is 0, NaN on the diagonal; and e, 0 on the diagonal.
    """
    found = np.array(overlap, np.float64)
    np.fill_diagonal(found, 0)
    partners = found.sum(1)
    a = np.sqrt(partners)
    for _ in range(1000):  # a_i Σ_{j≠i} a_j = partners_i, by a damped fixed point
        others = a.sum() - a
        following = np.sqrt(a * np.divide(partners, others, out=np.zeros_like(a), where=others > 0))
        if np.allclose(following, a, rtol=1e-10, atol=1e-14):
            break
        a = following
    expected = np.outer(a, a)
    np.fill_diagonal(expected, 0)
    ratio = np.divide(found, expected, out=np.ones_like(found), where=expected > 0)
    np.fill_diagonal(ratio, np.nan)
    return ratio, expected


def types_over_chance(shares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How much of each type of token an expert gets, against what it gets of all tokens.

    Args:
        shares: (S, E), a type's slots by expert; rows sum to 1.
        weights: (S,), share of the tokens of each type.

    Returns:
        (S, E), shares over the mean of shares; 1 where an expert gets nothing of any type.
    """
    load = weights @ shares / weights.sum()
    ratio: np.ndarray = np.divide(shares, load, out=np.ones_like(shares), where=load > 0)
    return ratio


def moved_by_type(shares: np.ndarray, weights: np.ndarray) -> float:
    """Share of the slots that would go elsewhere if all types were spread over the experts alike (0 to 1).

    The mean over types of the total variation distance to the mean of all; arguments as of `types_over_chance`.
    """
    weights = weights / weights.sum()
    return float(weights @ np.abs(shares - weights @ shares).sum(1) / 2)
