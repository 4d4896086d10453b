"""The kernels of the backends `cuda` and `hopper`, and of the router, one by one.

    python benchmarks/rows.py [--width 768 --multiple 4 …] [--json FILE]

Of one layer's shapes, bf16, GELU, with biases and random routing: microseconds of each kernel, bytes that it cannot
help moving (its inputs once, its outputs once) a second, and of the products the FLOPs. Each is a CUDA graph of
`--repeat` launches, in turns over `--rounds`; the median counts. Inputs larger than the second-level cache are what a
layer has, so a kernel's own may be partly there. First the layer is held to float64.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from moelab.bench.clock import captured, wall_ms
from moelab.bench.layer import TOLERANCE
from moelab.device import environment, resolve_device
from moelab.experts import cuda, hopper, nvrtc, reference
from moelab.experts.cuda import Rows
from moelab.experts.hopper import Products
from moelab.model import fused_router


@dataclass(frozen=True)
class Benchmark:
    """Time the kernels of a layer."""

    width: int = 768
    multiple: float = 4.0
    tokens: int = 32_768
    experts: int = 8
    top_k: int = 2
    repeat: int = 8
    rounds: int = 7
    json: Path | None = None


Kernel = tuple[Callable[[], object], int, int]  # what launches it, bytes, FLOPs


def kernels(settings: Benchmark, device: torch.device) -> dict[str, Kernel]:
    """By name; all of the gradients of one layer, in their order."""
    tokens, width, top_k, experts = settings.tokens, settings.width, settings.top_k, settings.experts
    hidden, slots = round(settings.multiple * width), tokens * top_k
    draw = partial(torch.randn, device=device)
    x, dy = draw(tokens, width).bfloat16(), draw(tokens, width).bfloat16()
    w_in, w_out = (draw(experts, *s).bfloat16() / s[1] ** 0.5 for s in ((hidden, width), (width, hidden)))
    b_in, b_out = draw(experts, hidden).bfloat16(), draw(experts, width).bfloat16()
    router = draw(experts, width)
    choose = partial(torch.ops.moelab.route, x, router, None, top_k, "softmax", "chosen")
    weights, indices, logits = choose()
    d_weights, d_logits = torch.randn_like(weights), torch.randn_like(logits)
    with nvrtc.launches(device) as launch:
        routing = cuda.route(launch, indices, experts)
        rows = Rows(launch, cuda._rows(torch.bfloat16, "gelu"), routing, indices)
        dispatched, z, d_h = rows.dispatch(x), draw(slots, hidden).bfloat16(), draw(slots, hidden).bfloat16()
    found: dict[str, Kernel] = {}

    def add(name: str, work: Callable[[Rows, Products], object], numbers: float, flops: int = 0) -> None:
        def launches() -> None:
            with nvrtc.launches(device) as launch:
                work(
                    Rows(launch, rows.source, routing, indices),
                    Products(launch, routing.offsets, device),
                )

        found[name] = (launches, int(2 * numbers), flops)

    t, n, f = tokens * width, slots * width, slots * hidden  # numbers of two bytes
    matrices, product = experts * hidden * width, 2 * slots * width * hidden
    found["route (router)"] = (choose, 2 * t, 0)
    add("route", lambda r, p: cuda.route(r.launch, indices, experts), 4 * slots + 4 * slots)
    add("dispatch", lambda r, p: r.dispatch(x), t + n)
    add("dispatch_dots", lambda r, p: r.dispatch_dots(dy, b_out), t + n)
    add("forward, up", lambda r, p: p.forward(dispatched, w_in), n + f + matrices, product)
    add("activate", lambda r, p: r.activate(z, b_in, hidden), 2 * f)
    add("up", lambda r, p: p.up(dispatched, w_in, b_in, "gelu"), n + 2 * f + matrices, product)
    add("forward, down", lambda r, p: p.forward(z, w_out), n + f + matrices, product)
    add("combine, weighted", lambda r, p: r.combine(dispatched, weights, b_out), n + t)
    add("backward, down", lambda r, p: p.backward(dispatched, w_out), n + f + matrices, product)
    add(
        "weighted_backward and slot_gradient", lambda r, p: r.weighted_backward(z, b_in, d_h, weights, d_weights), 4 * f
    )
    add("the same without biases", lambda r, p: r.weighted_backward(z, None, d_h, weights, None), 4 * f)
    add("slope", lambda r, p: p.slope(dispatched, w_out, z, r, weights, b_in, "gelu"), n + 3 * f + matrices, product)
    add("weight_gradient, out", lambda r, p: p.weight_gradient(dispatched, z), n + f + 2 * matrices, product)
    add("bias_gradient, out", lambda r, p: r.bias_gradient(dy, weights), n)
    add("weight_gradient, in", lambda r, p: p.weight_gradient(z, dispatched), n + f + 2 * matrices, product)
    add("backward, up", lambda r, p: p.backward(z, w_in), n + f + matrices, product)
    add("combine", lambda r, p: r.combine(dispatched), n + t)
    found["route_backward (router)"] = (
        lambda: torch.ops.moelab.route_backward(
            dy, d_weights, d_logits, x, router, indices, logits, "softmax", "chosen"
        ),
        2 * 3 * t,
        0,
    )
    return found


def check(settings: Benchmark, device: torch.device) -> float:
    """The worst relative error of a layer's output and gradients against float64, without clusters and with them."""
    many = hopper.LOWEST * settings.experts // settings.top_k + 77
    return max(_error(settings, tokens, device) for tokens in (700, many))


def _error(settings: Benchmark, tokens: int, device: torch.device) -> float:
    draw = partial(torch.randn, device=device)
    width, hidden, experts = settings.width, round(settings.multiple * settings.width), settings.experts
    x, weights = draw(tokens, width), torch.rand(tokens, settings.top_k, device=device)
    indices = torch.rand(tokens, experts, device=device).topk(settings.top_k).indices
    parameters = [
        draw(experts, hidden, width),
        draw(experts, width, hidden),
        draw(experts, hidden),
        draw(experts, width),
    ]
    leaves = [x, weights, *(p / p.shape[-1] ** 0.5 if p.ndim == 3 else p for p in parameters)]
    results = []
    for module, dtype in ((hopper, torch.bfloat16), (reference, torch.float64)):
        own = [
            t.bfloat16().to(torch.promote_types(dtype, torch.float32) if i == 1 else dtype).requires_grad_()
            for i, t in enumerate(leaves)
        ]
        y = module.expert_mlp(own[0], own[1], indices, *own[2:], "gelu")
        results.append([y, *torch.autograd.grad(y, own, torch.ones_like(y))])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device("auto")
    reason = "needs a GPU" if device.type != "cuda" else hopper.unusable(device)
    if reason is not None:
        raise SystemExit(f"rows.py: device = {device.type}: {reason}")
    assert fused_router.usable(torch.zeros(1, 1, device=device), settings.experts, settings.top_k)
    error = check(settings, device)
    assert error <= TOLERANCE[torch.bfloat16], error
    found = kernels(settings, device)

    def several(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: [work() for _ in range(settings.repeat)]

    graphs = {name: captured(several(work), device) for name, (work, _, _) in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(settings.rounds):
        for name, graph in graphs.items():
            assert graph is not None, name
            times[name].append(1e3 * wall_ms(graph, 1, device) / settings.repeat)
    table = Table("kernel", "µs", "TB/s", "TFLOP/s")
    rows = []
    for name, (_, moved, flops) in found.items():
        took = statistics.median(times[name])
        rows.append({"kernel": name, "us": took, "bytes": moved, "flops": flops})
        table.add_row(
            name,
            f"{took:.1f}",
            f"{moved / took / 1e6:.2f}" if not flops else "",
            f"{flops / took / 1e6:.0f}" if flops else "",
        )
    Console().print(table)
    if settings.json is not None:
        chosen = asdict(settings) | {"json": None}
        found_there = {"settings": chosen, "environment": environment(device, torch.bfloat16), "rows": rows}
        settings.json.write_text(json.dumps(found_there, indent=2) + "\n")


if __name__ == "__main__":
    main()
