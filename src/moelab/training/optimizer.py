"""AdamW over a GPT's parameters, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from moelab.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only.

    A matrix is a parameter with two or more axes, embeddings and the (E, F, D) experts included, except the experts'
    (E, F) and (E, D) biases; vectors (biases, norms) are not decayed. Each parameter is in exactly one group.
    Uses PyTorch's fused kernel, which CPUs have too, except on devices without one.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        is_vector = parameter.ndim < 2 or leaf == "bias" or leaf.startswith("b_")
        (vectors if is_vector else matrices).append(parameter)
    grouped = [id(p) for p in matrices + vectors]
    assert len(grouped) == len(set(grouped)), "a parameter in two groups"
    assert set(grouped) == {id(p) for p in model.parameters()}, "a parameter in no group"
    device = next(model.parameters()).device.type
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device in ("cuda", "cpu"),
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine down to `min_learning_rate` at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)
