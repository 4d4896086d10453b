"""Which tokens a step sees.

The train split is cut into contexts that do not overlap. An epoch is a permutation of them drawn from (seed, epoch),
and a step takes the next sequences of that order: it depends on the seed and on how many sequences a step holds, and
on nothing else. Two arms with the same seed see the same tokens in the same order, and a run that goes on from a
checkpoint needs no more than its step.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

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

    def starts(self, step: int, steps: int = 1) -> np.ndarray:
        """First token of each sequence of `steps` steps from `step` on (steps count from 0): (sequences,) int64."""
        places = np.arange(step * self.sequences_per_step, (step + steps) * self.sequences_per_step)
        epochs, indices = np.divmod(places, self.contexts)
        found = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            found[here] = self._order_of(epoch)[indices[here]]
        return found * self.context

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.contexts)
        return self._order

    def windows(self, step: int, steps: int = 1) -> torch.Tensor:
        """The sequences of steps, each with the token after it: (steps · sequences_per_step, context + 1) int64."""
        return self.read(step, torch.empty(steps * self.sequences_per_step, self.context + 1, dtype=torch.int64))

    def read(self, step: int, into: torch.Tensor) -> torch.Tensor:
        """The same into a tensor, as many steps as it has room for. Holds Python's lock only for moments."""
        starts = self.starts(step, len(into) // self.sequences_per_step)
        into.numpy()[:] = np.take(self.tokens, starts[:, None] + np.arange(self.context + 1))
        return into

    def micro_batches(self, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and targets of each micro-batch, both (batch_size, context) int64; a target is the token after its id."""
        for part in windows.split(self.batch_size):
            yield part[:, :-1].contiguous(), part[:, 1:].contiguous()


def prefetched(
    batches: Batches, steps: range, digest: str, device: torch.device, *, block: int = 16
) -> Generator[tuple[torch.Tensor, str]]:
    """The windows of each step on a device, and the digest of all batches up to it, read before they are asked for.

    A thread reads `block` steps at once into one of two buffers, page-locked for a GPU, so that a copy does not
    wait for the kernels before it. Reading step by step instead made a step on a GPU 5 to 10 % longer: that thread and
    the one that launches kernels then wait for one another at every call. To a GPU a step's windows travel while the
    step before it is computed; they lie there until the one after the next is asked for.

    Args:
        batches: read by this thread alone until the iterator is closed.
        steps: which ones, in order.
        digest: that of the steps before.
        device: where the windows go.
        block: steps that are read at once.
    """
    size, pinned = batches.sequences_per_step, device.type == "cuda"
    rows = min(block, len(steps)) * size
    buffers = [torch.empty(rows, batches.context + 1, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
    copied = [torch.cuda.Event() if pinned else None for _ in buffers]

    def read(number: int) -> tuple[tuple[torch.Tensor, ...], list[str]]:
        nonlocal digest
        here = steps[number * block : (number + 1) * block]
        event = copied[number % 2]
        if event is not None:
            event.synchronize()  # the copies out of this buffer
        windows = batches.read(here[0], buffers[number % 2][: len(here) * size]).split(size)
        digests = []
        for part in windows:
            digest = chain_digest(digest, part)
            digests.append(digest)
        return windows, digests

    def from_host() -> Generator[tuple[torch.Tensor, str]]:
        count = -(-len(steps) // block)
        coming = pool.submit(read, 0) if count else None
        for number in range(count):
            assert coming is not None
            windows, digests = coming.result()
            coming = pool.submit(read, number + 1) if number + 1 < count else None
            yield from zip(windows, digests, strict=True)
            event = copied[number % 2]
            if event is not None:
                event.record()

    with ThreadPoolExecutor(1) as pool:
        if pinned:
            yield from _travelling(from_host(), device)
        else:
            for windows, seen in from_host():
                yield windows.to(device, copy=True), seen


def _travelling(
    windows: Generator[tuple[torch.Tensor, str]], device: torch.device
) -> Generator[tuple[torch.Tensor, str]]:
    """Page-locked windows on a GPU, each copied by a stream of its own while the step before it is computed.

    Two buffers there take turns. The events of `prefetched` are recorded where a copy is issued: on that stream.
    """
    stream = torch.cuda.Stream(device)
    buffers: list[torch.Tensor] = []

    def send(number: int) -> tuple[torch.Tensor, str, torch.cuda.Event] | None:
        user = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            coming = next(windows, None)
        if coming is None:
            return None
        part, seen = coming
        if len(buffers) < 2:
            buffers.append(torch.empty(part.shape, dtype=part.dtype, device=device))
        stream.wait_stream(user)  # for all that reads what the buffer held
        with torch.cuda.stream(stream):
            buffers[number % 2].copy_(part, non_blocking=True)
        return buffers[number % 2], seen, stream.record_event()

    try:
        ahead = send(0)
        for number in itertools.count(1):
            if ahead is None:
                return
            here, seen, arrived = ahead
            ahead = send(number)
            torch.cuda.current_stream(device).wait_event(arrived)
            yield here, seen
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)  # before the buffers' memory is used for something else
        windows.close()


def chain_digest(digest: str, windows: torch.Tensor) -> str:
    """Digest of every step's tokens so far, `digest` being that of the steps before (empty at the start).

    A chain, and not one long hash, because a chain can be carried on from a checkpoint.
    """
    return hashlib.sha256(digest.encode() + windows.numpy().tobytes()).hexdigest()
