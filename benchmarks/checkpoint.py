"""What a checkpoint costs: how long training waits for it, until it is complete, and to go on from it.

    python benchmarks/checkpoint.py --preset 350m --arm moe

On a GPU training waits for the copy on the host alone, whose memory is new at the first checkpoint; "at once" is what
it would wait for all of it. A CPU's are written at once. The weights' gradients are random.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from moelab.device import environment, resolve_device, synchronize
from moelab.model import GPT
from moelab.presets import arm_model, preset
from moelab.training.checkpoint import Checkpoints, Progress, load_checkpoint, save_checkpoint
from moelab.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Benchmark:
    """Time checkpoints."""

    preset: str = "124m"
    arm: str = "moe"
    folder: Path | None = None
    """Where they are written, on the disk that is meant; a temporary folder when not given."""
    device: str = "auto"
    json: Path | None = None


def main() -> None:
    settings = tyro.cli(Benchmark)
    device, chosen = resolve_device(settings.device), preset(settings.preset)
    model = GPT(arm_model(settings.arm, chosen.model, chosen.moe)).to(device)
    optimizer = make_optimizer(model, chosen.training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rows: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        rows[name] = time.perf_counter() - begun
        print(f"{name:<34} {rows[name]:7.2f} s")

    facts = environment(device, torch.float32)
    print(f"{facts['device']}, PyTorch {facts['torch']}: {settings.preset} {settings.arm}")
    with tempfile.TemporaryDirectory(dir=settings.folder) as place, Checkpoints(Path(place)) as checkpoints:
        timed("at once", lambda: save_checkpoint(Path(place), model, optimizer, Progress(step=1)))
        for step, which in ((2, "first"), (3, "second")):
            timed(f"training waits, {which}", lambda step=step: checkpoints.save(model, optimizer, Progress(step=step)))  # type: ignore[misc]
            timed(f"then until it is complete, {which}", checkpoints.wait)
        files = list((Path(place) / "checkpoints" / "step-00000003").iterdir())
        size = sum(file.stat().st_size for file in files) / 1e9
        timed("checked and read", lambda: load_checkpoint(Path(place), model, optimizer))
    print(f"{size:.2f} GB in {len(files)} files")
    if settings.json:
        settings.json.write_text(json.dumps({"environment": facts, "gb": size, "seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
