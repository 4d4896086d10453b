"""LayerNorm and RMSNorm, with the statistics in fp32 whatever the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import ModelConfig
from moelab.experts.triton import power_of_2
from moelab.model.linear import Tensors, own_backward

EPSILON = 1e-5  # GPT-2's
WARP = 1024  # elements that a warp of the backward pass takes at once; `benchmarks/passes.py` times other tiles
SHORT = 16  # least rows of a program


class Norm(nn.Module):
    """(…, D) → (…, D), same dtype. LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), as configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.empty(config.width))
        self.bias = nn.Parameter(torch.empty(config.width)) if self.kind == "layernorm" and config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _norm(x, self.weight, self.bias, self.kind)

    def fork(self, x: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, which goes on beside its norm, and norm(x): one backward pass adds the gradients of both.

        It also sums the gradients of the norm's parameters and of `added` (D), a bias that was added to x and went
        through `left_to_fork`.
        """
        if not own_backward(x, self.weight):
            return x, self(x)
        both: tuple[torch.Tensor, torch.Tensor] = Fork.apply(x, self.weight, self.bias, added, self.kind)
        return both


def left_to_fork(x: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor | None:
    """A bias b that becomes part of an x which a `Norm.fork` reads next: its gradient is summed there, or nowhere."""
    return b.detach() if b is not None and own_backward(x, b) else b


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    # PyTorch's kernels take the mean and variance of bf16 and fp16 in fp32.
    weight = weight.to(x.dtype)
    if kind == "rmsnorm":
        return F.rms_norm(x, weight.shape, weight, EPSILON)
    return F.layer_norm(x, weight.shape, weight, None if bias is None else bias.to(x.dtype), EPSILON)


class Fork(torch.autograd.Function):
    """`Norm.fork`, of which x alone is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        added: torch.Tensor | None,
        kind: str,
    ) -> Tensors:
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.biased, ctx.added = kind, bias is not None, added is not None
        return x.view_as(x), _norm(x, weight, bias, kind)

    @staticmethod
    def backward(ctx: Any, d_passed: torch.Tensor, d_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, parts = torch.ops.moelab.norm_backward(d_normed, d_passed, x, weight, ctx.kind == "layernorm")
        sums = parts.sum(0)
        return dx, sums[0], sums[2] if ctx.biased else None, sums[1] if ctx.added else None, None


def _tall(tokens: int) -> int:
    """Rows of which a program of the backward pass sums each column: 500 to 1,000 programs at the sizes of training."""
    return 32 if tokens >= 32_768 else SHORT


def _tile(width: int) -> tuple[int, int, int]:
    """Of that program: rows at once, columns, warps."""
    columns = power_of_2(width)
    return min(SHORT, max(1, WARP // columns)), columns, max(1, columns // WARP)


@torch.library.custom_op("moelab::norm_backward", mutates_args=())
def _norm_backward(
    d_normed: torch.Tensor, d_passed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x (…, D) and its norm → dx = d_passed + the norm's gradient, and sums of each `_tall` rows: of weight's (D)
    gradient, of dx, and (LayerNorm, `centered`) of a bias's gradient, (parts, 3 or 2, D) fp32."""
    from moelab.model import norm_kernels as kernels

    width, tokens = x.shape[-1], x.numel() // x.shape[-1]
    dx, parts = torch.empty_like(x, memory_format=torch.contiguous_format), _sums(x, centered)
    rows, columns, warps = _tile(width)
    kernels.norm_backward[(len(parts),)](
        d_normed.contiguous(), d_passed.contiguous(), x.contiguous(), weight, dx, parts, tokens, width, EPSILON,
        CENTERED=centered, TALL=_tall(tokens), ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return dx, parts


@_norm_backward.register_fake
def _(d_normed: Any, d_passed: Any, x: Any, weight: Any, centered: bool) -> Tensors:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _sums(x, centered)


def _sums(x: torch.Tensor, centered: bool) -> torch.Tensor:
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(-(-tokens // _tall(tokens)), 3 if centered else 2, x.shape[-1], dtype=torch.float32)
