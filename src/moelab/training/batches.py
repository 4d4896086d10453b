"""Which tokens a step sees.

The train split is cut into contexts that do not overlap. An epoch is a permutation of them drawn from (seed, epoch),
and a step takes the next sequences of that order: it depends on the seed and on how many sequences a step holds, and
on nothing else. Two arms with the same seed see the same tokens in the same order, and a run that goes on from a
checkpoint needs no more than its step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from moelab.config import UsageError


class Batches:
    """Micro-batches of a token stream.

    Args:
        tokens: (n,) integers; target i of the stream is tokens[i + 1].
        context: tokens of one sequence.
        batch_size: sequences of one micro-batch.
        accumulation: micro-batches of one step.
        seed: of the order.

    Raises:
        UsageError: fewer tokens than one context.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, accumulation: int, seed: int) -> None:
        self.contexts = (len(tokens) - 1) // context
        if self.contexts < 1:
            raise UsageError(
                f"data: its train split has {max(len(tokens) - 1, 0):,} tokens, fewer than one context of {context}; "
                f"give more text or a smaller --context"
            )
        self.tokens, self.context, self.seed = tokens, context, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation

    def starts(self, step: int) -> list[int]:
        """First token of each sequence of a step (steps count from 0)."""
        first = step * self.sequences_per_step
        return [self._context_at(place) * self.context for place in range(first, first + self.sequences_per_step)]

    def _context_at(self, place: int) -> int:
        epoch, index = divmod(place, self.contexts)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.contexts)
        return int(self._order[index])

    def windows(self, step: int) -> torch.Tensor:
        """The sequences of a step, each with the token after it: (batch_size × accumulation, context + 1) int64."""
        rows = [self.tokens[start : start + self.context + 1] for start in self.starts(step)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def micro_batches(self, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and targets of each micro-batch, both (batch_size, context) int64; a target is the token after its id."""
        for part in windows.split(self.batch_size):
            yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


def chain_digest(digest: str, windows: torch.Tensor) -> str:
    """Digest of every step's tokens so far, `digest` being that of the steps before (empty at the start).

    A chain, and not one long hash, because a chain can be carried on from a checkpoint.
    """
    return hashlib.sha256(digest.encode() + windows.numpy().tobytes()).hexdigest()
