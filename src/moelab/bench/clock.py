"""What a step takes on a device: wall time, the time its kernels ran, and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def wall_ms(step: Step, steps: int, device: torch.device) -> float:
    """Milliseconds of a step, of `steps` back to back."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begun) / steps * 1e3


def busy_ms(step: Step, steps: int, device: torch.device) -> float | None:
    """Milliseconds of a step in which a kernel ran, by the profiler; None where it sees none."""
    if device.type != "cuda":
        return None
    microseconds: float = sum(event.self_device_time_total for event in _seen(step, steps, device).key_averages())
    return microseconds / 1e3 / steps if microseconds else None


def idle_share(step: Step, steps: int, device: torch.device) -> float | None:
    """Share of `steps` back to back in which nothing ran on a GPU, from the first kernel to the end of the last.

    Both times are the profiler's of the same steps: a GPU that throttles has other clocks in others. None on a CPU.
    """
    if device.type != "cuda":
        return None
    events = _seen(step, steps, device).events() or ()
    ran = [event.time_range for event in events if event.device_type.name == "CUDA"]
    return uncovered([(each.start, each.end) for each in ran])


def _seen(step: Step, steps: int, device: torch.device) -> profile:
    """What a GPU ran in `steps` back to back."""
    torch.cuda.synchronize(device)
    seen = profile(activities=[ProfilerActivity.CUDA])
    with seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    return seen


def uncovered(intervals: list[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that lies in no interval; None without any."""
    if not intervals:
        return None
    begun = reached = min(start for start, _ in intervals)
    idle = 0.0
    for start, end in sorted(intervals):
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle / (reached - begun) if reached > begun else None


def captured(step: Step, device: torch.device) -> Step | None:
    """The step as a CUDA graph, to be replayed; None where it cannot be captured, as where it waits for the host."""
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # what is allocated or compiled at first use
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:  # an operation that is not allowed in a capture; the graph is gone
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def peak_and_kept_mib(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object], device: torch.device
) -> tuple[float, float] | tuple[None, None]:
    """MiB over what is allocated before a step: at its peak, and after the forward pass (kept for the backward)."""
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    y = forward()
    kept = torch.cuda.memory_allocated(device) - base
    backward(y)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - base) / 2**20, kept / 2**20
