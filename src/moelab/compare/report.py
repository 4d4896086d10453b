"""report.html: a comparison for a reader who was not there.

One file that asks for nothing else: text, tables and inline SVG, styled for phones, desks and print, light and dark.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moelab.compare.figures import pictures
from moelab.compare.picture import DARK, FONT, LIGHT, Picture
from moelab.compare.results import measured, read_results
from moelab.compare.run import Run
from moelab.compare.statistics import deviation, estimate
from moelab.compare.words import (
    BUDGET_PHRASES,
    DASH,
    FLOPS,
    amount,
    describe_arm,
    duration,
    headline,
    loss_name,
    memory,
    notes,
    percent,
    point_text,
    quantity,
    signed,
    training_differences,
)  # fmt: skip
from moelab.config import UsageError
from moelab.training.loop import write_aside


@dataclass(frozen=True)
class Cell:
    """One figure of a table, under its heading, with what there is to say about it."""

    heading: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a table; `colour` is the number of the arm that it is about."""

    name: str
    about: str
    colour: int
    cells: list[Cell]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page of one or more finished comparisons, and the figures of each into its folder.

    Args:
        folders: of comparisons.
        out: the page; for one comparison its own report.html, for several report.html in the current folder, when not
            given.

    Raises:
        UsageError: a folder is not a comparison, or its files cannot be read; `out` cannot be written.
    """
    if not folders:
        raise UsageError("report: give the folder of a comparison")
    page = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    sections = []
    for number, folder in enumerate(folders):
        results, runs = read_results(folder)
        drawn = pictures(results, runs)
        _write_figures(folder / "figures", drawn)
        sections.append(_section(f"s{number}", results, runs, drawn))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_aside(page, _render(sections))
    except OSError as problem:
        raise UsageError(f"out = {page}: cannot be written ({problem.strerror}); choose another --out") from None
    return page


def _write_figures(folder: Path, drawn: Sequence[Picture]) -> None:
    folder.mkdir(exist_ok=True)
    for picture in drawn:
        for name, content in picture.files().items():
            aside = folder / f".{name}.writing"
            aside.write_bytes(content)
            os.replace(aside, folder / name)


def _render(sections: Sequence[dict[str, Any]]) -> str:
    loader = PackageLoader("moelab.compare", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source, _, _ = loader.get_source(environment, "report.css")
    template = environment.get_template("report.html")
    return template.render(sections=sections, css=Markup(source), light=LIGHT, dark=DARK, font=Markup(FONT))


def _section(identifier: str, results: dict[str, Any], runs: Sequence[Run], drawn: Sequence[Picture]) -> dict[str, Any]:
    """What the template shows of one comparison."""
    first, *others = results["arms"]
    on_page = [(picture, Markup(picture.page_svg(identifier))) for picture in drawn]
    return {
        "id": identifier,
        "title": f"{', '.join(others)} against {first}",
        "subtitle": f"size {results['preset']}, on {results['data']['name']}, {_seeds(results)}",
        "headline": headline(results),
        "notes": notes(results),
        "arms": [_arm_row(results, arm, place) for place, arm in enumerate(results["arms"])],
        "differences": _pair_rows(results, results["comparisons"], _difference),
        "to_reach": _pair_rows(results, results.get("to_reach", []), _to_reach),
        "runs": [_run_row(results, run) for run in runs],
        "pictures": [shown for shown in on_page if shown[0].arm is None],
        "colours": {arm: place for place, arm in enumerate(results["arms"])},
        "experts": {arm: own for arm in results["arms"] if (own := [one for one in on_page if one[0].arm == arm])},
        "held_equal": _held_equal(results),
        "batches": results["batches_sha256"],
        "command": results["command"],
        "environments": results["environments"],
        "facts": _facts,
        "data": results["data"],
        "first": first,
        "loss": loss_name(results),
        "curves_differ": loss_name(results) != "validation loss",
        "tuning": _tuning_rows(results),
        "has_experts": any(arm["model"]["moe"] for arm in results["arms"].values()),
        "interpolated": any(entry["interpolated"] for entry in results["comparisons"]),
    }


def _seeds(results: dict[str, Any]) -> str:
    count = len(results["seeds"])
    return "one run of each arm" if count == 1 else f"{count} seeds"


def _arm_row(results: dict[str, Any], arm: str, place: int) -> Row:
    """An arm's means over its runs of equal tokens."""
    facts = results["arms"][arm]
    split = "test" if results.get("split") == "test" else "val"

    def mean(figure: str) -> float | None:
        found = estimate(measured(facts, figure))
        return found.mean if found else None

    cells = [
        Cell("Parameters", quantity(facts["parameters"]["total"])),
        Cell("Active", quantity(facts["parameters"]["active"])),
        Cell(loss_name(results).capitalize(), _spread(facts, f"{split}_loss", 4)),
        Cell("Bits per byte", _spread(facts, f"{split}_bits_per_byte", 4)),
    ]
    if any(measured(other, f"{split}_word_perplexity") for other in results["arms"].values()):
        cells.append(Cell("Word perplexity", _spread(facts, f"{split}_word_perplexity", 2)))
    cells += [
        Cell("FLOPs per token", f"{quantity(facts['flops_per_token'], FLOPS)}FLOP"),
        Cell("Tokens/s", quantity(mean("tokens_per_second"))),
        Cell("MFU", percent(mean("mfu"))),
        Cell("Peak memory", memory(mean("peak_memory_bytes"))),
        Cell("Training time", duration(mean("seconds"))),
    ]
    for heading, figure in (("Max violation", "max_violation"), ("Dropped", "dropped")):
        if any(measured(other, figure) for other in results["arms"].values()):
            found = mean(figure)
            cells.append(Cell(heading, percent(found) if figure == "dropped" or found is None else f"{found:.2f}"))
    return Row(arm, "; ".join(filter(None, [describe_arm(facts), facts.get("match")])), place, cells)


def _spread(facts: dict[str, Any], figure: str, digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    values = measured(facts, figure)
    found = estimate(values)
    if found is None:
        return DASH
    spread = f" ± {deviation(values):.{digits}f}" if found.runs > 1 else ""
    return f"{found.mean:.{digits}f}{spread}"


def _pair_rows(
    results: dict[str, Any], entries: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], Cell]
) -> list[Row]:
    """A line for each pair of arms, a cell for each budget."""
    arms = list(results["arms"])
    rows: dict[tuple[str, str], Row] = {}
    for entry in entries:
        arm, against = entry["arm"], entry["against"]
        row = rows.setdefault((arm, against), Row(f"{arm} against {against}", "", arms.index(arm), []))
        row.cells.append(cell(entry))
    return list(rows.values())


def _difference(entry: dict[str, Any]) -> Cell:
    heading = BUDGET_PHRASES[entry["budget"]].capitalize().replace("flops", "FLOPs")
    if entry["difference"] is None:
        return Cell(heading, DASH, ("not measured",))
    if entry["ci95"]:
        low, high = entry["ci95"]
        certainty = f"95% interval {signed(low)} to {signed(high)}, {entry['runs']} seeds"
    else:
        certainty = "one run: no interval"
    spent = " against ".join(dict.fromkeys(amount(value, entry["budget"]) for value in entry["spent"]))
    unit = " tokens" if entry["budget"] == "tokens" else ""
    how = "read off" if entry["interpolated"] else "both end there"
    return Cell(heading, signed(entry["difference"]), (certainty, f"{spent}{unit}, {how}"))


def _to_reach(entry: dict[str, Any]) -> Cell:
    heading = {"tokens": "Tokens", "flops": "Training FLOPs", "seconds": "Training time"}[entry["budget"]]
    if entry["ratio"] is None:
        some = f"reached by {entry['reached']} of {entry['runs']} seeds" if entry["reached"] else "not reached"
        return Cell(heading, DASH, (some if entry["runs"] else "not measured",))
    own, other = (amount(value, entry["budget"]) for value in entry["spent"])
    certainty = "95% interval {:.2f} to {:.2f}".format(*entry["ci95"]) if entry["ci95"] else "one run: no interval"
    return Cell(heading, f"{entry['ratio']:.2f} ×", (certainty, f"{own} against {other}"))


def _run_row(results: dict[str, Any], run: Run) -> Row:
    summary = run.summary
    cells = [
        Cell("Steps", f"{summary['steps']:,}"),
        Cell("Tokens", f"{summary['tokens']:,}"),
        Cell("Time", duration(summary["seconds"])),
        Cell("Validation loss", f"{summary['val_loss']:.4f}"),
        Cell("Bits per byte", f"{summary['val_bits_per_byte']:.4f}"),
    ]
    if results.get("split") == "test":
        cells.append(Cell("Test loss", f"{summary['test_loss']:.4f}"))
    return Row(run.folder, BUDGET_PHRASES[run.budget], list(results["arms"]).index(run.arm), cells)


def _tuning_rows(results: dict[str, Any]) -> list[Row]:
    """A line for each tuned arm, a cell for each value that was tried for any."""
    tuned = (results.get("sweep") or {"arms": {}})["arms"]
    headings = dict.fromkeys(point_text(trial["values"]) for found in tuned.values() for trial in found["tried"])
    rows = []
    for arm, found in tuned.items():
        cells = {heading: Cell(heading.capitalize(), DASH) for heading in headings}
        for trial in found["tried"]:
            heading = point_text(trial["values"])
            loss = "not finite" if trial["val_loss"] is None else f"{trial['val_loss']:.4f}"
            said = ("chosen, at the edge of what was tried" if found["at_edge"] else "chosen",)
            cells[heading] = Cell(heading.capitalize(), loss, said if trial["values"] == found["chosen"] else ())
        rows.append(Row(arm, "", list(results["arms"]).index(arm), list(cells.values())))
    return rows


def _held_equal(results: dict[str, Any]) -> list[str]:
    training, arms = results["training"], list(results["arms"].values())
    tokens = arms[0]["runs"][0]["tokens"]
    shared = training | arms[0].get("training", {}) | training_differences(results)  # tuned alike is shared too

    def said(name: str) -> str:
        return shared[name] if isinstance(shared[name], str) else f"{shared[name]:,g}"

    lines = [
        f"the tokens and their order: {tokens:,} tokens in {training['steps']:,} steps of {training['batch_size']} × "
        f"{training['accumulation']} sequences of {arms[0]['model']['context']:,} tokens; see the hash of all batches",
        "the initial values of the parameters that arms share, which are drawn from the seed and their name",
        f"the optimizer: AdamW, learning rate {said('learning_rate')} to {said('min_learning_rate')} by a cosine after "
        f"{said('warmup_steps')} steps of warm-up, betas {said('beta1')} and {said('beta2')}, weight decay "
        f"{said('weight_decay')}, clipping at {said('clip')}"
        + (", where the values that arms differ in stand with their arms" if training_differences(results) else ""),
        f"the validation text: the whole split of {results['data']['valid_tokens']:,} tokens, each scored once",
    ]
    if results["data"].get("test_tokens"):
        lines.append(f"the test text: the whole split of {results['data']['test_tokens']:,} tokens, each scored once")
    if scopes := {arm["model"]["moe"]["balance_scope"] for arm in arms if arm["model"]["moe"]}:
        lines.append(f"the scope that balance losses count over: {', '.join(sorted(scopes))}")
    return lines


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of an environment, for a reader."""
    peak = environment.get("device_peak_flops")
    shown = environment | {"device_peak_flops": f"{quantity(peak, FLOPS)}FLOP/s" if peak else None}
    return [(name.replace("_", " "), str(value)) for name, value in shown.items() if value is not None]
