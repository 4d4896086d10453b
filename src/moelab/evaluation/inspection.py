"""A text with the experts that its tokens were sent to, for a terminal."""

from __future__ import annotations

import codecs
import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text

from moelab.config import UsageError
from moelab.model import GPT
from moelab.text import Tokenizer

# Told apart on light and dark terminals and with the common forms of colour blindness: the standard colours that a
# terminal's theme makes legible, as backgrounds with the text in black or white over them.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#999999")
DARK = {"#0072b2", "#009e73", "#d55e00"}
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Inspection:
    """Tokens of a text, and where each MoE layer sent them."""

    ids: list[int]
    pieces: list[str]
    """What is shown of each token; laid end to end they are the text, but for characters that are cut over tokens."""
    layers: list[int]
    """Numbers of the MoE layers, from 0."""
    experts: int
    indices: torch.Tensor
    """(MoE layers, tokens, K) int64, each token's experts from the one selected first on."""
    weights: torch.Tensor
    """(MoE layers, tokens, K) fp32."""
    shares: torch.Tensor
    """(MoE layers, tokens, E) fp32."""
    contexts: int
    """How many the text was cut into."""

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": [{"id": i, "text": piece} for i, piece in zip(self.ids, self.pieces, strict=True)],
            "layers": [
                {"layer": layer, "indices": indices.tolist(), "weights": weights.tolist()}
                for layer, indices, weights in zip(self.layers, self.indices, self.weights, strict=True)
            ],
        }


@torch.no_grad()
def inspect_text(model: GPT, tokenizer: Tokenizer, text: str) -> Inspection:
    """Sends a text through a model, after an end-of-text token, and keeps the routing.

    Raises:
        UsageError: a model without experts; a text without tokens.
    """
    if model.config.moe is None:
        raise UsageError("run: it is dense, and there are no experts to inspect; give one of an MoE arm")
    ids = [int(i) for i in tokenizer.encode(text)]
    if not ids:
        raise UsageError("text = (empty): give some text")
    device, context = next(model.parameters()).device, model.config.context
    was_training = model.training
    model.eval()
    parts = []
    room = context - 1  # after the end-of-text that every context begins with
    for start in range(0, len(ids), room):
        part = torch.tensor([[tokenizer.end_of_text, *ids[start : start + room]]], device=device)
        routed = model(part, keep_routing=True).routed
        parts.append([torch.stack([getattr(r, name)[1:] for r in routed]) for name in ("indices", "weights", "shares")])
    model.train(was_training)
    indices, weights, shares = (torch.cat(values, 1).cpu() for values in zip(*parts, strict=True))
    layers = sorted(model.config.moe_layers)
    return Inspection(
        ids,
        _pieces(tokenizer, ids),
        layers,
        model.config.moe.experts,
        indices,
        weights.float(),
        shares.float(),
        len(parts),
    )


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each token. A character that is cut over tokens stands at its last, the others show their bytes."""
    spelled = {rank: token for token, rank in tokenizer.ranks.items()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = []
    for i in ids:
        raw = spelled.get(i, b"")
        pieces.append(decoder.decode(raw) or "".join(f"<{byte:02x}>" for byte in raw))
    return pieces


def print_inspection(found: Inspection, layers: list[int], console: Console) -> None:
    """The text once a layer: coloured by each token's first expert, or with its number where there are no colours."""
    cut = f", cut into {found.contexts} contexts" if found.contexts > 1 else ""
    of = f"the first of {found.indices.shape[2]} experts"
    console.print(f"{len(found.ids):,} tokens{cut}, each marked with {of}", highlight=False)
    for layer in layers:
        place = found.layers.index(layer)
        first, shares = found.indices[place, :, 0], found.shares[place]
        kept = found.indices[place][found.indices[place] >= 0]
        slots = torch.bincount(kept, minlength=found.experts) / max(1, len(kept))
        entropy = -torch.special.xlogy(shares, shares).sum(-1).mean()
        console.print()
        console.print(
            f"layer {layer}: entropy {entropy:.2f} of {math.log(found.experts):.2f} nats, weight of the first expert "
            f"{found.weights[place, :, 0].mean():.2f}",
            style="bold", highlight=False,
        )  # fmt: skip
        legend = Text()
        for expert in range(found.experts):
            legend.append_text(_marked(f" {expert} ", expert, console))
            legend.append(f" {slots[expert]:.0%}  ")
        console.print(legend)
        shown = Text()
        for piece, expert in zip(found.pieces, first.tolist(), strict=True):
            body = piece.replace("\r", "␍").replace("\t", "→")
            # With colours a number is needed only where experts share them.
            numbered = not _coloured(console) or found.experts > len(COLOURS)
            name = str(expert).translate(SUPERSCRIPT) if expert >= 0 else "×"  # dropped
            number = name if numbered or expert < 0 else ""
            head, line_end, tail = body.partition("\n")  # the number stands before the first line end
            rest = f"⏎{number}\n" + tail.replace("\n", "⏎\n") if line_end else number
            shown.append_text(_marked(head + rest, expert, console))
        console.print(shown)


def _coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _marked(text: str, expert: int, console: Console) -> Text:
    colour = COLOURS[expert % len(COLOURS)]
    if expert < 0:
        return Text(text)
    style = Style(color="#ffffff" if colour in DARK else "#000000", bgcolor=colour) if _coloured(console) else Style()
    return Text(text, style)
