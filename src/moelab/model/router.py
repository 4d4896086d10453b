"""The router: which experts a token goes to, with what weight, and the losses that keep the experts in balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import MoEConfig


@dataclass
class Routed:
    """What the router decided for T tokens."""

    weights: torch.Tensor
    """(T, K) fp32."""
    indices: torch.Tensor
    """(T, K) int64, a token's experts from the likeliest on."""
    balance_loss: torch.Tensor
    """() fp32, without its coefficient."""
    z_loss: torch.Tensor
    """() fp32, without its coefficient."""
    load: torch.Tensor
    """(E,) fp32, the share of the routed slots that each expert got."""


class Router(nn.Module):
    """Softmax over the experts in fp32, then the K likeliest (Shazeer et al. 2017, without noise).

    Between equal probabilities the lower index goes first. With `normalize_weights` a token's K weights are divided by
    their sum; with K = 1 they are then all 1, and only the balance loss trains the router.
    """

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.normalize_weights = config.top_k, config.normalize_weights
        self.weight = nn.Parameter(torch.empty(config.experts, width))

    def forward(self, x_TD: torch.Tensor) -> Routed:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        p_TE = torch.softmax(logits_TE, dim=-1)
        # A stable sort, since the order that torch.topk gives to equal values is not promised.
        indices_TK = torch.sort(p_TE.detach(), dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights_TK = p_TE.gather(-1, indices_TK)
        if self.normalize_weights:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        load_E = expert_load(indices_TK, p_TE.shape[1]).to(wide)
        return Routed(weights_TK, indices_TK, balance_loss(load_E, p_TE), z_loss(logits_TE), load_E)


def expert_load(indices_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, K) int64 → (E,) fp32: each expert's share of the routed slots, from integer counts."""
    chosen = indices_TK.reshape(-1, 1) == torch.arange(experts, device=indices_TK.device)
    return chosen.sum(0) / max(1, indices_TK.numel())


def balance_loss(load_E: torch.Tensor, p_TE: torch.Tensor) -> torch.Tensor:
    """E · Σ_e f_e · p_e (Fedus et al. 2022, Switch Transformer, equations 4 to 6).

    f is an expert's share of the routed slots, which sums to 1 for any K, and p its mean probability; 1 when both are
    uniform, E when everything goes to one expert. Only p carries a gradient.
    """
    return len(load_E) * (load_E * p_TE.mean(0)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)² (Zoph et al. 2022, ST-MoE, equation 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()
