"""What training takes of a device's memory, in closed form, and the micro-batch that follows from it.

At its peak a step holds, at once: parameters, gradients and AdamW's state; each weight cast to the compute dtype, which
its product keeps for the backward pass; what the blocks keep for it (activations); and, of what is there for a moment,
the larger of the head's chunk of logits and one block's gradients. The tests hold the activations to what PyTorch
saves, and on GPUs the sum to the allocator's peak.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moelab.config import ModelConfig, RunConfig, TrainingConfig, UsageError
from moelab.device import available_memory
from moelab.evaluation.score import BUDGET
from moelab.experts.activation import inner_size
from moelab.meters import count_parameters
from moelab.model.head import CHUNK
from moelab.presets import ARMS, PRESETS, arm_model

FILL = 0.9  # share of the free memory that an estimate may take: its error, and blocks that fit no gap
SURELY = 1.15  # an estimate past that share by this factor is not tried even where its settings were given
STATE_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / 256}  # AdamW's two moments, of one parameter


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

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def training_memory(
    model: ModelConfig, training: TrainingConfig, device: torch.device, dtype: torch.dtype, batch_size: int
) -> Memory:
    """The peak of a step with micro-batches of `batch_size` sequences, nothing being allocated.

    Gradients are counted in full, as they lie there from a step's second micro-batch on. Experts are counted as the
    backend that keeps the most but for `triton` by name, which keeps the least.
    """
    size, tokens = dtype.itemsize, batch_size * model.context
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
    passing = max(_head(model, tokens, device, size, training), max(block.passing(tokens) for block in blocks))
    return Memory(
        parameters=4 * counts.total,
        gradients=4 * counts.total,
        optimizer=int(STATE_BYTES[training.optimizer_state] * counts.total),
        casts=casts,
        activations=kept,
        moment=passing,
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
        if moe.backend == "triton":
            experts = k * inner_size(model.activation, hidden) * size
        else:  # besides the sorted rows of tokens and of outputs
            experts = k * (steps * hidden + 2 * model.width) * size
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


def _head(model: ModelConfig, tokens: int, device: torch.device, size: int, training: TrainingConfig) -> int:
    """Bytes that `model.head` has at once, those of the hidden states' gradients included."""
    chunk = CHUNK.get(device.type, CHUNK["cuda"])
    compiled = training.compile == "on" or (training.compile == "auto" and device.type == "cuda")
    of_a_logit = 2 * size if compiled else 12
    if tokens > chunk:
        of_a_logit = size if device.type == "cuda" else size + 8  # the kernel needs no more than the logit's place
    weight = model.vocabulary * model.width * (size + 8)  # cast; its gradient, and that times the loss's
    return min(tokens, chunk) * model.vocabulary * of_a_logit + 2 * tokens * model.width * size + weight


def evaluation_memory(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of the logits of `evaluation.score`, which come on top: a captured step leaves its memory to nobody."""
    if device.type != "cuda":
        return 0
    logits = model.context * model.vocabulary
    return max(1, min(64, BUDGET["cuda"] // logits)) * logits * (dtype.itemsize + 8)


def split_step(
    runs: Sequence[RunConfig], device: torch.device, dtype: torch.dtype, available: int | None = None
) -> TrainingConfig:
    """The training of `runs`, which have one batch, with a micro-batch that the memory has room for in all of them.

    With `auto_batch` the sequences of a step stay as many, in micro-batches as large as fit: on CPUs, where large ones
    are no faster, at most as large as they were. Without it the settings are taken, unless they surely do not fit.

    Args:
        runs: of a comparison, or one; their vocabularies are the text's.
        device: whose free memory counts.
        dtype: of the products.
        available: bytes, instead of the device's; unlimited where neither is known.

    Raises:
        UsageError: no micro-batch fits, or the given one surely does not: with what would.
    """
    training = runs[0].training
    available = available_memory(device) if available is None else available
    chosen = replace(training, auto_batch=False)
    if available is None:
        return chosen

    def fits(run: RunConfig, batch_size: int, factor: float = 1.0) -> bool:
        needed = training_memory(run.model, run.training, device, dtype, batch_size).total
        return needed + evaluation_memory(run.model, device, dtype) <= available * FILL * factor

    if not training.auto_batch:
        for run in runs:
            if not fits(run, training.batch_size, SURELY):
                raise UsageError(_refusal(run, device, dtype, available, training.batch_size, fits))
        return chosen
    sequences = training.batch_size * training.accumulation
    most = training.batch_size if device.type == "cpu" else sequences
    for batch_size in (n for n in range(most, 0, -1) if sequences % n == 0):
        if all(fits(run, batch_size) for run in runs):
            return replace(chosen, batch_size=batch_size, accumulation=sequences // batch_size)
    run = next(run for run in runs if not fits(run, 1))
    raise UsageError(_refusal(run, device, dtype, available, 1, fits))


def split_as(training: TrainingConfig, before: TrainingConfig) -> TrainingConfig:
    """`training` with the micro-batch that a run of as many sequences a step began with, where it has the choice."""
    alike = training.batch_size * training.accumulation == before.batch_size * before.accumulation
    if not (training.auto_batch and alike):
        return training
    return replace(training, auto_batch=False, batch_size=before.batch_size, accumulation=before.accumulation)


def split_in_words(training: TrainingConfig) -> str:
    return f"{training.batch_size} sequences × {training.accumulation}"


def _refusal(
    run: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    available: int,
    batch_size: int,
    fits: Callable[[RunConfig, int], bool],
) -> str:
    """The line that says what was needed, and what fits."""
    needed = training_memory(run.model, run.training, device, dtype, batch_size)
    state = needed.parameters + needed.optimizer

    def fitting(options: Iterator[tuple[str, RunConfig, int]]) -> list[str]:
        return [words for words, other, size in options if fits(other, size)]

    settings = fitting(_settings(run, 1)) or fitting(_settings(run, 2))[:1]
    found = [
        *fitting(_smaller_batches(run, batch_size))[:1],
        *settings,
        *fitting(_matched(run)),
        *fitting(_smaller_presets(run))[:1],
    ]
    options = ", or ".join(found) or "a smaller model, by --layers and --width"
    return (
        f"memory = {gib(available)} free on {device.type}: {run.preset} {run.arm} needs {gib(needed.total)} in "
        f"micro-batches of {batch_size} (weights and AdamW state {gib(state)}, with gradients "
        f"{gib(state + needed.gradients)}); what fits: {options}"
    )


# What a user may try instead, the nearest first: the words of the command line, the run, its micro-batch.
Options = Iterator[tuple[str, RunConfig, int]]


def _smaller_batches(run: RunConfig, batch_size: int) -> Options:
    return ((f"--batch-size {n}", run, n) for n in range(batch_size - 1, 0, -1) if batch_size % n == 0)


def _settings(run: RunConfig, number: int) -> Options:
    """Settings of training, `number` of them together."""
    known: list[tuple[str, dict[str, Any]]] = [
        ("--checkpoint-activations", {"checkpoint_activations": True}),
        ("--optimizer-state bf16", {"optimizer_state": "bf16"}),
        ("--optimizer-state 8bit", {"optimizer_state": "8bit"}),
    ]
    for chosen in itertools.combinations(known, number):
        changed = {name: value for _, settings in chosen for name, value in settings.items()}
        if len(changed) == number:  # not two states
            with contextlib.suppress(UsageError):  # a beta2 that bf16 is too coarse for
                training = replace(run.training, **changed)
                yield " ".join(words for words, _ in chosen), replace(run, training=training), 1


def _matched(run: RunConfig) -> Options:
    if run.arm == "moe" and run.model.moe is not None:
        with contextlib.suppress(UsageError):  # a top-k that does not divide the hidden size
            model = arm_model("moe-matched", replace(run.model, moe=None), run.model.moe)
            yield "--arm moe-matched", replace(run, model=model), 1


def _smaller_presets(run: RunConfig) -> Options:
    names = list(PRESETS)
    if run.preset in names and run.arm in ARMS:
        for name in reversed(names[: names.index(run.preset)]):
            model = arm_model(run.arm, PRESETS[name].model, PRESETS[name].moe)
            yield f"the preset {name}", replace(run, model=replace(model, vocabulary=run.model.vocabulary)), 1


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB"
