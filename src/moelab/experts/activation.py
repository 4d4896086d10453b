"""The activations of a feed-forward, dense or expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from moelab.config import Activation


def inner_size(activation: Activation, hidden: int) -> int:
    """Rows of the input matrix: 2·hidden for swiglu (the gate's rows, then the value's), hidden for the others."""
    return 2 * hidden if activation == "swiglu" else hidden


def activate(h: torch.Tensor, activation: Activation) -> torch.Tensor:
    """(…, inner_size) → (…, hidden), same dtype.

    gelu is x·Φ(x) by the error function, gelu_tanh its tanh form (Hendrycks and Gimpel 2016); relu2 is ReLU squared
    (So et al. 2021); silu x·σ(x); swiglu silu(gate)·value (Shazeer 2020).
    """
    match activation:
        case "gelu":
            compiled = h.is_cuda and h.dtype in (torch.bfloat16, torch.float16) and torch.compiler.is_compiling()
            fused: torch.Tensor = FusedGelu.apply(h) if compiled else F.gelu(h)
            return fused
        case "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        case "relu2":
            return F.relu(h).square()
        case "silu":
            return F.silu(h)
        case "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value


class FusedGelu(torch.autograd.Function):
    """x·Φ(x) for a compiler that fuses it, in 16 bits: without erf, which takes a GPU longer than the memory does.

    log2 Φ(−|x|) is a polynomial of degree 5 in |x|: within 1.1e-6 in x·Φ(x) and 2.4e-5 in its derivative, the one of
    the experts' kernels (`triton_kernels.py`). Only x is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        wide = _wide(x)
        return (wide * _normal(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        wide = _wide(x)
        density = torch.exp2(wide * wide * -0.7213475204444817 - 1.3257480647361592)
        return (_wide(dy) * (_normal(wide) + wide * density)).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normal(x: torch.Tensor) -> torch.Tensor:
    """Φ(x), the normal distribution's."""
    m = x.abs()
    p = -0.00043716971413232386 * m + 0.006832347717136145
    p = p * m - 0.05121857672929764
    p = p * m - 0.460610568523407
    p = p * m - 1.1505370140075684
    tail = torch.exp2(p * m - 1.000066876411438)
    return torch.where(x > 0, 1 - tail, tail)
