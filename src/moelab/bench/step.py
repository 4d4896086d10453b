"""Whole optimizer steps of training: tokens per second, utilization, memory, and where the time goes.

Each model is built, compiled and trained on random tokens as `moelab train` would train it, one after another: what a
run of it would reach on this device. Where the time goes is measured apart (`bench.parts`).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import torch

from moelab.bench.clock import idle_share
from moelab.bench.defaults import filled
from moelab.bench.parts import TimedStep
from moelab.config import ModelConfig, Precision, RunConfig, RunFailed, TrainingConfig, UsageError, first_line, require
from moelab.device import (
    compute_dtype,
    environment,
    keep_compiled_code,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    resolve_device,
    synchronize,
)
from moelab.experts import backend_of
from moelab.experts.mlp import BACKENDS
from moelab.meters import count_parameters, flops_per_token, model_flops_utilization
from moelab.model import GPT
from moelab.presets import ARMS, PRESETS, arm_model
from moelab.training.batches import Batches, prefetched
from moelab.training.memory import NotEnoughMemory, split_step
from moelab.training.step import Step, check_capture

WARM_STEPS = 3
VOCABULARY = 50_304  # GPT-2's, padded
TWINS = {"moe": "dense-wide", "moe-matched": "dense"}  # dense arms of the same active FLOPs


@dataclass(frozen=True)
class StepBench:
    """What is timed."""

    sizes: tuple[str, ...] = ()
    """Presets; 5m, 40m, 124m and 350m on a GPU and smoke on a CPU when none is named."""
    arms: tuple[str, ...] = ("dense", "moe", "dense-wide", "moe-matched")
    """Arms of each size."""
    backends: tuple[str, ...] = ("auto",)
    """Backends that each arm with experts is timed with."""
    sequences: int | None = None
    """Sequences of an optimizer step; 32 on a GPU and 8 on a CPU when not given."""
    batch_size: int | None = None
    """Sequences of a micro-batch; as many as the memory has room for when not given."""
    experts: int = 8
    """Experts E of the arms that have some."""
    top_k: int = 2
    """Experts a token is sent to, K."""
    precision: Precision = "auto"
    """Arithmetic of the products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """As of `train`."""
    capture: Literal["auto", "on", "off"] = "auto"
    """As of `train`."""
    parts: bool = True
    """Also where a step's time goes, which takes a second compilation of each model."""
    rounds: int | None = None
    """Rounds of each; the median is reported. 5 on a GPU and 3 on a CPU when not given."""
    steps: int | None = None
    """Optimizer steps of a round; 10 on a GPU and 2 on a CPU when not given."""
    device: str = "auto"
    """cuda, cuda:N or cpu."""

    def __post_init__(self) -> None:
        for names, known, flag in (
            (self.sizes, PRESETS, "sizes"),
            (self.arms, ARMS, "arms"),
            (self.backends, ("auto", *BACKENDS), "backends"),
        ):
            for name in names:
                require(name in known, flag, name, f"give some of {', '.join(known)}")
        for name in ("sequences", "batch_size", "rounds", "steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name.replace("_", "-"), value, "give 1 or more")
        require(bool(self.arms) and bool(self.backends), "arms, backends", "", "give one or more of each")
        size, sequences = self.batch_size, self.sequences
        divides = size is None or sequences is None or sequences % size == 0
        require(divides, "batch-size", size, f"give a number that divides the {sequences} sequences of a step")


@dataclass(frozen=True)
class FullStepBench(StepBench):
    """With nothing left to the device; the defaults are a GPU's."""

    sizes: tuple[str, ...] = ("5m", "40m", "124m", "350m")
    sequences: int = 32
    rounds: int = 5
    steps: int = 10


SMALL_STEPS = {"sizes": ("smoke",), "sequences": 8, "rounds": 3, "steps": 2}  # under a minute on two cores


def bench_step(
    settings: StepBench,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Times the steps; returns what was measured and on what.

    Args:
        settings: what is timed.
        say: is called with a line for the user.
        keep: is called after each row with what there is by then, "stopped".

    Returns:
        {"environment", "date", "settings" (in full), "peak_flops", "stopped" (by Ctrl-C), "rows": [{"size", "arm",
        "backend" (None without experts), and "reason" (why there is no time) or: "batch_size", "accumulation", "tokens"
        (of a step), "parameters", "active_parameters", "flops_per_token", "ms" (the median of "rounds_ms"),
        "tokens_per_second", "mfu", "peak_bytes" (None on a CPU), "first_seconds" (to compile and capture), "captured",
        "idle" (share of the time in which no kernel ran; None on a CPU), "parts" ({part: share of the time}; None where
        they were not asked for or, for the reason "no_parts", could not be had), "twin" and "ratio" (tokens/s over
        those of the dense arm of the same active FLOPs, where both were timed)}]}.

    Raises:
        UsageError: a device, precision or capture that is not there.
    """
    keep_compiled_code()
    device = resolve_device(settings.device)
    dtype = compute_dtype(settings.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    check_capture(TrainingConfig(capture=settings.capture), device)
    settings = filled(settings, FullStepBench, SMALL_STEPS, device, say)
    rows: list[dict[str, Any]] = []
    results = {
        "environment": environment(device, dtype),
        "date": datetime.now(UTC).date().isoformat(),
        "settings": asdict(settings),
        "peak_flops": peak_flops(device, dtype),
        "stopped": True,
        "rows": rows,
    }
    try:
        for size in settings.sizes:
            for row in _size(size, settings, device, dtype, rows, say):
                if "ms" in row:
                    say(f"{_name(row)}: {row['tokens_per_second']:,.0f} tokens/s, {row['ms']:,.3g} ms")
                _add_ratios(rows)
                keep(results)
        results["stopped"] = False
    except KeyboardInterrupt:  # what was timed is not lost
        if rows and not rows[-1].keys() & {"ms", "reason"}:
            rows[-1]["reason"] = "stopped"
    return results


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        twins = [r for r in rows if (r["size"], r["arm"]) == (row["size"], TWINS.get(row["arm"])) and "ms" in r]
        if "ms" in row and twins:
            row |= {"twin": twins[0]["arm"], "ratio": row["tokens_per_second"] / twins[0]["tokens_per_second"]}


def _name(row: dict[str, Any]) -> str:
    return " ".join(filter(None, (row["size"], row["arm"], row["backend"])))


def _size(
    size: str, settings: FullStepBench, device: torch.device, dtype: torch.dtype, rows: list[dict[str, Any]],
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Adds the rows of one size, and gives each when it is whole."""
    runs = _runs(size, settings, device, dtype)
    training = _training([run for run in runs.values() if isinstance(run, RunConfig)], settings, device, dtype)
    for (arm, backend), run in runs.items():
        say(f"{size} {arm}{f', backend {backend}' if backend else ''}")
        row: dict[str, Any] = {"size": size, "arm": arm, "backend": backend}
        rows.append(row)
        if isinstance(run, str) or isinstance(training, str):
            row["reason"] = run if isinstance(run, str) else training
            yield row
            continue
        try:
            row |= _measured(run.model, training, settings, device, dtype)
        except (UsageError, RunFailed) as refused:
            row["reason"] = str(refused)
        except torch.OutOfMemoryError as problem:
            row["reason"] = f"out of memory ({str(problem).splitlines()[0]})"
        except Exception as problem:  # of a kernel or a compiler on a device that it does not know
            row["reason"] = f"failed ({first_line(problem)})"
        _forget(device)
        yield row


def _runs(
    size: str, settings: FullStepBench, device: torch.device, dtype: torch.dtype
) -> dict[tuple[str, str | None], RunConfig | str]:
    """By arm and backend, what is trained; or why it cannot be, whatever stands beside it."""
    runs: dict[tuple[str, str | None], RunConfig | str] = {}
    for arm in settings.arms:
        try:
            run = _run(size, arm, settings)
        except UsageError as refused:  # as moe-matched where K does not divide the hidden size
            runs[arm, None] = str(refused)
            continue
        for backend in settings.backends if run.model.moe is not None else (None,):
            of_backend = replace(run, model=_with_backend(run.model, backend))
            runs[arm, backend] = _refusal(of_backend, device, dtype) or of_backend
    return runs


def _refusal(run: RunConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a run cannot be trained by itself, in any micro-batch that it may have; None where it can."""
    try:
        split_step([run], device, dtype)
    except NotEnoughMemory as refused:
        if not run.training.auto_batch:
            of_any_size = replace(run, training=replace(run.training, auto_batch=True))
            if _refusal(of_any_size, device, dtype) is None:
                return f"{refused.need}; leave --batch-size out"
        return refused.need
    except UsageError as refused:
        return str(refused)
    return None


def _run(size: str, arm: str, settings: FullStepBench) -> RunConfig:
    chosen = PRESETS[size]
    model = replace(chosen.model, vocabulary=VOCABULARY)
    moe = replace(chosen.moe, experts=settings.experts, top_k=settings.top_k)
    return RunConfig(size, arm, arm_model(arm, model, moe), chosen.data, _training_asked(size, settings))


def _training_asked(size: str, settings: FullStepBench) -> TrainingConfig:
    batch_size = settings.batch_size or settings.sequences
    return replace(
        PRESETS[size].training,
        batch_size=batch_size,
        accumulation=settings.sequences // batch_size,
        auto_batch=settings.batch_size is None,
        precision=settings.precision,
        compile=settings.compile,
        capture=settings.capture,
        device=settings.device,
    )


def _training(
    runs: list[RunConfig], settings: FullStepBench, device: torch.device, dtype: torch.dtype
) -> TrainingConfig | str:
    """How all runs of a size are trained, with one micro-batch; or why they cannot be."""
    steps = WARM_STEPS + settings.rounds * settings.steps + settings.steps + 1  # and those that are profiled
    if not runs:
        return "no arm of this size can be trained"
    try:
        return replace(split_step(runs, device, dtype), steps=steps, log_interval=steps)
    except NotEnoughMemory as refused:
        return f"{refused.need}, and no micro-batch fits every arm; give fewer --arms at once"


def _with_backend(model: ModelConfig, backend: str | None) -> ModelConfig:
    moe = model.moe
    return model if moe is None or backend is None else replace(model, moe=replace(moe, backend=backend))


def _measured(
    config: ModelConfig, training: TrainingConfig, settings: FullStepBench, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """A row's figures."""
    row: dict[str, Any] = {"batch_size": training.batch_size, "accumulation": training.accumulation}
    if config.moe is not None:
        row["backend"] = backend_of(config, device, dtype).backend
    sequences = training.batch_size * training.accumulation
    tokens = np.random.default_rng(0).integers(0, 50_257, (training.steps + 1) * sequences * config.context + 1)
    batches = Batches(tokens.astype(np.uint16), config.context, training.batch_size, training.accumulation, 0)
    seconds, idle = _timed(row, GPT(config, dtype).to(device), training, batches, settings)
    _forget(device)
    of_step = sequences * config.context
    counts, flops, ms = count_parameters(config), flops_per_token(config), statistics.median(seconds) * 1e3
    shares = None
    if settings.parts:
        try:
            timed = TimedStep(GPT(config, dtype).to(device), training, batches, captured=row["captured"])
            shares = timed.parts(batches.windows(0).to(device))
        except (RuntimeError, RunFailed, UsageError) as problem:  # halves compiled apart are other programs
            row["no_parts"] = first_line(problem)
    return row | {
        "tokens": of_step,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": flops,
        "ms": ms,
        "rounds_ms": [second * 1e3 for second in seconds],
        "tokens_per_second": of_step / ms * 1e3,
        "mfu": model_flops_utilization(of_step / ms * 1e3, flops, peak_flops(device, dtype)),
        "idle": idle,
        "parts": shares and {name: share * (1 - (idle or 0)) for name, share in shares.items()},
    }


def _timed(
    row: dict[str, Any], model: GPT, training: TrainingConfig, batches: Batches, settings: FullStepBench
) -> tuple[list[float], float | None]:
    """Seconds of a step in each round, and the share of one in which no kernel ran; the rest goes to the row."""
    device = model.token_embedding.device
    begun = time.perf_counter()
    step = Step(model, training, batches)
    step.prepare(batches.windows(0).to(device))
    row["first_seconds"] = time.perf_counter() - begun
    row["captured"] = step.graph is not None
    with closing(prefetched(batches, range(training.steps), "", device)) as coming:
        seconds = [_seconds(step, coming, n, device) for n in (WARM_STEPS, *[settings.steps] * settings.rounds)]
        idle = idle_share(lambda: step(next(coming)[0]), settings.steps, device)
    row["peak_bytes"] = peak_memory(device) if device.type == "cuda" else None  # a CPU's is the whole process's
    return seconds[1:], idle


def _seconds(step: Step, coming: Generator[tuple[torch.Tensor, str]], steps: int, device: torch.device) -> float:
    """Of one step, of `steps` back to back."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(steps):
        step(next(coming)[0])
    synchronize(device)
    return (time.perf_counter() - begun) / steps


def _forget(device: torch.device) -> None:
    """Gives memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
