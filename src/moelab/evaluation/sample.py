"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moelab.config import require
from moelab.model import GPT
from moelab.text import Tokenizer


@torch.no_grad()
def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids that continue `prompt`, one at a time, until `tokens` of them or the end of the text.

    The prompt stands after an end-of-text token, as a document does in training. Keys and values are cached; when the
    context is full, its newer half is kept and the cache filled again from that.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0 among all.
        seed: of the draw, which is made on the CPU, so that it does not depend on the device.

    Raises:
        UsageError: a negative setting.
    """
    require(tokens >= 0, "tokens", tokens, "give 0 or more")
    require(temperature >= 0, "temperature", temperature, "give 0 (the likeliest token) or more")
    require(top_k >= 0, "top-k", top_k, "give 0 (no limit) or more")
    model.eval()
    device, context = next(model.parameters()).device, model.config.context
    generator = torch.Generator().manual_seed(seed)
    text = [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]
    pending, cache, cached = text[-context:], model.new_cache(1), 0
    for _ in range(tokens):
        if cached + len(pending) > context:
            pending, cache, cached = text[-max(1, context // 2) :], model.new_cache(1), 0
        logits = model(torch.tensor([pending], device=device), cache=cache).logits
        cached += len(pending)
        token = _draw(logits[0, -1, : tokenizer.vocabulary].float().cpu(), temperature, top_k, generator)
        if token == tokenizer.end_of_text:
            return
        yield token
        text.append(token)
        pending = [token]


def _draw(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        values, ids = logits.topk(top_k)
    else:
        values, ids = logits, torch.arange(len(logits))
    probabilities = torch.softmax(values / temperature, dim=-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
