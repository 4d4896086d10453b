"""Closed forms for parameters and FLOPs, against the modules themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moelab.config import ModelConfig, MoEConfig
from moelab.meters import count_parameters, flops_per_token, model_flops_utilization
from moelab.model import GPT
from moelab.presets import PRESETS, arm_model

MODELS = st.builds(
    ModelConfig,
    layers=st.integers(1, 3),
    heads=st.just(2),
    width=st.sampled_from([8, 12]),
    context=st.just(16),
    vocabulary=st.sampled_from([64, 128]),
    hidden=st.sampled_from([None, 20]),
    activation=st.sampled_from(["gelu", "swiglu"]),
    positions=st.sampled_from(["learned", "rope"]),
    norm=st.sampled_from(["layernorm", "rmsnorm"]),
    bias=st.booleans(),
    tied_head=st.booleans(),
    moe=st.none()
    | st.builds(
        MoEConfig,
        experts=st.just(4),
        top_k=st.integers(1, 4),
        moe_layers=st.sampled_from(["every", "0"]),
        shared_experts=st.integers(0, 2),
        learned_scale=st.booleans(),
        bias_rate=st.sampled_from([0.0, 0.1]),
        backend=st.just("reference"),  # of products that PyTorch counts
    ),
)


@settings(max_examples=60)
@given(config=MODELS)
def test_total_parameters_are_those_of_the_modules(config: ModelConfig) -> None:
    assert count_parameters(config).total == sum(p.numel() for p in GPT(config).parameters())


@settings(max_examples=40)
@given(config=MODELS)
def test_active_parameters_are_those_that_one_token_gives_a_gradient(config: ModelConfig) -> None:
    model = GPT(config)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    out = model(ids, ids + 1)
    (out.loss + out.balance_loss).backward()
    touched = 0
    for name, p in model.named_parameters():
        if config.moe is not None and p.ndim >= 2 and "experts" in name:
            touched += sum(p[0].numel() for e in range(len(p)) if p.grad is not None and p.grad[e].abs().sum() > 0)
        else:
            touched += p.numel()
    assert count_parameters(config).active == touched


@settings(max_examples=30)
@given(config=MODELS)
def test_flops_are_those_that_pytorch_counts(config: ModelConfig) -> None:
    """PyTorch's counter sees each product; it counts attention's in full too, once its mask is not used to skip."""
    model, tokens = GPT(config), config.context
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    products = counter.get_total_flops() - attention
    expected_attention = 4 * config.layers * config.context * config.width
    assert 3 * (products / tokens + expected_attention) == flops_per_token(config)


def test_the_124m_model_is_gpt2s() -> None:
    found = count_parameters(PRESETS["124m"].model)
    assert (
        found.total == 124_439_808 + (50_304 - 50_257) * 768
    )  # the count that OpenAI's checkpoint has, and the padding


@pytest.mark.parametrize("size", ["5m", "40m", "124m", "350m"])
def test_dense_wide_costs_what_moe_costs_and_moe_matched_what_dense_does(size: str) -> None:
    chosen = PRESETS[size]
    cost = {
        arm: flops_per_token(arm_model(arm, chosen.model, chosen.moe))
        for arm in ("dense", "moe", "dense-wide", "moe-matched")
    }
    router = 6 * chosen.model.layers * chosen.moe.experts * chosen.model.width
    assert cost["moe"] - cost["dense-wide"] == router
    assert cost["moe-matched"] - cost["dense"] == router


def test_mfu_is_null_without_a_peak() -> None:
    assert model_flops_utilization(1000.0, 10**9, None) is None
    assert model_flops_utilization(1000.0, 10**9, 4e12) == 0.25
