"""The sizes of arms: what --match solves, held against modules that are built and counted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.config import ModelConfig, MoEConfig, UsageError
from moelab.model import GPT
from moelab.presets import arm_model, solve_match

MODELS = st.builds(
    ModelConfig,
    layers=st.integers(1, 4),
    heads=st.just(2),
    width=st.sampled_from([8, 16, 24]),
    context=st.just(8),
    vocabulary=st.just(64),
    hidden=st.none() | st.integers(40, 150),
    activation=st.sampled_from(["gelu", "swiglu"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    bias=st.booleans(),
    tied_head=st.booleans(),
)
EXPERTS = st.integers(1, 6).flatmap(
    lambda experts: st.builds(
        MoEConfig,
        experts=st.just(experts),
        top_k=st.integers(1, min(experts, 2)),
        shared_experts=st.integers(0, 2),
        moe_layers=st.sampled_from(["every", "0", "every 1st"]),
        learned_scale=st.booleans(),
        match=st.sampled_from(["active", "total", "flops"]),
    )
)


def counted(model: ModelConfig, match: str) -> float:
    """Active or total parameters, or FLOPs a token, from the tensors of a built model."""
    total = 0.0
    for name, tensor in GPT(model, dtype=torch.float32, seed=0).named_parameters():
        routed = model.moe is not None and tensor.shape[:1] == (model.moe.experts,) and ".experts." in name
        share = model.moe.top_k / model.moe.experts if routed and model.moe and match != "total" else 1.0
        matrix = tensor.ndim == (3 if routed else 2) and not name.startswith("position")
        total += share * tensor.numel() if match != "flops" or matrix else 0
    return 6 * total if match == "flops" else total


@settings(max_examples=60)
@given(model=MODELS, moe=EXPERTS)
def test_a_solved_model_is_within_half_a_hidden_unit_of_its_target(model: ModelConfig, moe: MoEConfig) -> None:
    assert moe.match is not None
    try:
        solved = arm_model("moe", model, moe)
    except UsageError as refused:
        assert "the experts would have no hidden units" in str(refused)  # noqa: PT017
        return
    target, reached = counted(replace(model, moe=None), moe.match), counted(solved, moe.match)
    assert solved.moe is not None
    wider = replace(solved, moe=replace(solved.moe, expert_hidden=solved.expert_hidden_size + 1))
    unit = counted(wider, moe.match) - reached
    assert abs(reached - target) <= unit / 2 * (1 + 1e-9)
    told = solve_match("moe", model, moe)
    assert told is not None
    assert told.hidden == solved.expert_hidden_size
    assert told.reached - told.target == pytest.approx(reached - target)


def test_what_was_solved_is_told_in_one_line() -> None:
    model = ModelConfig(layers=2, heads=2, width=32, context=32)
    told = str(solve_match("moe", model, MoEConfig(experts=16, top_k=4, match="active")))
    assert told == (
        "match active: experts of hidden size F = 30 have 25,648 active parameters for 25,472 of dense (+0.69%; "
        "embeddings and head not counted)"
    )


def test_nothing_is_solved_where_the_experts_size_is_given_or_of_no_use() -> None:
    assert solve_match("moe", ModelConfig(), MoEConfig()) is None
    assert solve_match("dense", ModelConfig(), MoEConfig(match="total")) is None
    assert solve_match("moe-matched", ModelConfig(), MoEConfig(match="total")) is None


def test_a_match_without_a_moe_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=re.escape("moe-layers = 'every 9th': match needs one of the 4 layers to be")):
        arm_model("moe", ModelConfig(layers=4), MoEConfig(moe_layers="every 9th", match="active"))
