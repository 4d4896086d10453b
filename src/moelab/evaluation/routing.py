"""What the routers of a model do with a text: the figures of metrics.jsonl under "routing".

Measured by a forward pass of its own, on one micro-batch, outside of the compiled step: a step that is not measured
costs nothing, and the step's graph is one. All layers' figures reach the host in one copy.
"""

from __future__ import annotations

from typing import Any

import torch

from moelab.model import GPT
from moelab.model.router import Routed, expert_load


@torch.no_grad()
def routing(model: GPT, ids: torch.Tensor) -> dict[str, Any]:
    """Figures of each MoE layer (L of them) over a batch, in the mode that the model is in.

    Args:
        model: with experts.
        ids: (B, C) int64 token ids on the model's device.

    Returns:
        load: L × E, each expert's share of the routed slots.
        max_violation: L, max_e load_e · E − 1 (MaxVio, Wang et al. 2024, section 2.3); mean_violation: the mean over
            experts of |load_e · E − 1|.
        entropy: L, mean over tokens of the entropy of the scores' shares, in nats; ln E where the router is undecided.
        logit_rms: L, root mean square of the router's logits.
        dropped: L, share of the slots that found their expert full.
        weight_norm: L × E, norm of each expert's two matrices taken together.
        overlap: L × E × E, share of the tokens that chose both experts; on the diagonal, that chose the one.
    """
    layers = [_figures(routed) for routed in model(ids, keep_routing=True).routed]
    norms = [
        torch.sqrt(e.w_in.float().square().sum((1, 2)) + e.w_out.float().square().sum((1, 2))) for e in model.experts
    ]
    columns = {name: [figures[name] for figures in layers] for name in layers[0]} | {"weight_norm": norms}
    stacked = {name: torch.stack(values).double() for name, values in columns.items()}
    whole = torch.cat([values.flatten() for values in stacked.values()]).cpu()  # the one copy
    parts = whole.split([values.numel() for values in stacked.values()])
    found = {name: part.view(stacked[name].shape) for name, part in zip(stacked, parts, strict=True)}
    violation = found["load"] * found["load"].shape[1] - 1
    found["max_violation"], found["mean_violation"] = violation.amax(1), violation.abs().mean(1)
    return {name: _rounded(values.tolist()) for name, values in found.items()}


def _figures(routed: Routed) -> dict[str, torch.Tensor]:
    experts = len(routed.counts)
    p_TE = routed.shares
    # The experts that were chosen, dropped slots apart: a token's chosen ones are all different.
    chosen_TE = torch.zeros_like(p_TE).scatter_add(1, routed.indices.clamp_min(0), (routed.indices >= 0).to(p_TE.dtype))
    return {
        "load": expert_load(routed.counts).view(experts),
        "entropy": -torch.special.xlogy(p_TE, p_TE).sum(-1).mean(),
        "logit_rms": routed.logits.square().mean().sqrt(),
        "dropped": (routed.indices < 0).float().mean(),
        "overlap": chosen_TE.T @ chosen_TE / len(p_TE),
    }


def _rounded(values: Any) -> Any:
    return [_rounded(value) for value in values] if isinstance(values, list) else round(values, 5)
