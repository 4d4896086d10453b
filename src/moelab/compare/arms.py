"""The arms of a comparison: the known ones, and those made by override (`--arm NAME:key=value,…`).

A key is the flag of a setting of `MoEConfig`, `ModelConfig` or `TrainingConfig`, alone (`scores`) or with its section
(`moe.scores`, `model.activation`, `training.learning-rate`). What makes runs comparable is no key: all arms see the
same tokens in the same micro-batches, and balance over the same scope.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moelab.config import ModelConfig, MoEConfig, TrainingConfig, UsageError, flag
from moelab.presets import ARMS, arm_model

SECTIONS: dict[str, type] = {"moe": MoEConfig, "model": ModelConfig, "training": TrainingConfig}
SETTINGS = {
    f"{section}.{field.name}": typing.get_type_hints(kind)[field.name]
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if (section, field.name) not in {("model", "moe"), ("model", "vocabulary")}
}
OF_AN_ARM = frozenset(
    f"training.{name}"
    for name in (
        "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2", "epsilon", "clip",
    )
)  # fmt: skip
OF_ALL = frozenset(key for key in SETTINGS if key.startswith("training.")) - OF_AN_ARM | {
    "moe.balance_scope", "model.context",
}  # fmt: skip
SIZES = frozenset({"moe.expert_hidden", "moe.expert_multiple", "moe.match"})  # three ways to say one thing
# Settings of MoEConfig that a model without experts, or with experts of a given size, has no use for.
UNUSED = {
    "dense": frozenset(key for key in SETTINGS if key.startswith("moe.")),
    "moe": frozenset[str](),
    "dense-wide": frozenset(key for key in SETTINGS if key.startswith("moe."))
    - SIZES - {"moe.top_k", "moe.shared_experts"},
    "moe-matched": SIZES,
}  # fmt: skip
LONGEST_NAME = 32
Settings = tuple[tuple[str, Any], ...]
"""Settings by `section.name`, in the order that they were given."""


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: a known arm, with settings of its own."""

    name: str
    base: str
    overrides: Settings = ()

    def model(self, model: ModelConfig, moe: MoEConfig) -> ModelConfig:
        """Its model, from the dense model and the experts of the comparison. Raises `UsageError` as `arm_model`."""
        return arm_model(self.base, *self.settings(model, moe))

    def settings(self, model: ModelConfig, moe: MoEConfig) -> tuple[ModelConfig, MoEConfig]:
        """The dense model and the experts that `arm_model` makes its model from."""
        own = dict(self.overrides)
        if SIZES & own.keys():
            own = dict.fromkeys(SIZES) | own
        return replace(model, **_of("model", own)), replace(moe, **_of("moe", own))

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """Its training. Where it has a learning rate of its own, the rate at the end keeps its ratio to the peak."""
        own = _of("training", dict(self.overrides))
        rate = own.get("learning_rate", training.learning_rate)
        if rate != training.learning_rate and "min_learning_rate" not in own:
            own["min_learning_rate"] = training.min_learning_rate * rate / training.learning_rate
        return replace(training, **own)

    def uses(self, key: str) -> bool:
        """Whether a setting has any influence on it."""
        return key not in UNUSED[self.base]

    def at(self, point: Settings) -> Arm:
        """The same arm with further settings."""
        return replace(self, overrides=tuple((dict(self.overrides) | dict(point)).items()))


def _of(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{section}.")}


def known_arm(name: str) -> Arm:
    return Arm(name, name)


def parse_arm(text: str) -> Arm:
    """The arm that `NAME:key=value,…` describes.

    Raises `UsageError` on a name that is no folder's or a known arm's, a key that is no setting, that arms must not
    differ in or that the base has no use for, and a value that its setting does not take.
    """
    name, colon, rest = text.partition(":")
    where = f"arm = {text}"
    if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > LONGEST_NAME:
        raise UsageError(
            f"{where}: give NAME:key=value,…, the name of letters, digits, -, _ and ., at most {LONGEST_NAME}"
        )
    pairs = [(key.strip(), value.strip()) for key, value in _pairs(rest, where)]
    bases = [value for key, value in pairs if key == "base"]
    if len(bases) > 1 or (bases and bases[0] not in ARMS):
        raise UsageError(f"{where}: give base once, as one of {', '.join(ARMS)}")
    if name in ARMS and not bases:
        raise UsageError(f"{where}: {name} is a known arm; give another name, or base={name} to mean it")
    arm = Arm(name, bases[0] if bases else "moe")
    found: dict[str, Any] = {}
    for written, value in pairs:
        if written != "base":
            key = setting(written, where)
            if key in found:
                raise UsageError(f"{where}: {written} is given twice")
            if not arm.uses(key):
                raise UsageError(f"{where}: {arm.base} has no use for {written}; give another base, or leave it out")
            found[key] = convert(key, value, where)
    return arm.at(tuple(found.items()))


def setting(written: str, where: str) -> str:
    """The `section.name` of a key as it was written. Raises `UsageError` unless it is a setting of single arms."""
    wanted = written.replace("-", "_")
    found = [key for key in SETTINGS if wanted in (key, key.partition(".")[2])]
    if not found:
        near = difflib.get_close_matches(written, [flag(key.partition(".")[2]) for key in SETTINGS], n=1)
        raise UsageError(
            f"{where}: there is no setting {written or '(none)'}" + "".join(f"; did you mean {name}?" for name in near)
        )
    key = found[0]
    if key in OF_ALL:
        name = flag(key.partition(".")[2])
        raise UsageError(f"{where}: {name} is the same for every arm of a comparison; give --{name} for all of them")
    return key


def convert(key: str, text: str, where: str) -> Any:
    """A value of a setting from its text, as the type of its field. Raises `UsageError` on text of another type."""
    name, hint = flag(key.partition(".")[2]), SETTINGS[key]
    optional = types.NoneType in typing.get_args(hint)
    if optional:
        if text.lower() == "none":
            return None
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if text in choices:
            return text
        raise UsageError(f"{where}: {name} = {text or '(nothing)'}: give one of {', '.join(choices)}")
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"{where}: {name} = {text or '(nothing)'}: give true or false")
    if hint is str:
        if text:
            return text.replace("+", ",") if key == "moe.moe_layers" else text
        raise UsageError(f"{where}: {name} = (nothing): give a value")
    try:
        value = hint(text)
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    kind = "a whole number" if hint is int else "a finite number"
    raise UsageError(f"{where}: {name} = {text or '(nothing)'}: give {kind}" + " or none" * optional)


def separated(text: str) -> list[str]:
    """Parts of a text at its commas, but for those within quotes, which are taken off."""
    parts = re.findall(r"((?:'[^']*'|\"[^\"]*\"|[^,])*)(?:,|$)", text)
    return [re.sub(r"(['\"])(.*?)\1", r"\2", part).strip() for part in parts if part.strip()]


def _pairs(text: str, where: str) -> Iterable[tuple[str, str]]:
    for part in separated(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{where}: {part}: give key=value (numbers of layers as moe-layers=1+3)")
        yield key, value


def shown(key: str) -> str:
    """A setting's name for a reader."""
    return key.partition(".")[2].replace("_", " ")


def value_text(value: Any) -> str:
    """A setting's value for a reader."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_names(arms: Sequence[Arm]) -> None:
    """Raises `UsageError` where two arms would share a folder."""
    names = [arm.name.lower() for arm in arms]  # some file systems do not tell case apart
    for arm in arms:
        if names.count(arm.name.lower()) > 1:
            raise UsageError(f"arms = {','.join(one.name for one in arms)}: give each arm once")
