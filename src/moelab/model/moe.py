"""The Mixture-of-Experts feed-forward: a router, experts that `expert_mlp` computes, and shared experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moelab.config import ModelConfig, MoEConfig
from moelab.experts import expert_mlp
from moelab.experts.activation import inner_size
from moelab.model.feed_forward import FeedForward
from moelab.model.router import Routed, Router


class Experts(nn.Module):
    """Parameters of E feed-forwards, each as a dense one has them, stacked along the first axis."""

    def __init__(self, config: ModelConfig, experts: int) -> None:
        super().__init__()
        width, hidden = config.width, config.expert_hidden_size
        inner = inner_size(config.activation, hidden)
        self.w_in = nn.Parameter(torch.empty(experts, inner, width))
        self.b_in = nn.Parameter(torch.empty(experts, inner)) if config.bias else None
        self.w_out = nn.Parameter(torch.empty(experts, width, hidden))
        self.b_out = nn.Parameter(torch.empty(experts, width)) if config.bias else None


class MoE(nn.Module):
    """A feed-forward of which each token uses K of E experts."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.activation, self.backend = config.activation, moe.backend
        self.router = Router(config.width, moe)
        self.experts = Experts(config, moe.experts)
        shared = replace(config, hidden=moe.shared_experts * config.expert_hidden_size) if moe.shared_experts else None
        self.shared = FeedForward(shared) if shared is not None else None

    def forward(self, x_BCD: torch.Tensor) -> tuple[torch.Tensor, Routed]:
        """(B, C, D) → (B, C, D), and what the router decided for the B·C tokens."""
        routed = self.router(x_BCD)
        e = self.experts
        y_TD = expert_mlp(
            routed.x, routed.weights, routed.indices, e.w_in, e.w_out, e.b_in, e.b_out,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip
        y_BCD = y_TD.view_as(x_BCD)
        return (y_BCD if self.shared is None else y_BCD + self.shared(x_BCD)), routed
