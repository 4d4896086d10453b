"""AdamW with clipping: PyTorch's fused kernel against ours, for all parameters of a model.

    python benchmarks/optimizer.py [--models 5m:dense 124m:moe …] [--blocks 2048x4 …] [--json FILE]

Of each model as many numbers as it has parameters, in tensors of their shapes, with gradients. A step is clipping and
AdamW, captured in a CUDA graph on GPUs, timed in turns. Ways: PyTorch's; ours with fp32 and with bf16 moments, on GPUs
for each of `--blocks`, which are a program's numbers at once × how many times × warps; and the norm of the gradients
alone. First each way's step is held to PyTorch's in float64. Bytes moved are 4 of each gradient for the norm and 28 a
parameter for the step, 20 with bf16 moments; PyTorch's clipping moves 8 more, which do not count.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from moelab.bench.clock import captured, wall_ms
from moelab.device import compute_dtype, environment, resolve_device, synchronize
from moelab.model import GPT
from moelab.presets import arm_model, preset
from moelab.training.optimizer import AdamW, _Launch, clip_gradients


@dataclass(frozen=True)
class Benchmark:
    """Time AdamW with clipping."""

    models: tuple[str, ...] = ("5m:dense", "5m:moe", "124m:dense", "124m:moe")
    """Sizes and arms."""
    blocks: tuple[str, ...] = ("512x16x4", "1024x2x4", "1024x8x4", "2048x4x4", "2048x4x8")
    rounds: int = 5
    device: str = "auto"
    json: Path | None = None


def shapes(name: str) -> list[torch.Size]:
    size, arm = name.split(":")
    chosen = preset(size)
    config = chosen.model if arm == "dense" else arm_model(arm, chosen.model, chosen.moe)
    with torch.device("meta"):
        return [p.shape for p in GPT(config).parameters()]


class Way:
    """One optimizer over parameters of given shapes; they and their gradients are the same for every way."""

    def __init__(self, made: list[torch.Size], block: str | None, moments: torch.dtype, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=g, device=device)
        self.parameters = [torch.nn.Parameter(draw(shape)) for shape in made]
        for p in self.parameters:
            p.grad = draw(p.shape)
        groups = [{"params": self.parameters, "weight_decay": 0.1}]
        rate = torch.full((), 1e-3, device=device)  # a graph would copy a number from the host, at each step
        if block is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, rate, (0.9, 0.95), fused=True, capturable=device.type == "cuda"
            )
            return
        self.optimizer = AdamW(groups, rate, (0.9, 0.95), 1e-8, moments)
        if block:
            _Launch.BLOCK, _Launch.BLOCKS, _Launch.WARPS = map(int, block.split("x"))
            self.optimizer.launches = [_Launch(self.parameters)]

    def __call__(self) -> None:
        clip_gradients(self.parameters, self.optimizer, 1.0)
        self.optimizer.step()

    def check(self) -> None:
        """Holds two steps to PyTorch's in float64."""
        rights = [torch.nn.Parameter(p.detach().double()) for p in self.parameters]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        for p, gradient in zip(rights, gradients, strict=True):
            p.grad = gradient.double() / max(norm.item(), 1.0)
        right = torch.optim.AdamW(rights, 1e-3, (0.9, 0.95), weight_decay=0.1)
        before = [p.detach().clone() for p in rights]
        for _ in range(2):
            self()
            right.step()
        for p, exact, start in zip(self.parameters, rights, before, strict=True):
            way = exact - start
            error = (p.double() - start - way).norm() / way.norm()
            assert error.item() <= 1e-3, error.item()  # fp32 parameters of about 1 move by about 1e-3


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device(settings.device)
    blocks = settings.blocks if device.type == "cuda" else ("",)
    small = [torch.Size([3000, 7]), torch.Size([5]), torch.Size([64, 64])]
    ways = {"PyTorch's": (None, torch.float32)}
    for moments in (torch.float32, torch.bfloat16):
        for block in blocks:
            ways[f"ours, {str(moments).removeprefix('torch.')} {block}".rstrip()] = (block, moments)
    for block, moments in ways.values():
        Way(small, block, moments, device).check()
    rows: list[dict[str, Any]] = []
    for name in settings.models:
        rows += timed(name, ways, settings, device)
    facts = environment(device, compute_dtype("auto", device))
    console, table = Console(), Table("model", "parameters", "way", "ms", "TB/s")
    console.print(f"{facts['device']}, PyTorch {facts['torch']}", highlight=False)
    for row in rows:
        table.add_row(
            row["model"], f"{row['parameters'] / 1e6:,.1f} M", row["way"], f"{row['ms']:.3f}", f"{row['tb_per_s']:.2f}"
        )
    console.print(table)
    if settings.json:
        settings.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


def timed(
    name: str, ways: dict[str, tuple[str | None, torch.dtype]], settings: Benchmark, device: torch.device
) -> list[dict[str, Any]]:
    """Milliseconds of each way, in turns."""
    made = shapes(name)
    count = sum(shape.numel() for shape in made)
    steps: dict[str, tuple[Callable[[], object], float]] = {}
    held = []  # a graph does not hold what it was captured from
    for way, (block, moments) in ways.items():
        step = Way(made, block, moments, device)
        held.append(step)
        graph = captured(step, device)
        if isinstance(step.optimizer, AdamW):
            step.optimizer.settle()
        steps[way] = (graph or step), count * (32 if moments == torch.float32 else 24)
        if way == "PyTorch's":
            norm = partial(torch.nn.utils.get_total_norm, [p.grad for p in step.parameters if p.grad is not None])
            steps["the norm alone"] = (captured(norm, device) or norm), count * 4
    times: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(settings.rounds + 1):
        for way, (run, _) in steps.items():
            ms = wall_ms(run, 10 if device.type == "cuda" else 1, device)
            if number:
                times[way].append(ms)
    synchronize(device)
    found = {way: statistics.median(ms) for way, ms in times.items()}
    return [
        {"model": name, "parameters": count, "way": way, "ms": ms, "tb_per_s": steps[way][1] / ms / 1e9}
        for way, ms in found.items()
    ]


if __name__ == "__main__":
    main()
