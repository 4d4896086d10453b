"""The sizes a user names, and the arms of a comparison.

The four named sizes are those of the project that moelab grows out of, with its settings of the baseline batch; what a
name such as `5m` promises is the table there (the "5M" model has 3.2 M parameters in its blocks and 16.2 M with
GPT-2's embedding). `smoke` is for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moelab.config import DataConfig, ModelConfig, MoEConfig, TrainingConfig, UsageError, require
from moelab.meters import count_parameters, flops_per_token


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

    Raises `UsageError` on an unknown arm, or where `moe-matched` needs a hidden size that top-k does not divide, or
    `match` one that is less than 1.
    """
    dense = replace(model, moe=None)
    match arm:
        case "dense":
            return dense
        case "moe":
            return replace(dense, moe=_sized(moe, _expert_hidden(dense, moe)))
        case "dense-wide":
            return replace(dense, hidden=(moe.top_k + moe.shared_experts) * _expert_hidden(dense, moe))
        case "moe-matched":
            used = moe.top_k + moe.shared_experts
            if dense.hidden_size % used:
                shared = f" + {moe.shared_experts} shared experts" if moe.shared_experts else ""
                raise UsageError(
                    f"top-k = {moe.top_k}: moe-matched needs a top-k{shared} that divides the hidden size "
                    f"{dense.hidden_size}"
                )
            return replace(dense, moe=_sized(moe, dense.hidden_size // used))
    raise UsageError(f"arm = {arm}: give one of {', '.join(ARMS)}")


def _sized(moe: MoEConfig, hidden: int) -> MoEConfig:
    return replace(moe, expert_hidden=hidden, expert_multiple=None, match=None)


def _expert_hidden(dense: ModelConfig, moe: MoEConfig) -> int:
    """Hidden size of the experts of the arm `moe`."""
    if moe.match is None:
        return replace(dense, moe=moe).expert_hidden_size

    def size(model: ModelConfig) -> int:
        counts = count_parameters(model)
        return {"active": counts.active, "total": counts.total, "flops": flops_per_token(model)}[str(moe.match)]

    # Each is linear in F: two points give the line, and F is where it meets dense's.
    one, two = (size(replace(dense, moe=_sized(moe, hidden))) for hidden in (1, 2))
    hidden = 1 + round((size(dense) - one) / (two - one))
    require(
        hidden >= 1, "match", moe.match, "the experts would have no hidden units; give fewer experts or a smaller top-k"
    )
    return hidden
