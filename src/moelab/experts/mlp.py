"""`expert_mlp`, and the registry of ways to compute it."""

from __future__ import annotations

import functools
import logging
import operator
import typing
from dataclasses import dataclass
from types import ModuleType

import torch

from moelab.config import Activation, ModelConfig, UsageError
from moelab.experts import (
    choice,
    cuda,
    grouped_mm,
    hopper,
    megablocks,
    megablocks_capacity,
    reference,
    requirements,
    self_check,
    triton,
)
from moelab.experts.activation import inner_size
from moelab.experts.choice import Choice, Shape

# A backend is a module with `expert_mlp`, with `unusable` that says why it cannot be used on a device, and, where there
# are calls that it does not take, with `refuses` that says why not. Which of them is `auto`, `choice` says.
BACKENDS: dict[str, ModuleType] = {
    "grouped_mm": grouped_mm,
    "reference": reference,
    "triton": triton,
    "cuda": cuda,
    "hopper": hopper,
    "megablocks": megablocks,
    "megablocks-capacity": megablocks_capacity,
}


log = logging.getLogger("moelab")


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here, and the device it was tried on or what stands in the way."""

    usable: bool
    reason: str
    """In one line; after a semicolon what would mend it, commands joined by &&."""


def expert_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None = None,
    b_out: torch.Tensor | None = None,
    *,
    activation: Activation = "gelu",
    backend: str = "auto",
) -> torch.Tensor:
    """The feed-forward of a Mixture of Experts, for tokens that are already routed.

        y[t] = Σ_k weights[t, k] · (act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e].T + b_out[e]),   e = indices[t, k]

    as in Shazeer et al. 2017, equation 1, for the K experts of a token. The products run in x's dtype, to which the
    experts' parameters are cast; the sum over k runs in float32 (float64 for float64), in slot order. Gradients reach
    x, weights and all four parameters.

    Args:
        x: (T, D) floating point.
        weights: (T, K) floating point.
        indices: (T, K) integers from 0 to E − 1, or −1 for a dropped slot, which adds nothing and gets no gradient.
        w_in: (E, F, D); (E, 2F, D) for "swiglu", the first F rows the gate, the last F the value.
        w_out: (E, D, F).
        b_in: (E, F) or (E, 2F), or None.
        b_out: (E, D), or None.
        activation: "gelu" (erf), "gelu_tanh", "relu2", "silu" or "swiglu".
        backend: a name from `backends()`, or "auto" for the usable one that was measured fastest for such shapes on
            such a device (`choice`); which it is goes to the logger "moelab" once.

    Returns:
        (T, D), of x's dtype.

    Raises:
        UsageError: shapes or dtypes that do not fit together, an index outside −1 … E − 1 (checked on CPUs only: on a
            GPU that would wait for the device), an unknown activation, an unknown or unusable backend, or one that
            does not take such a call.
    """
    _check(x, weights, indices, w_in, w_out, b_in, b_out, activation)
    bias = b_in is not None or b_out is not None
    experts, width, hidden = w_out.shape
    # Numbers, and not symbols where the compiler has made a size dynamic.
    sizes = map(operator.index, (width, hidden, experts, indices.shape[1]))
    module = BACKENDS[_chosen(backend, x.device, x.dtype, activation, bias, *sizes)]
    wide = torch.promote_types(x.dtype, torch.float32)
    if not getattr(module, "CASTS", False):
        w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
    biases = (None if b is None else b.to(x.dtype) for b in (b_in, b_out))
    y: torch.Tensor = module.expert_mlp(x, weights.to(wide), indices, w_in, w_out, *biases, activation)
    return y


def backends() -> dict[str, Availability]:
    """Every way to compute the experts, and whether it can be used on this machine's default device."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return {name: availability(name, device) for name in BACKENDS}


def availability(name: str, device: torch.device) -> Availability:
    """Whether the backend `name` can be used on a device and gives right answers there.

    The first call for a device tries the backend on it. Raises `UsageError` on an unknown name.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend = {name}: give one of auto, {', '.join(BACKENDS)}")
    if str(device) == "cuda":  # a trial in another process has to know which
        device = torch.device("cuda", torch.cuda.current_device())
    return _tried(BACKENDS[name], device)


@functools.cache
def _tried(module: ModuleType, device: torch.device) -> Availability:
    reason = module.unusable(device)
    if reason is None:
        wrong = self_check.failure(module, device)
        reason = wrong and f"{wrong} on {device.type} with PyTorch {torch.__version__}; use another backend or version"
    slow = requirements.interpreted(device) and module in (triton, megablocks, megablocks_capacity)
    return Availability(reason is None, reason or f"on {device.type}{', interpreted: for tests' if slow else ''}")


def check_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
    bias: bool,
    deterministic: bool = False,
    shape: Shape | None = None,
) -> None:
    """Raises `UsageError` if `name` is not "auto" and cannot compute such experts on a device.

    Call it before `torch.compile`, whose tracing would hide the error in one of its own.
    """
    if name != "auto":
        found = availability(name, device)
        if not found.usable:
            raise UsageError(f"backend = {name}: {found.reason}")
        if reason := self_check.refusal(BACKENDS[name], dtype, activation, bias, deterministic, shape):
            raise UsageError(reason)


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
    bias: bool,
    shape: Shape,
    deterministic: bool = False,
) -> Choice:
    """The backend that computes such experts on a device: `name`, or for "auto" the first of `choice.order` that can.

    Raises `UsageError` where `check_backend` does, and where none can.
    """
    check_backend(name, device, dtype, activation, bias, deterministic, shape)
    if name != "auto":
        return Choice(name, None)
    order = choice.order(choice.device_class(device), dtype, shape)
    passed = []
    for known in order.backends:
        refused = self_check.refusal(BACKENDS[known], dtype, activation, bias, deterministic, shape)
        if refused is None and availability(known, device).usable:
            break
        passed.append(known)
    else:
        raise UsageError(f"backend = auto: none of {', '.join(passed)} computes such experts here; see moelab info")
    over = f"; passed over, see moelab info: {', '.join(passed)}" if passed else ""
    return Choice(known, f"backend = auto: {known}, {order.basis}{over}")


def backend_of(model: ModelConfig, device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> Choice:
    """The backend that computes the experts of a model; raises `UsageError` where it cannot."""
    moe = model.moe
    assert moe is not None
    shape = Shape(model.width, model.expert_hidden_size, moe.experts, moe.top_k)
    return choose_backend(moe.backend, device, dtype, model.activation, model.bias, shape, deterministic)


def _chosen(
    name: str, device: torch.device, dtype: torch.dtype, activation: Activation, bias: bool, *sizes: int
) -> str:  # fmt: skip
    deterministic = torch.are_deterministic_algorithms_enabled()
    chosen = choose_backend(name, device, dtype, activation, bias, Shape(*sizes), deterministic)
    choice.announce(chosen, log.info)
    return chosen.backend


# A backend is tried outside the graph. This is all that torch.compiler.assume_constant_result does, which imports
# torch._dynamo for it: nearly a second of every command's start.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> None:
    known = typing.get_args(Activation)
    if activation not in known:
        raise UsageError(f"activation = {activation}: give one of {', '.join(known)}")
    if x.ndim != 2 or not x.is_floating_point():
        raise UsageError(f"x = {_form(x)}: give (T, D) floating point")
    if w_out.ndim != 3:
        raise UsageError(f"w_out = {_form(w_out)}: give (E, D, F)")
    tokens, width = x.shape
    experts, _, hidden = w_out.shape
    inner = inner_size(activation, hidden)
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.ndim != 2 or not whole:
        raise UsageError(f"indices = {_form(indices)}: give (T, K) integers")
    expected: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("indices", indices, (tokens, indices.shape[1])),
        ("weights", weights, (tokens, indices.shape[1])),
        ("w_in", w_in, (experts, inner, width)),
        ("w_out", w_out, (experts, width, hidden)),
        ("b_in", b_in, (experts, inner)),
        ("b_out", b_out, (experts, width)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise UsageError(f"{name} = {_form(tensor)}: give {shape}, for x {tuple(x.shape)} and {experts} experts")
        if tensor is not None and tensor.device != x.device:
            raise UsageError(f"{name} is on {tensor.device}: x is on {x.device}; put them on one device")
    if indices.shape[1] < 1 or experts < 1:
        raise UsageError(f"indices = {_form(indices)}: give at least one slot a token and one expert")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -1 or high >= experts:
            raise UsageError(f"indices = {low} … {high}: give 0 to {experts - 1}, or −1 for a dropped slot")


def _form(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
