"""What does it cost to measure the routing?

    python benchmarks/routing.py --presets 5m 124m

Times a training step of the arm `moe` and the measurement that goes into metrics.jsonl, under several rules of the
router, and prints the second as a share of the steps between two measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import tyro

from moelab.device import compute_dtype, environment, resolve_device, synchronize
from moelab.evaluation import routing
from moelab.model import GPT
from moelab.presets import arm_model, preset
from moelab.training.optimizer import make_optimizer

RULES: dict[str, dict[str, object]] = {
    "default": {},
    "sigmoid, bias": {"scores": "sigmoid", "bias_rate": 0.001},
    "capacity": {"capacity_factor": 1.0},
    "shared expert": {"shared_experts": 1},
}


@dataclass(frozen=True)
class Benchmark:
    """Time steps and measurements of the routing."""

    presets: tuple[str, ...] = ("5m",)
    """Sizes."""
    interval: int = 50
    """Steps between two measurements."""


def milliseconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    for _ in range(3):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times * 1e3


def main() -> None:
    settings = tyro.cli(Benchmark)
    device = resolve_device("auto")
    dtype = compute_dtype("auto", device)
    for fact, value in environment(device, dtype).items():
        print(f"{fact.replace('_', ' '):<20}{value}")
    for name in settings.presets:
        chosen = preset(name)
        for rules, changes in RULES.items():
            torch.compiler.reset()
            moe = replace(chosen.moe, **changes)  # type: ignore[arg-type]
            config = replace(arm_model("moe", chosen.model, moe), vocabulary=50_304)
            model = GPT(config, dtype=dtype, seed=0).to(device)
            forward = model.compiled() if device.type == "cuda" else model
            optimizer = make_optimizer(model, chosen.training)
            ids = torch.randint(0, 50_257, (chosen.training.batch_size, config.context + 1), device=device)

            def step(
                forward: Callable[..., object] = forward,
                optimizer: torch.optim.Optimizer = optimizer,
                ids: torch.Tensor = ids,
                accumulation: int = chosen.training.accumulation,
            ) -> None:
                for _ in range(accumulation):
                    out = forward(ids[:, :-1], ids[:, 1:])
                    (out.loss + 0.01 * out.balance_loss).backward()  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            a_step = milliseconds(step, 12 if device.type == "cuda" else 2, device)
            measured = milliseconds(partial(routing, model, ids[:, :-1]), 5, device)
            share = measured / (settings.interval * a_step)
            print(f"{name}, {rules}: step {a_step:.2f} ms, measurement {measured:.2f} ms,", end=" ")
            print(f"{share:.2%} of {settings.interval} steps")


if __name__ == "__main__":
    main()
