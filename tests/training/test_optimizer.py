"""AdamW's groups and the learning rate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import ModelConfig, MoEConfig, TrainingConfig
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_only_matrices_are_decayed_and_each_parameter_is_in_one_group(arm: str) -> None:
    model = GPT(arm_model(arm, ModelConfig(layers=2, heads=2, width=16, context=8, vocabulary=64), MoEConfig(4)))
    matrices, vectors = make_optimizer(model, TrainingConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (matrices, vectors))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    is_vector = {n for n in names.values() if "norm" in n or n.rsplit(".", 1)[-1].startswith("b")}
    assert kept == is_vector


def test_a_step_equals_adamw_written_out() -> None:
    config = TrainingConfig(learning_rate=0.01, min_learning_rate=0.0, weight_decay=0.1)
    model = torch.nn.Linear(3, 2)
    before, optimizer = model.weight.detach().clone().double(), make_optimizer(model, config)
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
    optimizer.step()
    g = gradient.double()  # after one step the bias-corrected moments are g and g²
    expected = before * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
    torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-7)


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400))
def test_learning_rate_warms_up_then_falls_to_the_minimum(steps: int, warmup: int) -> None:
    config = TrainingConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(steps)]
    top = min(warmup, steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if steps - top > 1:
        assert rates[-1] == pytest.approx(0.1)
        middle = top + (steps - 1 - top) / 2
        if middle.is_integer():
            assert rates[int(middle)] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
