"""The router: which experts a token goes to, with what weight, and what keeps the experts in balance.

Each rule is a function of its own below, with its source; `Router` puts together those that its settings name. Counts
of slots are integers, so sums over micro-batches and ranks do not depend on their order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moelab.config import MoEConfig
from moelab.model import fused_router


class Routed(NamedTuple):
    """What the router decided for T tokens."""

    x: torch.Tensor
    """(T, D), the router's input: what the experts take, so that the gradients of both arrive together."""
    weights: torch.Tensor
    """(T, K) fp32."""
    indices: torch.Tensor
    """(T, K) int64, a token's experts from the one selected first on; −1 for a slot that was dropped."""
    balance_loss: torch.Tensor
    """() fp32, without its coefficient."""
    z_loss: torch.Tensor
    """() fp32, without its coefficient."""
    counts: torch.Tensor
    """(E,) int64, slots routed to each expert by this rank, dropped ones included."""
    logits: torch.Tensor
    """(T, E) fp32."""
    shares: torch.Tensor
    """(T, E) fp32, scores divided by their sum over all experts."""
    dropped: torch.Tensor | None
    """() fp32, share of the slots that were dropped; None where there is no capacity."""

    def tally(self) -> Tally:
        """What of it training needs."""
        return Tally(self.balance_loss, self.z_loss, self.counts, self.dropped)


class Tally(NamedTuple):
    """`Routed` without what is there for each token."""

    balance_loss: torch.Tensor
    """() fp32, without its coefficient."""
    z_loss: torch.Tensor
    """() fp32, without its coefficient."""
    counts: torch.Tensor
    """(E,) int64, slots routed to each expert by this rank, dropped ones included."""
    dropped: torch.Tensor | None = None
    """() fp32, share of the slots that were dropped; None where there is no capacity."""


class Router(nn.Module):
    """Scores of the experts in fp32, selection of the K highest, and the weights of those.

    Between equal scores the lower index goes first. With `normalize` "chosen" and K = 1 the weight is always 1, and
    only the balance loss trains the router. Gradients reach the router through the weights; selection has none.
    """

    selection_bias: torch.Tensor | None
    seen: torch.Tensor

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width))
        self.scale = nn.Parameter(torch.tensor(config.score_scale)) if config.learned_scale else None
        bias = torch.zeros(config.experts) if config.bias_rate else None
        self.register_buffer("selection_bias", bias)  # (E,) fp32, part of a checkpoint
        # (E,) int64: slots of all ranks in the micro-batches of this optimizer step so far, for the scope "step".
        self.register_buffer("seen", torch.zeros(config.experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BCD: torch.Tensor) -> Routed:
        """(B, C, D) → the decisions for its T = B·C tokens."""
        config = self.config
        x_TD, weights_TK, indices_TK, logits_TE = self.decide(x_BCD.flatten(0, 1))
        wide = logits_TE.dtype
        p_TE = torch.softmax(_logarithms(logits_TE, config.scores), dim=-1)
        counts_BE = expert_counts(indices_TK.view(x_BCD.shape[0], -1), config.experts)
        counts_E = counts_BE.sum(0)
        match config.balance_scope:
            case "sequence":
                balance = sequence_balance_loss(counts_BE, p_TE.view(*x_BCD.shape[:2], -1))
            case "micro-batch":
                balance = balance_loss(expert_load(over_ranks(counts_E)).to(wide), p_TE)
            case "step":
                balance = balance_loss(expert_load(self.seen + over_ranks(counts_E)).to(wide), p_TE)
        dropped = None
        if config.capacity_factor is not None:
            if self.training or config.drop_in_evaluation:
                capacity = expert_capacity(indices_TK.numel(), config.experts, config.capacity_factor)
                kept = within_capacity(indices_TK, weights_TK.detach(), config.experts, capacity, config.drop)
                indices_TK = torch.where(kept, indices_TK, -1)
            dropped = (indices_TK < 0).float().mean()
        z = z_loss(logits_TE)
        return Routed(x_TD, weights_TK, indices_TK, balance, z, counts_E, logits_TE, p_TE, dropped)

    def decide(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, D) → x itself, weights (T, K) fp32, indices (T, K) int64, logits (T, E) fp32; nothing is dropped."""
        config = self.config
        if fused_router.usable(x_TD, config.experts, config.top_k):
            x_TD, weights_TK, indices_TK, logits_TE = fused_router.route(
                x_TD, self.weight, self.selection_bias, config.top_k, config.scores, config.normalize
            )
        else:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
            weights_TK, indices_TK = self._chosen(logits_TE)
        if self.scale is not None:
            weights_TK = weights_TK * self.scale.to(weights_TK.dtype)
        elif config.score_scale != 1:
            weights_TK = weights_TK * config.score_scale
        return x_TD, weights_TK, indices_TK, logits_TE

    def _chosen(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (T, K) and indices (T, K) of the experts selected."""
        config = self.config
        logarithms_TE = _logarithms(logits_TE, config.scores)
        p_TE = torch.softmax(logarithms_TE, dim=-1)
        scores_TE = torch.sigmoid(logits_TE) if config.scores == "sigmoid" else p_TE
        selected_by = scores_TE.detach()
        if self.selection_bias is not None:
            selected_by = selected_by + self.selection_bias
        indices_TK = highest(selected_by, config.top_k)
        match config.normalize:
            case "chosen":
                weights_TK = torch.softmax(_at(logarithms_TE, indices_TK), dim=-1)
            case "all":
                weights_TK = _at(p_TE, indices_TK)
            case "none":
                weights_TK = _at(scores_TE, indices_TK)
        return weights_TK, indices_TK


def _at(values_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """(T, K): each token's values at its indices.

    On CPUs the compiler of PyTorch 2.13 fuses the scatter that is gather's gradient with what reads it, and gets it
    wrong: there the values are picked by masks.
    """
    if not torch.compiler.is_compiling() or values_TE.device.type != "cpu":
        return values_TE.gather(-1, indices_TK)
    chosen_TKE = indices_TK.unsqueeze(-1) == torch.arange(values_TE.shape[-1])
    return torch.where(chosen_TKE, values_TE.unsqueeze(-2), 0).sum(-1)


def _logarithms(logits_TE: torch.Tensor, scores: str) -> torch.Tensor:
    """Logarithms of the scores, up to a constant a token."""
    return F.logsigmoid(logits_TE) if scores == "sigmoid" else logits_TE


def bias_step(counts_LE: torch.Tensor, rate: float) -> torch.Tensor:
    """(L, E) int64, slots of an optimizer step → (L, E) fp32: how far each layer's biases of selection move after it.

    rate · sign(mean(c) − c_e) (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1; DeepSeek-V3,
    section 2.1.2). In integers, E · c_e against Σ c, so that a balanced expert does not move.
    """
    experts = counts_LE.shape[1]
    return rate * torch.sign(counts_LE.sum(1, keepdim=True) - experts * counts_LE).float()


def highest(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """(T, E) → (T, K) int64: the K highest scores, the lower index first between equal ones.

    The order that torch.topk gives to equal values is not promised. torch.argmax promises the first; K of them are
    faster than a stable sort for small K (1.6 against 13.5 ms for K = 2 of T = 8,192, E = 64 on a CPU).
    """
    if top_k > 8:
        return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = []
    for k in range(top_k):
        best_T1 = scores_TE.argmax(-1, keepdim=True)
        chosen.append(best_T1)
        if k + 1 < top_k:
            scores_TE = scores_TE.scatter(-1, best_T1, -math.inf)
    return torch.cat(chosen, dim=-1)


def expert_counts(indices_BN: torch.Tensor, experts: int) -> torch.Tensor:
    """(B, N) int64 → (B, E) int64: slots of each expert, in each row."""
    chosen = indices_BN.unsqueeze(-1) == torch.arange(experts, device=indices_BN.device)
    return chosen.sum(1)


def expert_load(counts_E: torch.Tensor) -> torch.Tensor:
    """(…, E) int64 → fp32: each expert's share of the slots."""
    return counts_E / counts_E.sum(-1, keepdim=True).clamp_min(1)


def over_ranks(counts: torch.Tensor) -> torch.Tensor:
    """Counts summed over data-parallel ranks, which carry no gradient; themselves where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return counts
    total = counts.clone()
    dist.all_reduce(total)
    return total


def balance_loss(load_E: torch.Tensor, p_TE: torch.Tensor) -> torch.Tensor:
    """E · Σ_e f_e · p_e (Fedus et al. 2022, Switch Transformer, equations 4 to 6).

    f is an expert's share of the routed slots, which sums to 1 for any K, and p its mean share of the scores; 1 when
    both are uniform, E when everything goes to one expert. Only p carries a gradient. p is of this rank's micro-batch:
    gradients that are averaged over micro-batches and ranks then average p over them, whatever f was counted over.
    """
    return len(load_E) * (load_E * p_TE.mean(0)).sum()


def sequence_balance_loss(counts_BE: torch.Tensor, p_BCE: torch.Tensor) -> torch.Tensor:
    """The same of each sequence by itself, and the mean over sequences (DeepSeek-V3, equations 17 to 20)."""
    load_BE = expert_load(counts_BE).to(p_BCE.dtype)
    return p_BCE.shape[-1] * (load_BE * p_BCE.mean(1)).sum(-1).mean()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of logsumexp(logits)² (Zoph et al. 2022, ST-MoE, equation 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def expert_capacity(slots: int, experts: int, factor: float) -> int:
    """Slots an expert has: factor · N / E, rounded up (Fedus et al. 2022, equation 3, for K = 1), and at most N."""
    return slots if factor >= experts else math.ceil(factor * slots / experts)


def within_capacity(
    indices_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int, capacity: int, rule: str
) -> torch.Tensor:
    """(T, K) bool: the slots that their experts have room for.

    "position" keeps the first of an expert's slots in the order of the text, a token's in the order of selection (Fedus
    et al. 2022, section 2.2); "score" those of the highest weight, the earlier first between equal ones (batch
    prioritized routing, Riquelme et al. 2021, section 4).
    """
    experts_N = indices_TK.flatten()
    if rule == "score":
        order_N = torch.sort(weights_TK.flatten(), descending=True, stable=True).indices
        experts_N = experts_N[order_N]
    chosen_NE = experts_N.unsqueeze(-1) == torch.arange(experts, device=indices_TK.device)
    before_N = (chosen_NE.cumsum(0) - 1).gather(-1, experts_N.unsqueeze(-1)).squeeze(-1)
    kept_N = before_N < capacity
    if rule == "score":
        kept_N = torch.empty_like(kept_N).scatter(0, order_N, kept_N)
    return kept_N.view_as(indices_TK)
