"""Arms made by override: what they say, what they get, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.compare import Comparison, parse_arm, run_comparison
from moelab.compare.arms import OF_ALL, SETTINGS
from moelab.config import ModelConfig, MoEConfig, TrainingConfig, UsageError
from moelab.presets import ARMS, arm_model

Finish = Callable[..., Path]
Make = Callable[..., Comparison]


def test_every_setting_has_a_key_of_its_own_without_its_section() -> None:
    names = [key.partition(".")[2] for key in SETTINGS]
    assert len(set(names)) == len(names)
    wanted = {f.name for kind in (MoEConfig, ModelConfig, TrainingConfig) for f in dataclasses.fields(kind)}
    assert set(names) == wanted - {"moe", "vocabulary"}


def test_an_arm_has_its_overrides_and_else_the_settings_of_the_comparison() -> None:
    arm = parse_arm("sig:scores=sigmoid,moe.bias-rate=0.001, balance_loss=0,learned-scale=true,activation=swiglu")
    model, moe = ModelConfig(width=64), MoEConfig(experts=4, z_loss=0.1)
    wanted = MoEConfig(
        experts=4, z_loss=0.1, scores="sigmoid", bias_rate=0.001, balance_loss=0.0, learned_scale=True
    )  # fmt: skip
    assert arm.model(model, moe) == arm_model("moe", ModelConfig(width=64, activation="swiglu"), wanted)
    assert arm.training(TrainingConfig()) == TrainingConfig()


@given(base=st.sampled_from(sorted(ARMS)))
def test_an_arm_without_overrides_is_its_base(base: str) -> None:
    model, moe = ModelConfig(), MoEConfig(top_k=4)
    assert parse_arm(f"other:base={base}").model(model, moe) == arm_model(base, model, moe)


@pytest.mark.parametrize("written", ["moe-layers=1+3", "moe-layers='1,3'", 'moe-layers="1,3"'])
def test_a_list_of_layers_is_one_value(written: str) -> None:
    arm = parse_arm(f"some:{written},top-k=1")
    assert dict(arm.overrides) == {"moe.moe_layers": "1,3", "moe.top_k": 1}


def test_a_size_of_the_experts_replaces_the_one_of_the_comparison() -> None:
    moe = MoEConfig(match="active")
    assert parse_arm("a:expert-hidden=24").model(ModelConfig(), moe).expert_hidden_size == 24
    assert parse_arm("a:expert-multiple=2").model(ModelConfig(width=64), moe).expert_hidden_size == 128


@given(rate=st.floats(1e-5, 1e-1))
def test_the_rate_at_the_end_keeps_its_ratio_to_an_arms_own_peak(rate: float) -> None:
    shared = TrainingConfig(learning_rate=1e-3, min_learning_rate=1e-4)
    own = parse_arm(f"a:learning-rate={rate!r}").training(shared)
    assert own.learning_rate == rate
    assert own.min_learning_rate == pytest.approx(rate / 10)
    given_both = parse_arm("a:learning-rate=0.01,min-learning-rate=1e-4").training(shared)
    assert (given_both.learning_rate, given_both.min_learning_rate) == (0.01, 1e-4)


@pytest.mark.parametrize("key", sorted(OF_ALL))
def test_what_makes_runs_comparable_is_the_same_for_every_arm(key: str) -> None:
    with pytest.raises(UsageError, match="is the same for every arm of a comparison; give --"):
        parse_arm(f"a:{key}=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "arm = a: give NAME:key=value"),
        ("a/b:top-k=1", "arm = a/b:top-k=1: give NAME:key=value"),
        (":top-k=1", "give NAME:key=value"),
        ("moe:top-k=1", "moe is a known arm; give another name, or base=moe to mean it"),
        ("a:base=sparse", "give base once, as one of dense, moe,"),
        ("a:score=sigmoid", "there is no setting score; did you mean scores?"),
        ("a:vocabulary=7", "there is no setting vocabulary"),
        ("a:scores=linear", "scores = linear: give one of softmax, sigmoid"),
        ("a:top-k=two", "top-k = two: give a whole number"),
        ("a:bias-rate=nan", "bias-rate = nan: give a finite number"),
        ("a:expert-hidden=big", "expert-hidden = big: give a whole number or none"),
        ("a:match=all", "match = all: give one of active, total, flops"),
        ("a:bias=yes", "bias = yes: give true or false"),
        ("a:moe-layers=1,3", "3: give key=value (numbers of layers as moe-layers=1+3)"),
        ("a:top-k=1,moe.top-k=2", "moe.top-k is given twice"),
        ("a:base=dense,top-k=1", "dense has no use for top-k"),
        ("a:base=dense-wide,scores=sigmoid", "dense-wide has no use for scores"),
        ("a:base=moe-matched,match=total", "moe-matched has no use for match"),
    ],
)
def test_an_arm_that_cannot_work_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        parse_arm(text)
    assert "\n" not in str(refused.value)


def test_settings_that_only_together_cannot_work_are_refused_with_the_arms_name() -> None:
    with pytest.raises(UsageError, match=re.escape("top-k = 9: give 1 to 8, the number of experts (arm wide)")):
        Comparison(overridden=(parse_arm("wide:top-k=9"),))


def test_overridden_arms_come_after_the_known_ones_which_may_then_be_none() -> None:
    one, other = parse_arm("a:"), parse_arm("b:top-k=1")
    assert Comparison(arms=("dense",), overridden=(other,)).names == ("dense", "b")
    assert Comparison(arms=(), overridden=(one, other)).names == ("a", "b")
    with pytest.raises(UsageError, match=re.escape("arms = a: give two or more of dense")):
        Comparison(arms=(), overridden=(one,))
    with pytest.raises(UsageError, match=re.escape("arms = a,A: give each arm once")):
        Comparison(arms=(), overridden=(one, parse_arm("A:")))


def test_a_known_name_with_its_base_stands_for_the_known_arm() -> None:
    comparison = Comparison(arms=("dense",), overridden=(parse_arm("moe:base=moe,top-k=1"),))
    assert comparison.names == ("dense", "moe")
    moe = comparison.model_of("moe").moe
    assert moe is not None
    assert moe.top_k == 1


def test_the_report_says_every_override_in_words(small: Make, finish: Finish, tmp_path: Path) -> None:
    arms = ("softmax:scores=softmax", "sigmoid-bias:scores=sigmoid,balance-loss=0,bias-rate=0.001,learning-rate=0.001")
    comparison = small(arms=(), overridden=tuple(map(parse_arm, arms)), seeds=2)
    text = run_comparison(comparison, finish(comparison, tmp_path)).read_text()
    assert "4 experts, top-2, each hidden 512, softmax scores<" in text
    assert "sigmoid scores, no balance loss, bias rate 0.001, learning rate 0.001<" in text
    assert "The arms differ in their training: learning rate 0.0003 (softmax), 0.001 (sigmoid-bias)" in text
    assert "learning rates of the arms were given, and not tuned per arm" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["softmax", "sigmoid-bias"]
    assert results["arms"]["sigmoid-bias"]["overrides"]["moe.scores"] == "sigmoid"
    assert {run["folder"] for run in results["arms"]["softmax"]["runs"]} == {"softmax-seed0", "softmax-seed1"}


def test_more_arms_than_colours_are_drawn(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(overridden=tuple(map(parse_arm, ("one:top-k=1", "three:top-k=3", "four:top-k=4", "two:"))))
    assert run_comparison(comparison, finish(comparison, tmp_path)).exists()


def test_a_comparison_without_a_sweep_says_that_nothing_was_tuned(small: Make, finish: Finish, tmp_path: Path) -> None:
    text = run_comparison(small(), finish(small(), tmp_path)).read_text()
    assert "learning rates were not tuned per arm" in text
