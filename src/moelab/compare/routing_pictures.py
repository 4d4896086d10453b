"""What the pictures of an arm's routing show, with words that say what is healthy.

Each is of the arm's first seed. Heat maps are transparent where all is as it should be, and tinted in one of two
mid-tones elsewhere, over whatever is behind them, so that they serve light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moelab.compare.picture import ARM_COLOURS, LIGHT, Picture, new_figure
from moelab.compare.routing import (
    DROPPED,
    LARGE_LOGITS,
    UNBALANCED,
    UNLIKE,
    Routing,
    moved_by_type,
    pairs_over_chance,
    read_routing,
    types_over_chance,
)
from moelab.compare.run import Run
from moelab.compare.words import percent
from moelab.config import layer_pattern

OVER, UNDER = (0.85, 0.37, 0.0), (0.13, 0.47, 0.77)
BLANK = (0.5, 0.5, 0.5, 0.3)
COLUMNS = 120
"""Most measurements that a picture over training shows; more would be finer than its pixels."""

PRIOR = 5
"""Tokens that both sides of a pair's ratio are given before it is tinted: what a few tokens say stays faint."""


def routing_pictures(results: dict[str, Any], runs: Sequence[Run]) -> list[Picture]:
    """Of each arm with experts, those pictures that its first seed has measurements for."""
    found: list[Picture | None] = []
    for place, (arm, facts) in enumerate(results["arms"].items()):
        if facts["model"]["moe"] is None:
            continue
        run = next(run for run in runs if run.arm == arm and run.budget == "tokens")
        layers = sorted(layer_pattern(facts["model"]["moe"]["moe_layers"], facts["model"]["layers"]))
        if any("expert_load" in line for line in run.lines):
            found.append(_expert_load(arm, run, layers))
        routing = read_routing(run, layers)
        if routing is not None:
            tokens = run.summary["tokens_per_step"] // facts.get("training", results["training"])["accumulation"]
            found.append(_health(arm, routing, ARM_COLOURS[place]))
            found += [_norms(arm, routing), _pairs(arm, routing, tokens)]
        if run.summary.get("token_types"):
            found.append(_types(arm, run, layers))
    return [picture for picture in found if picture is not None]


def _expert_load(arm: str, run: Run, layers: Sequence[int]) -> Picture:
    """Heat map a layer: an expert a row, steps along, tinted by its share of the routed slots against 1 / E."""
    lines = [line for line in run.lines if "expert_load" in line]
    steps = np.array([line["step"] for line in lines])
    load = np.array([line["expert_load"] for line in lines])  # (lines, MoE layers, E)
    experts = load.shape[2]
    columns = min(len(lines), COLUMNS)
    middles = (np.arange(columns) + 0.5) * steps[-1] / columns
    load = load[np.searchsorted(steps, middles)]
    tallest = 1.8 if len(layers) <= 4 else 1.0 if len(layers) <= 8 else 0.6
    across = min(len(layers), 2 if len(layers) <= 8 else 3)
    down = -(-len(layers) // across)
    figure = new_figure(0.8 + down * (0.45 + min(0.11 * experts, tallest)))
    grid = figure.subplots(down, across, squeeze=False)
    for axes, layer, share in zip(grid.flat, layers, load.transpose(1, 2, 0), strict=False):
        extent = (0, steps[-1], experts - 0.5, -0.5)
        axes.imshow(tint(share * experts), aspect="auto", interpolation="none", extent=extent)
        axes.grid(visible=False)
        axes.set_title(f"layer {layer}")
        axes.set_yticks([0, experts - 1] if experts > 1 else [0])
        _step_axis(axes)
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10, color=LIGHT["muted"])
    figure.supylabel("expert", fontsize=10, color=LIGHT["muted"])
    _tint_legend(figure, "no slots", f"balanced, 1/{experts}", f"2/{experts} or more")
    last = lines[-1]["expert_load"]
    busiest, idlest = max(max(layer) for layer in last), min(min(layer) for layer in last)
    caption = (
        f"Share of the routed slots that each expert got, seed {run.seed}. Balanced is 1/{experts} = "
        f"{percent(1 / experts)}, which has no tint. At the end the busiest expert of any layer got {percent(busiest)} "
        f"and the idlest {percent(idlest)}. Healthy is a faint tint that changes; a row that stays strongly tinted is "
        "an expert that collects tokens, or gets hardly any."
    )
    return Picture(f"expert-load-{arm}", f"Expert load of {arm}, layer by layer", caption, figure, arm)


def _health(arm: str, routing: Routing, colour: str) -> Picture:
    """Small multiples over training: a figure a panel, a layer a line."""
    panels = _panels(routing)
    down = -(-len(panels) // 2)
    figure = new_figure(0.7 + 1.3 * down)
    grid = figure.subplots(down, 2, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _layer_lines(axes, panel.steps, panel.values, colour)
        axes.set_title(panel.title)
        _step_axis(axes)
        top = panel.top or 1.15 * float(panel.values.max()) or 1.0
        axes.set_ylim(0, top)
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        if panel.is_share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        if panel.limit is not None and panel.limit < top:
            axes.axhline(panel.limit, color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (1.5, 1.5)))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10, color=LIGHT["muted"])
    first, last = routing.layers[0], routing.layers[-1]
    legend = [
        Line2D([], [], label=f"layer {layer}", **_layer_style(place, 2, colour))
        for place, layer in ((0, first), (1, last))
    ]
    if first == last:
        legend = legend[1:]
    figure.legend(handles=legend, loc="outside upper left", ncols=2, frameon=False, handlelength=2.5)
    return Picture(f"routing-{arm}", f"Balance and router of {arm} over training", _health_words(routing), figure, arm)


@dataclass(frozen=True)
class _Panel:
    """One figure of all layers over training; `limit` is where it becomes unhealthy."""

    title: str
    steps: np.ndarray
    values: np.ndarray
    limit: float | None = None
    top: float | None = None
    is_share: bool = False


def _panels(routing: Routing) -> list[_Panel]:
    found = [
        _Panel("max violation", routing.steps, routing.max_violation, limit=UNBALANCED),
        _Panel("mean violation", routing.steps, routing.mean_violation),
        _Panel("size of the logits", routing.steps, routing.logit_rms, limit=LARGE_LOGITS),
    ]
    if routing.experts > 1:  # one expert has nothing to decide
        share = routing.entropy / np.log(routing.experts)
        found.insert(2, _Panel("entropy / largest", routing.steps, share, top=1.05, is_share=True))
    if routing.dropped is not None:
        found.append(_Panel("dropped slots", routing.dropped_steps, routing.dropped, limit=DROPPED, is_share=True))
    return found


def _layer_lines(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Lines of values (measurements, layers), fainter to stronger with depth, first and last layer on top."""
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), COLUMNS)).round().astype(int))
    layers = values.shape[1]
    for place in range(layers):
        style = _layer_style(place, layers, colour)
        if len(shown) == 1:
            style |= {"marker": "o", "markersize": 4}
        axes.plot(steps[shown], values[shown, place], zorder=3 if place in (0, layers - 1) else 2, **style)


def _layer_style(place: int, layers: int, colour: str) -> dict[str, Any]:
    """The first layer's line is dashed, the last one's heavy, and those between thin."""
    if place == layers - 1:
        return {"color": colour, "linewidth": 2.0}
    alpha = 0.3 + 0.5 * place / (layers - 1)
    if place == 0:
        return {"color": colour, "alpha": 0.7, "linewidth": 1.5, "linestyle": (0, (3, 1.2))}
    return {"color": colour, "alpha": alpha, "linewidth": 0.9}


def _step_axis(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step:g}" if step < 10_000 else f"{step / 1000:g} k")
    )


def _health_words(routing: Routing) -> str:
    """The figures at the end, and what each would be of a healthy router."""
    violation = routing.max_violation[-1]
    worst = int(violation.argmax())
    words = [
        f"Seed {routing.seed}; a line is a layer, fainter to stronger with depth, and what is above a dotted line is "
        "unhealthy. At the end:",
        f"Max violation: at most {violation[worst]:.2f}, in layer {routing.layers[worst]}, whose busiest expert gets "
        f"{1 + violation[worst]:.2f} times its share. Near 0 is balanced; over 1 an expert gets more than twice its "
        f"share{', which is so here' if violation[worst] > UNBALANCED else ''}.",
        f"Mean violation: at most {routing.mean_violation[-1].max():.2f}, by how much an expert is off its share on "
        "average; near 0 is balanced.",
    ]
    if routing.experts > 1:
        largest = np.log(routing.experts)
        share = routing.entropy[-1] / largest
        words.append(
            f"Entropy: {_span(share.min(), share.max(), '{:.0%}')} of its largest, ln {routing.experts} = "
            f"{largest:.2f} nats. Near 100% a router is undecided, near 0% it is sure; healthy falls slowly and stays "
            "off both."
        )
    half = (len(routing.steps) - 1) // 2
    size, before = routing.logit_rms[-1].max(), routing.logit_rms[half].max()
    grown = f", the largest {size / before:.2f} times that at step {routing.steps[half]:,}" if half and before else ""
    words.append(
        f"Size of the logits (root mean square): {_span(routing.logit_rms[-1].min(), size, '{:.2f}')}{grown}. Healthy "
        "settles; logits that keep growing endanger bf16 and ask for a z-loss."
    )
    if routing.dropped is not None:
        dropped = routing.dropped[-1]
        words.append(
            f"Dropped: {percent(dropped.mean())} of all slots, at most {percent(dropped.max())}, in layer "
            f"{routing.layers[int(dropped.argmax())]}. Healthy is under {DROPPED:.0%}."
        )
    return "\n".join(words)


def _span(low: float, high: float, form: str) -> str:
    low_text, high_text = form.format(low), form.format(high)
    return low_text if low_text == high_text else f"{low_text} to {high_text}"


def _norms(arm: str, routing: Routing) -> Picture | None:
    """Heat map of the experts' weight norms at the end, layers × experts, over the layer's mean."""
    layers, experts = routing.weight_norm.shape
    if experts == 1:
        return None
    mean = routing.weight_norm.mean(1, keepdims=True)
    ratio = np.divide(routing.weight_norm, mean, out=np.ones_like(routing.weight_norm), where=mean > 0)
    figure = new_figure(1.1 + 0.17 * max(layers, 3))
    axes = figure.subplots()
    axes.imshow(_doubling(ratio, 1), aspect="auto", interpolation="none")
    axes.grid(visible=False)
    shown = range(layers) if layers <= 12 else range(0, layers, -(-layers // 12))
    axes.set_yticks(list(shown), [str(routing.layers[place]) for place in shown])
    _expert_ticks(axes, experts)
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")
    _tint_legend(figure, "half or less", "layer's mean", "double or more")
    smallest, largest = routing.weight_norm.min(1), routing.weight_norm.max(1)
    factor = np.divide(largest, smallest, out=np.full(layers, np.inf), where=smallest > 0)
    worst = int(factor.argmax())
    most, least = routing.weight_norm[worst].argmax(), routing.weight_norm[worst].argmin()
    caption = (
        f"Norm of each expert's weights at the end, over the mean of its layer, seed {routing.seed}. They differ most "
        f"in layer {routing.layers[worst]}, where expert {most} has {factor[worst]:.2f} times the norm of expert "
        f"{least}. Healthy is faint: experts that differ by more than a factor of {UNLIKE:g} were not trained alike, "
        f"mostly for want of tokens; {'some do' if factor[worst] > UNLIKE else 'none do'} here."
    )
    return Picture(f"expert-norms-{arm}", f"Weight norms of the experts of {arm}", caption, figure, arm)


def _pairs(arm: str, routing: Routing, tokens: int) -> Picture | None:
    """Heat map a layer, E × E: how often two experts are chosen together, against chance at their loads."""
    pairs = routing.overlap.sum((1, 2)) - np.trace(routing.overlap, axis1=1, axis2=2)
    if routing.experts < 3 or not pairs.any():  # top-1 makes no pairs, and two experts only one
        return None
    layers = _some(len(routing.layers))
    found = [pairs_over_chance(overlap) for overlap in routing.overlap]
    across = 2 if routing.experts > 16 or len(layers) in (2, 4) else 3
    down = -(-len(layers) // across)
    figure = new_figure(0.75 + (5.1 / across) * down)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, place in zip(grid.flat, layers, strict=False):
        ratio, expected = found[place]
        colours = _doubling((ratio * expected * tokens + PRIOR) / (expected * tokens + PRIOR), 2)
        colours[np.arange(routing.experts), np.arange(routing.experts)] = BLANK
        axes.imshow(colours, interpolation="none")
        axes.grid(visible=False)
        axes.set_title(f"layer {routing.layers[place]}")
        _expert_ticks(axes, routing.experts)
        axes.set_yticks(axes.get_xticks())
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_axis_off()
    figure.supxlabel("expert", fontsize=10, color=LIGHT["muted"])
    figure.supylabel("expert", fontsize=10, color=LIGHT["muted"])
    _tint_legend(figure, "a quarter or less", "as by chance", "four times or more")
    return Picture(
        f"expert-pairs-{arm}",
        f"Which experts of {arm} are chosen together",
        _pair_words(routing, found, tokens),
        figure,
        arm,
    )


def _pair_words(routing: Routing, found: Sequence[tuple[np.ndarray, np.ndarray]], tokens: int) -> str:
    """The pair that stands out most, of those with tokens enough to tell."""
    ratio = np.array([one[0] for one in found])
    counts = np.array([one[1] for one in found]) * tokens
    usual = float(np.median(counts[counts > 0]))
    words = (
        "Share of the tokens that chose both of two experts, over what chance makes of their loads, at the end, seed "
        f"{routing.seed}{_of_layers(len(routing.layers))}. Grey is an expert itself. Healthy is faint: two experts "
        "that are always chosen together act as one. "
    )
    enough = np.where(counts >= 10, ratio, 0)
    if enough.any():
        layer, one, other = np.unravel_index(int(enough.argmax()), enough.shape)
        load = np.diag(routing.overlap[layer])
        rarer = min((one, other), key=lambda expert: load[expert])
        partner = other if rarer == one else one
        both = routing.overlap[layer, one, other] / load[rarer]
        words += (
            f"The closest pair is {min(one, other)} and {max(one, other)} in layer {routing.layers[layer]}, "
            f"{enough.max():.1f} times as often as by chance: {both:.0%} of expert {rarer}'s tokens went to expert "
            f"{partner} too. "
        )
    chance = 1 / np.sqrt(usual)
    return words + (
        f"Chance alone moves a usual pair by about {chance:.0%}, as it is expected {usual:.1f} times in the {tokens:,} "
        f"tokens of one measurement; rare pairs are tinted less."
    )


def _types(arm: str, run: Run, layers: Sequence[int]) -> Picture | None:
    """Heat map a layer, types × experts: what an expert gets of a type, over what it gets of all tokens."""
    found = run.summary["token_types"]
    weights = np.array(found["share_of_tokens"], np.float64)
    there = np.flatnonzero(weights > 0)
    weights = weights[there]
    names = [found["types"][place] for place in there]
    # A type without tokens has no shares. (MoE layers, types, E)
    shares = np.array([[layer[place] for place in there] for layer in found["layers"]], np.float64)
    if not len(there) or shares.shape[2] == 1:
        return None
    shown = _some(len(layers))
    figure = new_figure(0.75 + (0.4 + 0.19 * len(names)) * len(shown))
    grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True)
    for axes, place in zip(grid.flat, shown, strict=True):
        axes.imshow(_doubling(types_over_chance(shares[place], weights), 2), aspect="auto", interpolation="none")
        axes.grid(visible=False)
        axes.set_title(f"layer {layers[place]}")
        axes.set_yticks(range(len(names)), [f"{name} {share:.0%}" for name, share in zip(names, weights, strict=True)])
        axes.tick_params(axis="y", length=0)
        _expert_ticks(axes, shares.shape[2])
    grid[-1, 0].set_xlabel("expert")
    _tint_legend(figure, "a quarter or less", "as of all tokens", "four times or more")
    caption = _type_words(run.seed, layers, names, shares, weights)
    return Picture(f"token-types-{arm}", f"Which experts of {arm} each type of token reaches", caption, figure, arm)


def _type_words(seed: int, layers: Sequence[int], names: Sequence[str], shares: np.ndarray, weights: np.ndarray) -> str:
    """How far types decide, layer by layer, and the expert that one type reaches most unlike the others."""
    moved = [moved_by_type(layer, weights) for layer in shares]
    ratios = np.array([types_over_chance(layer, weights) for layer in shares])
    ratios[:, weights < 0.01] = 0  # a rare type stands out by chance
    place, kind, expert = np.unravel_index(int(ratios.argmax()), ratios.shape)
    load = weights @ shares[place, :, expert] / weights.sum()
    return (
        f"An expert's share of a type's slots over its share of all slots, on the validation text, seed {seed}"
        f"{_of_layers(len(layers))}; beside each type is its share of the tokens. Most apart: expert {expert} of layer "
        f"{layers[int(place)]} gets {percent(shares[place, kind, expert])} of “{names[int(kind)]}” and {percent(load)} "
        f"of all. Were all types spread alike, {_span(min(moved), max(moved), '{:.0%}')} of a layer's slots would go "
        f"elsewhere, most in layer {layers[int(np.argmax(moved))]}. A faint map says that experts do not share the "
        "text by type; a strong one, that they do. Both are healthy as long as the load is balanced."
    )


def _some(layers: int) -> list[int]:
    """The places of all layers up to four, else of the first, the middle and the last."""
    return list(range(layers)) if layers <= 4 else [0, layers // 2, layers - 1]


def _of_layers(layers: int) -> str:
    return "" if layers <= 4 else f" (three of the {layers} layers are shown; the words are of all)"


def _expert_ticks(axes: Axes, experts: int) -> None:
    axes.set_xticks(range(experts) if experts <= 16 and axes.get_position().width > 0.5 else [0, experts - 1])


def _tint_legend(figure: Figure, under: str, even: str, over: str) -> None:
    """What the tints of heat maps are, above them."""
    legend = [
        Patch(facecolor=(*UNDER, 1), label=under),
        Patch(facecolor="none", edgecolor=LIGHT["muted"], label=even),
        Patch(facecolor=(*OVER, 1), label=over),
    ]
    figure.legend(handles=legend, loc="outside upper left", ncols=3, frameon=False, handlelength=1, columnspacing=1.2)


def tint(ratio: np.ndarray) -> np.ndarray:
    """RGBA of loads divided by the balanced one: transparent at 1, full at 0 and from 2 on."""
    strength = np.clip(np.abs(ratio - 1), 0, 1)[..., None]
    colour = np.where((ratio > 1)[..., None], OVER, UNDER)
    return np.concatenate([colour, strength], axis=-1)


def _doubling(ratio: np.ndarray, octaves: float) -> np.ndarray:
    """RGBA of ratios: transparent at 1, full `octaves` doublings or halvings from it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return tint(1 + np.nan_to_num(np.log2(ratio), nan=0.0, neginf=-octaves) / octaves)
