"""WikiText's text as it was before it was split into words: GPT-2's evaluation detokenizer.

GPT-2 was scored on WikiText with the marks of its tokenisation removed ("invertible de-tokenizers", Radford et al.
2019, section 3.1). The rules here, in this order, are those that OpenAI gave for it and that Megatron-LM and the
lm-evaluation-harness score WikiText with, the latter an article at a time as is done here. `<unk>` stays as it is.
"""

from __future__ import annotations

import re

from moelab.text.documents import Pieces


def _around(opening: str, closing: str, inside: str) -> tuple[re.Pattern[str], str]:
    """No blanks just inside a pair of brackets or quotes."""
    pattern = rf"{re.escape(opening)}\s*({inside}*?)\s*{re.escape(closing)}"
    return re.compile(pattern), rf"{opening}\1{closing}"


_BEFORE = (
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)  # fmt: skip
_PAIRS = (
    _around("(", ")", r"[^\)]"), _around("[", "]", r"[^\]]"), _around("{", "}", r"[^}]"),
    _around('"', '"', r'[^"]'), _around("'", "'", r"[^']"),
)  # fmt: skip
_AFTER = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def detokenize(text: str) -> str:
    """One article as natural text."""
    for mark, instead in _BEFORE:
        text = text.replace(mark, instead)
    for pattern, replacement in _PAIRS:
        text = pattern.sub(replacement, text)
    for mark, instead in _AFTER:
        text = text.replace(mark, instead)
    return text


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
