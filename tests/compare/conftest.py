"""Comparisons whose runs are written, not trained: every figure of theirs is known."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab.compare import Comparison
from moelab.compare.plan import PlannedRun
from moelab.config import ModelConfig, MoEConfig, TrainingConfig
from moelab.meters import count_parameters, flops_per_token

VOCABULARY = 4096
# By arm; those made by override are all alike.
ADVANTAGE = defaultdict(lambda: -0.1, {"dense": 0.0, "moe": -0.12, "dense-wide": -0.07, "moe-matched": -0.05})
SPEED = defaultdict(lambda: 11_003.0, {"dense": 20_011.0, "dense-wide": 13_007.0, "moe-matched": 15_013.0})
BEST_RATE = defaultdict(lambda: 1e-3, dict.fromkeys(["dense", "moe", "dense-wide", "moe-matched"], 3e-4))
TEST = {
    "test_loss": 3.0, "test_bits_per_byte": 1.4, "test_word_perplexity": None, "test_tokens": 190_000,
    "test_fingerprint": "cd" * 32,
}  # fmt: skip


def write_run(plan: PlannedRun, folder: Path, **changes: Any) -> dict[str, Any]:
    """A finished run as training leaves it: the arm decides its loss and speed, the seed its noise.

    `changes` replaces entries of the summary.
    """
    run, training = plan.config, plan.config.training
    model = replace(run.model, vocabulary=VOCABULARY)
    place = folder / plan.folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(replace(run, model=model).to_json())
    tokens_per_step = training.batch_size * training.accumulation * model.context
    intervals = (training.log_interval, training.evaluation_interval, training.routing_interval)
    lines = [
        _metrics(plan, step, tokens_per_step)
        for step in range(1, training.steps + 1)
        if step == training.steps or any(step % interval == 0 for interval in intervals)
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = lines[-1]
    summary = {
        "finished": True, "arm": run.arm, "seed": training.seed, "steps": training.steps, "tokens": last["tokens"],
        "tokens_per_step": tokens_per_step, "seconds": last["tokens"] / SPEED[run.arm], "val_loss": last["val_loss"],
        "val_bits_per_byte": last["val_bits_per_byte"], "val_word_perplexity": None, "train_loss": last["train_loss"],
        "tokens_per_second": SPEED[run.arm], "mfu": None, "peak_memory_bytes": 700_000_000,
        "parameters": dataclasses.asdict(count_parameters(model)), "flops_per_token": flops_per_token(model),
        "batches_sha256": hashlib.sha256(f"{training.seed} {training.steps}".encode()).hexdigest(),
        "data": {
            "name": "stdlib", "fingerprint": "ab" * 32, "tokenizer": "bpe:4096", "train_tokens": 4_000_000,
            "valid_tokens": 210_000, "form": None, "source": "/usr/lib/python3.12",
        },
        "environment": {
            "moelab": "0.1.0", "commit": None, "python": "3.12.1", "torch": "2.13.0", "device": "a CPU, 2 threads",
            "precision": "float32", "device_peak_flops": None, "threads": 2, "platform": "Linux",
        },
        "command": "moelab compare smoke",
    }  # fmt: skip
    if model.moe is not None:
        summary["token_types"] = _token_types(model, training.seed)
    summary |= changes
    (place / "summary.json").write_text(json.dumps(summary))
    return summary


def _metrics(plan: PlannedRun, step: int, tokens_per_step: int) -> dict[str, Any]:
    run, training = plan.config, plan.config.training
    tokens = step * tokens_per_step
    annealed = 0.1 * math.sin(math.pi / 2 * step / training.steps) ** 4  # what the end of the cosine gives
    noise = 0.02 * math.sin(7 * training.seed + len(run.arm))
    mistuned = 0.05 * math.log10(training.learning_rate / BEST_RATE[run.arm]) ** 2
    loss = 3.0 + mistuned + 5.0 * math.exp(-tokens / 120_000) + ADVANTAGE[run.arm] + noise - annealed
    line = {
        "step": step, "tokens": tokens, "seconds": round(tokens / SPEED[run.arm], 6), "train_loss": loss + 0.05,
        "learning_rate": 1e-3, "gradient_norm": 1.0,
    }  # fmt: skip
    if run.model.moe is not None:
        experts = run.model.moe.experts
        line |= {"balance_loss": 4.1, "z_loss": 1.0, "expert_load": []}
        for layer in sorted(run.model.moe_layers):
            logits = [math.cos(expert * (layer + 1)) * math.exp(-step / 80) for expert in range(experts)]
            total = sum(math.exp(logit) for logit in logits)
            line["expert_load"].append([math.exp(logit) / total for logit in logits])
        if step % training.routing_interval == 0 or step == training.steps:
            line["routing"] = _routing(plan, step)
        if run.model.moe.capacity_factor is not None:
            line["dropped"] = [0.5 / (layer + 1) / step for layer in sorted(run.model.moe_layers)]
    if step % training.evaluation_interval == 0 or step == training.steps:
        line |= {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) / 3.1}
    return line


def _routing(plan: PlannedRun, step: int) -> dict[str, Any]:
    """What a router of drawn logits does to 512 tokens, layer by layer."""
    run, training = plan.config, plan.config.training
    assert run.model.moe is not None
    experts, top_k = run.model.moe.experts, run.model.moe.top_k
    found: dict[str, list[Any]] = {}
    for layer in sorted(run.model.moe_layers):
        draw = np.random.default_rng([training.seed, layer, step])
        logits = (
            draw.normal(0, 1 + step / training.steps, (512, experts)) + np.cos(np.arange(experts) * (layer + 1)) / 2
        )
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        chosen = logits >= np.sort(logits, axis=1)[:, -top_k, None]
        load = chosen.mean(0) / top_k
        figures = {
            "load": load, "max_violation": max(load) * experts - 1, "mean_violation": np.abs(load * experts - 1).mean(),
            "entropy": -(shares * np.log(shares)).sum(1).mean(), "logit_rms": np.sqrt((logits**2).mean()),
            "dropped": 0.0, "weight_norm": 10 + 40 * load + 0.1 * layer, "overlap": chosen.T @ (chosen / 512),
        }  # fmt: skip
        for name, value in figures.items():
            found.setdefault(name, []).append(np.round(value, 5).tolist())
    return found


def _token_types(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Types that experts share among themselves, more so in deeper layers; the last type does not occur."""
    assert model.moe is not None
    names = ["word start", "word inside", "number", "punctuation", "whitespace", "other"]
    draw = np.random.default_rng(seed)
    layers = [
        draw.dirichlet(np.full(model.moe.experts, 20 / (layer + 1)), len(names)).tolist() for layer in model.moe_layers
    ]
    return {"types": names, "share_of_tokens": [0.4, 0.25, 0.05, 0.2, 0.1, 0.0], "layers": layers}


@pytest.fixture(scope="session")
def finish() -> Callable[..., Path]:
    """Writes every run of a comparison into a folder, those of its further budgets too, as if they had been trained."""

    def write(comparison: Comparison, folder: Path, **changes: dict[str, Any]) -> Path:
        """`changes`: entries of the summary by arm, all its seeds."""
        spent = {}
        if comparison.sweeps:  # and its runs with the best of the values tried, scored on the test split
            best = {}
            for arm in comparison.names:
                scored = {p: write_run(plan, folder, **TEST) for p, plan in comparison.sweep_runs(arm).items()}
                best |= {arm: min(scored, key=lambda point: scored[point]["val_loss"])} if scored else {}
            comparison = comparison.tuned(best)
        for plan in comparison.runs():
            arm = plan.config.arm
            scored = TEST | {"test_loss": 3.0 + ADVANTAGE[arm]} if comparison.sweeps else {}
            spent[arm] = write_run(plan, folder, **(scored | changes.get(arm.replace("-", "_"), {})))
        costs = {
            "flops": {arm: summary["tokens"] * summary["flops_per_token"] for arm, summary in spent.items()},
            "seconds": {arm: summary["seconds"] for arm, summary in spent.items()},
        }
        for budget in comparison.budgets[1:]:
            for plan in comparison.budget_runs(budget, costs[budget]):
                write_run(plan, folder)
        return folder

    return write


@pytest.fixture(scope="session")
def small() -> Callable[..., Comparison]:
    """A comparison with few steps; keywords are its fields."""

    def make(**fields: Any) -> Comparison:
        training = TrainingConfig(steps=40, warmup_steps=4, evaluation_interval=10, log_interval=5, routing_interval=10)
        return Comparison(**({"moe": MoEConfig(experts=4), "training": training} | fields))

    return make
