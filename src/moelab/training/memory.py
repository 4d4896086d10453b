"""What training takes of a device's memory, in closed form, and the micro-batch that follows from it.

At its peak a step holds, at once: parameters, gradients and AdamW's state; each weight cast to the compute dtype, which
its product keeps for the backward pass; what the blocks keep for it (activations); and, of what is there for a moment,
the larger of the head's chunk of logits and one block's gradients. A compiled block gives the gradients of its
parameters all at its end, beside those of earlier micro-batches.

It is the same for a step that is captured in a CUDA graph, whose memory is the graph's own, so that what evaluation
takes comes on top. There the first micro-batch's gradients lie in what its logits left, which the next then lacks. The
tests hold the activations to what PyTorch saves, and on GPUs the sum to the allocator's peak.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moelab.config import ModelConfig, RunConfig, RunFailed, TrainingConfig, UsageError
from moelab.device import available_memory
from moelab.evaluation.score import contexts_at_once
from moelab.experts import backend_of
from moelab.experts.activation import inner_size
from moelab.experts.mlp import BACKENDS
from moelab.meters import count_parameters
from moelab.model.head import CHUNK
from moelab.presets import ARMS, PRESETS, arm_model

FILL = 0.9  # share of the free memory that an estimate may take; the rest is for its error and for gaps between blocks
SURELY = 1.15  # an estimate past that share by this factor is not tried even where its settings were given
STATE_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / 256}  # AdamW's two moments, of one parameter


class NotEnoughMemory(UsageError):
    """A device has too little for a run. Its text ends with what fits, in flags of `train` and `compare`."""

    def __init__(self, arm: str, need: str, options: str) -> None:
        super().__init__(f"{need}; what fits: {options}")
        self.arm = arm
        """The run's."""
        self.need = need
        """What the run needs and the device has, without the flags."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by what takes them."""

    parameters: int
    gradients: int
    optimizer: int
    casts: int
    """Weights in the compute dtype."""
    activations: int
    """What the blocks keep for their backward passes."""
    moment: int
    """The head's logits and gradients, or one block's, whichever is more."""
    gap: int
    """Lost between blocks of memory in a captured step of several micro-batches: the logits' place."""

    @property
    def state(self) -> int:
        """What is there from the first step to the last."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.casts + self.activations + self.moment + self.gap


def training_memory(model: ModelConfig, training: TrainingConfig, device: torch.device, dtype: torch.dtype) -> Memory:
    """The peak of a step, nothing being allocated.

    Gradients are counted in full, as they lie there from a step's second micro-batch on. Experts are counted as the
    backend keeps them; those of "auto" as `grouped_mm` does, the most of all.
    """
    size, tokens = dtype.itemsize, training.batch_size * model.context
    counts = count_parameters(model)
    blocks = [_Block(model, layer, device, size) for layer in range(model.layers)]
    largest = max(block.parameters for block in blocks)
    cast = size if size < 4 else 0
    if training.checkpoint_activations:
        kept = max(block.kept(tokens) for block in blocks) + sum(block.kept_anyway(tokens) for block in blocks)
        casts = cast * largest
    else:
        kept = sum(block.kept(tokens) for block in blocks)
        casts = cast * sum(block.parameters for block in blocks)
    kept += tokens * model.width * (size + (size if model.norm == "layernorm" else 8))  # the last norm's output, input
    beside = 0
    if training.accumulation > 1:  # not added yet: gradients of a compiled block, and of a head that is the embedding
        beside += 4 * largest if training.compiles(device.type) else 0
        beside += 4 * model.vocabulary * model.width if model.tied_head else 0
    of_blocks = (block.passing(tokens) + beside for block in blocks)
    passing = max(_head(model, tokens, device, size), *of_blocks)
    return Memory(
        parameters=4 * counts.total,
        gradients=4 * counts.total,
        optimizer=int(STATE_BYTES[training.optimizer_state] * counts.total),
        casts=casts,
        activations=kept,
        moment=passing,
        gap=_logits(model, tokens, device, size) if training.accumulation > 1 and training.captures(device.type) else 0,
    )


class _Block:
    """Bytes of one block, D width, `size` bytes a number of the compute dtype."""

    def __init__(self, model: ModelConfig, layer: int, device: torch.device, size: int) -> None:
        self.model, self.size, self.on_cpu = model, size, device.type == "cpu"
        self.moe = model.moe if model.moe is not None and layer in model.moe_layers else None
        matrices = 3 if model.activation == "swiglu" else 2
        hidden = model.hidden_size
        if self.moe is not None:
            hidden = (self.moe.experts + self.moe.shared_experts) * model.expert_hidden_size
        self.parameters = 4 * model.width**2 + matrices * model.width * hidden

    def kept(self, tokens: int) -> int:
        """Kept from the forward to the backward pass: what the products, norms and activations take derivatives at."""
        width, size = self.model.width, self.size
        norms = 2 * (size if self.model.norm == "layernorm" else 8)  # inputs; RMSNorm's also normed, both in fp32
        products = 3 * size  # inputs of w_qkv, of w_out, and of the feed-forward
        turned = 3 if self.model.positions == "rope" else 0
        # Queries, keys and values; on CPUs all of attention is fp32.
        attention = 4 * 4 if self.on_cpu and size < 4 else (3 + turned) * size
        of_statistics = 4 * (self.model.heads + 4)
        return tokens * ((norms + products + attention) * width + of_statistics + self._feed_forward())

    def _feed_forward(self) -> int:
        """Bytes of a token."""
        model, size = self.model, self.size
        steps = (
            4 if model.activation == "swiglu" else 2
        )  # before and after the activation; swiglu's gate and value apart
        if self.moe is None:
            return steps * model.hidden_size * size
        hidden, k, moe = model.expert_hidden_size, self.moe.top_k, self.moe
        routing = 12 * moe.experts + k * (8 + 4 + 3 * 8)
        if getattr(BACKENDS.get(moe.backend), "RECOMPUTES", False):
            experts = k * inner_size(model.activation, hidden) * size
        else:
            experts = k * (steps * hidden + 2 * model.width) * size  # with the sorted rows of tokens and of outputs
        shared = steps * moe.shared_experts * hidden * size
        # On CPUs the router's input is cast; the cast takes its place where no product of shared experts reads it too.
        in_fp32 = (4 if moe.shared_experts else 4 - size) * model.width if self.on_cpu and size < 4 else 0
        return experts + shared + routing + in_fp32

    def kept_anyway(self, tokens: int) -> int:
        """Kept where the block is computed again: its input, and the router's decisions."""
        decisions = 8 * self.moe.top_k + 4 * self.moe.experts if self.moe is not None else 0
        return tokens * (self.model.width * self.size + decisions)

    def passing(self, tokens: int) -> int:
        """There for a moment of the backward pass: gradients of the hidden layer, of the rows, and of the weights."""
        moe, model = self.moe, self.model
        hidden = model.hidden_size if moe is None else model.expert_hidden_size
        rows = tokens if moe is None else tokens * moe.top_k
        inner = inner_size(model.activation, hidden)
        return self.size * (rows * (inner + hidden + 2 * model.width) + self.parameters)


def _head(model: ModelConfig, tokens: int, device: torch.device, size: int) -> int:
    """Bytes that `model.head` has at once, those of the hidden states' gradients included."""
    weight = model.vocabulary * model.width * (size + 8)  # cast; its gradient, and that times the loss's
    return _logits(model, tokens, device, size) + 2 * tokens * model.width * size + weight


def _logits(model: ModelConfig, tokens: int, device: torch.device, size: int) -> int:
    """Bytes of a chunk's logits and what is computed of them."""
    chunk = CHUNK.get(device.type, CHUNK["cuda"])
    on_cpu = 12 if tokens <= chunk else size + 8
    of_a_logit = on_cpu if device.type == "cpu" else size  # the kernel on GPUs needs no more than the logit's place
    return min(tokens, chunk) * model.vocabulary * of_a_logit


def evaluation_memory(run: RunConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of what comes on top of a step on a GPU, since a captured one leaves its memory to nobody: the logits of
    `evaluation.score` or what a block of it has, or a block's forward pass over the micro-batch that the routing is
    measured on."""
    if device.type != "cuda":
        return 0
    model = run.model
    scored, tokens = contexts_at_once(model, device) * model.context, run.training.batch_size * model.context
    logits = min(CHUNK["cuda"], scored) * model.vocabulary * dtype.itemsize
    blocks = [_Block(model, layer, device, dtype.itemsize) for layer in range(model.layers)]
    routing = (blocks[layer].kept(tokens) for layer in model.moe_layers)
    return max(logits, *routing, *(block.passing(scored) for block in blocks))


def split_step(
    runs: Sequence[RunConfig], device: torch.device, dtype: torch.dtype, available: int | None = None,
    resuming: bool = False,
) -> TrainingConfig:  # fmt: skip
    """The training of `runs`, which have one batch, with a micro-batch that the memory has room for in all of them.

    With `auto_batch` the sequences of a step stay as many, in micro-batches as large as fit: on CPUs, where large ones
    are no faster, at most as large as they were. Without it the settings are taken, unless they surely do not fit.

    Args:
        runs: of a comparison, or one; their vocabularies are the text's.
        device: whose free memory counts.
        dtype: of the products.
        available: bytes, of a device that need not be here, instead of the device's; where neither is known the
            settings are taken.
        resuming: what fits is looked for among what may change when a run goes on.

    Raises:
        NotEnoughMemory: no micro-batch fits, or the given one surely does not: with what would.
    """
    training = runs[0].training
    if available is None:
        available = available_memory(device)
        runs = [_with_its_backend(run, device, dtype) for run in runs]
    if available is None:
        return replace(training, auto_batch=False)
    room = _Room(device, dtype, available)
    if not training.auto_batch:
        for run in runs:
            if not room.holds(run, SURELY):
                raise _refusal(runs, run, run.training, room, resuming)
        return training
    most = training.batch_size if device.type == "cpu" else training.batch_size * training.accumulation
    splits = list(_splits(training, most))
    for split in splits:
        if all(room.holds(_cut(run, split)) for run in runs):
            return replace(split, auto_batch=False)
    # The smallest need not take the least: only a step that is cut has a block's gradients beside those before.
    needs = [max(((room.takes(_cut(run, split)), run) for run in runs), key=lambda need: need[0]) for split in splits]
    (_, run), split = min(zip(needs, splits, strict=True), key=lambda found: found[0][0])
    raise _refusal(runs, run, split, room, resuming)


def _with_its_backend(run: RunConfig, device: torch.device, dtype: torch.dtype) -> RunConfig:
    """The run with the name of the backend that "auto" is on a device."""
    if run.model.moe is None or run.model.moe.backend != "auto":
        return run
    backend = backend_of(run.model, device, dtype, run.training.deterministic).backend
    return replace(run, model=replace(run.model, moe=replace(run.model.moe, backend=backend)))


def _splits(training: TrainingConfig, most: int) -> Iterator[TrainingConfig]:
    """The same sequences of a step in micro-batches of at most `most`, the largest first."""
    sequences = training.batch_size * training.accumulation
    small = [size for size in range(1, math.isqrt(sequences) + 1) if sequences % size == 0]
    for size in sorted({*small, *(sequences // size for size in small)}, reverse=True):
        if size <= most:
            yield replace(training, batch_size=size, accumulation=sequences // size)


def _cut(run: RunConfig, split: TrainingConfig) -> RunConfig:
    return replace(run, training=cut_as(run.training, split))


@dataclass(frozen=True)
class _Room:
    """A device's free memory in bytes, and what it holds."""

    device: torch.device
    dtype: torch.dtype
    available: int

    def needs(self, run: RunConfig) -> Memory:
        return training_memory(run.model, run.training, self.device, self.dtype)

    def takes(self, run: RunConfig) -> int:
        return self.needs(run).total + evaluation_memory(run, self.device, self.dtype)

    def holds(self, run: RunConfig, factor: float = 1.0) -> bool:
        return self.takes(run) <= self.available * FILL * factor


def split_as(training: TrainingConfig, before: TrainingConfig) -> TrainingConfig:
    """`training` with the micro-batch that a run of as many sequences a step began with, where it has the choice."""
    alike = training.batch_size * training.accumulation == before.batch_size * before.accumulation
    return cut_as(training, before) if training.auto_batch and alike else training


def cut_as(training: TrainingConfig, other: TrainingConfig) -> TrainingConfig:
    """`training` with the micro-batch of another one, which says too whether it is to be chosen."""
    return replace(training, batch_size=other.batch_size, accumulation=other.accumulation, auto_batch=other.auto_batch)


def split_in_words(training: TrainingConfig) -> str:
    several, sequences = "es" * (training.accumulation > 1), "s" * (training.batch_size > 1)
    return f"{training.accumulation} micro-batch{several} of {training.batch_size} sequence{sequences}"


def _refusal(
    runs: Sequence[RunConfig], run: RunConfig, split: TrainingConfig, room: _Room, resuming: bool
) -> NotEnoughMemory:  # fmt: skip
    """What `run`, of `runs`, needs in that split, and what fits for all of them."""
    cut = _cut(run, split)
    needed = room.needs(cut)
    settings = (_fitting(room, _settings(runs, number, resuming)) for number in (1, 2, 3))
    found = next(filter(None, settings), [])
    if not resuming:
        smaller, matched, presets = (_fitting(room, of(runs)) for of in (_smaller_batches, _matched, _smaller_presets))
        found = [*smaller[:1], *found, *matched, *presets[:1]]
    last = (
        "another GPU, or to start anew with another --out" if resuming else "a smaller model, by --layers and --width"
    )
    options = ", or ".join(found) or last
    return NotEnoughMemory(
        run.arm,
        f"memory = {gib(room.available)} free on {room.device.type}: {run.preset} {run.arm} needs "
        f"{gib(room.takes(cut) / FILL)} in micro-batches of {split.batch_size} (weights and AdamW state "
        f"{gib(needed.state)}, with gradients {gib(needed.state + needed.gradients)})",
        options,
    )


# What a user may try instead, the nearest first: the words of the command line, and the runs.
Options = Iterator[tuple[str, Sequence[RunConfig]]]


def _fitting(room: _Room, options: Options) -> list[str]:
    """The words of those for which some micro-batch of the step fits in all runs."""
    found = []
    for words, runs in options:
        training = runs[0].training
        splits = _splits(training, training.batch_size * training.accumulation) if training.auto_batch else [training]
        if any(all(room.holds(_cut(run, split)) for run in runs) for split in splits):
            found.append(words)
    return found


def _smaller_batches(runs: Sequence[RunConfig]) -> Options:
    """The same step in smaller micro-batches, of runs whose own was given."""
    training = runs[0].training
    if not training.auto_batch:
        for split in itertools.islice(_splits(training, training.batch_size), 1, None):
            words = f"--batch-size {split.batch_size} --accumulation {split.accumulation}"
            yield words, [_cut(run, split) for run in runs]


def _settings(runs: Sequence[RunConfig], number: int, resuming: bool) -> Options:
    """Settings of training, `number` of them together; of runs that go on those that may change."""
    known: list[tuple[str, dict[str, Any]]] = [
        ("--checkpoint-activations", {"checkpoint_activations": True}),
        ("--optimizer-state bf16", {"optimizer_state": "bf16"}),
        ("--optimizer-state 8bit", {"optimizer_state": "8bit"}),
        ("--compile off", {"compile": "off"}),
    ]
    known = [(words, settings) for words, settings in known if not resuming or "optimizer_state" not in settings]
    for chosen in itertools.combinations(known, number):
        changed = {name: value for _, settings in chosen for name, value in settings.items()}
        if len(changed) == number:  # not two states
            with contextlib.suppress(UsageError):  # a beta2 that bf16 is too coarse for
                made = [replace(run, training=replace(run.training, **changed)) for run in runs]
                yield " ".join(words for words, _ in chosen), made


def _matched(runs: Sequence[RunConfig]) -> Options:
    """With moe-matched for moe: in `train` another --arm, in `compare` another list of --arms."""
    arms = [run.arm for run in runs]
    if "moe" in arms and all(arm in ARMS for arm in arms):
        with contextlib.suppress(UsageError):  # a top-k that does not divide the hidden size
            made = []
            for run in runs:
                if run.arm == "moe" and run.model.moe is not None:
                    model = arm_model("moe-matched", replace(run.model, moe=None), run.model.moe)
                    run = replace(run, arm="moe-matched", model=model)
                made.append(run)
            listed = ",".join(dict.fromkeys(run.arm for run in made))
            yield f"--arm{'s' * (len(set(arms)) > 1)} {listed}", made


def _smaller_presets(runs: Sequence[RunConfig]) -> Options:
    names = list(PRESETS)
    if all(run.preset in names and run.arm in ARMS for run in runs):
        for name in reversed(names[: names.index(runs[0].preset)]):
            made = []
            for run in runs:
                model = arm_model(run.arm, PRESETS[name].model, PRESETS[name].moe)
                made.append(replace(run, model=replace(model, vocabulary=run.model.vocabulary)))
            yield f"the preset {name}", made


@contextlib.contextmanager
def memory_in_words(training: TrainingConfig) -> Iterator[None]:
    """Makes PyTorch's report that a device has no more memory one line (`RunFailed`)."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        smaller = next(itertools.islice(_splits(training, training.batch_size), 1, None), None)
        or_anew = (
            f", or start anew with --batch-size {smaller.batch_size} --accumulation {smaller.accumulation}"
            if smaller is not None
            else ""
        )
        raise RunFailed(
            f"memory: the device has no more, in micro-batches of {training.batch_size} sequences; "
            f"add --checkpoint-activations{or_anew}"
        ) from problem


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB"
