"""The mistakes of the course project that moelab grows out of; each test fails if one of them comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moelab.config import RunConfig
from moelab.experts.mlp import BACKENDS, availability
from moelab.training import train

MakeRun = Callable[..., RunConfig]
SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
USABLE = [name for name in BACKENDS if availability(name, torch.device("cpu")).usable]


@pytest.fixture(scope="module")
def random_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform over 64 symbols: 6 bits per byte, and nothing to learn beyond that."""
    path = tmp_path_factory.mktemp("random") / "random.txt"
    path.write_text("".join(random.Random(0).choices(SYMBOLS, k=200_000)))
    return path


@pytest.mark.parametrize(("arm", "backend"), [("dense", "auto"), ("dense-wide", "auto"), *(("moe", b) for b in USABLE)])
def test_nothing_is_learned_from_random_text(
    tiny_run: MakeRun, random_text: Path, tmp_path: Path, arm: str, backend: str
) -> None:
    """A model that sees its targets, or is scored on padding, goes far below 6 bits per byte here."""
    run = tiny_run(arm, text=random_text, steps=200, batch_size=16, evaluation_interval=50, learning_rate=5e-3)
    if run.model.moe is not None:
        run = replace(run, model=replace(run.model, moe=replace(run.model.moe, backend=backend)))
    summary = train(run, tmp_path / "run")
    assert 5.98 <= summary["val_bits_per_byte"] < 6.3


@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_a_cycle_is_learned_through_prediction(tiny_run: MakeRun, tmp_path: Path, arm: str) -> None:
    """A cycle of 16 symbols: whoever predicts gets it all; a model asked for its own input would have it at step 0."""
    text = tmp_path / "cycle.txt"
    text.write_text(SYMBOLS[:16] * 4000)
    run = tiny_run(arm, text=text, steps=250, batch_size=8, evaluation_interval=250, learning_rate=5e-3)
    first_line = train(replace(run, training=replace(run.training, steps=1)), tmp_path / "one")
    assert first_line["val_loss"] > 4.0
    assert train(run, tmp_path / "run")["val_loss"] < 0.02
