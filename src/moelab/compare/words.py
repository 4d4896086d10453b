"""A comparison's results in words and in readable numbers.

The words name no winner where the results do not: a single run has no interval, and an interval that spans zero shows
no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BUDGET_PHRASES = {
    "tokens": "at equal tokens",
    "flops": "at equal training FLOPs",
    "seconds": "in equal training time",
}
COUNTS = ("", "k", "M", "B", "T")
FLOPS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
DASH = "–"


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
        )
    if any(_unequal(entry) for entry in results["comparisons"]):
        found.append(
            "Some runs at equal time differ in their times by more than a tenth: the machine did not run at one speed, "
            "and those differences are not at equal time."
        )
    if len({entry["environment"].get("device") for entry in results["environments"]}) > 1:
        found.append("The runs were made on different devices; their speeds and times are not of one machine.")
    found.append(
        "Every arm used the same learning rate and schedule, and none was tuned by this comparison; another rate may "
        "suit one arm better than another."
    )
    return found


def describe_model(model: dict[str, Any]) -> str:
    """What the feed-forwards of an arm are, from its `ModelConfig` as a dict."""
    moe = model["moe"]
    if moe is None:
        return f"hidden {model['hidden'] or 4 * model['width']:,}"
    experts = f"{moe['experts']} expert" + ("s" if moe["experts"] != 1 else "")
    return f"{experts}, top-{moe['top_k']}, each hidden {moe['expert_hidden'] or 4 * model['width']:,}"


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
    name, other = (f"{arm} ({describe_model(results['arms'][arm]['model'])})" for arm in (arm, against))
    first, *further = entries
    found = [f"{BUDGET_PHRASES[first['budget']]} {_first_finding(first, name, other)}{_aside(first, results)}"]
    found += [f"{BUDGET_PHRASES[entry['budget']]} {_finding(entry)}{_aside(entry, results)}" for entry in further]
    text = "; ".join(found)
    seeds = len(results["seeds"])
    return f"{'In this single run' if seeds == 1 else f'Over {seeds} seeds'}, {text}."


def _first_finding(entry: dict[str, Any], name: str, other: str) -> str:
    difference = entry["difference"]
    if difference is None:
        return f"{name} and {other} could not be compared"
    if entry["ci95"] and spans_zero(entry):
        return f"no difference between the validation losses of {name} and {other} was shown"
    if round(difference, 3) == 0:
        return f"{name} and {other} reached the same validation loss to within 0.001 nats per token"
    return (
        f"{name} reached a validation loss {abs(difference):.3f} nats per token "
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
