"""WikiText's text as it was before it was split into words: GPT-2's evaluation detokenizer.

GPT-2 was scored on WikiText with the marks of its tokenisation removed ("invertible de-tokenizers", Radford et al.
2019, section 3.1). The rules here, in this order, are those that OpenAI gave for it and that Megatron-LM and the
lm-evaluation-harness score WikiText with, the latter an article at a time as is done here. `<unk>` stays as it is.
"""

from __future__ import annotations

import re
from functools import partial

from moelab.text.documents import Pieces

_BEFORE = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)  # fmt: skip
_PAIRS = tuple(
    (closing, re.compile(rf"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}"), opening)
    for opening, closing in ("()", "[]", "{}", '""', "''")
)
_AFTER = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def detokenize(text: str) -> str:
    """One article as natural text."""
    for mark, instead in _BEFORE:
        text = text.replace(mark, instead)
    for closing, pair, opening in _PAIRS:
        # No blanks just inside a pair. Up to the last closing mark each search ends at one: the time is linear.
        closed, last, rest = text.rpartition(closing)
        text = pair.sub(partial(_trimmed, opening, closing), closed + last) + rest
    for mark, instead in _AFTER:
        text = text.replace(mark, instead)
    return text


def _trimmed(opening: str, closing: str, pair: re.Match[str]) -> str:
    return f"{opening}{pair[1].strip()}{closing}"


def detokenized(pieces: Pieces) -> Pieces:
    """The same documents as natural text, each in memory as a whole: a pair of quotes may be far apart."""
    document: list[str] = []
    for piece in pieces:
        if piece is not None:
            document.append(piece)
            continue
        if text := detokenize("".join(document)):
            yield text
            yield None
        document.clear()
