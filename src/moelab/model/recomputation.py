"""Activation checkpointing (Chen et al. 2016): only a block's input is kept, and the backward pass computes it again.

What a router decided is kept too: two computations of one score may differ in their last bit, where the compiler put
them into other kernels, and a token would then get gradients of experts that it was not sent to. All else that a block
computes moves with such a bit by a bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moelab.model.router import Tally

DECISIONS = (torch.ops.moelab.route.default, torch.ops.aten.argmax.default, torch.ops.aten.sort.stable)


def recomputed(block: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Tally | None]:
    """`block(x, 0, None)`, of which (B, C, D) x and the decisions are all that is kept for the backward pass.

    A block must not change between its forward and its backward pass: what follows from a micro-batch, such as the
    counts of `training.balance`, is taken in after both. Nothing random is in it, so no generator's state is kept,
    which a CUDA graph could not do.
    """

    def tensors(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, tally = block(x, 0, None)
        return (y, *(t for t in tally or () if t is not None))

    y, *tally = checkpoint(tensors, x, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_decisions)
    return y, Tally(*tally) if tally else None


def _keeping_decisions() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DECISIONS else CheckpointPolicy.PREFER_RECOMPUTE
