"""How long until the first step, with nothing compiled yet and with everything, and what the compiled step then takes.

    python benchmarks/cold_start.py --preset 124m --arms dense,moe

Each start is a process of its own. Seconds are counted from when Python has started, and told by what takes them;
preparing the text is not in them. Where Python's packages lie without bytecode (PYTHONDONTWRITEBYTECODE) imports take
more than twice as long: PYTHONPYCACHEPREFIX is for that.
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
import tyro  # noqa: E402

from moelab.device import (  # noqa: E402
    compute_dtype,
    environment,
    keep_compiled_code,
    peak_memory,
    resolve_device,
    synchronize,
)
from moelab.experts import backend_of  # noqa: E402
from moelab.model import GPT  # noqa: E402
from moelab.presets import arm_model, preset  # noqa: E402
from moelab.training.batches import Batches  # noqa: E402
from moelab.training.step import Step  # noqa: E402

PHASES = ("imports", "backend", "model", "prepare")


@dataclass(frozen=True)
class Benchmark:
    """Time the first step, from a cold and from a warm cache, and the steps after it."""

    preset: str = "124m"
    """Size of the model."""
    arms: str = "dense,moe"
    """Arms, separated by commas."""
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
    print(f"{settings.preset:<18}{'start':<6}{'s':>7}", *(f"{phase:>9}" for phase in PHASES), "  ms a step     GiB")
    for arm in settings.arms.split(","):
        with tempfile.TemporaryDirectory() as home:
            for start in ("cold", "warm"):
                found = measured(replace(settings, arms=arm), home)
                phases = (f"{found[phase]:9.1f}" for phase in PHASES)
                memory = f"{found['memory'] / 2**30:8.2f}" if found["memory"] else ""
                figures = f"{1e3 * found['step']:11.2f}{memory}"
                print(f"{arm:<18}{start:<6}{found['first']:7.1f}", *phases, figures, flush=True)


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
    """Seconds until the first step, of what came before it, and of a later step; bytes of memory at the peak."""
    moments = [BEGUN, time.time()]
    keep_compiled_code()
    chosen, device = preset(settings.preset), resolve_device(settings.device)
    dtype = compute_dtype("auto", device)
    config = arm_model(settings.arms, chosen.model, chosen.moe)
    if config.moe is not None:
        backend_of(config, device, dtype)
    moments.append(time.time())
    given = {name: getattr(settings, name) for name in ("batch_size", "accumulation") if getattr(settings, name)}
    training = replace(chosen.training, **given)
    vocabulary, context = chosen.model.vocabulary, chosen.model.context
    tokens = np.random.default_rng(0).integers(0, vocabulary - 64, 2_000_000, np.uint16)
    model = GPT(config, dtype).to(device)
    step = Step(model, training, Batches(tokens, context, training.batch_size, training.accumulation, seed=0))
    windows = step.batches.windows(0).to(device)
    moments.append(time.time())
    step.prepare(windows)
    moments.append(time.time())
    step(windows)
    synchronize(device)
    first = time.time() - BEGUN
    begun = time.perf_counter()
    for _ in range(settings.steps):
        step(windows)
    synchronize(device)
    each = (time.perf_counter() - begun) / settings.steps
    spent = {phase: end - begin for phase, begin, end in zip(PHASES, moments[:-1], moments[1:], strict=True)}
    return {"first": first, "step": each, "memory": peak_memory(device), **spent}


if __name__ == "__main__":
    main()
