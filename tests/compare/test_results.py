"""results.json: its schema, and where each difference comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moelab.compare import Comparison, run_comparison
from moelab.compare.plan import BUDGETS
from moelab.compare.results import build_results, read_results
from moelab.compare.run import read_run
from moelab.config import RunFailed, UsageError

Finish = Callable[..., Path]
Make = Callable[..., Comparison]
FIGURES = {"val_loss", "val_bits_per_byte", "tokens_per_second", "mfu", "peak_memory_bytes", "seconds"}


def compare(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What results.json holds of every run in a folder."""
    budgets = {place.name: place.name.rpartition("-")[2] for place in sorted(folder.glob("*-seed*"))}
    runs = [read_run(folder, name, end if end in BUDGETS else "tokens") for name, end in budgets.items()]
    return json.loads(json.dumps(build_results(comparison, runs, "moelab compare smoke"), default=str))


def entry(results: dict[str, Any], arm: str, against: str, budget: str) -> dict[str, Any]:
    (found,) = [e for e in results["comparisons"] if (e["arm"], e["against"], e["budget"]) == (arm, against, budget)]
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_the_schema_is_the_promised_one(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(seeds=2, budgets=("tokens", "flops", "seconds"))
    results = compare(comparison, finish(comparison, tmp_path))
    assert results["schema"] == 1
    assert [entry["budget"] for entry in results["to_reach"]] == ["tokens", "flops", "seconds"] * 3
    assert results["data"].keys() >= {"name", "fingerprint", "tokenizer", "train_tokens", "valid_tokens"}
    assert list(results["arms"]) == ["dense", "moe", "dense-wide"]
    for arm in results["arms"].values():
        assert arm["parameters"].keys() == {"total", "active", "embedding"}
        assert arm["flops_per_token"] > 0
        for run in arm["runs"]:
            assert run.keys() >= FIGURES | {"seed", "budget", "tokens"}
            assert run["mfu"] is None  # not measured on a CPU: absent, not zero
    for found in results["comparisons"]:
        assert found.keys() >= {"arm", "against", "budget", "interpolated", "difference", "ci95", "runs"}
        assert found["budget"] in {"tokens", "flops", "seconds"}
        assert len(found["ci95"]) == found["runs"] == 2
    assert [(e["arm"], e["against"]) for e in results["comparisons"][::3]] == [
        ("moe", "dense"), ("dense-wide", "dense"), ("moe", "dense-wide"),
    ]  # fmt: skip


def test_figures_of_a_run_are_those_of_its_summary(small: Make, finish: Finish, tmp_path: Path) -> None:
    results = compare(small(), finish(small(), tmp_path))
    for arm in results["arms"].values():
        for run in arm["runs"]:
            of_run = summary(tmp_path / run["folder"])
            assert {name: run[name] for name in FIGURES} == {name: of_run[name] for name in FIGURES}


def test_the_backend_that_computed_the_experts_is_said_of_each_run(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(seeds=2)
    results = compare(comparison, finish(comparison, tmp_path, moe={"backend": "grouped_mm"}))
    backends = {arm: [run["backend"] for run in facts["runs"]] for arm, facts in results["arms"].items()}
    assert backends == {"dense": [None, None], "moe": ["grouped_mm", "grouped_mm"], "dense-wide": [None, None]}
    assert results["arms"]["moe"]["model"]["moe"]["backend"] == "auto"  # which is what was asked for


def test_at_equal_tokens_final_losses_are_compared(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(seeds=3)
    results = compare(comparison, finish(comparison, tmp_path))
    differences = [
        summary(tmp_path / f"moe-seed{seed}")["val_loss"] - summary(tmp_path / f"dense-seed{seed}")["val_loss"]
        for seed in range(3)
    ]
    found = entry(results, "moe", "dense", "tokens")
    assert found["difference"] == pytest.approx(np.mean(differences))
    assert (found["interpolated"], found["runs"]) == (False, 3)


def test_without_runs_of_its_own_a_budget_is_read_off_the_dearer_arms_curve(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    results = compare(small(), finish(small(), tmp_path))
    dense, moe = summary(tmp_path / "dense-seed0"), summary(tmp_path / "moe-seed0")
    evaluations = [line for line in metrics(tmp_path / "moe-seed0") if "val_loss" in line]
    budget = dense["tokens"] * dense["flops_per_token"]
    places = [line["tokens"] * moe["flops_per_token"] for line in evaluations]
    read = np.interp(budget, places, [line["val_loss"] for line in evaluations])
    found = entry(results, "moe", "dense", "flops")
    assert found["interpolated"] is True
    assert found["difference"] == pytest.approx(read - dense["val_loss"])
    assert found["spent"] == [budget, budget]


def test_runs_that_end_at_a_budget_are_used_where_they_are(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(budgets=("flops",))
    results = compare(comparison, finish(comparison, tmp_path))
    own = summary(tmp_path / "moe-seed0-flops")["val_loss"]
    wide = summary(tmp_path / "dense-wide-seed0-flops")["val_loss"]
    dense = summary(tmp_path / "dense-seed0")["val_loss"]  # the cheapest: its run of equal tokens ends there
    assert entry(results, "moe", "dense", "flops")["difference"] == pytest.approx(own - dense)
    assert entry(results, "moe", "dense-wide", "flops")["difference"] == pytest.approx(own - wide)
    assert entry(results, "moe", "dense", "flops")["interpolated"] is False
    assert entry(results, "moe", "dense", "seconds")["interpolated"] is True


def reach(results: dict[str, Any], arm: str, against: str, budget: str) -> dict[str, Any]:
    (found,) = [e for e in results["to_reach"] if (e["arm"], e["against"], e["budget"]) == (arm, against, budget)]
    return found


def test_the_cost_of_a_loss_is_read_off_each_seeds_curve(small: Make, finish: Finish, tmp_path: Path) -> None:
    results = compare(small(seeds=3), finish(small(seeds=3), tmp_path))
    tokens, times = [], []
    for seed in range(3):
        moe, dense = tmp_path / f"moe-seed{seed}", tmp_path / f"dense-seed{seed}"
        # It falls all the way, so that it can be read upwards.
        curve = [(line["val_loss"], line["tokens"]) for line in metrics(moe) if "val_loss" in line][::-1]
        needed = np.interp(summary(dense)["val_loss"], *zip(*curve, strict=True))
        tokens.append(needed / summary(dense)["tokens"])
        times.append(needed / summary(moe)["tokens_per_second"] / summary(dense)["seconds"])
    found = reach(results, "moe", "dense", "tokens")
    assert 0.5 < found["ratio"] < 1
    assert found["ratio"] == pytest.approx(stats.gmean(tokens))
    assert found["ci95"] == pytest.approx(np.exp(stats.ttest_1samp(np.log(tokens), 0).confidence_interval(0.95)))
    assert found["spent"][0] / found["spent"][1] == pytest.approx(np.mean(tokens))  # all seeds of dense cost the same
    assert reach(results, "moe", "dense", "seconds")["ratio"] == pytest.approx(stats.gmean(times), rel=1e-5)
    assert (found["runs"], found["reached"]) == (3, 3)


def test_a_loss_that_some_seed_did_not_reach_has_no_ratio(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(seeds=2), tmp_path)
    place = tmp_path / "dense-seed1" / "summary.json"
    place.write_text(json.dumps(summary(place.parent) | {"val_loss": 1.0}))
    found = reach(compare(small(seeds=2), tmp_path), "moe", "dense", "tokens")
    assert (found["ratio"], found["spent"], found["runs"], found["reached"]) == (None, None, 2, 1)


def test_a_budget_before_the_first_evaluation_is_not_measured(small: Make, finish: Finish, tmp_path: Path) -> None:
    folder = finish(small(), tmp_path, moe={"seconds": 1e6})
    slow = folder / "moe-seed0" / "metrics.jsonl"
    lines = [json.loads(line) | {"seconds": 1e5} for line in slow.read_text().splitlines()]
    slow.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = entry(compare(small(), folder), "moe", "dense", "seconds")
    assert (found["difference"], found["ci95"], found["runs"]) == (None, None, 0)


def test_times_of_different_devices_are_not_compared(small: Make, finish: Finish, tmp_path: Path) -> None:
    environment = {"device": "a GPU", "threads": 2, "precision": "bfloat16"}
    results = compare(small(), finish(small(), tmp_path, moe={"environment": environment}))
    assert entry(results, "moe", "dense", "seconds")["difference"] is None
    assert entry(results, "dense-wide", "dense", "seconds")["difference"] is not None
    assert reach(results, "moe", "dense", "seconds")["runs"] == 0
    assert len(results["environments"]) == 2
    assert any("different devices" in note for note in results["words"]["notes"])


def test_arms_that_saw_other_batches_are_not_compared(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path, moe={"batches_sha256": "00" * 32})
    with pytest.raises(RunFailed, match="seed 0: the arms did not see the same batches"):
        run_comparison(small(), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_runs_of_other_text_are_not_compared(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path, dense_wide={"data": {"fingerprint": "cd" * 32}})
    with pytest.raises(RunFailed, match="dense-wide-seed0: its text has changed"):
        run_comparison(small(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a comparison; give a folder that"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"schema": 1, "arms": {"dense": {}}}', "cannot be read"),
        ('{"schema": 9, "arms": {}}', "has schema 9; this version of moelab reads 1"),
    ],
)
def test_a_folder_that_is_not_a_comparison_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_results(tmp_path)


def test_a_run_that_is_gone_is_named(small: Make, finish: Finish, tmp_path: Path) -> None:
    run_comparison(small(), finish(small(), tmp_path))
    (tmp_path / "moe-seed0" / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"moe-seed0: its metrics.jsonl cannot be read"):
        read_results(tmp_path)


def test_the_curve_ends_at_the_summarys_figures(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(), tmp_path)
    run = read_run(tmp_path, "moe-seed0", "tokens")
    for budget in ("tokens", "flops", "seconds"):
        assert run.curve(budget).spent[-1] == run.spent(budget)
        assert run.curve(budget).at(run.spent(budget)) == run.loss
