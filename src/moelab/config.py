"""Every setting of one run.

Frozen dataclasses, checked when they are made: a value that cannot work is refused with one line that names the
setting, the value it had and what would work (`UsageError`). `to_json` / `from_json` carry a whole run to and from a
`config.json`. Field names are the flags of the command line (`batch_size` is `--batch-size`), and the text under a
field is its help.

Letters used in shapes everywhere: T tokens, D width, F expert hidden size, E experts, K top-k, N = T·K routed slots,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

Activation = Literal["gelu", "gelu_tanh", "relu2", "silu", "swiglu"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
OptimizerState = Literal["fp32", "bf16", "8bit"]


class UsageError(ValueError):
    """A setting that cannot work. Its text is one line for the user; commands exit with status 2."""


def first_line(problem: BaseException) -> str:
    """What an exception says, or is where it says nothing, for a message of one line."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


class RunFailed(RuntimeError):
    """A run that was set up rightly and failed. Its text is one line for the user; commands exit with status 1."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For imports: what they make stays, and looking for garbage among it takes a fifth of their time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def moelab_home() -> Path:
    """$MOELAB_HOME, or ~/.cache/moelab."""
    return Path(os.environ.get("MOELAB_HOME") or Path.home() / ".cache" / "moelab")


def require(condition: bool, setting: str, value: object, would_work: str) -> None:
    """Raises `UsageError` naming the setting, its value and what would work, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{setting} = {value}: {would_work}")


@dataclass(frozen=True)
class MoEConfig:
    """The feed-forward layers that are Mixtures of Experts, and their router."""

    experts: int = 8
    """Number of experts of a layer (E)."""
    top_k: int = 2
    """Experts that each token is sent to (K)."""
    expert_hidden: int | None = None
    """Hidden size of one expert (F); that of the dense feed-forward when not given."""
    expert_multiple: float | None = None
    """Hidden size of one expert as a multiple of the width D, instead of --expert-hidden."""
    match: Literal["active", "total", "flops"] | None = None
    """Solve the experts' hidden size so that the arm moe has the active or total parameters, or the FLOPs, of dense."""
    shared_experts: int = 0
    """Experts that every token passes besides (DeepSeekMoE), of the same hidden size; their sum has weight 1."""
    moe_layers: str = "every"
    """Which layers are MoE: "every", "every 2nd" (the 2nd, 4th, …), or a list such as "1,3" (the first is 0)."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """An expert's score: softmax over all experts (Shazeer et al. 2017), or a sigmoid of its own (DeepSeek-V3)."""
    normalize: Literal["chosen", "all", "none"] = "chosen"
    """Weights are scores divided by the sum over the K chosen (select, then normalise), over all experts (normalise,
    then select), or not divided; for softmax the last two are one."""
    score_scale: float = 1.0
    """Factor of the weights."""
    learned_scale: bool = False
    """Learn that factor, one for each layer, from --score-scale on."""
    balance_loss: float = 0.01
    """Coefficient of the balance loss (Switch Transformer), summed over layers; 0 turns it off."""
    balance_scope: Literal["sequence", "micro-batch", "step"] = "micro-batch"
    """Over what the balance loss counts an expert's load: each sequence (DeepSeek-V3's sequence-wise loss), the
    micro-batch of all ranks, or the micro-batches of the optimizer step so far."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss (ST-MoE), summed over layers; 0 turns it off."""
    bias_rate: float = 0.0
    """Balance without a loss (DeepSeek-V3; 0.001 there): how much a step moves the bias that an expert is selected
    with; 0 turns it off."""
    capacity_factor: float | None = None
    """Most slots of an expert in a micro-batch, as a multiple of T·K/E; those past it are dropped. Dropless when not
    given."""
    drop: Literal["score", "position"] = "score"
    """Which slots an expert keeps where it has too many: those of the highest weight, or the first in the text."""
    drop_in_evaluation: bool = False
    """Keep the capacity in evaluation too, which is dropless otherwise."""
    backend: str = "auto"
    """How the experts are computed; `moelab info` lists the ways."""

    def __post_init__(self) -> None:
        require(self.experts >= 1, "experts", self.experts, "give 1 or more")
        require(
            1 <= self.top_k <= self.experts, "top-k", self.top_k, f"give 1 to {self.experts}, the number of experts"
        )
        for name in ("expert_hidden", "expert_multiple", "capacity_factor"):
            value = getattr(self, name)
            require(value is None or value > 0, flag(name), value, "give more than 0, or leave it out")
        given = [name for name in ("expert_hidden", "expert_multiple", "match") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{flag(given[1])} = {getattr(self, given[1])}: leave it or --{flag(given[0])} out")
        for name in ("balance_loss", "z_loss", "bias_rate"):
            require(getattr(self, name) >= 0, flag(name), getattr(self, name), "give 0 (off) or more")
        require(self.shared_experts >= 0, "shared-experts", self.shared_experts, "give 0 (none) or more")
        require(self.score_scale > 0, "score-scale", self.score_scale, "give more than 0")
        if self.normalize == "none":
            require(self.scores == "sigmoid", "normalize", "none", "softmax is normalised already; give all or chosen")
        layer_pattern(self.moe_layers, layers=None)


def layer_pattern(pattern: str, layers: int | None) -> frozenset[int]:
    """The layers (numbered from 0) that `moe_layers` names, of a model of `layers` layers.

    With `layers` None only the form is checked. Raises `UsageError` on another form or a layer that is not there.
    """
    would_work = 'give "every", "every 2nd", or layer numbers such as "1,3,5"'
    words = pattern.split()
    if words == ["every"]:
        return frozenset(range(layers or 0))
    if len(words) == 2 and words[0] == "every":
        digits = words[1].rstrip("ndrsth")
        require(digits.isdigit() and int(digits) >= 1, "moe-layers", repr(pattern), would_work)
        step = int(digits)
        return frozenset(range(step - 1, layers or 0, step))
    numbers = [part.strip() for part in pattern.split(",")]
    require(all(n.isdigit() for n in numbers), "moe-layers", repr(pattern), would_work)
    chosen = frozenset(int(n) for n in numbers)
    if layers is not None:
        require(max(chosen) < layers, "moe-layers", repr(pattern), f"give numbers from 0 to {layers - 1}")
    return chosen


@dataclass(frozen=True)
class ModelConfig:
    """One GPT. With `moe` None every feed-forward is dense."""

    layers: int = 4
    """Number of transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    width: int = 256
    """Size of a token's vector (D)."""
    context: int = 256
    """Tokens that attention can look back over, the current one included."""
    vocabulary: Annotated[int, tyro.conf.Suppress] = 50_304
    """Rows of the embedding (V): the tokenizer's, padded to a multiple of 64. Training sets it from the data."""
    hidden: int | None = None
    """Hidden size of a dense feed-forward; 4 × width when not given."""
    activation: Activation = "gelu"
    """Activation of every feed-forward: gelu is the exact erf form; swiglu has two input matrices."""
    positions: Literal["learned", "rope"] = "learned"
    """Learned position vectors as in GPT-2, or rotary positions (RoPE)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each attention and feed-forward, and before the head."""
    bias: bool = True
    """Biases in the projections, feed-forwards (experts' too) and LayerNorms."""
    tied_head: bool = True
    """The output head is the token embedding."""
    moe: Annotated[MoEConfig | None, tyro.conf.Suppress] = None
    """The Mixture-of-Experts layers; None for a dense model."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "context", "vocabulary"):
            require(getattr(self, name) >= 1, flag(name), getattr(self, name), "give 1 or more")
        require(self.width % self.heads == 0, "heads", self.heads, f"give a number that divides the width {self.width}")
        if self.positions == "rope":
            head = self.width // self.heads
            require(head % 2 == 0, "heads", self.heads, f"rope needs an even head size; width / heads is {head}")
        require(
            self.hidden is None or self.hidden >= 1,
            "hidden",
            self.hidden,
            "give 1 or more, or leave it out for 4 × width",
        )
        if self.moe is not None:
            layer_pattern(self.moe.moe_layers, self.layers)

    @property
    def hidden_size(self) -> int:
        """Hidden size of a dense feed-forward."""
        return self.hidden or 4 * self.width

    @property
    def expert_hidden_size(self) -> int:
        """Hidden size F of one expert. Raises `UsageError` on a dense model."""
        if self.moe is None:
            raise UsageError("moe = None: a dense model has no experts")
        if self.moe.match is not None:
            raise UsageError(f"match = {self.moe.match}: presets.arm_model solves it; give expert-hidden")
        if self.moe.expert_multiple is not None:
            return max(1, round(self.moe.expert_multiple * self.width))
        return self.moe.expert_hidden or self.hidden_size

    @property
    def moe_layers(self) -> frozenset[int]:
        """Numbers of the layers (from 0) whose feed-forward is a Mixture of Experts."""
        return layer_pattern(self.moe.moe_layers, self.layers) if self.moe else frozenset()


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    data: str = "stdlib"
    """Corpus: stdlib, wikitext-2, wikitext-103 (and their -raw forms), or text:PATH (a file or a folder)."""
    source: Path | None = None
    """Local files of a named corpus, instead of the hub: a folder, or for WikiText also a zip."""
    detokenize: bool = False
    """WikiText as natural text: GPT-2's evaluation detokenizer, an article at a time."""
    glob: str = "**/*"
    """Which files of a text:PATH folder are read."""
    tokenizer: str | None = None
    """gpt2, bpe:VOCAB or bytes; bpe:4096 for stdlib and text:, gpt2 for WikiText, when not given."""
    ranks: Path | None = None
    """Offline GPT-2 ranks: r50k_base.tiktoken, or a folder with encoder.json and vocab.bpe ($MOELAB_GPT2_RANKS)."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    steps: int = 5_000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences of one micro-batch."""
    accumulation: int = 4
    """Micro-batches whose gradients are summed for one optimizer step."""
    auto_batch: bool = False
    """Take the sequences of a step, batch-size × accumulation, in micro-batches as large as the memory has room for; on
    for the presets, unless --batch-size or --accumulation is given."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    min_learning_rate: float = 3e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only."""
    optimizer_state: OptimizerState = "fp32"
    """What AdamW's two moments are kept in: fp32, bf16 (half the memory) or 8bit (a quarter, by torchao)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    precision: Precision = "auto"
    """Arithmetic of the products; auto is bf16 where there are units for it, fp16 on older GPUs, else fp32."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu; auto takes a GPU when there is one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto uses it on CUDA."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Launch a whole optimizer step as one CUDA graph; auto does where the model is compiled and nothing in the step
    waits for the host."""
    checkpoint_activations: bool = False
    """Keep only the blocks' inputs for the backward pass, which computes the blocks again: less memory, more time."""
    seed: int = 0
    """Seed of the initial values and of the order of the data."""
    deterministic: bool = False
    """Ask PyTorch for algorithms that give the same bits every time."""
    evaluation_interval: int = 250
    """Steps between evaluations on the whole validation split; there is always one at the end."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    routing_interval: int = 50
    """Steps between measurements of the routing in metrics.jsonl, beside each expert's load."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; there is always one at the end."""

    def __post_init__(self) -> None:
        positive = (
            "steps", "batch_size", "accumulation", "evaluation_interval", "log_interval", "routing_interval",
            "checkpoint_interval",
        )  # fmt: skip
        for name in positive:
            require(getattr(self, name) >= 1, flag(name), getattr(self, name), "give 1 or more")
        for name in ("warmup_steps", "weight_decay", "clip", "min_learning_rate", "seed"):
            require(getattr(self, name) >= 0, flag(name), getattr(self, name), "give 0 or more")
        for name in ("learning_rate", "epsilon"):
            require(getattr(self, name) > 0, flag(name), getattr(self, name), "give more than 0")
        require(
            self.min_learning_rate <= self.learning_rate,
            "min-learning-rate", self.min_learning_rate, f"give at most the learning rate {self.learning_rate}",
        )  # fmt: skip
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            require(0 <= beta < 1, flag(name), beta, "give 0 or more and less than 1")
            # Halfway to bf16's next number is up to 1/256 of one away: a decay of less than that would not move it.
            rounds = self.optimizer_state == "bf16" and beta > 0.99
            require(
                not rounds, flag(name), beta, "optimizer-state bf16 is too coarse for it; give 0.99 or less, or 8bit"
            )

    def compiles(self, device: str) -> bool:
        """Whether the model is compiled on a device of this type."""
        return self.compile == "on" or (self.compile == "auto" and device == "cuda")

    def captures(self, device: str) -> bool:
        """Whether a step is captured in a CUDA graph on a device of this type, if nothing in it waits for the host."""
        return device == "cuda" and (self.capture == "on" or (self.capture == "auto" and self.compiles(device)))


@dataclass(frozen=True)
class UpcyclingConfig:
    """A trained dense run that a model with experts starts from; see docs/upcycling.md."""

    upcycle: Path | None = None
    """Folder of a trained dense run to start from, its feed-forward in every expert; from scratch when not given."""
    upcycle_split: bool = False
    """Cut the dense feed-forward's hidden units into G experts of 1/G its hidden size, instead of copying all."""
    upcycle_groups: bool = False
    """With --upcycle-split: the G experts of a group begin with one router row (virtual groups), so that a token
    chooses them together."""
    upcycle_noise: float = 0.0
    """Gaussian noise on the experts' weights, as a multiple of their standard deviation."""

    def __post_init__(self) -> None:
        require(self.upcycle_noise >= 0, "upcycle-noise", self.upcycle_noise, "give 0 (none) or more")
        for name in ("upcycle_split", "upcycle_groups", "upcycle_noise"):
            value = getattr(self, name)
            require(not value or self.upcycle is not None, flag(name), value, "give --upcycle RUN too, or leave it out")
        require(self.upcycle_split or not self.upcycle_groups, "upcycle-groups", True, "give --upcycle-split too")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides one run; written to `config.json` in the run's folder."""

    preset: str = "smoke"
    arm: str = "dense"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)

    def __post_init__(self) -> None:
        if self.upcycling.upcycle is not None:
            fits, would_work = self.model.moe is not None, f"the arm {self.arm} has no experts; give --arm moe"
            require(fits, "upcycle", self.upcycling.upcycle, would_work)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @staticmethod
    def from_json(text: str) -> RunConfig:
        """The run that `to_json` wrote. Raises `UsageError` on a setting that is unknown or cannot work."""
        return build(RunConfig, json.loads(text), "config.json")


def flag(name: str) -> str:
    """How the command line spells a field."""
    return name.replace("_", "-")


Dataclass = TypeVar("Dataclass")


def build(kind: type[Dataclass], values: Mapping[str, Any], where: str) -> Dataclass:
    """A dataclass of this module from plain values, nested ones too.

    Raises `UsageError` naming a setting that `kind` does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UsageError(f"{where}: {kind.__name__} has no setting {unknown[0]!r}; it has {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], value, where) for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    return Path(value) if hint is Path else value
