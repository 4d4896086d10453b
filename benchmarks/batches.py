"""Does reading batches hold a training step up?

    python benchmarks/batches.py --preset 5m

Times the same training step three ways, interleaved: on batches read ahead and pinned, as training does; on batches
that are read when they are needed; and on one batch that stays on the device, which is what a step takes that waits
for no data. Prints the median of the rounds of each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro

from moelab.device import compute_dtype, environment, resolve_device, synchronize
from moelab.model import GPT
from moelab.presets import preset
from moelab.training.batches import Batches, prefetched
from moelab.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Benchmark:
    """Time training steps on batches that are read ahead, read when needed, and not read at all."""

    preset: str = "5m"
    """Size of the model."""
    megatokens: int = 100
    """Tokens of the file that batches are read from (10^6)."""
    steps: int = 48
    """Steps of a round."""
    rounds: int = 7
    """Rounds of each way."""


def main() -> None:
    settings = tyro.cli(Benchmark)
    chosen = preset(settings.preset)
    device = resolve_device("auto")
    dtype = compute_dtype("auto", device)
    config = replace(chosen.model, vocabulary=50_304)
    model = GPT(config, dtype=dtype, seed=0).to(device)
    forward: Callable[..., object] = model.compiled() if device.type == "cuda" else model
    optimizer = make_optimizer(model, chosen.training)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_257, settings.megatokens * 1_000_000, np.uint16).tofile(path)
        tokens = np.memmap(path, np.uint16, mode="r")
        training = chosen.training
        batches = Batches(tokens, config.context, training.batch_size, training.accumulation, seed=0)

        def step(windows: torch.Tensor) -> None:
            for ids, targets in batches.micro_batches(windows):
                forward(ids, targets).loss.backward()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        every = range(settings.steps * (settings.rounds + 1))
        held = batches.windows(0).to(device)
        ways: dict[str, Iterator[torch.Tensor]] = {
            "read ahead": (windows for windows, _ in prefetched(batches, every, "", device)),
            "read when needed": (batches.windows(number).to(device) for number in every),
            "not read": (held for _ in every),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(settings.rounds + 1):
            for name, windows in ways.items():
                synchronize(device)
                start = time.perf_counter()
                for given in islice(windows, settings.steps):
                    step(given)
                synchronize(device)
                times[name].append((time.perf_counter() - start) / settings.steps)

    for fact, value in environment(device, dtype).items():
        print(f"{fact.replace('_', ' '):<20}{value}")
    base = statistics.median(times["not read"][1:])
    print(f"{settings.preset}, dense, {batches.sequences_per_step} sequences of {config.context} a step")
    for name, found in times.items():
        median = statistics.median(found[1:])  # the first round compiles and allocates
        print(f"  {name:<18}{1e3 * median:9.3f} ms a step, {median / base:6.3f} of the step that reads nothing")


if __name__ == "__main__":
    main()
