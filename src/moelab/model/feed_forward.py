"""The dense feed-forward of a block."""

from __future__ import annotations

import torch
from torch import nn

from moelab.config import ModelConfig
from moelab.experts.activation import inner_size
from moelab.model.linear import activated_linear, linear


class FeedForward(nn.Module):
    """act(x @ w_in.T + b_in) @ w_out.T + b_out: what one expert computes, for every token. (B, C, D) → (B, C, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_size
        inner = inner_size(config.activation, hidden)
        self.activation = config.activation
        self.w_in = nn.Parameter(torch.empty(inner, width))
        self.b_in = nn.Parameter(torch.empty(inner)) if config.bias else None
        self.w_out = nn.Parameter(torch.empty(width, hidden))
        self.b_out = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(activated_linear(x, self.w_in, self.b_in, self.activation), self.w_out, self.b_out)
