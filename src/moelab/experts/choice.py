"""Which backend `auto` is: the fastest measured for such experts on such a device, of those that work here.

`measured.json` has the times, made by `benchmarks/choose.py` from what `moelab bench layer --json` wrote. The nearest
measured shape decides. Where nothing was measured the other 16-bit type stands in, or for a GPU the nearest one, and
else the order is `ORDER`, on NVIDIA GPUs `GPU_ORDER`, as it is of backends whose times do not carry over (`GROUPED`).
The number of tokens has no say, so that training, evaluation and sampling of one model use one backend, and a compiled
graph does not depend on it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelab.device import cpu_has_bf16
from moelab.experts import products

# Of `auto` where nothing was measured. `reference` stays last wherever it stands in the times: it breaks a compiled
# graph, as megablocks does, which is not here at all; in fp32 only triton's products do not wait for the host on a GPU.
ORDER = ("grouped_mm", "triton", "cuda", "hopper", "reference")
GPU_ORDER = ("triton", "cuda", "hopper", "grouped_mm", "reference")
# Of these the products are `products`': times of one kernel for all experts say nothing of where they run an expert at
# a time and wait for the host, nor the other way round.
GROUPED = ("cuda", "grouped_mm")
OTHER_HALF = {"float16": ("bfloat16",), "bfloat16": ("float16",)}  # whose times stand in where there are none
CAPABILITY = "compute capability"
TABLE = Path(__file__).with_name("measured.json")


class Shape(NamedTuple):
    """Sizes of experts that decide which backend is fastest."""

    width: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"D = {self.width:,}, F = {self.hidden:,}, E = {self.experts}, K = {self.top_k}"


class Order(NamedTuple):
    """What `auto` tries, in turn."""

    backends: tuple[str, ...]
    basis: str
    """Where the order comes from, in words."""


class Choice(NamedTuple):
    """The backend that computes the experts."""

    backend: str
    why: str | None
    """For `auto`, a line that says so; None where the backend was named."""


@functools.cache
def device_class(device: torch.device) -> str:
    """The devices that measurements are shared among."""
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_name(device)
        return "{} {}.{}".format(CAPABILITY, *torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        return f"CPUs {'with' if cpu_has_bf16() else 'without'} bf16 units"
    return device.type


@functools.cache
def order(devices: str, dtype: torch.dtype, shape: Shape) -> Order:
    """What `auto` tries for experts of a shape on a class of devices, fastest first."""
    precision = str(dtype).removeprefix("torch.")
    unmeasured = _unmeasured(devices)
    for known in _alike(devices):
        for measured in (precision, *OTHER_HALF.get(precision, ())):
            if times := measured_times(known).get(measured):
                nearest = min(times, key=lambda sizes: _distance(sizes, shape))
                one_there, one_here = _one_kernel(known, measured, nearest), _one_kernel(devices, precision, shape)
                apart = GROUPED if one_there != one_here else ()
                timed = (name for name in times[nearest] if name in ORDER[:-1] and name not in apart)
                fastest = sorted(timed, key=times[nearest].__getitem__)
                names = (*fastest, *(name for name in unmeasured if name not in fastest))
                basis = (
                    f"by {measured} times on {known} at {nearest}{'' if nearest == shape else ', the nearest measured'}"
                )
                if apart:
                    where = "there" if one_there else "here"
                    basis += f", but for {' and '.join(apart)}, whose products are one kernel only {where}"
                own = (known, measured) == (devices, precision)
                return Order(names, basis if own else f"{precision} was not measured on {devices}; {basis}")
    return Order(unmeasured, f"{precision} was not measured on {devices}")


def _unmeasured(devices: str) -> tuple[str, ...]:
    return ORDER if _capability(devices) is None else GPU_ORDER


def _alike(devices: str) -> list[str]:
    """A class of devices, and those whose times say something of it: of an NVIDIA GPU the others, the nearest first."""
    number = _capability(devices)
    if number is None:
        return [devices]
    others = [name for name in table() if name != devices and _capability(name) is not None]
    return [devices, *sorted(others, key=lambda name: abs((_capability(name) or 0) - number))]


def _capability(devices: str) -> float | None:
    kind, _, number = devices.rpartition(" ")
    return float(number) if kind == CAPABILITY else None


def _one_kernel(devices: str, precision: str, shape: Shape) -> bool:
    """Whether `products` are one kernel for all experts."""
    number = _capability(devices)
    return number is not None and products.built_as_one(getattr(torch, precision), int(number), shape.experts)


def in_words(device: torch.device) -> str:
    """What `auto` goes by on a device."""
    devices = device_class(device)
    for known in _alike(devices):
        if measured_times(known):
            own = known == devices
            return f"the fastest measured on {known}" if own else f"by times of {known}; {devices} was not measured"
    return f"first usable of {', '.join(_unmeasured(devices))}"


def _distance(one: Shape, other: Shape) -> float:
    """How many times sizes are doubled or halved between two shapes."""
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(one, other, strict=True))


@functools.cache
def measured_times(devices: str) -> dict[str, dict[Shape, dict[str, float]]]:
    """Precision → shape → backend → time over the fastest's, the geometric mean over the numbers of tokens."""
    ratios: dict[str, dict[Shape, dict[str, list[float]]]] = {}
    for precision, _, *sizes, times in table().get(devices, {}).get("rows", []):
        for name, ms in times.items():
            found = ratios.setdefault(precision, {}).setdefault(Shape(*sizes), {})
            found.setdefault(name, []).append(ms / min(times.values()))
    return {
        precision: {
            shape: {name: math.prod(r) ** (1 / len(r)) for name, r in backends.items()}
            for shape, backends in shapes.items()
        }
        for precision, shapes in ratios.items()
    }


@functools.cache
def table() -> dict[str, Any]:
    """Class of devices → {"device", versions, "date", "command", "rows"}; a row is [precision, T, D, F, E, K, ms]."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


_said: set[str] = set()


def announce(choice: Choice, say: Callable[[str], object]) -> None:
    """Says why `auto` is what it is; a line is said once in a process."""
    if choice.why is not None and choice.why not in _said:
        _said.add(choice.why)
        say(choice.why)
