"""Dealing the documents of a corpus out to train, valid and test.

By a hash of the document, so that a document stays in its split whatever is added around it. A corpus of few documents
is cut at lines instead: its first 90 % to train on, then 5 % each to validate and test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moelab.config import UsageError
from moelab.text.documents import Advance, Pieces, unheard, without_empty_documents

SPLITS = ("train", "valid", "test")

HELD_OUT = 0.04  # share of documents, by hash, of the validation split, and again of the test split
HEAD = 16_384  # characters that a document is told apart by
FEWEST_DOCUMENTS = 20  # under this a corpus is split at lines
LINE_SHARES = (0.90, 0.95)  # where the validation and the test split then begin


def dealt(read: Callable[[Advance], Pieces], split: str, name: str, advance: Advance = unheard) -> Pieces:
    """The documents of one split, from a stream that can be read again. Raises `UsageError` if it is empty."""
    deal = _survey(read, name)
    if deal.line_cuts is not None:
        yield from without_empty_documents(_between(read(advance), deal.line_cuts, split))
        return
    for head, rest in _documents(read(advance)):
        if deal.split_of(_key(head)) == split:
            yield head
            yield from rest
            yield None


@dataclass(frozen=True)
class _Deal:
    """Which documents the splits get; by lines where `line_cuts` (in characters) is set."""

    promoted: Mapping[int, str]
    """Documents, by hash, that fill a split which would be empty."""
    line_cuts: tuple[int, int] | None

    def split_of(self, key: int) -> str:
        return self.promoted.get(key) or _place(key)


def _key(head: str) -> int:
    """64 bits of a document's first characters: its place does not depend on the documents around it."""
    return int.from_bytes(hashlib.blake2b(head.encode(), digest_size=8).digest(), "big")


def _place(key: int) -> str:
    share = key / 2**64
    return "valid" if share < HELD_OUT else "test" if share < 2 * HELD_OUT else "train"


def _survey(read: Callable[[Advance], Pieces], name: str) -> _Deal:
    """Reads as much as it takes to know that every split will have a document, or that there are too few."""
    keys: set[int] = set()
    filled: set[str] = set()
    characters = 0
    for head, rest in _documents(read(unheard)):
        key = _key(head)
        keys.add(key)
        filled.add(_place(key))
        if len(filled) == len(SPLITS) and len(keys) >= FEWEST_DOCUMENTS:
            return _Deal({}, None)
        characters += len(head) + sum(map(len, rest))
    if not keys:
        raise UsageError(f"data = {name}: the text is empty; give some text")
    if len(keys) < FEWEST_DOCUMENTS:
        return _Deal({}, (int(characters * LINE_SHARES[0]), int(characters * LINE_SHARES[1])))
    lowest = iter(sorted(key for key in keys if _place(key) == "train"))
    return _Deal({next(lowest): split for split in ("valid", "test") if split not in filled}, None)


def _documents(pieces: Pieces) -> Iterator[tuple[str, Iterator[str]]]:
    """Each document as its head (the first `HEAD` characters, or all) and the rest, which is read or passed over."""
    for first in pieces:
        assert first is not None, "an empty document"
        head, ended = [first], False
        length = len(first)
        while length < HEAD and not ended:
            piece = next(pieces)
            if piece is None:
                ended = True
            else:
                head.append(piece)
                length += len(piece)
        text = "".join(head)
        rest = _rest(text[HEAD:], pieces, ended)
        yield text[:HEAD], rest
        for _ in rest:
            pass


def _rest(overflow: str, pieces: Pieces, ended: bool) -> Iterator[str]:
    if overflow:
        yield overflow
    while not ended:
        piece = next(pieces)
        if piece is None:
            return
        yield piece


def _between(pieces: Pieces, cuts: tuple[int, int], split: str) -> Pieces:
    """The part of the stream that belongs to a split, cut after the first line end at or past each place."""
    patience = (cuts[1] - cuts[0]) // 2  # characters in which to look for a line end before cutting where we are
    current, place = 0, 0
    for piece in pieces:
        if piece is None:
            if SPLITS[current] == split:
                yield None
            continue
        while current < len(cuts) and place + len(piece) > cuts[current]:
            at = max(0, cuts[current] - place)
            line_end = piece.find("\n", at, at + patience)
            at = line_end + 1 if line_end >= 0 else at
            if SPLITS[current] == split:
                yield piece[:at]
                yield None
            piece, place, current = piece[at:], place + at, current + 1
        if SPLITS[current] == split:
            yield piece
        place += len(piece)
