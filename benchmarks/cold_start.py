"""How long until the first step, with nothing compiled yet and with everything, and what the compiled step then takes.

    python benchmarks/cold_start.py --preset 124m --arms dense,moe

Three ways to compile are compared, each in processes of its own with a cache of its own: the whole model, which is what
training does; each block by itself, which the compiler does once for all blocks that are alike, and the loss; and the
whole model in which the block is marked as a region to be compiled once (`torch.compiler.nested_compile_region`).
Seconds are counted from the start of the process. Preparing the text is not in them.
"""

from __future__ import annotations

import time

BEGUN = time.time()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

from moelab.device import (  # noqa: E402
    compute_dtype,
    environment,
    keep_compiled_code,
    peak_memory,
    resolve_device,
    synchronize,
)
from moelab.model import GPT, gpt  # noqa: E402
from moelab.presets import arm_model, preset  # noqa: E402
from moelab.training.batches import Batches  # noqa: E402
from moelab.training.step import Step  # noqa: E402

WAYS = ("whole", "blocks", "region")


@dataclass(frozen=True)
class Benchmark:
    """Time the first step, from a cold and from a warm cache, and the steps after it."""

    preset: str = "124m"
    """Size of the model."""
    arms: str = "dense,moe"
    """Arms, separated by commas."""
    ways: str = ",".join(WAYS)
    """Ways to compile, separated by commas: whole, blocks, region."""
    batch_size: int | None = None
    """Sequences of one micro-batch; the preset's when not given."""
    accumulation: int | None = None
    """Micro-batches of one step; the preset's when not given."""
    steps: int = 20
    """Steps that are timed after the first."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu."""


def main() -> None:
    settings = tyro.cli(Benchmark)
    if "MOELAB_COLD_START" in os.environ:
        print(json.dumps(first_steps(settings)))
        return
    device = resolve_device(settings.device)
    for fact, value in environment(device, compute_dtype("auto", device)).items():
        print(f"{fact.replace('_', ' '):<20}{value}")
    print(f"{settings.preset:<18}{'way':<10}{'cold':>9}{'warm':>9}{'compile':>9}{'warm':>9}{'ms a step':>12}{'GiB':>8}")
    for arm in settings.arms.split(","):
        for way in settings.ways.split(","):
            with tempfile.TemporaryDirectory() as home:
                cold, warm = (measured(replace(settings, arms=arm, ways=way), home) for _ in range(2))
            memory = f"{warm['memory'] / 2**30:8.2f}" if warm["memory"] else ""
            print(
                f"{arm:<18}{way:<10}{cold['first']:8.1f}s{warm['first']:8.1f}s{cold['prepare']:8.1f}s"
                f"{warm['prepare']:8.1f}s{1e3 * warm['step']:12.2f}{memory}",
                flush=True,
            )


def measured(settings: Benchmark, home: str) -> dict[str, float]:
    """`first_steps` in a process of its own, whose caches are under `home`."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(settings).items() if value is not None]
    given = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    given |= {"MOELAB_HOME": home, "MOELAB_COLD_START": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *flags],
        env=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_steps(settings: Benchmark) -> dict[str, float | None]:
    """Seconds until the first step was done, of making it ready, and of a later step; bytes of memory at the peak."""
    keep_compiled_code()
    chosen, device = preset(settings.preset), resolve_device(settings.device)
    given = {name: getattr(settings, name) for name in ("batch_size", "accumulation") if getattr(settings, name)}
    whole = settings.ways != "blocks"
    capture = "on" if device.type == "cuda" else "off"
    training = replace(chosen.training, compile="on" if whole else "off", capture=capture, **given)
    model = GPT(arm_model(settings.arms, chosen.model, chosen.moe), compute_dtype("auto", device)).to(device)
    if settings.ways == "blocks":
        for block in model.blocks:
            block.compile()
        gpt.next_token_loss = torch.compile(gpt.next_token_loss)  # type: ignore[attr-defined]
    elif settings.ways == "region":
        gpt.Block.forward = torch.compiler.nested_compile_region(gpt.Block.forward)  # type: ignore[method-assign]
    vocabulary, context = chosen.model.vocabulary, chosen.model.context
    tokens = np.random.default_rng(0).integers(0, vocabulary - 64, 2_000_000, np.uint16)
    step = Step(model, training, Batches(tokens, context, training.batch_size, training.accumulation, seed=0))
    windows = step.batches.windows(0).to(device)
    begun = time.time()
    step.prepare(windows)
    prepared = time.time() - begun
    step(windows)
    synchronize(device)
    first = time.time() - BEGUN
    begun = time.perf_counter()
    for _ in range(settings.steps):
        step(windows)
    synchronize(device)
    each = (time.perf_counter() - begun) / settings.steps
    return {"first": first, "prepare": prepared, "step": each, "memory": peak_memory(device)}


if __name__ == "__main__":
    main()
