"""A few steps of a run on a timeline, as `moelab train --profile` writes them, for https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

BEFORE, RECORDED = 5, 5  # steps; of those before, the last has the profiler on, which takes its own time to begin


@contextlib.contextmanager
def traced(file: Path, device: torch.device, say: Callable[[str], object]) -> Iterator[Callable[[], None]]:
    """Writes a Chrome trace, gzipped, of the host's operators and the GPU's kernels; yields what ends a step.

    A step that is replayed as a CUDA graph is one launch on the host's lines, and all its kernels on the GPU's.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    written = []

    def write(profiler: profile) -> None:
        steps = min(RECORDED, profiler.step_num - BEFORE)
        if steps < 1:
            return
        profiler.export_chrome_trace(str(file))
        written.append(file)
        say(f"profile: {steps} step{'s are' if steps > 1 else ' is'} in {file}; open it in https://ui.perfetto.dev")

    plan = schedule(wait=BEFORE - 1, warmup=1, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        made = profiler.step_num
        say(f"profile: nothing is written; it takes more than {BEFORE} steps, and this run made {made}")
