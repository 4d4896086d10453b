"""Does the whole chain learn a language? A small model against counting, on the same words.

Bigram Kneser-Ney (Chen and Goodman 1999, section 3.1.7: interpolated, one discount n1 / (n1 + 2 n2)) is exact and has
nothing of this project in it: a model with targets in the wrong place, a split that leaks, or a perplexity over the
wrong count would lie far from it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moelab.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from moelab.training import train


def words_of(path: Path) -> list[str]:
    """Words with one end-of-line a line."""
    return [word for line in path.read_text().split("\n")[:-1] for word in (*line.split(), "<eol>")]


def kneser_ney(words: list[str]) -> Callable[[str, str], float]:
    """p(word | the word before it)."""
    pairs = Counter(itertools.pairwise(words))
    before, followers = Counter(words[:-1]), Counter(first for first, _ in pairs)
    preceders = Counter(second for _, second in pairs)
    once, twice = (sum(count == n for count in pairs.values()) for n in (1, 2))
    discount = once / (once + 2 * twice)

    def probability(first: str, second: str) -> float:
        kept = max(pairs[first, second] - discount, 0) / before[first]
        return kept + discount * followers[first] / before[first] * preceders[second] / len(pairs)

    return probability


def perplexity(probability: Callable[[str, str], float], words: list[str]) -> float:
    nats = -sum(math.log(probability(a, b)) for a, b in zip(["<eol>", *words], words, strict=False))
    return math.exp(nats / len(words))


def test_kneser_ney_is_a_distribution() -> None:
    words = "a b a c a b b c d a b c c a d <eol>".split() * 3 + ["e", "a"]
    probability = kneser_ney(words)
    for first in set(words[:-1]):
        assert sum(probability(first, second) for second in set(words)) == pytest.approx(1)


def test_kneser_ney_on_wikitext_2(shared_data: Path) -> None:
    folder = shared_data / "wikitext-2"
    probability = kneser_ney(words_of(folder / "wiki.train.tokens"))
    assert perplexity(probability, words_of(folder / "wiki.valid.tokens")) == pytest.approx(288.8, abs=0.1)
    assert perplexity(probability, words_of(folder / "wiki.test.tokens")) == pytest.approx(267.4, abs=0.1)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_5m_dense_model_beats_bigram_kneser_ney_on_wikitext_2(shared_data: Path, tmp_path: Path) -> None:
    """One epoch or so: 2.5 M tokens. The bigram has seen every word of it once."""
    folder = shared_data / "wikitext-2"
    run = RunConfig(
        preset="5m",
        arm="dense",
        model=ModelConfig(context=128, positions="rope", norm="rmsnorm", activation="relu2", bias=False),
        data=DataConfig(data="wikitext-2", source=folder, tokenizer="bpe:8192"),
        training=TrainingConfig(
            steps=1220, batch_size=16, accumulation=1, learning_rate=2e-3, min_learning_rate=1e-4, warmup_steps=100,
            evaluation_interval=1220, checkpoint_interval=1220,
        ),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        summary = train(run, tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    counted = perplexity(kneser_ney(words_of(folder / "wiki.train.tokens")), words_of(folder / "wiki.valid.tokens"))
    assert summary["val_word_perplexity"] < counted
    assert summary["val_word_perplexity"] > 100  # and is no miracle, such as seeing the target would be
