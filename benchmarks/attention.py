"""Causal attention by each of PyTorch's backends, forward and backward, at the sizes' shapes.

    python benchmarks/attention.py [--presets 5m 40m 124m 350m] [--sequences 32] [--json FILE]

In turns, captured as a CUDA graph where that can be; q, k and v are views of one projection, as the model has them.
TFLOP/s count the causal half. The worst relative error is against float64.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from moelab.bench.clock import captured, wall_ms
from moelab.device import compute_dtype, environment, resolve_device
from moelab.presets import preset

WAYS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Benchmark:
    """Time causal attention with each of PyTorch's backends."""

    presets: tuple[str, ...] = ("5m", "40m", "124m", "350m")
    """Sizes, whose context, heads and width are taken."""
    sequences: int = 32
    """Sequences of a micro-batch."""
    ways: tuple[str, ...] = ("flash", "efficient", "cudnn")
    """flash, efficient, cudnn, math."""
    rounds: int = 7
    device: str = "auto"
    json: Path | None = None


def attend(qkv: torch.Tensor, way: SDPBackend | None) -> torch.Tensor:
    """qkv (B, C, 3, heads, head) → (B, C, heads, head)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if way is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    with sdpa_kernel(way):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def step(qkv: torch.Tensor, upstream: torch.Tensor, way: SDPBackend | None) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Output and gradient."""

    def run() -> tuple[torch.Tensor, ...]:
        y = attend(qkv, way)
        return (y.detach(), *torch.autograd.grad(y, qkv, upstream))

    return run


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device(settings.device)
    dtype = compute_dtype("auto", device)
    rows: list[dict[str, Any]] = []
    for name in settings.presets:
        model = preset(name).model
        shape = (settings.sequences, model.context, 3, model.heads, model.width // model.heads)
        g = torch.Generator(device).manual_seed(0)
        qkv = torch.randn(shape, generator=g, device=device).to(dtype).requires_grad_()
        upstream = torch.randn(*shape[:2], *shape[3:], generator=g, device=device).to(dtype)
        few = qkv[:1].detach().double().requires_grad_()
        expected = step(few, upstream[:1].double(), SDPBackend.MATH)()
        steps: dict[str, Callable[[], object]] = {}
        for way in ("default", *settings.ways):
            row: dict[str, Any] = {"preset": name, "shape": shape, "way": way}
            rows.append(row)
            run = step(qkv, upstream, WAYS.get(way))
            try:
                found = run()
            except RuntimeError as problem:  # none of the kernel's conditions is met
                row["reason"] = str(problem).splitlines()[0]
                continue
            pairs = zip(found, expected, strict=True)
            row["error"] = torch.stack([(a[:1].double() - b).norm() / b.norm() for a, b in pairs]).max().item()
            steps[way] = captured(run, device) or run
        times: dict[str, list[float]] = {way: [] for way in steps}
        for _ in range(settings.rounds):
            for way, run in steps.items():
                times[way].append(wall_ms(run, 5, device))
        flops = 7 * shape[0] * shape[3] * shape[1] ** 2 * shape[4]  # 2 products forward, 5 backward, half of each
        for row in rows:
            if row["preset"] == name and row["way"] in times:
                row["ms"] = statistics.median(times[row["way"]])
                row["tflops"] = flops / row["ms"] / 1e9
    facts = environment(device, dtype)
    print(f"{facts['device']}, PyTorch {facts['torch']}, {facts['precision']}")
    for row in rows:
        figures = (
            f"{row['ms']:.3f} ms {row['tflops']:.0f} TFLOP/s, error {row['error']:.1e}"
            if "ms" in row
            else row["reason"]
        )
        print(f"{row['preset']:>5} {row['shape']!s:<24} {row['way']:<10} {figures}")
    if settings.json:
        settings.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
