"""Scores: every token once, from the context that is stated, whatever the batch."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import DataConfig, ModelConfig, MoEConfig, UsageError
from moelab.evaluation import Score, score
from moelab.evaluation.score import windows
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.text import prepare
from moelab.text.tokenizer import bytes_tokenizer

MODEL = ModelConfig(layers=2, heads=2, width=16, context=12, vocabulary=64)


@dataclass
class Tokens:
    """The part of a prepared split that scoring reads."""

    tokens: np.ndarray
    bytes: int = 100
    words: int | None = 20
    documents: int = 1

    @property
    def scored(self) -> int:
        return len(self.tokens) - 1


def split(length: int) -> Tokens:
    return Tokens(np.random.default_rng(0).integers(0, 64, length + 1).astype(np.uint16))


@given(predictions=st.integers(1, 200), context=st.integers(1, 30), data=st.data())
def test_each_token_is_scored_once_with_the_promised_context(
    predictions: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for window in windows(predictions, context, stride):
        assert window.length <= context
        assert window.start + window.length <= predictions
        for target in range(window.start + window.first, window.start + window.length):
            before = target - window.start
            assert before >= min(target, context - stride)
            scored.append(target)
    assert scored == list(range(predictions))


@pytest.mark.parametrize("arm", ["dense", "moe"])
@pytest.mark.parametrize("stride", [None, 5])
def test_the_loss_is_cross_entropy_by_hand_from_logits(arm: str, stride: int | None) -> None:
    model, text = GPT(arm_model(arm, MODEL, MoEConfig(4))).eval(), split(40)
    nats = 0.0
    step = stride or 12
    for target in range(40):  # one token at a time, each from its own stretch of text
        window = 0 if target < 12 else math.ceil((target - 12 + 1) / step) * step
        ids = torch.from_numpy(text.tokens[window : target + 1].astype(np.int64))[None]
        log_p = F.log_softmax(model(ids).logits[0, -1].double(), -1)
        nats -= log_p[int(text.tokens[target + 1])].item()
    assert score(model, text, stride=stride).nats == pytest.approx(nats, rel=1e-5)  # fp32 logits


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batch_size_leaves_the_loss_as_it_was(batch_size: int) -> None:
    model = GPT(arm_model("moe", MODEL, MoEConfig(4)))
    reference = score(model, split(500), batch_size=3)
    assert score(model, split(500), batch_size=batch_size).nats == pytest.approx(reference.nats, rel=1e-6)


def test_more_context_is_given_by_a_smaller_stride() -> None:
    assert len(windows(100, 10, 1)) == 91
    assert len(windows(100, 10, 10)) == 10


@pytest.mark.parametrize("stride", [0, 13, -1])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match=rf"stride = {stride}: give 1 to 12"):
        score(GPT(MODEL), split(30), stride=stride)


def test_a_model_that_knows_nothing_scores_the_logarithm_of_the_vocabulary() -> None:
    model = GPT(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = score(model, split(40))
    assert found.loss == pytest.approx(math.log(64), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(40 * 6 / 100, rel=1e-6)


@given(nats=st.floats(1, 1e5), tokens=st.integers(1, 10**6), size=st.integers(1, 10**6), words=st.integers(1, 10**5))
def test_word_perplexity_and_bits_per_byte_are_the_same_nats(nats: float, tokens: int, size: int, words: int) -> None:
    result = Score("test", nats, tokens, size, words, 8, 8)
    assert result.bits_per_byte * math.log(2) * size == pytest.approx(nats)
    if nats / words < 600:
        assert result.word_perplexity is not None
        assert math.log(result.word_perplexity) * words == pytest.approx(nats, abs=1e-6)


def test_scoring_leaves_the_model_in_training_mode_if_it_was() -> None:
    model = GPT(MODEL).train()
    score(model, split(30))
    assert model.training


def test_on_wikitext_103s_test_split_every_tokenizer_is_measured_on_the_same_bytes_and_words(shared_data: Path) -> None:
    """The official split: log2(word perplexity) · words = bits per byte · bytes, whatever the tokens are."""
    source = shared_data / "wikitext-103"
    for tokenizer in (None, bytes_tokenizer()):
        data = DataConfig(data="wikitext-103", source=source, ranks=shared_data / "gpt2-bpe")
        text = prepare(data, splits=("test",), tokenizer=tokenizer)
        vocabulary = text.tokenizer.vocabulary
        model = GPT(ModelConfig(layers=1, heads=1, width=2, context=64, vocabulary=vocabulary), seed=0)
        found = score(model, text.splits["test"], "test")
        assert (found.words, found.bytes) == (245_569, 1_281_077)
        assert found.tokens == len(text.splits["test"].tokens) - 1
        assert found.word_perplexity is not None
        bits = found.bits_per_byte * found.bytes
        assert math.log2(found.word_perplexity) * found.words == pytest.approx(bits, rel=1e-12)
        assert bits * math.log(2) == pytest.approx(found.loss * found.tokens, rel=1e-12)
        # A model that knows nothing: its loss is that of a guess, on every token.
        assert found.loss == pytest.approx(math.log(vocabulary), rel=0.01)
