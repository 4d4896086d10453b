"""Next-token cross-entropy over a whole split, and the figures that follow from it.

Every token of the split is predicted exactly once, the first of them from an end-of-text token. Each context is
`context` tokens long and contexts advance by `stride`: of each but the first, the last `stride` predictions count, so
a token has at least context − stride tokens before it (but at the very start). With stride = context, the default,
contexts do not overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from moelab.config import ModelConfig, require
from moelab.device import keep_freed_memory
from moelab.model import GPT
from moelab.text import Split

LOGITS = 2**24  # held at once where the head makes all that it is asked for
STATES = 2**23  # numbers of a block's output at once, where it does not: small models wait for launches, not for memory


@dataclass(frozen=True)
class Score:
    """Sums over one split, and what they were taken over."""

    split: str
    nats: float
    """Σ −ln p(token) over every token of the split, end-of-text tokens included."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the original text."""
    words: int | None
    """Whitespace-separated words, with one end-of-line a line; None for corpora that are not split into words."""
    context: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer: not comparable with another tokenizer's."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the original text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words), the perplexity that papers on WikiText report."""
        return _exp(self.nats / self.words) if self.words else None

    def as_json(self) -> dict[str, str | float | int | None]:
        return {
            "split": self.split,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "word_perplexity": self.word_perplexity,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "context": self.context,
            "stride": self.stride,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Predictions of tokens[start + 1 : start + length + 1], of which those from `first` on count."""

    start: int
    length: int
    first: int


def windows(predictions: int, context: int, stride: int) -> list[Window]:
    """The contexts that score each of `predictions` targets once."""
    found, done = [], 0
    start = 0
    while done < predictions:
        length = min(context, predictions - start)
        found.append(Window(start, length, done - start))
        done = start + length
        start += stride
    return found


def contexts_at_once(config: ModelConfig, device: torch.device) -> int:
    """Contexts that `score` computes at once: on CPUs their logits are the most, on GPUs, where those come in chunks,
    what is in a block."""
    if device.type == "cuda":
        return max(1, STATES // (config.width * config.context))
    return max(1, min(64, LOGITS // (config.vocabulary * config.context)))


@torch.no_grad()
def score(
    model: GPT, split: Split, name: str = "valid", *, stride: int | None = None, batch_size: int | None = None
) -> Score:
    """Scores every token of a split.

    Args:
        model: on its device; left in the mode it was in.
        split: its tokens begin with end-of-text.
        name: what the split is called.
        stride: tokens that contexts advance by, 1 to context; context when not given.
        batch_size: contexts computed at once; has no influence on the result beyond rounding.

    Raises:
        UsageError: a stride outside 1 … context.
    """
    context = model.config.context
    stride = context if stride is None else stride
    require(1 <= stride <= context, "stride", stride, f"give 1 to {context}, the context")
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()  # or the logits of every batch are given back to the system and asked for again
    batch_size = batch_size or contexts_at_once(model.config, device)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for group in _groups(windows(split.scored, context, stride), batch_size):
        rows = np.stack([split.tokens[w.start : w.start + w.length + 1] for w in group]).astype(np.int64)
        ids = torch.from_numpy(rows).to(device)
        losses = model(ids[:, :-1], ids[:, 1:], reduction="none").loss
        nats += losses[:, group[0].first :].sum(dtype=torch.float64)
    model.train(was_training)
    return Score(name, nats.item(), split.scored, split.bytes, split.words, context, stride)


def _groups(all_windows: list[Window], size: int) -> list[list[Window]]:
    """Batches of windows of one shape: no window is padded, the last and shorter one goes alone."""
    groups: list[list[Window]] = []
    for window in all_windows:
        last = groups[-1][-1] if groups else None
        alike = last is not None and (last.length, last.first) == (window.length, window.first)
        if alike and len(groups[-1]) < size:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups
