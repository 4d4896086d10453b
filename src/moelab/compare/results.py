"""results.json: what a comparison found, from its finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moelab.compare.plan import BUDGETS, Comparison
from moelab.compare.routing import final_figures
from moelab.compare.run import Run, read_run
from moelab.compare.statistics import estimate
from moelab.compare.words import headline, notes
from moelab.config import RunFailed, UsageError

SCHEMA = 1
RUN_FIGURES = (
    "tokens", "val_loss", "val_bits_per_byte", "tokens_per_second", "mfu", "peak_memory_bytes", "seconds",
    "val_word_perplexity", "train_loss", "steps", "test_loss", "test_bits_per_byte", "test_word_perplexity",
)  # fmt: skip


def build_results(
    comparison: Comparison, runs: Sequence[Run], command: str, sweep: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of results.json; of a swept comparison with what was tried, and differences of the test loss.

    Raises `RunFailed` where arms of one seed did not see the same batches, or runs not the same text: whatever they
    reached could not be compared.
    """
    batches = {str(seed): _same_batches(runs, seed) for seed in comparison.seed_values}
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "data": _same_text(runs),
        "arms": {arm: _arm(comparison, arm, runs) for arm in comparison.names},
        "comparisons": _comparisons(comparison, runs, "test" if sweep else "valid"),
        "to_reach": _to_reach(comparison, runs),
        "split": "test" if sweep else "valid",
        "sweep": sweep,
        "preset": comparison.preset,
        "seeds": list(comparison.seed_values),
        "budgets": list(comparison.budgets),
        "training": asdict(comparison.training),
        "batches_sha256": batches,
        "environments": _environments(runs),
        "command": command,
    }
    results["words"] = {"headline": headline(results), "notes": notes(results)}
    return results


def read_results(folder: Path) -> tuple[dict[str, Any], list[Run]]:
    """A comparison's results and its runs. Raises `UsageError` where there is none, or it cannot be read."""
    try:
        results = json.loads((folder / "results.json").read_text())
        found = results["schema"]
        listed = [run for arm in results["arms"].values() for run in arm["runs"]]
        runs = [read_run(folder, run["folder"], run["budget"]) for run in listed] if found == SCHEMA else []
    except OSError:
        raise UsageError(
            f"report: {folder} is not a comparison; give a folder that `moelab compare --out` wrote"
        ) from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UsageError(
            f"report: {folder / 'results.json'} cannot be read ({problem!r}); run the comparison again"
        ) from None
    if found != SCHEMA:
        raise UsageError(f"report: {folder / 'results.json'} has schema {found}; this version of moelab reads {SCHEMA}")
    return results, runs


def measured(arm: dict[str, Any], figure: str) -> list[float]:
    """A figure of each of an arm's runs of equal tokens, those left out where it was not measured."""
    return list(measured_by_seed(arm, figure).values())


def measured_by_seed(arm: dict[str, Any], figure: str) -> dict[int, float]:
    """`measured`, by the runs' seeds."""
    runs = (run for run in arm["runs"] if run["budget"] == "tokens" and run.get(figure) is not None)
    return {run["seed"]: run[figure] for run in runs}


def _arm(comparison: Comparison, arm: str, runs: Sequence[Run]) -> dict[str, Any]:
    own = [run for run in runs if run.arm == arm]
    return {
        "parameters": own[0].summary["parameters"],
        "flops_per_token": own[0].summary["flops_per_token"],
        "runs": [
            {"seed": run.seed, "budget": run.budget, "folder": run.folder, "backend": run.summary.get("backend")}
            | {name: run.summary.get(name) for name in RUN_FIGURES}
            | final_figures(run)
            for run in own
        ],
        "model": asdict(comparison.model_of(arm)),
        "base": comparison.by_name[arm].base,
        "overrides": dict(comparison.by_name[arm].overrides),
        "training": asdict(comparison.training_of(arm)),
        "match": str(match) if (match := comparison.match_of(arm)) else None,
    }


def _same_batches(runs: Sequence[Run], seed: int) -> str:
    hashes = {run.arm: run.summary["batches_sha256"] for run in runs if run.seed == seed and run.budget == "tokens"}
    if len(set(hashes.values())) != 1:
        seen = ", ".join(f"{arm} {digest[:12]}" for arm, digest in hashes.items())
        raise RunFailed(
            f"seed {seed}: the arms did not see the same batches ({seen}); train them again in another --out"
        )
    return str(next(iter(hashes.values())))


def _same_text(runs: Sequence[Run]) -> dict[str, Any]:
    texts = {run.folder: run.summary["data"] for run in runs}
    first = next(iter(texts.values()))
    for folder, text in texts.items():
        if text["fingerprint"] != first["fingerprint"]:
            raise RunFailed(
                f"{folder}: its text has changed (fingerprint {text['fingerprint'][:12]}, that of {runs[0].folder} "
                f"{first['fingerprint'][:12]}); train all runs again in another --out"
            )
    known = ("name", "form", "source", "fingerprint", "tokenizer", "train_tokens", "valid_tokens")
    return {name: first.get(name) for name in known} | _same_test_text(runs)


def _same_test_text(runs: Sequence[Run]) -> dict[str, Any]:
    """What is known of the test split, where runs were scored on it."""
    known = {run.summary["test_fingerprint"]: run for run in runs if "test_fingerprint" in run.summary}
    if len(known) > 1:
        told = " and ".join(f"{run.folder} {fingerprint[:12]}" for fingerprint, run in known.items())
        raise RunFailed(f"the test text has changed between runs ({told}); train all runs again in another --out")
    scored = next(iter(known.values()), None)
    return {"test_tokens": scored.summary["test_tokens"]} if scored else {}


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the runs were measured on: each environment once, with the runs that were made in it."""
    found: list[dict[str, Any]] = []
    for run in runs:
        environment = run.summary["environment"]
        same = next((entry for entry in found if entry["environment"] == environment), None)
        if same is None:
            found.append(same := {"environment": environment, "runs": []})
        same["runs"].append(run.folder)
    return found


def _comparisons(comparison: Comparison, runs: Sequence[Run], split: str) -> list[dict[str, Any]]:
    return [
        _difference(runs, arm, against, budget, budget in comparison.budgets, split)
        for arm, against in _pairs(comparison)
        for budget in BUDGETS
    ]


def _to_reach(comparison: Comparison, runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [_ratio(runs, arm, against, budget) for arm, against in _pairs(comparison) for budget in BUDGETS]


def _pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """The arms that a comparison is about, two by two: each against the first, and moe against dense-wide."""
    first, *others = comparison.names
    pairs = [(arm, first) for arm in others]
    if {"moe", "dense-wide"} <= set(others):
        pairs.append(("moe", "dense-wide"))
    return pairs


def _ratio(runs: Sequence[Run], arm: str, against: str, budget: str) -> dict[str, Any]:
    """One entry of `to_reach`: what each arm had spent when it first was at the final validation loss of `against`.

    Of the runs of equal tokens, seed by seed; `ratio` is the arm's over that of `against`, the geometric mean, with the
    interval of the logarithms. It is absent unless every seed reached the loss: those that did would flatter the arm.
    """
    pairs = [
        pair
        for pair in _pairs_of_seeds(runs, arm, against, budget, trained_to_it=False)
        if budget != "seconds" or _same_device(*pair)
    ]
    spent = [[run.curve(budget).spent_to(right.loss) for run in (left, right)] for left, right in pairs]
    reached = [(own, other) for own, other in spent if own is not None and other is not None]
    found = estimate([math.log(own / other) for own, other in reached]) if len(reached) == len(pairs) else None
    return {
        "arm": arm,
        "against": against,
        "budget": budget,
        "ratio": math.exp(found.mean) if found else None,
        "ci95": [math.exp(end) for end in found.ci95] if found and found.ci95 else None,
        "runs": len(pairs),
        "reached": len(reached),
        "spent": [sum(amounts) / len(reached) for amounts in zip(*reached, strict=True)] if found else None,
    }


def _difference(
    runs: Sequence[Run], arm: str, against: str, budget: str, trained_to_it: bool, split: str
) -> dict[str, Any]:
    """One entry of `comparisons`.

    Where runs end at the budget, their final losses are compared. Where none were asked for, the budget is, seed by
    seed, what the cheaper of the two spent; the dearer one is read off its curve there. The curve is of the validation
    loss, so that of the test loss nothing is read off.
    """
    differences: list[float] = []
    spent: list[tuple[float, float]] = []
    for left, right in _pairs_of_seeds(runs, arm, against, budget, trained_to_it):
        costs = left.spent(budget), right.spent(budget)
        if budget == "seconds" and not _same_device(left, right):
            continue
        if trained_to_it:
            losses: tuple[float | None, float | None] = left.reported(split), right.reported(split)
        else:
            common = min(costs)
            losses = _loss_at(left, budget, common, split), _loss_at(right, budget, common, split)
            costs = common, common
        if losses[0] is not None and losses[1] is not None:
            differences.append(losses[0] - losses[1])
            spent.append(costs)
    found = estimate(differences)
    ends_there = trained_to_it or split == "test" or _cost_the_same(runs, arm, against, budget)
    return {
        "arm": arm,
        "against": against,
        "budget": budget,
        "interpolated": not ends_there,
        "difference": found.mean if found else None,
        "ci95": list(found.ci95) if found and found.ci95 else None,
        "runs": found.runs if found else 0,
        "spent": [sum(amounts) / len(spent) for amounts in zip(*spent, strict=True)] if spent else None,
    }


def _pairs_of_seeds(
    runs: Sequence[Run], arm: str, against: str, budget: str, trained_to_it: bool
) -> list[tuple[Run, Run]]:
    """Runs of two arms with the same seed: those that end at the budget, or else those of equal tokens."""

    def by_seed(name: str) -> dict[int, Run]:
        found = {run.seed: run for run in runs if run.arm == name and run.budget == "tokens"}
        if trained_to_it:
            found |= {run.seed: run for run in runs if run.arm == name and run.budget == budget}
        return found

    left, right = by_seed(arm), by_seed(against)
    return [(left[seed], right[seed]) for seed in left if seed in right]


def _loss_at(run: Run, budget: str, common: float, split: str) -> float | None:
    if run.spent(budget) == common:
        return run.reported(split)
    return run.curve(budget).at(common) if split == "valid" else None


def _cost_the_same(runs: Sequence[Run], arm: str, against: str, budget: str) -> bool:
    return all(
        left.spent(budget) == right.spent(budget) for left, right in _pairs_of_seeds(runs, arm, against, budget, False)
    )


def _same_device(left: Run, right: Run) -> bool:
    """Seconds of different machines are not compared."""
    return all(
        left.summary["environment"].get(name) == right.summary["environment"].get(name)
        for name in ("device", "threads", "precision")
    )
