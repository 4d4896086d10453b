"""The plan: who trains, on what, and for how long."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moelab.compare import Comparison
from moelab.config import ModelConfig, MoEConfig, TrainingConfig, UsageError

ARMS = st.permutations(["dense", "moe", "dense-wide", "moe-matched"]).flatmap(
    lambda arms: st.integers(2, 4).map(lambda n: tuple(arms[:n]))
)


@given(arms=ARMS, seeds=st.integers(1, 4), first=st.integers(0, 100), steps=st.integers(1, 5_000))
def test_every_arm_of_a_seed_gets_the_same_training_on_the_same_data(
    arms: tuple[str, ...], seeds: int, first: int, steps: int
) -> None:
    training = TrainingConfig(steps=steps, seed=first)
    runs = Comparison(arms=arms, seeds=seeds, training=training).runs()
    for seed in range(first, first + seeds):
        of_seed = [run.config for run in runs if run.config.training.seed == seed]
        assert [config.arm for config in of_seed] == list(arms)
        assert {(config.training, config.data) for config in of_seed} == {
            (replace(training, seed=seed), of_seed[0].data)
        }
        assert {config.model.context for config in of_seed} == {of_seed[0].model.context}
    assert len(runs) == seeds * len(arms)


def test_all_arms_of_a_seed_come_before_the_next_seed() -> None:
    folders = [run.folder for run in Comparison(arms=("dense", "moe"), seeds=2).runs()]
    assert folders == ["dense-seed0", "moe-seed0", "dense-seed1", "moe-seed1"]


@given(arms=ARMS, steps=st.integers(1, 20_000), costs=st.lists(st.integers(1, 10**15), min_size=4, max_size=4))
def test_a_run_at_equal_flops_costs_the_budget_to_within_one_of_its_steps(
    arms: tuple[str, ...], steps: int, costs: list[int]
) -> None:
    comparison = Comparison(arms=arms, training=TrainingConfig(steps=steps, warmup_steps=steps // 10))
    a_step = dict(zip(arms, costs, strict=False))
    budget = min(a_step.values()) * steps
    assume(all(cost <= budget for cost in a_step.values()))
    runs = comparison.budget_runs("flops", {arm: cost * steps for arm, cost in a_step.items()})
    assert {run.config.arm for run in runs} == {arm for arm in arms if a_step[arm] * steps > budget}
    for run in runs:
        spent = run.config.training.steps * a_step[run.config.arm]
        assert spent <= budget < spent + a_step[run.config.arm]
        assert run.config.training.warmup_steps <= run.config.training.steps / 10


def test_a_shortened_run_differs_in_its_steps_and_warm_up_alone() -> None:
    comparison = Comparison(arms=("dense", "moe"), training=TrainingConfig(steps=100, warmup_steps=10))
    (run,) = comparison.budget_runs("seconds", {"dense": 30.0, "moe": 60.0})
    usual = comparison.runs()[1].config
    assert run.config == replace(usual, training=replace(usual.training, steps=50, warmup_steps=5))
    assert run.folder == "moe-seed0-seconds"


def test_a_budget_smaller_than_one_step_is_refused() -> None:
    comparison = Comparison(arms=("dense", "moe"), training=TrainingConfig(steps=1, warmup_steps=0))
    with pytest.raises(UsageError, match="steps = 1: not one step of moe fits into the training FLOPs"):
        comparison.budget_runs("flops", {"dense": 10, "moe": 11})


def test_tokens_is_always_a_budget_and_comes_first() -> None:
    assert Comparison(budgets=("seconds",)).budgets == ("tokens", "seconds")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ("dense",)}, "arms = dense: give two or more of dense, moe,"),
        ({"arms": ()}, "arms = (none): give two or more"),
        ({"arms": ("dense", "mo")}, "arms = mo: give some of dense, moe,"),
        ({"arms": ("dense", "moe", "dense")}, "arms = dense,moe,dense: give each arm once"),
        ({"seeds": 0}, "seeds = 0: give 1 or more"),
        ({"budgets": ("time",)}, "budgets = time: give some of tokens, flops, seconds"),
        (
            {"arms": ("dense", "moe-matched"), "moe": MoEConfig(top_k=3), "model": ModelConfig()},
            "moe-matched needs a top-k that divides the hidden size 1024",
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused_by_its_setting(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Comparison(**fields)  # type: ignore[arg-type]
