"""What SonicMoE 0.1.2 has under this name, with its signature, by a plain loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .enums import ActivationType

PLAIN = {
    ActivationType.GELU: lambda h: F.gelu(h, approximate="tanh"),
    ActivationType.SILU: F.silu,
    ActivationType.RELU_SQ: lambda h: F.relu(h).square(),
}


def moe_general_routing_inputs(
    x: torch.Tensor, router_scores: torch.Tensor, token_indices: torch.Tensor, expert_indices: torch.Tensor,
    w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None, E: int, stream_id: int,
    activation_type: ActivationType, is_inference_mode_enabled: bool = False, concat_layout: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert router_scores.shape == token_indices.shape == expert_indices.shape
    assert (token_indices.diff() >= 0).all(), "the tokens must be sorted"
    for w in (w1, w2):  # its layout in memory is (E, rows, columns)
        assert w.permute(2, 0, 1).is_contiguous()
    assert w1.shape[-1] == E
    rows = [torch.zeros_like(x[0]) for _ in x]
    for score, t, e in zip(router_scores, token_indices.tolist(), expert_indices.tolist(), strict=True):
        z = w1[:, :, e] @ x[t] + (0 if b1 is None else b1[e])
        h = F.silu(z[::2]) * z[1::2] if activation_type is ActivationType.SWIGLU else PLAIN[activation_type](z)
        y = w2[:, :, e] @ h + (0 if b2 is None else b2[e])
        rows[t] = rows[t] + score * y
    return torch.stack(rows), torch.bincount(expert_indices, minlength=E)
