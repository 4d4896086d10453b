"""A stream of text, encoded by several threads in chunks that give the tokens of the whole, in constant memory."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moelab.text.documents import Pieces
from moelab.text.tokenizer import Tokenizer

CHUNK = 1 << 18  # characters that are encoded at once
LONGEST_WORD = 1 << 19  # characters without a safe cut after which the text is cut all the same: from a million
# blanks on, the engine's regular expression runs out of stack
_SAFE_CUT = re.compile(r"\S(?=[ \t\r\n])")


def encoded(pieces: Pieces, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of the stream, in order, an end-of-text after each document; a few chunks are in memory at once."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    end = np.array([tokenizer.end_of_text], tokenizer.dtype)

    def encode(texts: list[str | None]) -> np.ndarray:
        return np.concatenate([end if text is None else tokenizer.encode(text) for text in texts])

    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(pieces):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches(pieces: Pieces) -> Iterator[list[str | None]]:
    """The stream in lists of about `CHUNK` characters, cut where encoding cannot tell."""
    batch: list[str | None] = []
    size = 0
    for part in _parts(pieces):
        batch.append(part)
        size += len(part) if part is not None else 0
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(pieces: Pieces) -> Pieces:
    """The stream in parts of at most `LONGEST_WORD` characters that are encoded by themselves."""
    carry = ""
    for piece in pieces:
        if piece is None:
            if carry:
                yield carry
                carry = ""
            yield None
            continue
        text, start = carry + piece, 0
        while len(text) - start > CHUNK and (cut := _cut(text, start)) is not None:
            yield text[start:cut]
            start = cut
        carry = text[start:]
    assert not carry, "a document without its end"


def _cut(text: str, start: int) -> int | None:
    """A place near `CHUNK` past `start` where cutting changes no token; None to wait for more text.

    In GPT-2's pattern a pre-token has blanks only at its beginning or throughout, so a blank after a character that is
    none always begins one. A single word or row of blanks longer than `LONGEST_WORD` is cut inside.
    """
    limit = start + LONGEST_WORD
    found = _SAFE_CUT.search(text, start + CHUNK - 1, limit)
    if found is not None:
        return found.end()
    return limit if len(text) > limit else None
