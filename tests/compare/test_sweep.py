"""Tuning: what is tried, what is chosen, and what the arms are then compared by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.compare import Comparison, parse_arm, parse_sweep, run_comparison
from moelab.compare.sweep import Sweep, Trial, at_edge, choose, points
from moelab.config import RunFailed, UsageError

Finish = Callable[..., Path]
Make = Callable[..., Comparison]


def test_every_arm_tries_every_value_that_it_has_a_use_for() -> None:
    sweeps = (parse_sweep("training.learning-rate=1e-4,1e-3"), parse_sweep("z-loss=0,0.1,1"))
    comparison = Comparison(arms=("dense", "moe"), sweeps=sweeps, seeds=2)
    dense, moe = (list(comparison.sweep_runs(arm).values()) for arm in ("dense", "moe"))
    assert [plan.folder for plan in dense] == ["sweep/dense-learning-rate=0.0001", "sweep/dense-learning-rate=0.001"]
    assert len({plan.folder for plan in moe}) == len(moe) == 6
    assert {plan.config.training.seed for plan in dense + moe} == {comparison.training.seed}
    assert sorted(p.config.training.learning_rate for p in moe) == [1e-4] * 3 + [1e-3] * 3


def test_the_chosen_values_run_is_the_first_seeds_and_is_not_made_twice() -> None:
    comparison = Comparison(arms=("dense", "moe"), sweeps=(parse_sweep("learning-rate=1e-4,1e-3"),), seeds=2)
    (_, tried), *_ = comparison.sweep_runs("moe").items()
    tuned = comparison.tuned({"moe": (("training.learning_rate", 1e-4),), "dense": (("training.learning_rate", 1e-3),)})
    runs = [run for run in tuned.runs() if run.config.arm == "moe"]
    assert runs[0] == tried
    assert runs[1].folder == "moe-learning-rate=0.0001-seed1"
    assert runs[1].config.training.learning_rate == 1e-4


@given(losses=st.lists(st.none() | st.floats(0, 10), min_size=1, max_size=6))
def test_the_lowest_loss_is_chosen_and_the_first_of_equals(losses: list[float | None]) -> None:
    trials = [Trial("moe", (("moe.top_k", place),), "", loss) for place, loss in enumerate(losses)]
    finite = [loss for loss in losses if loss is not None]
    if finite:
        assert choose(trials) == (("moe.top_k", losses.index(min(finite))),)
    else:
        with pytest.raises(RunFailed, match="moe: no value of the sweep kept its loss finite"):
            choose(trials)


@pytest.mark.parametrize(
    ("values", "value", "edge"),
    [((1, 2, 3), 2, {}), ((1, 2, 3), 3, {"k": "highest"}), ((3, 1, 2), 1, {"k": "lowest"}), ((0.0, 0.1), 0.0, {}),
     (("softmax", "sigmoid"), "sigmoid", {}), ((True, False), True, {})],
)  # fmt: skip
def test_the_edge_of_a_range_of_numbers_is_told(values: tuple[object, ...], value: object, edge: object) -> None:
    assert at_edge((Sweep("k", values),), (("k", value),)) == edge


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["learning-rate=1e-3"], "sweep = learning-rate=1e-3: give two or more values"),
        (["learning-rate=1e-3,0.001"], "give two or more values, each once"),
        (["batch-size=4,8"], "batch-size is the same for every arm of a comparison"),
        (["balance-scope=step,sequence"], "balance-scope is the same for every arm"),
        (["rate=1,2"], "there is no setting rate"),
        (["top-k=1,2", "moe.top-k=3,4"], "sweep = top-k: give all its values in one --sweep"),
        (["bias-rate=0,0.1"], "sweep = bias-rate: the arm biased is given one value of it"),
        (["top-k=1,99"], "top-k = 99: give 1 to 8, the number of experts (arm moe)"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_in_one_line(sweeps: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Comparison(sweeps=tuple(map(parse_sweep, sweeps)), overridden=(parse_arm("biased:bias-rate=0.1"),))


def test_a_setting_that_no_arm_has_is_not_swept() -> None:
    with pytest.raises(UsageError, match="sweep = z-loss: no arm has a use for it"):
        Comparison(arms=("dense", "dense-wide"), sweeps=(parse_sweep("z-loss=0.1,1"),))
    assert points((parse_sweep("z-loss=0.1,1"),), parse_arm("d:base=dense")) == []


def test_a_swept_comparison_is_chosen_on_valid_and_reported_on_test(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    comparison = small(
        arms=("dense", "moe"), seeds=3, sweeps=(parse_sweep("learning-rate=1e-4,3e-4,1e-3"),),
        overridden=(parse_arm("sig:scores=sigmoid"),),
    )  # fmt: skip
    page = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {arm: found["chosen"] for arm, found in results["sweep"]["arms"].items()} == {
        "dense": {"training.learning_rate": 3e-4}, "moe": {"training.learning_rate": 3e-4},
        "sig": {"training.learning_rate": 1e-3},
    }  # fmt: skip
    for found in results["sweep"]["arms"].values():
        losses = {tuple(t["values"].values()): t["val_loss"] for t in found["tried"]}
        assert min(losses, key=lambda one: losses[one]) == tuple(found["chosen"].values())
    assert results["split"] == "test"
    (moe,) = [e for e in results["comparisons"] if (e["arm"], e["budget"]) == ("moe", "tokens")]
    assert moe["difference"] == pytest.approx(-0.12)  # of test losses; the validation losses have noise
    (flops,) = [e for e in results["comparisons"] if (e["arm"], e["budget"]) == ("moe", "flops")]
    assert flops["difference"] is None  # nothing is read off a curve of another split
    assert [run["folder"] for run in results["arms"]["sig"]["runs"]] == [
        "sweep/sig-learning-rate=0.001", "sig-learning-rate=0.001-seed1", "sig-learning-rate=0.001-seed2",
    ]  # fmt: skip
    assert "How each arm was tuned" in page
    assert "sig: the highest learning rate tried, 0.001, did best" in page
    assert "chosen, at the edge of what was tried" in page
    assert "moe: the" not in page
    assert "reached a test loss 0.120 nats per token lower" in page
    assert "not tuned per arm" not in page


def test_a_value_that_every_arm_was_tuned_to_is_what_was_held_equal(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    comparison = small(arms=("dense", "moe"), sweeps=(parse_sweep("learning-rate=1e-2,1e-3"),))
    assert comparison.training.learning_rate == 3e-4
    text = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    assert "AdamW, learning rate 0.001 to 0.0001 by a cosine" in text
    assert "The arms differ" not in text


def test_runs_scored_on_different_test_texts_are_not_compared(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(arms=("dense", "moe"), sweeps=(parse_sweep("learning-rate=1e-4,3e-4"),))
    finish(comparison, tmp_path, moe={"test_fingerprint": "ef" * 32})
    with pytest.raises(RunFailed, match="the test text has changed between runs"):
        run_comparison(comparison, tmp_path)
