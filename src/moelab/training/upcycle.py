"""Starting a model with experts from a trained dense run.

Everything the two models share is copied (Komatsuzaki et al. 2023, "Sparse Upcycling", figure 1) and the experts are
made of the dense feed-forward, act(x·W_in + b_in)·W_out + b_out =: y(x) + b_out:

- copies: every expert is all of it (G = 1).
- split: its hidden units are cut into G shards, and each group of G experts holds every shard once (He et al. 2024,
  "Upcycling Large Language Models into Mixture of Experts", section 2.3). Shard outputs add up to y.

A token's routed output is Σ_k w_k · expert(e_k). With W = Σ_k w_k spread evenly over the shards it is W/G · y, so
experts are scaled by G/W (the reasoning of their section 2.3.1; their equation 2 is its cube root for softmax over all
experts: in their letters W = T/(E·G)). Where weights do not sum to a constant, W is only typical; `departures` names
that and every other setting for which step 0 is not the dense model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moelab.config import Activation, ModelConfig, MoEConfig, RunConfig, UpcyclingConfig, UsageError, flag, require
from moelab.meters import flops_per_token
from moelab.model import GPT
from moelab.model.feed_forward import FeedForward
from moelab.model.moe import MoE
from moelab.text import Tokenizer
from moelab.training.checkpoint import load_checkpoint, read_run


@dataclass(frozen=True)
class Start:
    """What a run started from, as its metrics and summary record it."""

    run: str
    """Folder of the dense run."""
    arm: str
    step: int
    """Of its checkpoint."""
    tokens: int
    """That it was trained on until then."""
    training_flops: int
    """That it spent on them: `flops_per_token` times tokens."""
    val_loss: float | None
    """Its validation loss at that step; None where it did not measure one."""
    same_data: bool
    """Whether its text is this run's, so that the validation losses can be set side by side."""
    shards: int
    """G: parts that the dense feed-forward was cut into; 1 for copies."""
    departures: tuple[str, ...]
    """Why step 0 is not the dense model; empty where it is."""

    def in_words(self, experts: int, layers: int, val_loss: float) -> str:
        """One line for the user, with the validation loss before the first step."""
        made = "copies of the dense feed-forward" if self.shards == 1 else f"shards of 1/{self.shards} of the dense one"
        dense = "not measured" if self.val_loss is None else f"{self.val_loss:.4f}"
        differs = f"step 0 differs from the dense model: {'; '.join(self.departures)}" if self.departures else ""
        return (
            f"upcycled from {self.run}, step {self.step:,} ({self.tokens:,} tokens): {experts} experts in each of "
            f"{layers} layers, {made}; {differs or 'step 0 is the dense model'}; validation loss {val_loss:.4f} before "
            f"the first step, the dense run's {dense}" + ("" if self.same_data else " on its own text")
        )


def upcycle(model: GPT, run: RunConfig, tokenizer: Tokenizer) -> Start:
    """Fills a freshly initialised model from the dense run that `run.upcycling` names.

    The router keeps its own initial value (with `upcycle_groups`, one row for each group). Noise is drawn from the
    seed and the parameter's name alone.

    Raises:
        UsageError: there is no such run, it has experts, or a setting of the two models does not fit.
        RunFailed: none of its checkpoints is good.
    """
    settings, moe = run.upcycling, run.model.moe
    assert settings.upcycle is not None
    assert moe is not None
    folder, source = _source(settings.upcycle)
    _refuse_misfits(run, source, tokenizer, folder)
    dense = GPT(source.model)
    progress, said = load_checkpoint(folder, dense)
    if progress is None:
        raise UsageError(f"upcycle = {folder}: it has no checkpoint yet; train it first")
    for line in said:
        print(line)
    fill(model, dense, settings, run.training.seed)
    return Start(
        run=str(folder),
        arm=source.arm,
        step=progress.step,
        tokens=progress.tokens,
        training_flops=progress.tokens * flops_per_token(source.model),
        val_loss=_validation_loss(folder, progress.step),
        same_data=source.data == run.data,
        shards=source.model.hidden_size // run.model.expert_hidden_size if settings.upcycle_split else 1,
        departures=departures(run.model, source.model.hidden_size, settings),
    )


@torch.no_grad()
def fill(model: GPT, dense: GPT, settings: UpcyclingConfig, seed: int) -> None:
    """Gives a model with experts the parameters of a dense one that fits it; see `upcycle`."""
    source = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in source:
            parameter.copy_(source[name])
    for layer, (block, dense_block) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
        if isinstance(block.feed_forward, MoE):
            assert isinstance(dense_block.feed_forward, FeedForward)
            _fill_layer(block.feed_forward, dense_block.feed_forward, settings)
            for leaf in ("w_in", "w_out") if settings.upcycle_noise else ():
                name = f"blocks.{layer}.feed_forward.experts.{leaf}"
                _add_noise(model.get_parameter(name), f"{seed} {name} upcycle-noise", settings.upcycle_noise)


def _fill_layer(layer: MoE, dense: FeedForward, settings: UpcyclingConfig) -> None:
    moe, experts, shared = layer.router.config, layer.experts, layer.shared
    hidden = dense.w_out.shape[1]
    shards = hidden // experts.w_out.shape[-1]  # G
    weight_sum = typical_weight_sum(moe)
    if settings.upcycle_split:  # shared experts hold the first shards, and each group the others
        group = shards - moe.shared_experts
        held, shared_scale = list(range(moe.shared_experts)), 1.0
        chosen, scale = [moe.shared_experts + e % group for e in range(moe.experts)], group / weight_sum
        if settings.upcycle_groups:
            group_of = torch.arange(moe.experts, device=layer.router.weight.device) // group
            layer.router.weight.copy_(layer.router.weight[group_of])
    else:  # the shared experts and what is routed are 1 + S copies, each with an equal part of the output
        held, shared_scale = [0] * moe.shared_experts, 1 / (1 + moe.shared_experts)
        chosen, scale = [0] * moe.experts, shared_scale / weight_sum
    cut = _Shards(dense, layer.activation, shards)
    experts.w_in.copy_(cut.w_in(chosen, scale).transpose(0, 1).flatten(1, 2))  # (E, inner, D)
    experts.w_out.copy_(cut.w_out(chosen, scale).transpose(0, 1))  # (E, D, F)
    if experts.b_in is not None and experts.b_out is not None and dense.b_out is not None:
        experts.b_in.copy_(cut.b_in(chosen, scale).transpose(0, 1).flatten(1, 2))
        # The shared experts' weight is 1 whatever the router does: where there are any, the output bias is theirs.
        experts.b_out.copy_(torch.zeros_like(dense.b_out) if shared is not None else dense.b_out / weight_sum)
    if shared is not None:
        shared.w_in.copy_(cut.w_in(held, shared_scale).flatten(0, 2))  # (parts·S·F, D)
        shared.w_out.copy_(cut.w_out(held, shared_scale).flatten(1, 2))  # (D, S·F)
        if shared.b_in is not None and shared.b_out is not None and dense.b_out is not None:
            shared.b_in.copy_(cut.b_in(held, shared_scale).flatten())
            shared.b_out.copy_(dense.b_out)


class _Shards:
    """A dense feed-forward's hidden units as G shards of F units, scaled so that their outputs are.

    The scale s is spread over both matrices where that is exact, since He et al. (section 2.3.1) found training better
    than with all of it in W_out: for relu2 its cube root in each (their equation 2), for swiglu its square root in the
    value's rows and in W_out. GELU and SiLU are not homogeneous, and W_out takes all of it.
    """

    def __init__(self, dense: FeedForward, activation: Activation, shards: int) -> None:
        self.dense, self.activation, self.shards = dense, activation, shards
        self.parts = 2 if activation == "swiglu" else 1  # the gate's rows and the value's, or one matrix

    def w_in(self, chosen: Sequence[int], scale: float) -> torch.Tensor:
        """(parts, len(chosen), F, D)"""
        width = self.dense.w_in.shape[1]
        rows = self.dense.w_in.view(self.parts, self.shards, -1, width)[:, list(chosen)]
        return rows * self._input_scales(rows, scale)

    def b_in(self, chosen: Sequence[int], scale: float) -> torch.Tensor:
        """(parts, len(chosen), F)"""
        assert self.dense.b_in is not None
        rows = self.dense.b_in.view(self.parts, self.shards, -1)[:, list(chosen)]
        return rows * self._input_scales(rows, scale)

    def w_out(self, chosen: Sequence[int], scale: float) -> torch.Tensor:
        """(D, len(chosen), F)"""
        columns = self.dense.w_out.view(self.dense.w_out.shape[0], self.shards, -1)[:, list(chosen)]
        power = {"relu2": 1 / 3, "swiglu": 1 / 2}.get(self.activation, 1.0)
        return columns * float(scale**power)

    def _input_scales(self, rows: torch.Tensor, scale: float) -> torch.Tensor:
        scales = {"relu2": [scale ** (1 / 3)], "swiglu": [1.0, scale**0.5]}.get(self.activation, [1.0])
        return rows.new_tensor(scales).view(-1, *[1] * (rows.dim() - 1))


def typical_weight_sum(moe: MoEConfig) -> float:
    """Σ_k w_k of a token: exact where weights are normalised over the K chosen or all E are chosen.

    Else it is that of a router that prefers no expert: K/E of the shares, or K sigmoids of 0.
    """
    sums = {"chosen": 1.0, "all": moe.top_k / moe.experts, "none": moe.top_k / 2}
    return moe.score_scale * sums[moe.normalize]


def departures(model: ModelConfig, dense_hidden: int, settings: UpcyclingConfig) -> tuple[str, ...]:
    """Why the upcycled model's first output is not the dense model's, in words; empty where it is, to rounding."""
    moe = model.moe
    assert moe is not None
    found = []
    if moe.normalize == "none" or (moe.normalize == "all" and moe.top_k < moe.experts):
        found.append(
            f"with normalize = {moe.normalize} weights sum to {typical_weight_sum(moe):g} only in the typical case"
        )
    group = dense_hidden // model.expert_hidden_size - moe.shared_experts if settings.upcycle_split else 1
    if group > 1 and not settings.upcycle_groups:
        found.append(f"a token need not choose the {group} experts of a group together")
    elif group > 1 and moe.top_k % group:
        found.append(f"top-k = {moe.top_k} cannot choose whole groups of {group}")
    if settings.upcycle_noise:
        found.append(f"upcycle-noise = {settings.upcycle_noise:g}")
    if moe.capacity_factor is not None and moe.drop_in_evaluation:
        found.append("slots are dropped in evaluation")
    return tuple(found)


def _add_noise(weights: nn.Parameter, name: str, size: float) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    noise = torch.randn(weights.shape, generator=generator).to(weights)
    weights.add_(noise * (size * weights.std(correction=0)))


def _source(upcycled: Path) -> tuple[Path, RunConfig]:
    try:
        folder, source = read_run(upcycled)
    except UsageError as problem:
        raise UsageError(f"upcycle = {str(problem).removeprefix('run = ')}") from None
    if source.model.moe is not None:
        raise UsageError(f"upcycle = {folder}: its arm {source.arm} has experts already; give a run of the arm dense")
    return folder, source


def _validation_loss(folder: Path, step: int) -> float | None:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    return next((line["val_loss"] for line in reversed(lines) if line["step"] == step and "val_loss" in line), None)


def _refuse_misfits(run: RunConfig, source: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Raises `UsageError` on the first setting for which the dense run's parameters cannot be this model's."""
    mine, theirs = run.model, source.model
    there = f"the dense run {folder} has"
    names = ["layers", "width", "heads", "activation", "norm", "positions", "bias", "tied_head"]
    if theirs.positions == "learned":
        names.append("context")
    for name in names:
        own, its = getattr(mine, name), getattr(theirs, name)
        give = f"--{'' if its else 'no-'}{flag(name)}" if isinstance(its, bool) else f"--{flag(name)} {its}"
        require(own == its, flag(name), own, f"{there} {its}; give {give}")
    its_tokenizer = Tokenizer.load(folder / "tokenizer")
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        other = its_tokenizer.name == tokenizer.name
        give = f"--data {source.data.data}, which it was made of" if other else f"--tokenizer {its_tokenizer.name}"
        raise UsageError(f"tokenizer = {tokenizer.name}: {there} {'another ' * other}{its_tokenizer.name}; give {give}")
    if len(mine.moe_layers) < mine.layers:
        own, its = mine.hidden_size, theirs.hidden_size
        require(own == its, "hidden", own, f"{there} {its}, which layers without experts keep; give --hidden {its}")
    _refuse_expert_sizes(run, theirs.hidden_size, there)


def _refuse_expert_sizes(run: RunConfig, hidden: int, there: str) -> None:
    moe, size = run.model.moe, run.model.expert_hidden_size
    assert moe is not None
    there = f"{there} hidden size {hidden}"
    whole = f"--arm moe --expert-hidden {hidden}"
    divides = hidden % size == 0 and size < hidden
    if not run.upcycling.upcycle_split:
        cut = f"--upcycle-split, which cuts it into {hidden // size} experts, or " if divides else ""
        require(size == hidden, "expert-hidden", size, f"{there}; give {cut}{whole}")
        return
    require(size != hidden, "upcycle-split", True, f"experts have the dense hidden size {hidden} already; leave it out")
    require(divides, "expert-hidden", size, f"{there}; give a size that divides it")
    shards, shared = hidden // size, moe.shared_experts
    require(shared < shards, "shared-experts", shared, f"the dense feed-forward is cut into {shards}; give fewer")
    group = shards - shared
    require(
        moe.experts % group == 0, "experts", moe.experts, f"a group has {group} experts; give a multiple of {group}"
    )
