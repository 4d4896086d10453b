"""The backward passes of `model/linear.py`, `norm.py` and `fused_router.py` by the tiles that a program takes.

    python benchmarks/passes.py [--presets 5m 40m 124m 350m] [--sequences 32] [--passes norm] [--json FILE]

Each tile is held to what the model's own operator gives (the router's to PyTorch), and then timed as a CUDA graph, in
turns; GB/s count what has to be read and written once. The fastest are printed, and the tile that the model has.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro

from moelab.bench.clock import captured, wall_ms
from moelab.device import environment, resolve_device
from moelab.model import fused_router, linear, linear_kernels, norm, norm_kernels, router_kernels
from moelab.presets import preset

ACROSS = {"tall": (64, 128, 256), "rows": (4, 8, 16, 32), "columns": (256, 512), "warps": (4, 8)}  # of linear's
ALONG = {"tall": (16, 32, 64, 128, 256), "rows": (1, 2, 4), "warps": (1, 2, 4, 8)}  # of the norm's
ROUTED = {"programs": (512, 1024, 2048, 4096), "rows": (16, 32, 64), "columns": (64, 128, 256), "warps": (2, 4, 8)}
TIMES, EXPERTS = 8, 8  # in a graph; of the router
Tile = dict[str, int]
Two = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Benchmark:
    """Time the backward passes that sum over tokens."""

    presets: tuple[str, ...] = ("5m", "40m", "124m", "350m")
    """Sizes, whose context, heads, width and hidden size are taken."""
    passes: tuple[str, ...] = ("activation", "heads", "norm", "router")
    sequences: int = 32
    """Sequences of a micro-batch."""
    rounds: int = 5
    show: int = 5
    """Tiles that are printed."""
    device: str = "auto"
    json: Path | None = None


@dataclass(frozen=True)
class Pass:
    """One of them, at one size."""

    launch: Callable[[Tile], Two]
    """Its result and the sums of its programs, in memory that all tiles share."""
    own: Tile
    """The model's."""
    right: Two
    """What it should give."""
    bytes: int


def passes(name: str, settings: Benchmark, device: torch.device) -> dict[str, Pass]:
    model = preset(name).model
    tokens, width, hidden = settings.sequences * model.context, model.width, model.hidden_size
    g = torch.Generator(device).manual_seed(0)
    dh, z = (torch.randn(tokens, hidden, generator=g, device=device).bfloat16() for _ in range(2))
    x, d_normed, d_passed = (torch.randn(tokens, width, generator=g, device=device).bfloat16() for _ in range(3))
    weight = torch.randn(width, generator=g, device=device)
    three = torch.randn(3, settings.sequences, model.context, width, generator=g, device=device).bfloat16()
    dq, dk, dv = three.unflatten(3, (model.heads, -1)).transpose(2, 3).unbind(0)
    w, d_logits = (torch.randn(n, m, generator=g, device=device) for n, m in ((EXPERTS, width), (tokens, EXPERTS)))
    routed = d_passed.float().addmm(d_logits, w).bfloat16(), (d_logits.T @ x.float())[None]
    out = z.new_empty(max(hidden, 3 * width) * tokens)
    sums = z.new_empty(tokens // 16 * max(hidden, EXPERTS * width), dtype=torch.float32)

    def room(tile: Tile, shape: tuple[int, ...], columns: int) -> Two:
        programs = -(-tokens // tile["tall"])
        return out[: math.prod(shape)].view(shape), sums[: programs * columns].view(programs, columns)

    def activation(tile: Tile) -> Two:
        dz, parts = room(tile, (tokens, hidden), hidden)
        linear_kernels.activation_backward[(-(-hidden // tile["columns"]), len(parts))](
            dh, z, dz, parts, tokens, hidden, "gelu", tile["tall"], tile["rows"], tile["columns"],
            num_warps=tile["warps"],
        )  # fmt: skip
        return dz, parts

    def heads(tile: Tile) -> Two:
        d_qkv, parts = room(tile, (settings.sequences, model.context, 3 * width), 3 * width)
        linear_kernels.heads_backward[(-(-width // tile["columns"]), len(parts), 3)](
            dq, dk, dv, d_qkv, parts, tokens, model.context, width, *dq.stride()[:3], dq.shape[3],
            tile["tall"], tile["rows"], tile["columns"], num_warps=tile["warps"],
        )  # fmt: skip
        return d_qkv, parts

    def along(tile: Tile) -> Two:
        dx, parts = room(tile, (tokens, width), 3 * width)
        norm_kernels.norm_backward[(len(parts),)](
            d_normed, d_passed, x, weight, dx, parts, tokens, width, norm.EPSILON, True, tile["tall"], tile["rows"],
            triton.next_power_of_2(width), num_warps=tile["warps"],
        )  # fmt: skip
        return dx, parts

    def router(tile: Tile) -> Two:
        span = fused_router.span(tokens, tile["programs"], -(-width // tile["columns"]), tile["rows"])
        parts = sums[: -(-tokens // span) * EXPERTS * width].view(-1, EXPERTS, width)
        dx = out[: tokens * width].view(tokens, width)
        router_kernels.route_backward[(-(-width // tile["columns"]), len(parts))](
            x, w, d_logits, d_passed, dx, parts, tokens, width, EXPERTS, span,
            tile["rows"], fused_router._bins(EXPERTS), tile["columns"], num_warps=tile["warps"],
        )  # fmt: skip
        return dx, parts

    tall, operators = {"tall": linear._tall(tokens)}, torch.ops.moelab
    rows, _, warps = norm._tile(width)
    own = {"tall": norm._tall(tokens), "rows": rows, "warps": warps}
    return {
        "activation": Pass(
            activation, tall | linear.ACTIVATION._asdict(), operators.activation_backward(dh, z, "gelu"),
            6 * tokens * hidden,
        ),
        "heads": Pass(heads, tall | linear.HEADS._asdict(), operators.heads_backward(dq, dk, dv), 12 * tokens * width),
        "norm": Pass(along, own, operators.norm_backward(d_normed, d_passed, x, weight, True), 8 * tokens * width),
        "router": Pass(router, fused_router.BACKWARD._asdict(), routed, 6 * tokens * width),
    }  # fmt: skip


def tiles(name: str) -> list[Tile]:
    """Those that are tried."""
    values = {"norm": ALONG, "router": ROUTED}.get(name, ACROSS)
    return [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]


def error(found: Two, right: Two) -> float:
    pairs = ((a.flatten(), b.flatten()) for a, b in ((found[0], right[0]), (found[1].sum(0), right[1].sum(0))))
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def timed(size: str, name: str, one: Pass, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Every tile, the fastest first."""
    rows: list[dict[str, Any]] = []
    graphs = []
    for tile in tiles(name):
        rows.append({"size": size, "pass": name, "tile": tile, "error": error(one.launch(tile), one.right)})
        graph = captured(lambda tile=tile: [one.launch(tile) for _ in range(TIMES)], device)  # type: ignore[misc]
        assert graph is not None, "needs a GPU"
        graphs.append(graph)
    times = [[wall_ms(graph, 1, device) / TIMES for graph in graphs] for _ in range(rounds)]
    for row, own_times in zip(rows, zip(*times, strict=True), strict=True):
        row["us"] = 1e3 * statistics.median(own_times)
        row["gb_per_s"] = one.bytes / row["us"] / 1e3
    return sorted(rows, key=lambda row: row["us"])


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device(settings.device)
    facts = environment(device, torch.bfloat16)
    print(f"{facts['device']}, PyTorch {facts['torch']}")
    rows: list[dict[str, Any]] = []
    for size in settings.presets:
        for name, one in passes(size, settings, device).items():
            if name not in settings.passes:
                continue
            found = timed(size, name, one, settings.rounds, device)
            rows += found
            for place, row in enumerate(found):
                if place < settings.show or row["tile"] == one.own:
                    tile = " ".join(f"{key} {value}" for key, value in row["tile"].items())
                    print(
                        f"{size:>5} {name:<11}{row['us']:7.1f} µs {row['gb_per_s']:6.0f} GB/s  "
                        f"error {row['error']:.0e}  {tile}{', the model’s' if row['tile'] == one.own else ''}"
                    )
    if settings.json:
        settings.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
