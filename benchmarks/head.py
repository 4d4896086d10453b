"""The output head and its loss: whole logits against chunks, and against other packages' where they are installed.

    python benchmarks/head.py [--presets 5m 40m 124m 350m] [--sequences 32] [--kernels 32x2 …] [--json FILE]

Times forward and backward, from the normed hidden states to the gradients of them and of the fp32 weight, in turns, and
takes each way's peak memory over what was there before. `moelab.model.head.CHUNK` is chosen from it. On GPUs the
whole logits are compiled, as training would compile them; and the softmax alone is timed for each of `--kernels`, which
are warps × programs of a multiprocessor, as `softmax_kernel` takes them. One read and one write of the
logits count as moved. Others, on GPUs: Liger (`pip install --no-deps liger-kernel`) and Apple's cut cross-entropy
(`pip install --no-deps cut-cross-entropy`; without its filter of small gradients, since random logits have no others);
anywhere PyTorch's own, from 2.13 on.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from moelab.bench.clock import wall_ms
from moelab.device import (
    compute_dtype,
    environment,
    keep_freed_memory,
    peak_memory,
    reset_peak_memory,
    resolve_device,
    synchronize,
)
from moelab.model.head import next_token_loss, softmax_kernel
from moelab.presets import preset

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Benchmark:
    """Time the output head with its loss, forward and backward."""

    presets: tuple[str, ...] = ("5m", "40m", "124m", "350m")
    """Sizes, whose context and width are taken."""
    sequences: int = 32
    """Sequences of a micro-batch."""
    vocabulary: int = 50_304
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    """Most tokens at once."""
    torch: bool = True
    """PyTorch's own too, where it has one."""
    kernels: tuple[str, ...] = ("32x2", "16x2", "32x1", "16x4", "8x8")
    """On GPUs."""
    tokens: int = 8192
    """Rows of logits for `kernels`."""
    rounds: int = 5
    compile: bool | None = None
    """Compile the whole logits; on GPUs when not given."""
    device: str = "auto"
    json: Path | None = None


def whole(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w.to(x.dtype).T).float(), targets)


def torchs_own(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """PyTorch 2.13's chunked operator, with the weight cast as ours casts it."""
    return F.linear_cross_entropy(x, w.to(x.dtype), targets, options=torch.nn.LinearCrossEntropyOptions())


def liger(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: torch.Tensor = liger_fused_linear_cross_entropy(x, w.to(x.dtype), targets, accum_dtype=torch.float32)
    return loss


def cut(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: torch.Tensor = linear_cross_entropy(x, w.to(x.dtype), targets, filter_eps=None)
    return loss


OTHERS: dict[str, tuple[str, Loss]] = {"Liger": ("liger_kernel", liger), "cut": ("cut_cross_entropy", cut)}


class Head:
    """One size's hidden states, weight and targets, and the ways to its loss."""

    def __init__(self, name: str, settings: Benchmark, device: torch.device) -> None:
        model = preset(name).model
        dtype = compute_dtype("auto", device)
        self.name, self.device = name, device
        self.tokens, self.width, self.vocabulary = settings.sequences * model.context, model.width, settings.vocabulary
        g = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(self.tokens, self.width, generator=g, device=device).to(dtype).requires_grad_()
        self.w = (0.02 * torch.randn(self.vocabulary, self.width, generator=g, device=device)).requires_grad_()
        self.targets = torch.randint(0, self.vocabulary, (self.tokens,), generator=g, device=device)
        self.logits_bytes = self.tokens * self.vocabulary * dtype.itemsize
        compiled = device.type == "cuda" if settings.compile is None else settings.compile
        self.ways: dict[str, Loss] = {"whole": torch.compile(whole) if compiled else whole, "one chunk": one_chunk}
        for tokens in settings.chunks:
            if tokens < self.tokens:
                self.ways[f"chunks of {tokens:,}"] = partial(next_token_loss, chunk=tokens)
        if settings.torch and hasattr(F, "linear_cross_entropy"):
            self.ways["PyTorch's"] = torchs_own
        if device.type == "cuda":
            self.ways |= {name: loss for name, (package, loss) in OTHERS.items() if importlib.util.find_spec(package)}

    def run(self, way: str) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.ways[way](self.x, self.w, self.targets), [self.x, self.w])

    def check(self) -> None:
        """Holds every way's gradients against those of whole logits; other packages' that are wrong are not timed."""
        expected = self.run("whole")
        for way in list(self.ways):
            try:
                errors = [
                    ((one - other).norm() / other.norm()).item()
                    for one, other in zip(self.run(way), expected, strict=True)
                ]
                assert max(errors) <= 2e-2, (self.name, way, errors)
            except Exception as problem:
                if way not in OTHERS:
                    raise
                print(f"{self.name} {way}: {problem}")
                del self.ways[way]

    def memory(self, way: str) -> int | None:
        """Bytes at the peak over what was there before."""
        synchronize(self.device)
        reset_peak_memory(self.device)
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else peak_memory(self.device)
        self.run(way)
        synchronize(self.device)
        after = peak_memory(self.device)
        return after - before if after is not None and before is not None else None


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device(settings.device)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name in settings.presets:
        head = Head(name, settings, device)
        head.check()
        for way in head.ways:
            rows[name, way] = {
                "preset": name, "tokens": head.tokens, "width": head.width, "vocabulary": head.vocabulary,
                "logits_bytes": head.logits_bytes, "way": way, "peak_bytes": head.memory(way),
            }  # fmt: skip
    if device.type == "cpu":
        keep_freed_memory()  # as training does; afterwards its use says nothing of a single call
    for name in settings.presets:
        head = Head(name, settings, device)
        times: dict[str, list[float]] = {way: [] for way in head.ways if (name, way) in rows}
        for number in range(settings.rounds + 1):
            for way, found in times.items():
                ms = wall_ms(partial(head.run, way), 1 if device.type == "cpu" else 5, device)
                if number:  # the first round compiles and allocates
                    found.append(ms)
        for way, found in times.items():
            ms = statistics.median(found)
            flops = 6 * head.tokens * head.width * head.vocabulary
            rows[name, way] |= {"ms": ms, "tflops": flops / ms / 1e9}
    facts = environment(device, compute_dtype("auto", device))
    show(list(rows.values()), facts)
    kernels = softmax(settings, device) if device.type == "cuda" else []
    if settings.json:
        found = {"environment": facts, "rows": list(rows.values()), "kernels": kernels}
        settings.json.write_text(json.dumps(found, indent=2) + "\n")


def softmax(settings: Benchmark, device: torch.device) -> list[dict[str, Any]]:
    """Times the kernels in turns; what each leaves is the next one's logits."""
    logits = torch.randn(settings.tokens, settings.vocabulary, device=device, dtype=compute_dtype("auto", device))
    targets = torch.randint(0, settings.vocabulary, (settings.tokens,), device=device)
    times: dict[str, list[float]] = {kernel: [] for kernel in settings.kernels}
    for number in range(settings.rounds + 1):
        for kernel, found in times.items():
            warps, programs = map(int, kernel.split("x"))
            ms = wall_ms(partial(softmax_kernel, logits, targets, warps, programs), 10, device)
            if number:
                found.append(ms)
    table = Table("warps × programs", "us", "TB/s")
    rows = []
    for kernel, found in times.items():
        ms = statistics.median(found)
        moved = 2 * logits.nbytes / ms / 1e9
        rows.append({"kernel": kernel, "ms": ms, "tb_per_s": moved})
        table.add_row(kernel, f"{ms * 1e3:.0f}", f"{moved:.2f}")
    Console().print(table)
    return rows


def one_chunk(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Our operator on all tokens at once: what it is worth without its saving of memory."""
    loss: torch.Tensor = torch.ops.moelab.head_loss(x, w, targets, len(x))[0]
    return loss


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{facts['device']}, PyTorch {facts['torch']}, {facts['precision']}", highlight=False)
    table = Table("preset", "tokens", "logits, MiB", "way", "ms", "TFLOP/s", "peak, MiB")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] is not None else ""
        table.add_row(
            row["preset"], f"{row['tokens']:,}", f"{row['logits_bytes'] / 2**20:,.0f}", row["way"],
            f"{row['ms']:.2f}", f"{row['tflops']:.2f}", peak,
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
