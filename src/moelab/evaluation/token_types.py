"""Kinds of tokens, and which experts each of them reaches.

A token's type is decided by its own bytes, so that a vocabulary has one table of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moelab.model import GPT
from moelab.text import Split, Tokenizer

TYPES = (
    "word start", "word inside", "capitalised word", "number", "punctuation", "blank", "line end", "broken character",
    "end of text",
)  # fmt: skip


def type_of(token: bytes) -> str:
    """The type of a token by its bytes; end-of-text has none of its own bytes and is not asked for here.

    "word start" begins with a blank and a lower-case letter, "capitalised word" (with or without a blank) with an
    upper-case letter, "word inside" with a lower-case letter, "number" with a digit, after a blank or not; letters of
    scripts without case count as lower-case. "broken character" is part of one: not UTF-8 by itself.
    """
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "broken character"
    bare = text.strip()
    if not bare:
        return "line end" if "\n" in text or "\r" in text else "blank"
    first = bare[0]
    if first.isalpha():
        if first.isupper():
            return "capitalised word"
        return "word start" if text[0].isspace() else "word inside"
    return "number" if first.isdigit() else "punctuation"


def types_of(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) uint8: the place in `TYPES` of every id."""
    table = np.full(tokenizer.vocabulary, TYPES.index("end of text"), np.uint8)
    for token, rank in tokenizer.ranks.items():
        table[rank] = TYPES.index(type_of(token))
    return table


@torch.no_grad()
def token_types(model: GPT, split: Split, tokenizer: Tokenizer, *, contexts: int = 64) -> dict[str, Any]:
    """Which experts the tokens of each type reach, over contexts spread evenly over a split, in evaluation mode.

    Returns:
        types: the names of those that occur; share_of_tokens: one a type; layers: for each MoE layer and type, the (E)
        shares of the slots of that type's tokens. The host waits for the device once.
    """
    context, config = model.config.context, model.config.moe
    assert config is not None
    device = next(model.parameters()).device
    count = max(1, min(contexts, split.scored // context))
    length = min(context, split.scored)
    starts = np.linspace(0, split.scored - length, count).astype(np.int64)
    ids = torch.from_numpy(np.stack([split.tokens[s : s + length] for s in starts]).astype(np.int64)).to(device)
    kinds = torch.from_numpy(types_of(tokenizer).astype(np.int64)).to(device)[ids].flatten()
    was_training = model.training
    model.eval()
    totals = []
    for part, kind in zip(ids.split(8), kinds.split(8 * length), strict=True):
        counts = []
        for routed in model(part, keep_routing=True).routed:
            kept = routed.indices >= 0
            slots = kind.unsqueeze(1) * config.experts + routed.indices.clamp_min(0)
            counts.append(torch.bincount(slots.flatten(), kept.flatten().double(), len(TYPES) * config.experts))
        totals.append(torch.stack(counts))
    model.train(was_training)
    found = torch.stack(totals).sum(0).view(-1, len(TYPES), config.experts)
    occurring = torch.bincount(kinds, minlength=len(TYPES))
    table = torch.cat([found.flatten(), occurring.double()]).cpu()  # the one copy
    found, occurring = table[: -len(TYPES)].view_as(found), table[-len(TYPES) :]
    present = [place for place, tokens in enumerate(occurring.tolist()) if tokens]
    shares = found / found.sum(-1, keepdim=True).clamp_min(1)
    return {
        "types": [TYPES[place] for place in present],
        "share_of_tokens": [round(x, 5) for x in (occurring / occurring.sum())[present].tolist()],
        "layers": [[[round(x, 5) for x in layer[place].tolist()] for place in present] for layer in shares],
    }
