"""Backend `reference`: a plain loop over experts, for reading and as the yardstick of the others.

Works in any dtype, float64 included, on any device. It asks the device how many tokens each expert got, once an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moelab.config import Activation
from moelab.experts.activation import activate


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None, since it always can."""
    return None


def expert_mlp(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights of the combine's."""
    # Each (t, k) is read by one expert, so that backward adds nothing up out of order.
    slots_TKD = x_TD[:, None].expand(-1, indices_TK.shape[1], -1)
    outputs_TKD = torch.zeros_like(slots_TKD)
    for e in range(w_in.shape[0]):
        token, slot = (indices_TK == e).nonzero(as_tuple=True)
        h = F.linear(slots_TKD[token, slot], w_in[e], None if b_in is None else b_in[e])
        y = F.linear(activate(h, activation), w_out[e], None if b_out is None else b_out[e])
        outputs_TKD = outputs_TKD.index_put((token, slot), y)
    return combine(outputs_TKD, weights_TK, indices_TK).to(x_TD.dtype)


def combine(outputs_TKD: torch.Tensor, weights_TK: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Σ_k weights[t, k]·outputs[t, k] in slot order and in the weights' dtype; dropped slots add nothing. (T, D)"""
    wide = weights_TK.dtype
    total = torch.zeros_like(outputs_TKD[:, 0], dtype=wide)
    for k in range(indices_TK.shape[1]):
        term = weights_TK[:, k, None] * outputs_TKD[:, k].to(wide)
        total = total + torch.where(indices_TK[:, k, None] >= 0, term, 0)
    return total
