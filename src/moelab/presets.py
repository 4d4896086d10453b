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
    return Preset(ModelConfig(layers, heads, width, context), TrainingConfig(auto_batch=True))


PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        ModelConfig(layers=4, heads=4, width=128, context=128),
        TrainingConfig(
            steps=300,
            batch_size=16,
            accumulation=1,
            auto_batch=True,
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


@dataclass(frozen=True)
class Match:
    """What `--match` solved: the experts' hidden size F at which the arm moe comes nearest to dense."""

    match: str
    """active, total or flops."""
    hidden: int
    target: int
    """Dense's count outside of the embeddings and the head, which all arms share and the text decides."""
    reached: int
    """The count of moe with that F."""

    def __str__(self) -> str:
        what = "FLOPs a token" if self.match == "flops" else f"{self.match} parameters"
        off = f"{self.reached / self.target - 1:+.2%}".replace("-", "−")
        return (
            f"match {self.match}: experts of hidden size F = {self.hidden:,} have {self.reached:,} {what} "
            f"for {self.target:,} of dense ({off}; embeddings and head not counted)"
        )


def solve_match(arm: str, model: ModelConfig, moe: MoEConfig) -> Match | None:
    """What `match` comes to for an arm whose experts' size it decides (moe and dense-wide); None where it does not.

    The counts are linear in F, so that F, rounded to the nearest whole number, is within half a hidden unit of meeting
    the target. Raises `UsageError` where that is less than 1, or no layer is MoE.
    """
    if moe.match is None or arm not in ("moe", "dense-wide"):
        return None
    dense = replace(model, moe=None)

    def size(of: ModelConfig) -> int:
        if moe.match == "flops":
            return flops_per_token(of) - 6 * of.vocabulary * of.width
        counts = count_parameters(of)
        head = 0 if of.tied_head else of.vocabulary * of.width
        return (counts.active if moe.match == "active" else counts.total) - counts.embedding - head

    def sized(hidden: int) -> int:
        return size(replace(dense, moe=_sized(moe, hidden)))

    one, unit, target = sized(1), sized(2) - sized(1), size(dense)
    require(unit > 0, "moe-layers", repr(moe.moe_layers), f"match needs one of the {model.layers} layers to be MoE")
    hidden = 1 + round((target - one) / unit)
    require(
        hidden >= 1, "match", moe.match, "the experts would have no hidden units; give fewer experts or a smaller top-k"
    )
    return Match(moe.match, hidden, target, sized(hidden))


def _sized(moe: MoEConfig, hidden: int) -> MoEConfig:
    return replace(moe, expert_hidden=hidden, expert_multiple=None, match=None)


def _expert_hidden(dense: ModelConfig, moe: MoEConfig) -> int:
    """Hidden size of the experts of the arm `moe`."""
    solved = solve_match("moe", dense, moe)
    return solved.hidden if solved else replace(dense, moe=moe).expert_hidden_size
