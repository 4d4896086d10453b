"""A page that reads the reference results: where the experts paid, how soon, and what they were worth in compute.

It is made of what `reference.py` stored in a folder: SIZE/results.json of each comparison, SIZE/wikitext-103.json with
the scores of its runs, and SIZE/RUN.diverged.txt or SIZE/RUN.failed.txt, whose first line says why a run failed. What
is not there is said to be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scaling import FEWEST, Point, PowerLaw, fit

from moelab.compare import Comparison
from moelab.compare.figures import MARKERS
from moelab.compare.picture import ARM_COLOURS, LIGHT, STYLE, Picture, new_figure
from moelab.compare.plan import run_folder
from moelab.compare.results import measured, measured_by_seed
from moelab.compare.statistics import estimate
from moelab.compare.words import DASH, FLOPS, duration, memory, percent, quantity, signed, spans_zero
from moelab.training.loop import write_aside

WIKITEXT = "wikitext-103.json"
DIVERGED, FAILED = ".diverged.txt", ".failed.txt"  # behind a run's name: why it is not there
RATE = "-lr"  # before a learning rate, in the name of a size at another one
SEQUENCES_A_STEP = "-b"  # before a number of sequences, in the name of a size whose steps have as many
ARMS = ("dense", "moe", "dense-wide", "moe-matched")  # in the order of the reports, which gives them their colours
PAIRS = (("moe", "dense"), ("moe-matched", "dense"), ("moe", "dense-wide"))
ALL_PAIRS = (*PAIRS, ("dense-wide", "dense"))  # and what size alone does
BUDGETS = ("tokens", "flops", "seconds")
NOT_RECORDED = "not recorded"
GOAL = ("124m", 0.7)
"""Share of the dense arm's training time in which the MoE of that size is to be at its final loss."""


@dataclass(frozen=True)
class Stored:
    """What is there of one size."""

    name: str
    results: dict[str, Any]
    scores: dict[str, dict[str, Any]]

    @property
    def base(self) -> str:
        """The size's name at the learning rate and the sequences a step of all sizes."""
        return re.split(f"({RATE}|{SEQUENCES_A_STEP})(?=[0-9])", self.name)[0]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.results["arms"]
        return found

    @property
    def folders(self) -> set[str]:
        """Of the runs of equal tokens: an arm and seed have one name in every size."""
        return {run["folder"] for facts in self.arms.values() for run in facts["runs"] if run["budget"] == "tokens"}

    @property
    def context(self) -> int:
        return int(next(iter(self.arms.values()))["model"]["context"])

    @property
    def sequences(self) -> int:
        """Of a step."""
        training = self.results["training"]
        return int(training["batch_size"] * training["accumulation"])

    def mean(self, arm: str, figure: str) -> float | None:
        """Over the runs of equal tokens."""
        found = estimate(measured(self.arms[arm], figure))
        return found.mean if found else None

    def score(self, arm: str, figure: str) -> float | None:
        """Of WikiText-103's test split, over the runs that were scored; None unless all were."""
        runs = [run["folder"] for run in self.arms[arm]["runs"] if run["budget"] == "tokens"]
        found = estimate([self.scores[run][figure] for run in runs if run in self.scores])
        return found.mean if found and found.runs == len(runs) else None

    def entry(self, of: str, arm: str, against: str, budget: str) -> dict[str, Any] | None:
        """One of the entries `of` results.json: comparisons or to_reach."""
        key = (arm, against, budget)
        return next((e for e in self.results.get(of, []) if (e["arm"], e["against"], e["budget"]) == key), None)


def write_page(folder: Path, planned: Mapping[str, Comparison]) -> Path:
    """Writes README.md, and a picture of each fit, into the folder that the results lie in; returns the page."""
    stored = [found for name in planned if (found := _stored(folder, name))]
    fits = Fits([one for one in stored if one.name == one.base])
    folder.mkdir(parents=True, exist_ok=True)
    for group, law in fits.laws.items():
        (folder / _picture_name(group)).write_bytes(_picture(fits, group, law).files()["compute.svg"])
    parts = [
        "# Reference results",
        "The experiment of the project that moelab grows out of, with the same tokens for every arm. "
        "`python benchmarks/reference.py` trains it, and writes this page from the JSON files beside it.",
        *_what_was_run(folder, stored, planned),
        *_where_it_won(stored),
        *_how_soon(stored),
        *_at_other_rates(stored),
        *_in_larger_steps(stored),
        *_worth(fits),
        *_losses(stored),
        *_speeds(stored),
        *_again(stored),
    ]
    page = folder / "README.md"
    write_aside(page, "\n\n".join(parts) + "\n")
    return page


def _stored(folder: Path, name: str) -> Stored | None:
    try:
        results = json.loads((folder / name / "results.json").read_text())
    except FileNotFoundError:
        return None
    scores = folder / name / WIKITEXT
    return Stored(name, results, json.loads(scores.read_text()) if scores.exists() else {})


def reasons(folder: Path) -> dict[str, str]:
    """Why runs of a size failed, in a few words by run; of those that failed, and are not there since."""
    found = {}
    for ending, words in ((FAILED, ""), (DIVERGED, "diverged, ")):
        for path in sorted(folder.glob(f"*{ending}")):
            first = path.read_text().partition("\n")[0]
            found[path.name.removesuffix(ending)] = words + first.partition(" (")[0]
    return found


def _what_was_run(folder: Path, stored: Sequence[Stored], planned: Mapping[str, Comparison]) -> list[str]:
    rows, there = [], {one.name: one for one in stored}
    for name, plan in planned.items():
        one = there.get(name)
        missing = _missing(one, plan, reasons(folder / name))
        if one is None:
            rows.append([name, f"{plan.model.context:,}", DASH, DASH, DASH, missing])
            continue
        arm = next(iter(one.arms.values()))
        seeds = len(one.results["seeds"])
        rows.append(
            [
                f"[{name}]({name}/report.html)",
                f"{one.context:,}",
                f"{one.results['training']['steps']:,} × {one.sequences}",
                f"{arm['runs'][0]['tokens']:,}",
                f"{', '.join(one.arms)}; {seeds} seed{'s' * (seeds > 1)}",
                missing,
            ]
        )
    headings = ["size", "context", "steps × sequences", "tokens of each run", "compared", "not run"]
    notes = [
        "Losses are next-token cross-entropy in nats per token. Every arm of a size saw the same batches. Learning "
        f"rates are those of that project for every arm; a size with {RATE} in its name is the same at another one, "
        f"and one with {SEQUENCES_A_STEP} has the same tokens in steps of as many sequences. "
        "Where a size has one seed there is no interval, and another seed may turn a small difference around.",
    ]
    return ["## What was run", _table(headings, rows), *notes] if stored else [
        "## What was run", "Nothing is stored here yet.", _table(headings, rows),
    ]  # fmt: skip


def _missing(one: Stored | None, plan: Comparison, why: Mapping[str, str]) -> str:
    """The planned arms and seeds that results.json does not have, and of runs that failed the reason."""
    have = set() if one is None else {(arm, seed) for arm in one.arms for seed in one.results["seeds"]}
    absent: dict[tuple[str, str], list[int]] = {}
    for arm in plan.arms:
        for seed in plan.seed_values:
            if (arm, seed) not in have:
                absent.setdefault((arm, why.get(run_folder(arm, seed, "tokens"), "")), []).append(seed)
    if not have and not any(reason for _, reason in absent):
        return "all of it"
    told = []
    for (arm, reason), seeds in absent.items():
        name = arm if len(seeds) == plan.seeds else f"{arm} seed {', '.join(map(str, seeds))}"
        told.append(f"{name} ({reason})" if reason else name)
    return "; ".join(told) or DASH


def _where_it_won(stored: Sequence[Stored]) -> list[str]:
    rows = []
    for one in stored:
        for arm, against in PAIRS:
            entries = [one.entry("comparisons", arm, against, budget) for budget in BUDGETS]
            if any(entries):
                rows.append([one.name, arm, against, *map(_verdict, entries)])
    if not rows:
        return []
    text = (
        "Difference of the loss on the held-out text, with its 95 % interval over the seeds in brackets. *read off*: "
        "the dearer arm's loss is its curve's where the cheaper arm ended; its learning rate had not come down there, "
        "which flatters the cheaper arm. Of one seed it is said which loss was lower and not who won."
    )
    headings = ["size", "arm", "against", "at equal tokens", "at equal training FLOPs", "in equal training time"]
    return ["## Where the experts won", text, _table(headings, rows), *_size_alone(stored), *_several_codes(stored)]


def _size_alone(stored: Sequence[Stored]) -> list[str]:
    """Whether a larger dense model is the better one on so many tokens: of what experts add, that much is size."""
    entries = {one.name: one.entry("comparisons", "dense-wide", "dense", "tokens") for one in stored}
    told = [f"{name} {_verdict(entry)}" for name, entry in entries.items() if entry]
    if not told:
        return []
    return [
        "Size alone: `dense-wide`, which is as large as the active part of moe, against `dense` at equal tokens: "
        f"{'; '.join(told)}. Where it is not below dense, a larger dense model is not shown to be the better one on "
        "these tokens at this learning rate."
    ]


def _several_codes(stored: Sequence[Stored]) -> list[str]:
    """Sizes whose arms were not all trained by one version of the code, which may have made some faster."""
    told = []
    for one in stored:
        codes = _codes(one)
        if len(codes) > 1:
            parts = [f"{code}: {', '.join(runs)}" for code, runs in codes.items()]
            told.append(f"{one.name} ({'; '.join(parts)})")
    if not told:
        return []
    return [
        "Not all runs of a size were made by one commit, so that their times are not those of one code: "
        f"{'; '.join(told)}."
    ]


def _codes(one: Stored) -> dict[str, list[str]]:
    """A size's runs by the commit that made them."""
    codes: dict[str, list[str]] = {}
    for entry in one.results["environments"]:
        codes.setdefault(entry["environment"].get("commit") or NOT_RECORDED, []).extend(entry["runs"])
    return codes


def _codes_across(groups: Iterable[Sequence[Stored]]) -> list[str]:
    """What is to be said where several commits made the runs of sizes that are compared with one another.

    Those runs are of an arm and seed that another size of its group has too.
    """
    told = []
    for group in groups:
        codes: dict[str, list[str]] = {}
        for one in group:
            elsewhere = set[str]().union(*(other.folders for other in group if other is not one))
            for code, runs in _codes(one).items():
                if compared := [run for run in runs if run in one.folders & elsewhere]:
                    codes.setdefault(code, []).append(f"{one.name} {', '.join(compared)}")
        if len(codes) > 1 or NOT_RECORDED in codes:
            told.append("; ".join(f"{code}: {', '.join(runs)}" for code, runs in codes.items()))
    if not told:
        return []
    return [
        "Not all runs that are compared here are known to be of one commit, so that the code may have a part in what "
        f"differs. By commit: {'. '.join(told)}."
    ]


def _verdict(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["difference"] is None:
        return "not measured"
    difference = entry["difference"]
    interval = " ({} to {})".format(*map(signed, entry["ci95"])) if entry["ci95"] else ""
    if entry["ci95"] and spans_zero(entry):
        words = f"no difference shown, {signed(difference)}"
    elif round(difference, 3) == 0:
        words = "the same to 0.001"
    else:
        below, above = ("won", "lost") if entry["ci95"] else ("lower", "higher")
        words = f"**{below if difference < 0 else above}**, {signed(difference)}"
    return words + interval + (", *read off*" if entry["interpolated"] else "")


def _how_soon(stored: Sequence[Stored]) -> list[str]:
    rows = []
    for one in stored:
        for arm, against in ALL_PAIRS:
            entries = [one.entry("to_reach", arm, against, budget) for budget in BUDGETS]
            if any(entries):
                spent = [_spent(entries[0], quantity), _spent(entries[-1], "{:,.1f}".format)]
                rows.append([one.name, arm, against, *map(_ratio, entries), *spent])
    if not rows:
        return []
    text = (
        "What an arm had spent when its loss was first at the final loss of the other, over what that one had spent "
        "for it: below 1, less was enough. It is read between two evaluations off a schedule that went on; one that "
        "ends there would need less."
    )
    headings = ["size", "arm", "to the loss of", "tokens", "training FLOPs", "training time", "in tokens", "in seconds"]
    return ["## How soon the same loss", text, _table(headings, rows), _goal(stored)]


def _ratio(entry: dict[str, Any] | None) -> str:
    if entry is None or not entry["runs"]:
        return "not measured"
    if entry["ratio"] is None:
        return f"reached by {entry['reached']} of {entry['runs']} seeds" if entry["reached"] else "not reached"
    return f"{entry['ratio']:.2f} ×" + (" ({:.2f} to {:.2f})".format(*entry["ci95"]) if entry["ci95"] else "")


def _spent(entry: dict[str, Any] | None, form: Callable[[float], str]) -> str:
    return "{} against {}".format(*map(form, entry["spent"])) if entry and entry["spent"] else DASH


def _goal(stored: Sequence[Stored]) -> str:
    size, goal = GOAL
    asked = (
        f"The goal: at {size}, an arm with experts at dense's final loss in at most {goal} of dense's training time. "
    )
    told = []
    for one in stored:
        entries = [one.entry("to_reach", arm, "dense", "seconds") for arm in ("moe", "moe-matched")]
        if one.base == size and any(entry and entry["runs"] for entry in entries):
            told.append(_judged(entries, goal) + ("" if one.name == size else f" ({one.name})"))
    return asked + ("; ".join(told) + "." if told else "It was not measured.")


def _judged(entries: Sequence[dict[str, Any] | None], goal: float) -> str:
    best = min((e for e in entries if e and e["ratio"] is not None), key=lambda e: e["ratio"], default=None)
    if best is None:
        return "**Missed**: none was there at the end of its run"
    return f"**{'Met' if best['ratio'] <= goal else 'Missed'}** by {best['arm']}, in {best['ratio']:.2f} of it"


def _at_other_rates(stored: Sequence[Stored]) -> list[str]:
    """Every arm's loss at each learning rate, where there are several, and the arms compared at the best of each."""
    groups: dict[str, dict[float, Stored]] = {}
    for one in stored:
        groups.setdefault(one.name.partition(RATE)[0], {})[one.results["training"]["learning_rate"]] = one
    rows, words = [], []
    for name, by_rate in groups.items():
        best, seeds = {}, set()
        for arm in dict.fromkeys(arm for one in by_rate.values() for arm in one.arms):
            having = {rate: one.arms[arm] for rate, one in by_rate.items() if arm in one.arms}
            by_seed = {rate: measured_by_seed(facts, "val_loss") for rate, facts in having.items()}
            common = set.intersection(*map(set, by_seed.values()))
            means = {rate: estimate([losses[seed] for seed in common]) for rate, losses in by_seed.items()}
            known = {rate: found.mean for rate, found in means.items() if found is not None}
            if len(known) < 2:
                continue
            best[arm] = min(known.items(), key=lambda entry: entry[1])
            told = [f"{rate:g}: {loss:.4f}" for rate, loss in sorted(known.items())]
            edge = {min(known): " (the lowest tried)", max(known): " (the highest tried)"}.get(best[arm][0], "")
            rows.append(
                [name, arm, str(len(common)), ", ".join(told), f"{best[arm][0]:g}{edge}", f"{best[arm][1]:.4f}"]
            )
            seeds |= common
        for arm, against in PAIRS:
            if arm in best and against in best:
                difference = best[arm][1] - best[against][1]
                verdict = "below" if difference < 0 else "above"
                of = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds, without an interval"
                words.append(f"At {name}, each at its best, {arm} is {abs(difference):.3f} {verdict} {against} ({of}).")
    if not rows:
        return []
    text = (
        "The loss at equal tokens of every arm at several peak learning rates, the mean over the seeds that were run "
        "at all of them. An arm whose rate is far from its best is the commonest unfair comparison. The best is chosen "
        "on the held-out text that it is reported on, for every arm alike; one at the edge of what was tried may lie "
        "beyond it."
    )
    headings = ["size", "arm", "seeds", "loss at each learning rate", "best", "its loss"]
    several = [list(by_rate.values()) for by_rate in groups.values() if len(by_rate) > 1]
    return ["## At other learning rates", text, _table(headings, rows), " ".join(words), *_codes_across(several)]


def _in_larger_steps(stored: Sequence[Stored]) -> list[str]:
    """Every arm where a step has more sequences, beside the same tokens in the steps of all sizes."""
    rows, words, compared = [], [], []
    for base in (one for one in stored if one.name == one.base):
        for larger in (one for one in stored if one.base == base.name and one.sequences > base.sequences):
            losses = {}
            for arm in (arm for arm in base.arms if arm in larger.arms):
                before, after = (measured_by_seed(one.arms[arm], "val_loss") for one in (base, larger))
                common = sorted(before.keys() & after.keys())
                if common:
                    losses[arm] = (_mean(before, common), _mean(after, common))
                    first, last = losses[arm]
                    told = [_in_steps(base), f"{first:.4f}", _in_steps(larger), f"{last:.4f}", signed(last - first)]
                    rows.append([larger.name, arm, str(len(common)), *told])
            compared.append((base, larger))
            words += [_gap(arm, against, losses, larger.name) for arm, against in PAIRS if {arm, against} <= {*losses}]
    if not rows:
        return []
    text = (
        "The same tokens in fewer, larger steps. The size of a step, the number of updates and the learning rate, "
        "which is larger by the root of the ratio, change together: which of them a change comes from is not to be "
        "seen here. The loss at equal tokens of every arm, the mean over the seeds that were run in both."
    )
    headings = ["size", "arm", "seeds", "steps of all sizes", "its loss", "larger steps", "its loss", "change"]
    return ["## In larger steps", text, _table(headings, rows), *words, *_codes_across(compared)]


def _in_steps(one: Stored) -> str:
    training = one.results["training"]
    return f"{training['steps']:,} × {one.sequences} at {training['learning_rate']:g}"


def _mean(losses: Mapping[int, float], seeds: Sequence[int]) -> float:
    return sum(losses[seed] for seed in seeds) / len(seeds)


def _gap(arm: str, against: str, losses: Mapping[str, tuple[float, float]], name: str) -> str:
    """How the difference of two arms changes in larger steps, and which of them it is that moves."""
    own, other = losses[arm], losses[against]
    before, after = own[0] - other[0], own[1] - other[1]
    words = f"At {name} {arm} against {against} goes from {signed(before)} to {signed(after)}"
    falls = after < before
    towards = -1 if falls else 1
    moved = {
        f"{arm} ends {'lower' if falls else 'higher'}": towards * (own[1] - own[0]),
        f"{against} ends {'higher' if falls else 'lower'}": -towards * (other[1] - other[0]),
    }
    causes = [what for what, by in moved.items() if round(by, 3) > 0]
    others = [f", and not because {what}" for what in moved if what not in causes]
    return f"{words}, because {' and '.join(causes)}{''.join(others)}." if causes else f"{words}."


# What the loss is worth in dense compute


class Fits:
    """Runs of one context and number of tokens, and the law of their dense ones."""

    def __init__(self, stored: Sequence[Stored]) -> None:
        self.dense: dict[tuple[int, int], list[Point]] = {}
        self.experts: dict[tuple[int, int], list[Point]] = {}
        for one in stored:
            for arm, facts in one.arms.items():
                group = (one.context, facts["runs"][0]["tokens"])
                kind = self.dense if facts["model"]["moe"] is None else self.experts
                losses, compute = measured(facts, "val_loss"), facts["flops_per_token"] * facts["runs"][0]["tokens"]
                kind.setdefault(group, []).append(Point(f"{one.name} {arm}", compute, float(np.mean(losses))))
        found = {group: fit(points) for group, points in self.dense.items() if group in self.experts}
        self.laws = {group: law for group, law in found.items() if law is not None}
        self.without = {group: len(self.dense[group]) for group, law in found.items() if law is None}
        self.alone = {
            group: fit([point for point in self.dense[group] if _arm(point) == ARMS[0]]) for group in self.laws
        }


def _worth(fits: Fits) -> list[str]:
    parts = []
    for group, law in fits.laws.items():
        parts += [*_law_words(group, law), *_alone_words(fits.alone[group])]
        headings = [
            "run with experts", "loss", "its training FLOPs", "dense FLOPs for that loss", "dense ÷ its own",
            "by `dense` alone",
        ]  # fmt: skip
        rows = [_worth_row(law, fits.alone[group], point) for point in fits.experts[group]]
        parts += [_table(headings, rows), f"![Loss over training compute]({_picture_name(group)})"]
    for (context, tokens), runs in fits.without.items():
        parts.append(
            f"At context {context:,} and {quantity(tokens)} tokens: no fit. It needs dense runs of {FEWEST} or more "
            f"amounts of compute, over which the loss falls; there are {runs} dense runs."
        )
    if not parts:
        return []
    text = (
        "The training FLOPs of a dense run that would reach the loss of a run with experts, over the FLOPs of that "
        "run, by a fit over dense runs (`dense` and `dense-wide`) of one context and number of tokens. It says what a "
        "larger dense model would cost on the same tokens, and not what the best mix of size and tokens would. Where "
        "`dense-wide` is the worse use of compute the fit over both flatters the experts: the last column is by a fit "
        "over `dense` alone."
    )
    return ["## By how much compute", text, *parts]


def _formula(law: PowerLaw) -> str:
    floor = f"{law.floor:.3f} + " if law.floor else ""
    return f"L(C) = {floor}{law.drop:.3f} · (C / {quantity(law.unit, FLOPS)}FLOP)^−{law.exponent:.3f}"


def _alone_words(law: PowerLaw | None) -> list[str]:
    if law is None:
        return []
    residuals = ", ".join(signed(residual) for residual in law.residuals)
    return [
        f"By `dense` alone: {_formula(law)}, fitted to {len(law.points)} runs, which lie {residuals} above it. With as "
        "few runs as that their own chance is not in the residuals: a seed's loss moves by some 0.02."
    ]


def _law_words(group: tuple[int, int], law: PowerLaw) -> list[str]:
    (context, tokens), (least, most) = group, law.range
    why = "" if law.floor else " (no floor: too few amounts of compute to tell one, or none found)"
    words = (
        f"Context {context:,}, {quantity(tokens)} tokens: {_formula(law)}{why}, fitted to {len(law.points)} runs from "
        f"{quantity(least, FLOPS)}FLOP to {quantity(most, FLOPS)}FLOP."
    )
    rows = [
        [point.name, f"{quantity(point.compute, FLOPS)}FLOP", f"{point.loss:.4f}", f"{residual:+.4f}".replace("-", "−")]
        for point, residual in zip(law.points, law.residuals, strict=True)
    ]
    return [words, _table(["dense run", "training FLOPs", "loss", "above the fit"], rows)]


def _worth_row(law: PowerLaw, alone: PowerLaw | None, run: Point) -> list[str]:
    compute = law.compute(run.loss)
    worth = "∞" if compute is None else f"{quantity(compute, FLOPS)}FLOP"
    figures = [f"{run.loss:.4f}", f"{quantity(run.compute, FLOPS)}FLOP", worth, _multiplier(law, run)]
    return [run.name, *figures, DASH if alone is None else _multiplier(alone, run)]


def _multiplier(law: PowerLaw, run: Point) -> str:
    """Dense compute over the run's own; outside of the fit's range only what the range says, and that it is left."""
    least, most = law.range
    compute = law.compute(run.loss)
    if compute is None or compute > most:
        further = "none, by the fit's floor" if compute is None else f"{compute / run.compute:.2f} × by the fit"
        return f"more than {most / run.compute:.2f} ×; extrapolated: {further}"
    if compute < least:
        return f"less than {least / run.compute:.2f} ×; extrapolated: {compute / run.compute:.2f} × by the fit"
    worst = max(map(abs, law.residuals))
    bounds = [law.compute(run.loss + worst), law.compute(run.loss - worst)]
    told = [DASH if bound is None else f"{bound / run.compute:.2f}" for bound in bounds]
    return f"{compute / run.compute:.2f} × ({told[0]} to {told[1]} with the largest residual added and taken off)"


def _arm(point: Point) -> str:
    return point.name.rpartition(" ")[2]


def _picture_name(group: tuple[int, int]) -> str:
    return f"compute-{group[0]}-{group[1]}.svg"


def _picture(fits: Fits, group: tuple[int, int], law: PowerLaw) -> Picture:
    """Every run, and the law of the dense ones, dashed where it leaves their range; dense has its size's name."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.4)
        axes = figure.subplots()
        points = fits.dense[group] + fits.experts[group]
        reach = [point.compute for point in points] + [law.compute(point.loss) or 0 for point in fits.experts[group]]
        for low, high, line in ((*law.range, "-"), (law.range[1], min(max(reach), 20 * law.range[1]), "--")):
            place = np.geomspace(low, max(low, high), 200)
            axes.plot(place, [law.loss(c) for c in place], color=ARM_COLOURS[0], linestyle=line, linewidth=1.2)
        for arm in sorted(set(map(_arm, points)), key=ARMS.index):
            own, index = [point for point in points if _arm(point) == arm], ARMS.index(arm)
            place, losses = [point.compute for point in own], [point.loss for point in own]
            axes.plot(place, losses, MARKERS[index], color=ARM_COLOURS[index], markersize=6, label=arm)
        for point in fits.dense[group]:
            if _arm(point) == ARMS[0]:
                axes.annotate(
                    point.name.rpartition(" ")[0], (point.compute, point.loss), xytext=(-2, -14),
                    textcoords="offset points", fontsize=8, color=LIGHT["muted"], ha="right",
                )  # fmt: skip
        axes.legend(frameon=False)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c / 1e15:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.2, y=0.1)
        axes.grid(visible=False, which="minor")
        axes.set_xlabel("training FLOPs, PFLOP")
        axes.set_ylabel("loss, nats per token")
        axes.spines["bottom"].set_color(LIGHT["muted"])
    return Picture("compute", "Loss over training compute", "", figure)


# The figures themselves


def _losses(stored: Sequence[Stored]) -> list[str]:
    rows = []
    for one in stored:
        for arm, facts in one.arms.items():
            parameters = facts["parameters"]
            rows.append(
                [
                    one.name,
                    arm,
                    f"{quantity(parameters['total'])} / {quantity(parameters['active'])}",
                    _fixed(one.mean(arm, "val_loss"), 4),
                    _fixed(one.mean(arm, "val_bits_per_byte"), 4),
                    _fixed(one.score(arm, "loss"), 4),
                    _fixed(one.score(arm, "word_perplexity"), 1),
                    _fixed(one.score(arm, "bits_per_byte"), 4),
                ]
            )
    if not rows:
        return []
    text = (
        "Means over the seeds. WikiText-103 is its official test split as natural text (detokenized), in contexts of "
        "the size's length without overlap; its word perplexity is over the words as published. None of these models "
        "was trained on WikiText-103: these are not to be set beside results of models that were."
    )
    headings = [
        "size", "arm", "parameters: total / active", "held-out loss", "bits per byte", "WikiText-103 loss",
        "word perplexity", "bits per byte",
    ]  # fmt: skip
    return ["## Losses", text, _table(headings, rows)]


def _speeds(stored: Sequence[Stored]) -> list[str]:
    rows = [
        [
            one.name,
            arm,
            quantity(one.mean(arm, "tokens_per_second")),
            percent(one.mean(arm, "mfu")),
            memory(one.mean(arm, "peak_memory_bytes")),
            duration(one.mean(arm, "seconds")),
            f"{quantity(facts['flops_per_token'], FLOPS)}FLOP",
        ]
        for one in stored
        for arm, facts in one.arms.items()
    ]
    text = (
        "Means over the seeds, in training steps alone: evaluations, checkpoints and compilation are not counted. MFU "
        "is of active FLOPs and the device's peak."
    )
    headings = ["size", "arm", "tokens/s", "MFU", "peak memory", "training time", "FLOPs of a token"]
    return ["## Speed", text, _table(headings, rows)] if rows else []


def _again(stored: Sequence[Stored]) -> list[str]:
    """Commands, text, versions and devices, each once, with the sizes that have them."""
    facts: dict[tuple[str, str], list[str]] = {}
    for one in stored:
        data, environments = one.results["data"], [entry["environment"] for entry in one.results["environments"]]
        told = [("command", f"`{one.results['command']}`")]
        told.append(
            (
                "text",
                f"{data['name']}, {data['train_tokens']:,} tokens to train on and {data['valid_tokens']:,} held out, "
                f"tokenizer {data['tokenizer']}, fingerprint `{data['fingerprint']}`",
            )
        )
        told += [("experts computed by", words) for words in _backends(one)]
        told += [("WikiText-103", f"fingerprint `{s['fingerprint']}`") for s in one.scores.values()]
        for environment in environments:
            known = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in environment.items() if v is not None)
            told.append(("environment", known))
        for fact in dict.fromkeys(told):
            facts.setdefault(fact, []).append(one.name)
    rows = [[what, ", ".join(sizes), value] for (what, value), sizes in sorted(facts.items(), key=lambda f: f[0][0])]
    return ["## How to make it again", _table(["", "sizes", ""], rows)] if rows else []


def _backends(one: Stored) -> list[str]:
    """The backends that computed the experts of a size, each with its arms; of results that have them."""
    arms: dict[str, list[str]] = {}
    for arm, facts in one.arms.items():
        for backend in dict.fromkeys(run.get("backend") for run in facts["runs"]):
            if backend is not None:
                arms.setdefault(backend, []).append(arm)
    return [f"`{backend}`: {', '.join(names)}" for backend, names in arms.items()]


def _fixed(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
