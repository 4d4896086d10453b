"""Balancing over a whole optimizer step: what a single forward pass cannot see."""

from __future__ import annotations

import torch

from moelab.model import GPT
from moelab.model.router import bias_step, over_ranks


class Balancer:
    """Counts of the experts' slots over a step's micro-batches and all ranks, and what the settings do with them.

    With the scope "step" each micro-batch's balance loss counts the load from the step's first micro-batch on; with a
    bias rate each layer's bias of selection moves once a step. Without either, nothing is computed.
    """

    def __init__(self, model: GPT) -> None:
        moe, routers = model.config.moe, model.routers
        self.seen = [router.seen for router in routers] if moe and moe.balance_scope == "step" else []
        self.biases = [router.selection_bias for router in routers if router.selection_bias is not None]
        self.rate = moe.bias_rate if moe else 0.0
        self.counts: torch.Tensor | None = None  # (L, E) int64, of this step

    def add(self, counts_LE: torch.Tensor) -> None:
        """Takes in a micro-batch, after its backward pass, which may compute the forward pass again."""
        if self.seen or self.biases:
            total = over_ranks(counts_LE)
            self.counts = total if self.counts is None else self.counts + total
            for seen, count in zip(self.seen, total, strict=False):
                seen += count

    def step(self, made: torch.Tensor | None = None) -> None:
        """Ends an optimizer step; no bias moves where `made`, () bool, says that the optimizer passed over it."""
        if self.biases and self.counts is not None:
            for bias, change in zip(self.biases, bias_step(self.counts, self.rate), strict=True):
                bias += change if made is None else change * made
        for seen in self.seen:
            seen.zero_()
        self.counts = None
