"""A GPT whose feed-forwards are dense or Mixtures of Experts.

- GPT-2's arithmetic by default: pre-norm blocks, learned positions, LayerNorm, exact GELU, biases, tied head.
- RoPE, RMSNorm, SwiGLU and ReLU² are settings of the same modules.
- Precision is explicit: parameters are fp32, each is cast to the compute dtype where it is used; the router, the
  softmaxes and the loss are fp32.
- Every initial value is set in `initialize`, from the seed and the parameter's name alone.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import ModelConfig
from moelab.model.attention import Attention, KVCache
from moelab.model.feed_forward import FeedForward
from moelab.model.head import next_token_loss
from moelab.model.linear import linear
from moelab.model.moe import Experts, MoE
from moelab.model.norm import Norm
from moelab.model.recomputation import recomputed
from moelab.model.router import Routed, Router, Tally

STANDARD_DEVIATION = 0.02  # GPT-2's


@dataclass
class Output:
    """What a forward pass gives. The losses are apart, and none has a coefficient."""

    logits: torch.Tensor | None
    """(B, C, V) in the compute dtype; None when targets were given, or the routing was asked for instead."""
    loss: torch.Tensor | None
    """Next-token cross-entropy in nats, fp32: () or (B, C); None without targets."""
    balance_loss: torch.Tensor
    """() fp32, summed over the MoE layers; 0 for a dense model."""
    z_loss: torch.Tensor
    """() fp32, summed over the MoE layers; 0 for a dense model."""
    expert_counts: torch.Tensor | None
    """(MoE layers, E) int64, slots routed to each expert, dropped ones included; None for a dense model."""
    dropped: torch.Tensor | None
    """(MoE layers,) fp32, share of the slots that were dropped; None where there is no capacity."""
    routed: list[Routed]
    """What each MoE layer's router decided, where that was asked for; else empty."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        is_moe = config.moe is not None and layer in config.moe_layers
        self.feed_forward_norm = Norm(config)
        self.feed_forward: MoE | FeedForward = (
            MoE(config, config.moe) if is_moe and config.moe is not None else FeedForward(config)
        )

    def forward(
        self, x: torch.Tensor, first: int, cache: KVCache | None, keep_routing: bool = False
    ) -> tuple[torch.Tensor, Routed | Tally | None]:
        """(B, C, D) → (B, C, D), and of an MoE's router what it decided, or just what training needs of it."""
        return self.feed(self.attend(x, first, cache), keep_routing)

    def attend(self, x: torch.Tensor, first: int, cache: KVCache | None) -> torch.Tensor:
        """The first half."""
        x, normed = self.attention_norm.fork(x)
        mixed: torch.Tensor = self.attention(normed, first, cache)
        return x + mixed

    def feed(self, x: torch.Tensor, keep_routing: bool = False) -> tuple[torch.Tensor, Routed | Tally | None]:
        """The second half. What it hands out, compiled by itself, gets gradients, if only of zeros: for training the
        routers' losses and counts alone."""
        x, normed = self.feed_forward_norm.fork(x, self.attention.b_out)
        if not isinstance(self.feed_forward, MoE):
            return x + self.feed_forward(normed), None
        y, routed = self.feed_forward(normed)
        return x + y, routed if keep_routing else routed.tally()


class Parts(NamedTuple):
    """The functions that a forward pass of `GPT` consists of; the first argument of each is the module it is of."""

    embed: Callable[..., torch.Tensor]
    block: Callable[..., tuple[torch.Tensor, Routed | Tally | None]]
    recomputed: Callable[..., tuple[torch.Tensor, Tally | None]]
    output: Callable[..., Output]


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019).

    Args:
        config: its sizes and choices.
        dtype: of the products and of the residual stream; parameters are fp32 (float64 if this is float64).
        seed: of the initial values.
        checkpoint_activations: keep only the blocks' inputs for the backward pass (`recomputation`).
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.checkpoint_activations = config, dtype, checkpoint_activations
        self.token_embedding = nn.Parameter(torch.empty(config.vocabulary, config.width))
        learned = config.positions == "learned"
        self.position_embedding = nn.Parameter(torch.empty(config.context, config.width)) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = Norm(config)
        self.head = None if config.tied_head else nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.initialize(seed)
        if dtype == torch.float64:
            self.double()

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Gives every parameter its initial value, as GPT-2 does, on the CPU and so alike on every device.

        Matrices, embeddings and the router are N(0, 0.02²); projections back into the residual stream (attention's,
        the feed-forwards', the experts') N(0, 0.02²/(2·layers)); biases 0; norms 1. Each is drawn from the seed and
        its own name, in which an expert's parameter is called as a dense feed-forward's is: models that share a
        parameter share its initial value, and a single expert begins as the dense feed-forward does.
        """
        residual = STANDARD_DEVIATION / math.sqrt(2 * self.config.layers)
        drawn: list[tuple[nn.Parameter, float, torch.Generator]] = []
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "bias" or leaf.startswith("b_"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            elif leaf == "scale" and self.config.moe is not None:
                parameter.fill_(self.config.moe.score_scale)
            else:
                draw = hashlib.sha256(f"{seed} {name.replace('.experts.', '.')}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(draw[:7], "big"))
                drawn.append((parameter, residual if leaf == "w_out" else STANDARD_DEVIATION, generator))
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # one draws 65 to 150 M numbers a second
            list(threads.map(lambda each: nn.init.normal_(each[0], 0, each[1], each[2]), drawn))

    @property
    def routers(self) -> list[Router]:
        """Those of the MoE layers, in order."""
        return [block.feed_forward.router for block in self.blocks if isinstance(block.feed_forward, MoE)]

    @property
    def experts(self) -> list[Experts]:
        """The routed experts of the MoE layers, in order."""
        return [block.feed_forward.experts for block in self.blocks if isinstance(block.feed_forward, MoE)]

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D), the output head's; the token embedding where the head is tied to it."""
        return self.token_embedding if self.head is None else self.head

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: Literal["mean", "none"] = "mean") -> torch.Tensor:
        """Cross-entropy in nats of the last block's output x (B, C, D): () or (B, C)."""
        loss = next_token_loss(self.final_norm(x).flatten(0, 1), self.head_weight, targets.flatten(), reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` texts."""
        return KVCache(self.config, batch, self.dtype, self.token_embedding.device)

    def embed(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """(B, C) ids, the first of each row at position `first` → (B, C, D) in the compute dtype."""
        x = F.embedding(ids, self.token_embedding)
        if self.position_embedding is not None:
            x = x + self.position_embedding[first : first + ids.shape[1]]
        return x.to(self.dtype)

    def output(
        self,
        x: torch.Tensor,
        targets: torch.Tensor | None,
        reduction: Literal["mean", "none"],
        decided: Sequence[Routed | Tally],
        keep_routing: bool = False,
    ) -> Output:
        """What a forward pass gives, of the last block's (B, C, D) x and what the routers decided."""
        logits = loss = None
        if targets is not None:
            loss = self.loss(x, targets, reduction)
        elif not keep_routing:
            logits = linear(self.final_norm(x), self.head_weight, None)
        none = torch.zeros((), device=x.device)
        dropped = [each.dropped for each in decided if each.dropped is not None]
        return Output(
            logits=logits,
            loss=loss,
            balance_loss=sum((each.balance_loss for each in decided), none),
            z_loss=sum((each.z_loss for each in decided), none),
            expert_counts=torch.stack([each.counts for each in decided]) if decided else None,
            dropped=torch.stack(dropped) if dropped else None,
            routed=[each for each in decided if isinstance(each, Routed)],
        )

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        reduction: Literal["mean", "none"] = "mean",
        cache: KVCache | None = None,
        keep_routing: bool = False,
        parts: Parts | None = None,
    ) -> Output:
        """Logits of the next tokens, or, with targets, their loss.

        Args:
            ids: (B, C) int64 token ids, C at most the context, the cached tokens counted.
            targets: (B, C) int64, for each id the token that follows it. They are not shifted here: whoever cuts
                the text gives ids = text[:-1] and targets = text[1:].
            reduction: "mean" over all B·C tokens, or "none".
            cache: of the tokens before `ids`; it is extended.
            keep_routing: return the routers' decisions, which are (T, E) tensors of every MoE layer; without targets,
                instead of the logits.
            parts: what the pass consists of; the functions of this file when not given.

        Raises:
            ValueError: more tokens than the context.
        """
        first = cache.length if cache is not None else 0
        if first + ids.shape[1] > self.config.context:
            raise ValueError(f"{first + ids.shape[1]} tokens: the context is {self.config.context}")
        parts = parts or PLAIN
        x = parts.embed(self, ids, first)
        decided: list[Routed | Tally] = []
        recompute = self.checkpoint_activations and torch.is_grad_enabled() and cache is None and not keep_routing
        for block in self.blocks:
            x, one = parts.recomputed(block, x) if recompute else parts.block(block, x, first, cache, keep_routing)
            if one is not None:
                decided.append(one)
        if cache is not None:
            cache.length += ids.shape[1]
        return parts.output(self, x, targets, reduction, decided, keep_routing)

    def compiled(self, **settings: Any) -> Callable[..., Output]:
        """This model for training, compiled part by part: blocks that are alike are compiled once.

        A whole GPT takes as many times as long to compile as it has layers. What is not fused by parts is the addition
        at a block's end with the norm of the next. `settings` are those of `torch.compile`.
        """
        compiled: list[Any] = [torch.compile(part, **settings) for part in PLAIN]
        return functools.partial(self, parts=Parts(*compiled))


def _block(block: Block, *given: Any) -> tuple[torch.Tensor, Routed | Tally | None]:
    found: tuple[torch.Tensor, Routed | Tally | None] = block(*given)
    return found


PLAIN = Parts(GPT.embed, _block, recomputed, GPT.output)
