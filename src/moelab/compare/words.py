"""A comparison's results in words and in readable numbers.

The words name no winner where the results do not: a single run has no interval, and an interval that spans zero shows
no difference.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from moelab.compare.arms import shown, value_text
from moelab.compare.routing import routing_notes
from moelab.config import MoEConfig

BUDGET_PHRASES = {
    "tokens": "at equal tokens",
    "flops": "at equal training FLOPs",
    "seconds": "in equal training time",
}
COUNTS = ("", "k", "M", "B", "T")
FLOPS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
DASH = "–"


def loss_name(results: dict[str, Any]) -> str:
    """The loss that a comparison is about."""
    return "test loss" if results.get("split") == "test" else "validation loss"


def headline(results: dict[str, Any]) -> list[str]:
    """A sentence for each pair that the comparison is about: an arm with experts against each other arm."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results["comparisons"]:
        pairs.setdefault((entry["arm"], entry["against"]), []).append(entry)
    about_experts = {pair: entries for pair, entries in pairs.items() if _has_experts(results, pair)}
    sentences = [_sentence(results, *pair, entries) for pair, entries in (about_experts or pairs).items()]
    if len(results["seeds"]) == 1:
        sentences[-1] += " One run has no interval: another seed may turn a difference around."
    return sentences


def notes(results: dict[str, Any]) -> list[str]:
    """What a careful reader of these results has to know."""
    found = []
    if len(results["seeds"]) == 1:
        found.append("Each arm was trained once. How much of a difference is chance cannot be told from one run.")
    elif len(results["seeds"]) == 2:
        found.append("Two seeds give an interval by a Student's t of one degree of freedom, which is very wide.")
    if any(entry["interpolated"] and entry["difference"] is not None for entry in results["comparisons"]):
        found.append(
            "Differences marked “read off” compare a finished run with another one's curve before its schedule has "
            "ended. A loss read off before its schedule has ended is higher than that of a run that ends there, so "
            "they flatter the cheaper arm. --budgets tokens,flops,seconds trains runs that end there."
        )
    if any(entry["difference"] is None for entry in results["comparisons"]):
        found.append(
            "A dash among the differences was not measured: the budget lies before the first evaluation, or the times "
            "are of different devices."
            if loss_name(results) == "validation loss"
            else "A dash among the differences was not measured: the test loss is taken at the end of runs alone. "
            "--budgets tokens,flops,seconds trains runs that end at equal FLOPs and time."
        )
    if any(_unequal(entry) for entry in results["comparisons"]):
        found.append(
            "Some runs at equal time differ in their times by more than a tenth: the machine did not run at one speed, "
            "and those differences are not at equal time."
        )
    if len({entry["environment"].get("device") for entry in results["environments"]}) > 1:
        found.append("The runs were made on different devices; their speeds and times are not of one machine.")
    differing = [
        words
        for name, words in {"commit": "commit of moelab", "torch": "PyTorch", "driver": "driver"}.items()
        if len({entry["environment"].get(name) for entry in results["environments"]}) > 1
    ]
    if differing:
        found.append(
            f"The runs were not all made by one {' and '.join(differing)} (see how to make it again); a difference in "
            "time may be that of the code."
        )
    return found + routing_notes(results) + _tuning_notes(results)


def training_differences(results: dict[str, Any]) -> dict[str, str]:
    """The settings of training that arms differ in: each with its values, and the arms that have them."""
    trained = {arm: facts["training"] for arm, facts in results["arms"].items() if "training" in facts}
    found = {}
    for key in next(iter(trained.values()), {}):
        by_value: dict[Any, list[str]] = {}
        for arm, training in trained.items():
            by_value.setdefault(training[key], []).append(arm)
        if len(by_value) > 1:
            found[key] = ", ".join(f"{value_text(value)} ({', '.join(arms)})" for value, arms in by_value.items())
    return found


def _tuning_notes(results: dict[str, Any]) -> list[str]:
    """How fair the settings of training are to each arm."""
    found = _sweep_notes(results, results["sweep"]) if results.get("sweep") else []
    differing = training_differences(results)
    if not results.get("sweep") or "training.learning_rate" not in results["sweep"]["keys"]:
        found.append(
            "The learning rates of the arms were given, and not tuned per arm"
            if "learning_rate" in differing
            else "Every arm used the same learning rate, and learning rates were not tuned per arm"
        )
        found[-1] += (
            ": another rate may suit one arm better than another. --sweep learning-rate=A,B,C tunes every arm by the "
            "same rule."
        )
    if differing:
        told = "; ".join(f"{key.replace('_', ' ')} {values}" for key, values in differing.items())
        found.append(f"The arms differ in their training: {told}.")
    return found


def _sweep_notes(results: dict[str, Any], sweep: dict[str, Any]) -> list[str]:
    settings = " and ".join(shown(key) for key in sweep["keys"])
    found = [
        f"Each arm’s {settings} was chosen by the lowest validation loss at the end of its runs with seed "
        f"{sweep['seed']}; the arms are compared by the test loss, which had no part in that choice. Nothing else was "
        "tuned."
    ]
    for arm in results["arms"]:
        if arm not in sweep["arms"]:
            found.append(f"{arm} has no use for {settings}, and was not tuned.")
            continue
        for key, end in sweep["arms"][arm]["at_edge"].items():
            value = value_text(sweep["arms"][arm]["chosen"][key])
            found.append(
                f"{arm}: the {end} {shown(key)} tried, {value}, did best, so that a "
                f"{'lower' if end == 'lowest' else 'higher'} one may do better still. Extend the range of --sweep."
            )
        if diverged := [trial for trial in sweep["arms"][arm]["tried"] if trial["val_loss"] is None]:
            told = "; ".join(point_text(trial["values"]) for trial in diverged)
            found.append(f"{arm}: the loss did not stay finite with {told}.")
    return found


def point_text(values: dict[str, Any]) -> str:
    """Settings and their values, as a reader says them."""
    return ", ".join(f"{shown(key)} {value_text(value)}" for key, value in values.items())


def describe_model(model: dict[str, Any], named: Collection[str] = ()) -> str:
    """What the feed-forwards of an arm are, from its `ModelConfig` as a dict.

    Of the router it says what is not the default, and the settings in `named`.
    """
    moe = model["moe"]
    if moe is None:
        return f"hidden {model['hidden'] or 4 * model['width']:,}"
    experts = f"{moe['experts']} expert" + ("s" if moe["experts"] != 1 else "")
    words = [experts, f"top-{moe['top_k']}", f"each hidden {moe['expert_hidden'] or 4 * model['width']:,}"]
    default = MoEConfig()
    for key, phrase in _routing_phrases({**vars(default), **moe}).items():
        if phrase and (key in named or moe.get(key, getattr(default, key)) != getattr(default, key)):
            words.append(phrase)
    return ", ".join(words)


def describe_arm(facts: dict[str, Any]) -> str:
    """What an arm is: its feed-forwards, and in words whatever it overrides or was tuned to."""
    overrides = facts.get("overrides") or {}
    named = {key.partition(".")[2] for key in overrides if key.startswith("moe.")}
    further = {key: value for key, value in overrides.items() if not key.startswith("moe.")}
    return ", ".join([describe_model(facts["model"], named), *([point_text(further)] if further else [])])


def _routing_phrases(moe: dict[str, Any]) -> dict[str, str]:
    """Each setting of the layer and its router in words, but for those that `describe_model` always says."""
    shared, layers, capacity = moe["shared_experts"], moe["moe_layers"], moe["capacity_factor"]
    return {
        "shared_experts": f"{shared or 'no'} shared expert" + "s" * (shared != 1),
        "moe_layers": f"in {layers} layer" if layers.startswith("every") else f"in layers {layers}",
        "scores": f"{moe['scores']} scores",
        "normalize": {
            "chosen": "weights normalised over the chosen",
            "all": "weights normalised over all experts",
            "none": "weights not normalised",
        }[moe["normalize"]],
        "score_scale": f"weights times {moe['score_scale']:g}",
        "learned_scale": "a learned scale of weights" if moe["learned_scale"] else "no learned scale",
        "balance_loss": f"balance loss {moe['balance_loss']:g}" if moe["balance_loss"] else "no balance loss",
        "balance_scope": f"balance over the {moe['balance_scope']}" if moe["balance_loss"] else "",
        "z_loss": f"z-loss {moe['z_loss']:g}" if moe["z_loss"] else "no z-loss",
        "bias_rate": f"bias rate {moe['bias_rate']:g}" if moe["bias_rate"] else "no bias of selection",
        "capacity_factor": f"capacity factor {capacity:g}" if capacity else "dropless",
        "drop": f"drops by {moe['drop']}" if capacity else "",
        "drop_in_evaluation": "drops in evaluation too" if capacity and moe["drop_in_evaluation"] else "",
        "backend": f"backend {moe['backend']}",
    }


def spans_zero(entry: dict[str, Any]) -> bool:
    """Whether the interval of a difference has both signs in it."""
    low, high = entry["ci95"]
    return bool(low <= 0 <= high)


def quantity(value: float | None, prefixes: Sequence[str] = COUNTS) -> str:
    """A number to three digits with a prefix, such as 1.24 M; a dash for what was not measured."""
    if value is None:
        return DASH
    step = 0
    while abs(float(f"{value:.3g}")) >= 1000 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    form = ".0f" if abs(value) >= 100 else "#.3g" if step else ".3g"
    return f"{value:{form}} {prefixes[step]}".strip()


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def memory(size: float | None) -> str:
    """Bytes in MiB or GiB."""
    if size is None:
        return DASH
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{share:.1%}"


def amount(value: float, budget: str) -> str:
    """What a run spent of a budget."""
    if budget == "seconds":
        return duration(value)
    return f"{quantity(value, FLOPS)}FLOP" if budget == "flops" else quantity(value)


def _has_experts(results: dict[str, Any], pair: tuple[str, str]) -> bool:
    return any(results["arms"][arm]["model"]["moe"] is not None for arm in pair)


def _sentence(results: dict[str, Any], arm: str, against: str, entries: list[dict[str, Any]]) -> str:
    """The findings of one pair, the first of which names its arms."""
    name, other = (f"{arm} ({describe_arm(results['arms'][arm])})" for arm in (arm, against))
    first, *further = entries
    finding = _first_finding(first, name, other, loss_name(results))
    found = [f"{BUDGET_PHRASES[first['budget']]} {finding}{_aside(first, results)}"]
    found += [f"{BUDGET_PHRASES[entry['budget']]} {_finding(entry)}{_aside(entry, results)}" for entry in further]
    text = "; ".join(found)
    seeds = len(results["seeds"])
    return f"{'In this single run' if seeds == 1 else f'Over {seeds} seeds'}, {text}."


def _first_finding(entry: dict[str, Any], name: str, other: str, loss: str) -> str:
    difference = entry["difference"]
    if difference is None:
        return f"{name} and {other} could not be compared"
    if entry["ci95"] and spans_zero(entry):
        return f"no difference between the {loss.replace('loss', 'losses')} of {name} and {other} was shown"
    if round(difference, 3) == 0:
        return f"{name} and {other} reached the same {loss} to within 0.001 nats per token"
    return (
        f"{name} reached a {loss} {abs(difference):.3f} nats per token "
        f"{'lower' if difference < 0 else 'higher'} than {other}"
    )


def _finding(entry: dict[str, Any]) -> str:
    difference = entry["difference"]
    if difference is None:
        return "there is no measurement"
    if entry["ci95"] and spans_zero(entry):
        return "no difference was shown"
    if round(difference, 3) == 0:
        return "the same to within 0.001"
    return f"{abs(difference):.3f} {'lower' if difference < 0 else 'higher'}"


def _aside(entry: dict[str, Any], results: dict[str, Any]) -> str:
    """How sure a finding is, behind it."""
    if entry["difference"] is None:
        return ""
    seeds = len(results["seeds"])
    aside = ""
    if entry["ci95"]:
        low, high = entry["ci95"]
        aside = f", 95% interval {signed(low)} to {signed(high)}"
        if spans_zero(entry):
            aside = f", mean {signed(entry['difference'])}{aside}"
    if entry["runs"] < seeds:
        aside += ", from one seed: no interval" if entry["runs"] == 1 else f", over {entry['runs']} of them"
    if _unequal(entry):
        aside += f", though their times came out as {' and '.join(duration(spent) for spent in entry['spent'])}"
    return aside + (" (read off)" if entry["interpolated"] else "")


def _unequal(entry: dict[str, Any]) -> bool:
    """Whether runs that were planned to take the same time did not."""
    return entry["budget"] == "seconds" and bool(entry["spent"]) and max(entry["spent"]) > 1.1 * min(entry["spent"])


def signed(value: float | None) -> str:
    """A difference in nats per token, with its sign; a dash for what was not measured."""
    return DASH if value is None else f"{value:+.3f}".replace("-", "−")
