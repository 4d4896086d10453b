"""The sizes a user names, and the arms of a comparison.

The four named sizes are those of the project that moelab grows out of, with its settings of the baseline batch; what a
name such as `5m` promises is the table there (the "5M" model has 3.2 M parameters in its blocks and 16.2 M with
GPT-2's embedding). `smoke` is for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moelab.config import DataConfig, ModelConfig, MoEConfig, TrainingConfig, UsageError


@dataclass(frozen=True)
class Preset:
    """Settings that a command starts from; `model` is the dense model and `moe` the experts of its MoE arms."""

    model: ModelConfig
    training: TrainingConfig
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()


def _reference(layers: int, heads: int, width: int, context: int) -> Preset:
    return Preset(ModelConfig(layers, heads, width, context), TrainingConfig())


PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        ModelConfig(layers=4, heads=4, width=128, context=128),
        TrainingConfig(
            steps=300,
            batch_size=16,
            accumulation=1,
            learning_rate=2e-3,
            min_learning_rate=2e-4,
            warmup_steps=30,
            evaluation_interval=60,
            checkpoint_interval=100,
        ),
    ),
    "5m": _reference(layers=4, heads=4, width=256, context=256),
    "40m": _reference(layers=8, heads=8, width=512, context=512),
    "124m": _reference(layers=12, heads=12, width=768, context=1024),
    "350m": _reference(layers=24, heads=16, width=1024, context=1024),
}

ARMS: dict[str, str] = {
    "dense": "the GPT itself, feed-forward of hidden size 4·D",
    "moe": "every feed-forward a Mixture of Experts, each expert as wide as the dense feed-forward",
    "dense-wide": "dense with hidden size K·F: the same active FLOPs as moe, without its experts",
    "moe-matched": "experts of 1/K the dense hidden size: the same active FLOPs as dense",
}


def preset(name: str) -> Preset:
    """Raises `UsageError` on a name that is not in `PRESETS`."""
    if name not in PRESETS:
        raise UsageError(f"preset = {name}: give one of {', '.join(PRESETS)}")
    return PRESETS[name]


def arm_model(arm: str, model: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """The model of one arm, from the dense model and the experts of the comparison.

    Raises `UsageError` on an unknown arm, or where `moe-matched` needs a hidden size that top-k does not divide.
    """
    dense = replace(model, moe=None)
    expert_hidden = moe.expert_hidden or dense.hidden_size
    match arm:
        case "dense":
            return dense
        case "moe":
            return replace(dense, moe=replace(moe, expert_hidden=expert_hidden))
        case "dense-wide":
            return replace(dense, hidden=moe.top_k * expert_hidden)
        case "moe-matched":
            if dense.hidden_size % moe.top_k:
                raise UsageError(
                    f"top-k = {moe.top_k}: moe-matched needs a top-k that divides the hidden size {dense.hidden_size}"
                )
            return replace(dense, moe=replace(moe, expert_hidden=dense.hidden_size // moe.top_k))
    raise UsageError(f"arm = {arm}: give one of {', '.join(ARMS)}")
