"""Causal self-attention, with learned or rotary positions, and the cache that sampling uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import ModelConfig
from moelab.model.linear import heads_linear, linear
from moelab.model.norm import left_to_fork


class KVCache:
    """Keys and values of the tokens so far, for every layer: two tensors (layers, B, heads, context, head size)."""

    def __init__(self, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        head = config.width // config.heads
        shape = (config.layers, batch, config.heads, config.context, head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values (B, heads, C, head) of C new tokens; returns those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Multi-head causal self-attention (Vaswani et al. 2017) as GPT-2 has it: one projection for q, k and v."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        self.layer, self.heads, self.rotary = layer, config.heads, config.positions == "rope"
        self.w_qkv = nn.Parameter(torch.empty(3 * width, width))
        self.b_qkv = nn.Parameter(torch.empty(3 * width)) if config.bias else None
        self.w_out = nn.Parameter(torch.empty(width, width))
        self.b_out = nn.Parameter(torch.empty(width)) if config.bias else None

    def forward(self, x_BCD: torch.Tensor, first: int, cache: KVCache | None) -> torch.Tensor:
        """(B, C, D) → (B, C, D); `first` is the position of the first of the C tokens. b_out is `left_to_fork`."""
        batch, length, width = x_BCD.shape
        q, k, v = heads_linear(x_BCD, self.w_qkv, self.b_qkv, self.heads)
        if self.rotary:
            q, k = rotate(q, first), rotate(k, first)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            if first and length > 1:  # neither is_causal's square nor a single row that sees everything
                mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=x_BCD.device).tril(first)
        if x_BCD.device.type == "cpu":  # PyTorch's CPU kernel is 3 times slower backward in bf16 than in fp32
            q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=first == 0).to(x_BCD.dtype)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return linear(mixed, self.w_out, left_to_fork(mixed, self.b_out))


def rotate(x: torch.Tensor, first: int) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) on (B, heads, C, head), the first of the C tokens at position `first`.

    Dimension i is paired with i + head/2, as GPT-NeoX and LLaMA pair them; base 10,000; the rotation is in fp32.
    """
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    position = torch.arange(first, first + x.shape[2], dtype=torch.float32, device=x.device)
    angle = position[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).split(half, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
