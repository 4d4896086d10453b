"""The activations of a feed-forward, dense or expert."""

from __future__ import annotations

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
            return F.gelu(h)
        case "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        case "relu2":
            return F.relu(h).square()
        case "silu":
            return F.silu(h)
        case "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value
