"""Searches the tiles of the Triton kernels (`moelab.experts.triton.TILES`) on the GPU at hand.

    python benchmarks/tiles.py [--widths 256 512 768 1024] [--products up slope] [--json FILE]

Each product of one MoE layer (T = 32,768, E = 8, K = 2, F = 4·D, GELU, bf16, random routing) is timed with every
candidate, in turns, after its result was held against the first candidate's; then the best two with other groups.
Worker processes compile all candidates first. Prints TFLOP/s, and the best as a table to put into `triton.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moelab.bench.clock import wall_ms
from moelab.device import environment
from moelab.experts import triton
from moelab.experts.triton import Tile

TOKENS, EXPERTS, TOP_K, MULTIPLE = 32_768, 8, 2, 4
PLAIN = [
    Tile(128, 128, 64), Tile(128, 128, 64, stages=4), Tile(128, 128, 64, warps=4), Tile(128, 256, 64),
    Tile(128, 256, 64, stages=4), Tile(256, 128, 64), Tile(256, 128, 64, stages=4),
    Tile(128, 64, 64, warps=4, stages=4), Tile(64, 128, 64, warps=4, stages=4),
    Tile(64, 256, 64, warps=4, stages=3), Tile(128, 128, 128, stages=2), Tile(128, 128, 32, stages=5),
]  # fmt: skip
SLOPE = [
    Tile(128, 128, 64, halves=True), Tile(128, 128, 64, halves=True, registers=128), Tile(128, 128, 64),
    Tile(128, 64, 64), Tile(128, 64, 64, stages=4, registers=128), Tile(128, 64, 64, warps=4, halves=True),
    Tile(128, 64, 64, warps=4, halves=True, registers=168), Tile(64, 64, 64, warps=4, stages=4),
    Tile(64, 128, 64, warps=4, halves=True), Tile(64, 128, 64, warps=4, halves=True, registers=168),
    Tile(128, 256, 64, halves=True),
]  # fmt: skip
UP = [*PLAIN, Tile(128, 128, 64, registers=128), Tile(128, 128, 64, warps=4, registers=168)]
CHUNKS = (1 << 30, 16384, 10240, 4096, 2048)
GRADIENT = [
    Tile(128, 128, 64), Tile(128, 128, 64, stages=4), Tile(128, 128, 64, warps=4), Tile(128, 256, 64),
    Tile(128, 256, 64, stages=4), Tile(256, 128, 64), Tile(256, 128, 64, stages=4), Tile(128, 128, 128, stages=2),
    Tile(64, 128, 64, warps=4, stages=4), Tile(128, 256, 32, stages=5),
]  # fmt: skip
CANDIDATES = {
    name: [*tiles, *(tile._replace(maps=True) for tile in tiles[:7])]
    for name, tiles in {
        "up": UP, "down": PLAIN, "slope": SLOPE, "back": PLAIN, "in": GRADIENT, "out": GRADIENT
    }.items()
}  # fmt: skip


@dataclass
class Layer:
    """What the products of one layer read and write."""

    width: int

    def __post_init__(self) -> None:
        g = torch.Generator("cuda").manual_seed(0)
        width, hidden = self.width, MULTIPLE * self.width

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=g, device="cuda") * scale).bfloat16()

        self.x, self.dy = draw(TOKENS, width), draw(TOKENS, width)
        self.w_in, self.w_out = draw(EXPERTS, hidden, width, scale=0.02), draw(EXPERTS, width, hidden, scale=0.02)
        indices = torch.rand(TOKENS, EXPERTS, generator=g, device="cuda").topk(TOP_K).indices
        self.weights = torch.rand(TOKENS, TOP_K, generator=g, device="cuda")
        self.slot_of_row, _, self.offsets = triton.sort_slots(indices, EXPERTS)
        self.z, self.h = draw(TOKENS * TOP_K, hidden), draw(TOKENS * TOP_K, hidden)
        self.wide, self.narrow = torch.empty_like(self.z), torch.empty(TOKENS * TOP_K, width, device="cuda").bfloat16()
        self.second = torch.empty_like(self.z)
        self.partial = torch.empty(TOKENS * TOP_K, hidden // 16, device="cuda")

    def step(self, product: str) -> Callable[[], torch.Tensor]:
        """One launch of a product; returns what it wrote."""
        width, hidden = self.width, MULTIPLE * self.width
        gathered: dict[str, Any] = {"slot_of_row": self.slot_of_row, "top_k": TOP_K, "activation": "gelu"}

        def up() -> torch.Tensor:
            triton._product(
                "up", self.x, self.w_in, hidden, self.offsets, out=self.wide, h=self.second, epilogue="act",
                **gathered,
            )  # fmt: skip
            return self.second

        def down() -> torch.Tensor:
            triton._product("down", self.h, self.w_out, width, self.offsets, out=self.narrow)
            return self.narrow

        def slope() -> torch.Tensor:
            triton._product(
                "slope", self.dy, self.w_out, hidden, self.offsets, out=self.wide,
                h=self.second, z=self.z, weights=self.weights, partial=self.partial, epilogue="slope", **gathered,
            )  # fmt: skip
            return self.wide

        def back() -> torch.Tensor:
            triton._product("back", self.h, self.w_in, width, self.offsets, out=self.narrow)
            return self.narrow

        def gradient_in() -> torch.Tensor:
            return triton._weight_gradient("in", self.h, self.x, self.offsets, self.slot_of_row, TOP_K, self.w_in)

        def gradient_out() -> torch.Tensor:
            return triton._weight_gradient("out", self.dy, self.h, self.offsets, self.slot_of_row, TOP_K, self.w_out)

        return {"up": up, "down": down, "slope": slope, "back": back, "in": gradient_in, "out": gradient_out}[product]


def with_tile(product: str, tile: Tile, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        triton.TILES[product] = {1 << 30: tile}
        return step()

    return run


def compile_all(job: tuple[int, list[tuple[str, Tile]]]) -> list[tuple[str, Tile, str]]:
    """In a worker: launches each candidate once, so that it is in Triton's cache; returns what fails, and why."""
    width, candidates = job
    layer, failed = Layer(width), []
    for product, tile in candidates:
        try:
            with_tile(product, tile, layer.step(product))()
            torch.cuda.synchronize()
        except Exception as problem:
            failed.append((product, tile, str(problem).splitlines()[0]))
    return failed


def search(width: int, product: str, candidates: list[Tile], rounds: int) -> list[dict[str, Any]]:
    """Times the candidates; fastest first."""
    layer, device = Layer(width), torch.device("cuda")
    step = layer.step(product)
    right, kept = None, {}
    for tile in candidates:
        result = with_tile(product, tile, step)().clone()
        right = result if right is None else right
        if ((result - right).float().norm() <= 1e-2 * right.float().norm()).item():
            kept[tile] = with_tile(product, tile, step)
        else:
            print(f"D = {width} {product}: {tile} is wrong", flush=True)
    times: dict[Tile, list[float]] = {tile: [] for tile in kept}
    for _ in range(rounds):
        for tile, run in kept.items():
            run()
            times[tile].append(wall_ms(run, 5, device))
    flops = 2 * TOKENS * TOP_K * width * MULTIPLE * width
    found = [{"tile": tile._asdict(), "ms": statistics.median(ms)} for tile, ms in times.items()]
    for row in found:
        row["tflops"] = flops / row["ms"] / 1e9
    return sorted(found, key=lambda row: row["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--products", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    jobs = [(name, tile) for name in settings.products for tile in CANDIDATES[name]]
    shares = [(settings.widths[0], jobs[i :: settings.workers]) for i in range(settings.workers)]
    with multiprocessing.get_context("spawn").Pool(settings.workers) as pool:
        failed = [bad for part in pool.map(compile_all, shares) for bad in part]
    for product, tile, reason in failed:
        print(f"{product}: {tile} does not run: {reason}")
    broken = {(product, tile) for product, tile, _ in failed}
    best: dict[str, dict[int, Tile]] = {name: {} for name in settings.products}
    rows = []
    for width in settings.widths:
        for name in settings.products:
            candidates = [tile for tile in CANDIDATES[name] if (name, tile) not in broken]
            found = search(width, name, candidates, settings.rounds)
            leaders = [Tile(**row["tile"]) for row in found[:2]]
            if name in ("in", "out"):
                further = [tile._replace(chunk=chunk) for tile in leaders for chunk in CHUNKS]
            else:
                further = [tile._replace(group=group) for tile in leaders for group in (1, 4, 8, 16, 32)]
            last = search(width, name, further, settings.rounds)  # the GPU may be hotter by now: not beside the first
            best[name][width] = Tile(**last[0]["tile"])
            rows += [{"width": width, "product": name, **row} for row in found + last]
            print(f"D = {width} {name}")
            for row in found[:4] + found[-1:] + last[:3]:
                print(f"    {row['ms']:.4f} ms {row['tflops']:6.1f} TFLOP/s  {Tile(**row['tile'])}", flush=True)
    for name, tiles in best.items():
        print(f'    "{name}": {{')
        for width, tile in tiles.items():
            print(f"        {width}: {tile},")
        print("    },")
    if settings.json:
        found = environment(torch.device("cuda"), torch.bfloat16)
        settings.json.write_text(json.dumps({"environment": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
