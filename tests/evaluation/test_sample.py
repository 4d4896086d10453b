"""Samples: repeatable, cached as if they were not, and within what was asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moelab.config import DataConfig, ModelConfig, MoEConfig, UsageError
from moelab.evaluation import sample
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.text import Tokenizer, prepare

MODEL = ModelConfig(layers=2, heads=2, width=16, context=16, vocabulary=320)


@pytest.fixture
def tokenizer(story) -> Tokenizer:  # type: ignore[no-untyped-def]
    return prepare(DataConfig(data=f"text:{story}", tokenizer="bytes"), splits=("valid",)).tokenizer


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_the_cache_gives_what_the_whole_context_gives(tokenizer: Tokenizer, arm: str, positions: str) -> None:
    from dataclasses import replace

    model = GPT(arm_model(arm, replace(MODEL, positions=positions), MoEConfig(4))).eval()
    written = list(sample(model, tokenizer, "abc", tokens=12, temperature=0))
    text = [tokenizer.end_of_text, *tokenizer.encode("abc").tolist()]
    for token in written:
        logits = model(torch.tensor([text])).logits[0, -1, : tokenizer.vocabulary]
        assert int(logits.argmax()) == token
        text.append(token)


def test_a_seed_gives_the_same_text_and_another_another(tokenizer: Tokenizer) -> None:
    model = GPT(MODEL)
    first, again, other = (list(sample(model, tokenizer, tokens=30, temperature=1, seed=s)) for s in (1, 1, 2))
    assert first == again != other


def test_text_goes_on_past_the_context(tokenizer: Tokenizer) -> None:
    model = GPT(MODEL)
    assert len(list(sample(model, tokenizer, "x" * 50, tokens=60, temperature=0))) == 60


def test_padding_of_the_vocabulary_is_never_drawn(tokenizer: Tokenizer) -> None:
    model = GPT(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every token is as likely as another, the padding too
    drawn = [t for seed in range(5) for t in sample(model, tokenizer, tokens=200, temperature=1, top_k=0, seed=seed)]
    assert max(drawn) < tokenizer.vocabulary
    assert len(set(drawn)) > 100


def test_top_k_draws_among_the_likeliest_alone(tokenizer: Tokenizer) -> None:
    model = GPT(MODEL).eval()
    logits = model(torch.tensor([[tokenizer.end_of_text]])).logits[0, -1, : tokenizer.vocabulary]
    likeliest = set(np.argsort(-logits.detach().numpy())[:3].tolist())
    first = {next(sample(model, tokenizer, tokens=1, temperature=5, top_k=3, seed=s), None) for s in range(40)}
    assert first - {None} <= likeliest
    assert len(first) > 1


@pytest.mark.parametrize("setting", ["tokens", "temperature", "top_k"])
def test_a_negative_setting_is_refused(tokenizer: Tokenizer, setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting.replace('_', '-')} = -1: give 0"):
        list(sample(GPT(MODEL), tokenizer, **{setting: -1}))  # type: ignore[arg-type]
