"""Whether a backend gives right answers on the device at hand, found out by trying it once.

A driver, a PyTorch or a GPU that a backend was never run on is caught here, before a run is built on its answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from moelab.config import Activation, first_line, moelab_home
from moelab.device import import_compiler
from moelab.experts import reference
from moelab.experts.activation import inner_size
from moelab.experts.choice import Shape

TOP_K = 2
PATIENCE = 180  # seconds for a trial in a process of its own, compiling included
TOLERANCE = 0.05  # relative; a wrong answer is far off, and bf16's rounding is ten times smaller


def refusal(
    backend: ModuleType,
    dtype: torch.dtype,
    activation: Activation,
    bias: bool,
    deterministic: bool = False,
    shape: Shape | None = None,
) -> str | None:
    """What of a call a backend does not take, and what would work; None if it takes it, as one without `refuses` does.

    `deterministic` asks for the same bits in every process; a shape is refused by a backend with `refuses_shape`.
    """
    said: str | None = backend.refuses(dtype, activation, bias, deterministic) if hasattr(backend, "refuses") else None
    if said is None and shape is not None and hasattr(backend, "refuses_shape"):
        said = backend.refuses_shape(shape)
    return said


class Trial(NamedTuple):
    """A call that a backend is tried with, of K = 2, in which the last expert is idle and the others are even."""

    tokens: int
    width: int
    hidden: int
    experts: int
    """Not one more than a multiple of 5."""
    activation: Activation = "gelu"
    fp32: bool = True
    """In fp32 too, and not in 16 bits alone."""


# Rows are no multiple of 16 bytes. A backend that does not take this, or whose kernels differ, has `TRIALS` of its own.
SMALL = Trial(40, 20, 36, 5)
Answer = TypeVar("Answer")


def apart(device: torch.device, trial: Callable[..., Answer], *given: Any) -> Answer:
    """trial(*given) in a thread of its own: what its first caller stands in, as checkpointing, autocast or
    inference, is not the trial's. `device` is current there."""

    def run() -> Answer:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return trial(*given)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def failure(backend: ModuleType, device: torch.device) -> str | None:
    """What is wrong with a backend's outputs and gradients on a device, in one line; None if nothing is.

    One small call in fp32 and one in bf16 (fp16 on GPUs without bf16), with a dropped slot and an idle expert, against
    `reference` in float64 on the CPU: of what the backend takes, and with biases where it takes those. Waits for the
    device.

    A backend with `identity` has kernels that wait for one another: it is tried in a process of its own, where one that
    waits for ever, or that takes the CUDA context with it, does no harm.
    """
    try:
        if not hasattr(backend, "identity"):
            return apart(device, _wrong, backend, device)
        known = _known(backend, device)
        return known[0] if known else _tried_elsewhere(backend, device)
    except TrialFailed as problem:
        return str(problem)


def _file(backend: ModuleType, device: torch.device) -> Path:
    """Where it is kept, for an identity of the backend, what a trial in another process found: that it is right, wrong
    or did not end. What failed is not kept: it may have been the memory."""
    name = backend.__name__
    key = hashlib.sha256(json.dumps([name, *backend.identity(device)]).encode()).hexdigest()[:32]
    return moelab_home() / "kernels" / f"{name.rpartition('.')[2]}-trial-{key}.json"


def _known(backend: ModuleType, device: torch.device) -> list[str | None]:
    """What is kept there, or nothing."""
    try:
        return [json.loads(_file(backend, device).read_text())]
    except (OSError, ValueError):
        return []


def _tried_elsewhere(backend: ModuleType, device: torch.device) -> str | None:
    """`failure` in another process. Raises `TrialFailed`."""
    name = backend.__name__
    code = (
        f"import json, torch, {name}; from moelab.experts.self_check import _wrong; "
        f"print(json.dumps(_wrong({name}, torch.device({str(device)!r}))))"
    )
    trial = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _meanwhile(backend, device, trial)
        out, errors = trial.communicate(timeout=PATIENCE)
        if trial.returncode != 0:
            said = errors.strip().splitlines() or [f"it ended with {trial.returncode}"]
            raise ValueError(said[-1].removeprefix(f"{__name__}.TrialFailed: "))
        wrong = json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        wrong = f"a trial in a process of its own did not end in {PATIENCE} seconds"
    except (ValueError, IndexError) as problem:
        raise TrialFailed(f"a trial in a process of its own failed ({problem})") from None
    finally:
        trial.kill()  # if it goes on: a kernel may wait for ever
        trial.communicate()
    kept = _file(backend, device)
    answer = wrong and f"{wrong} (delete {kept} to have it tried again)"
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(answer))
    return answer


def _meanwhile(backend: ModuleType, device: torch.device, trial: subprocess.Popen[str]) -> None:
    """What is needed after a trial, or in it, while it goes on: it takes a process start and several compilations."""
    if device.type == "cuda":
        import_compiler()  # 3 seconds
    if hasattr(backend, "compile_ahead"):
        with contextlib.suppress(Exception):  # the trial says what does not compile
            for _ in backend.compile_ahead(device):
                if trial.poll() is not None:
                    break


class TrialFailed(RuntimeError):
    """A trial has no result; its text is one line."""


def _wrong(backend: ModuleType, device: torch.device) -> str | None:
    """`failure` in this process. Raises `TrialFailed`."""
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    half = torch.bfloat16 if has_bf16 else torch.float16
    for trial in getattr(backend, "TRIALS", (SMALL,)):
        for dtype in (torch.float32, half) if trial.fp32 else (half,):
            bias = refusal(backend, dtype, trial.activation, bias=True) is None
            if not bias and refusal(backend, dtype, trial.activation, bias=False) is not None:
                continue
            name = str(dtype).removeprefix("torch.")
            expected = _results(reference, trial, torch.float64, torch.device("cpu"), bias)
            try:
                found = _results(backend, trial, dtype, device, bias)
            except Exception as problem:  # whatever it is, it is the reason that the user is told
                line = first_line(problem)
                raise TrialFailed(f"a trial call in {name} failed ({line})") from problem
            for what, value in found.items():
                error = ((value - expected[what]).norm() / expected[what].norm()).item()
                if not error <= TOLERANCE:
                    return f"a trial call in {name} gave a wrong {what}, {error:.2g} off relative to float64"
    return None


def _results(
    backend: ModuleType, trial: Trial, dtype: torch.dtype, device: torch.device, bias: bool
) -> dict[str, torch.Tensor]:
    """Output and gradients of one call, as float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, hidden, experts, activation, _ = trial
    inner = inner_size(activation, hidden)
    shapes = {
        "x": (tokens, width),
        "weights": (tokens, TOP_K),
        "w_in": (experts, inner, width),
        "w_out": (experts, width, hidden),
    }
    if bias:
        shapes |= {"b_in": (experts, inner), "b_out": (experts, width)}
    drawn = {name: torch.randn(shape, generator=generator, device="cpu") / 2 for name, shape in shapes.items()}
    upstream = torch.randn(shapes["x"], generator=generator, device="cpu").to(device, dtype)
    indices = torch.arange(tokens * TOP_K, device="cpu").view(tokens, TOP_K) * 5 % (experts - 1)
    indices[3, 1] = -1
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: t.to(device, wide if name == "weights" else dtype).requires_grad_()
        for name, t in drawn.items()
    }  # fmt: skip
    x, weights, *parameters = leaves.values()
    biases = [] if bias else [None, None]
    y = backend.expert_mlp(x, weights, indices.to(device), *parameters, *biases, activation)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    named = {"output": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.cpu().double() for name, t in named.items()}
