"""LayerNorm and RMSNorm, with the statistics in fp32 whatever the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import ModelConfig

EPSILON = 1e-5  # GPT-2's


class Norm(nn.Module):
    """(…, D) → (…, D), same dtype. LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), as configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width)) if self.kind == "layernorm" and config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyTorch's kernels take the mean and variance of bf16 and fp16 in fp32.
        weight = self.weight.to(x.dtype)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, weight.shape, weight, EPSILON)
        return F.layer_norm(x, weight.shape, weight, None if self.bias is None else self.bias.to(x.dtype), EPSILON)
