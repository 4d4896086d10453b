"""What the pictures of a report show: differences and loss curves here, the experts' routing beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from moelab.compare.picture import ARM_COLOURS, LIGHT, STYLE, Picture, new_figure
from moelab.compare.routing_pictures import routing_pictures
from moelab.compare.run import Run
from moelab.compare.statistics import Estimate, estimate
from moelab.compare.words import COUNTS, FLOPS, loss_name

# Six colours, and with each of them four lines and four markers: what tells 24 arms apart.
LINES: list[Any] = [["-", (0, (5, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1.2))][(i + i // 6) % 4] for i in range(24)]
MARKERS = [*"os^DvP", *"s^DvPo", *"^DvPos", *"DvPos^"]
AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time"}


def pictures(results: dict[str, Any], runs: Sequence[Run]) -> list[Picture]:
    """Every figure of a comparison: the differences first, then curves, then the routing of each arm's experts."""
    with matplotlib.rc_context(STYLE):
        found = [_differences(results), _curves(results, runs, "tokens"), _difference_over_tokens(results, runs)]
        found += [_curves(results, runs, budget) for budget in ("flops", "seconds")]
        found += routing_pictures(results, runs)
        for picture in found:  # laid out once, and not again for each of a picture's forms
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")
    return found


def _differences(results: dict[str, Any]) -> Picture:
    """Every difference with its interval, a row each."""
    entries = [entry for entry in results["comparisons"] if entry["difference"] is not None]
    pairs = list(dict.fromkeys((entry["arm"], entry["against"]) for entry in entries))
    figure = new_figure(0.9 + 0.27 * len(entries) + 0.3 * len(pairs))
    axes = figure.subplots()
    arms, row, ticks = list(results["arms"]), 0.0, []
    for pair in pairs:
        axes.annotate(
            f"{pair[0]} against {pair[1]}", (0, row), xycoords=("axes fraction", "data"), xytext=(-4, 0),
            textcoords="offset points", va="center", ha="right", fontsize=10, fontweight="bold",
        )  # fmt: skip
        row += 1
        for entry in entries:
            if (entry["arm"], entry["against"]) == pair:
                _interval(axes, entry, row, arms.index(entry["arm"]))
                ticks.append((row, {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}[entry["budget"]]))
                row += 1
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    axes.set_ylim(row - 0.3, -0.6)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    reach = 1.25 * max([abs(x) for e in entries for x in (e["difference"], *(e["ci95"] or ()))] or [1]) or 1.0
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("← lower · nats per token · higher →")
    loss = loss_name(results)
    caption = f"Difference of {loss} at the same tokens, training FLOPs and time."
    if any(entry["ci95"] for entry in entries):
        caption += " Bars are 95% intervals, paired over seeds; one that crosses zero shows no difference."
    else:
        caption += " Single runs: there are no intervals."
    if any(entry["interpolated"] for entry in entries):
        caption += " Open markers were read off a curve whose schedule had not ended."
    return Picture("differences", f"Differences of {loss}", caption, figure)


def _interval(axes: Axes, entry: dict[str, Any], row: float, arm: int) -> None:
    colour = ARM_COLOURS[arm]
    if entry["ci95"]:
        axes.plot(entry["ci95"], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    fill = LIGHT["surface"] if entry["interpolated"] else colour
    axes.plot(entry["difference"], row, MARKERS[arm], color=colour, markerfacecolor=fill, markersize=7)


def _curves(results: dict[str, Any], runs: Sequence[Run], budget: str) -> Picture:
    """Validation loss against one budget: means over seeds, single seeds thin, runs that end at the budget open."""
    figure = new_figure(3.4)
    axes = figure.subplots()
    cheapest = min(run.spent(budget) for run in runs if run.budget == "tokens")
    unit, scale = _axis_unit(budget, max(run.spent(budget) for run in runs))
    ends, tops, seeds = [], [], len(results["seeds"])
    for index, arm in enumerate(results["arms"]):
        own = [run for run in runs if run.arm == arm and run.budget == "tokens"]
        for run in own if seeds > 1 else []:
            curve = run.curve(budget)
            axes.plot(curve.spent / scale, curve.loss, color=ARM_COLOURS[index], linewidth=0.7, alpha=0.45)
        spent, loss = _mean_curve(own, budget)
        axes.plot(
            spent / scale, loss, color=ARM_COLOURS[index], linestyle=LINES[index], marker=MARKERS[index],
            markersize=4, markevery=max(1, len(spent) // 8), label=arm,
        )  # fmt: skip
        further = [run for run in runs if run.arm == arm and run.budget == budget != "tokens"]
        if further:
            place = [np.mean([run.spent(budget) for run in further]) / scale]
            axes.plot(
                place, [np.mean([run.loss for run in further])], MARKERS[index], color=ARM_COLOURS[index],
                markerfacecolor=LIGHT["surface"], markersize=8, markeredgewidth=1.6,
            )  # fmt: skip
        if len(spent):
            ends.append((spent[-1] / scale, loss[-1], arm, ARM_COLOURS[index]))
            early = spent >= 0.15 * cheapest
            tops.append(loss[early].max() if early.any() else loss.max())
    if ends:
        lowest = min(run.loss for run in runs)
        top = max(tops)
        axes.set_ylim(lowest - 0.06 * (top - lowest or 1), top + 0.04 * (top - lowest or 1))
        if budget == "tokens":
            _label_ends(axes, ends)
        else:  # lines end at different places, and names there would lie on other lines
            axes.set_xlim(left=0)
            axes.legend(loc="upper right", frameon=False, handlelength=3)
    axes.set_xlabel(AXES[budget] + unit)
    axes.set_ylabel("validation loss, nats per token")
    caption = f"Lines are means over {seeds} seeds, thin lines single seeds." if seeds > 1 else "One run of each arm."
    if any(run.budget == budget != "tokens" for run in runs):
        caption += " Open markers are runs whose schedule ends at that budget."
    return Picture(f"loss-{budget}", f"Loss against {AXES[budget]}", caption, figure)


def _mean_curve(runs: Sequence[Run], budget: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds at the evaluations that all of them have, in order."""
    curves = [run.curve(budget) for run in runs]
    common = min((len(curve.loss) for curve in curves), default=0)
    spent = np.mean([curve.spent[:common] for curve in curves], axis=0)
    loss = np.mean([curve.loss[:common] for curve in curves], axis=0)
    return spent, loss


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of lines, moved apart where they would overlap."""
    axes.set_xlim(0, 1.3 * max(end[0] for end in ends))
    low, high = axes.get_ylim()
    apart = 0.062 * (high - low)
    height = -np.inf
    for x, y, arm, colour in sorted(ends, key=lambda end: end[1]):
        height = max(y, height + apart)
        axes.annotate(
            arm, (x, height), xytext=(6, 0), textcoords="offset points", color=colour, va="center", fontweight="bold"
        )


def _axis_unit(budget: str, largest: float) -> tuple[str, float]:
    """The unit of an axis in words, and its size."""
    if budget == "seconds":
        unit, scale = ("s", 1.0) if largest < 300 else ("min", 60.0) if largest < 18_000 else ("h", 3600.0)
        return f", {unit}", scale
    prefixes = FLOPS if budget == "flops" else COUNTS
    step = min(int(np.log10(max(largest, 1)) // 3), len(prefixes) - 1)
    words = {"": "", "k": "thousands", "M": "millions", "B": "billions", "T": "trillions"}
    unit = f"{prefixes[step]}FLOP" if budget == "flops" else words[prefixes[step]]
    return f", {unit}" if unit else "", 1000.0**step


def _difference_over_tokens(results: dict[str, Any], runs: Sequence[Run]) -> Picture:
    """How far each arm is from the first, evaluation by evaluation, at equal tokens."""
    figure = new_figure(3.4)
    axes = figure.subplots()
    first, *others = results["arms"]
    unit, scale = _axis_unit("tokens", max(run.spent("tokens") for run in runs))
    ends = []
    for index, arm in enumerate(others, start=1):
        tokens, found = _paired_over_tokens(runs, arm, first)
        if not tokens:
            continue
        place = np.array(tokens) / scale
        means = [one.mean for one in found]
        axes.plot(place, means, color=ARM_COLOURS[index], linestyle=LINES[index], marker=MARKERS[index], markersize=4)
        if all(one.ci95 for one in found):
            low, high = np.array([one.ci95 for one in found]).T
            axes.fill_between(place, low, high, color=ARM_COLOURS[index], alpha=0.15, linewidth=0)
        ends.append((place[-1], means[-1], arm, ARM_COLOURS[index]))
    right = max((end[0] for end in ends), default=1.0)
    axes.plot([0, right], [0, 0], color=ARM_COLOURS[0], linestyle=LINES[0])
    axes.margins(y=0.15)
    _label_ends(axes, [(right, 0.0, first, ARM_COLOURS[0]), *ends])
    axes.set_xlabel("training tokens" + unit)
    axes.set_ylabel(f"loss − that of {first}, nats per token")
    caption = f"Difference from {first} at each evaluation; below zero is lower loss."
    if len(results["seeds"]) > 1:
        caption += " Bands are 95% intervals, paired over seeds."
    return Picture("difference-over-tokens", f"Difference from {first} over training", caption, figure)


def _paired_over_tokens(runs: Sequence[Run], arm: str, first: str) -> tuple[list[int], list[Estimate]]:
    """Tokens at which all seeds of two arms were evaluated, and the estimates of the difference there."""

    def losses(name: str) -> dict[int, dict[int, float]]:
        own = [run for run in runs if run.arm == name and run.budget == "tokens"]
        return {run.seed: {line["tokens"]: line["val_loss"] for line in run.evaluations} for run in own}

    left, right = losses(arm), losses(first)
    seeds = [seed for seed in left if seed in right]
    common = set.intersection(*(set(left[seed]) & set(right[seed]) for seed in seeds)) if seeds else set()
    tokens = sorted(common)
    return tokens, [found for t in tokens if (found := estimate([left[s][t] - right[s][t] for s in seeds]))]
