"""Whether a backend gives right answers on the device at hand, found out by trying it once.

A driver, a PyTorch or a GPU that a backend was never run on is caught here, before a run is built on its answers.
"""

from __future__ import annotations

from types import ModuleType

import torch

from moelab.config import Activation
from moelab.experts import reference

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 40, 20, 36, 5, 2  # rows that are no multiple of 16 bytes
TOLERANCE = 0.05  # relative; a wrong answer is far off, and bf16's rounding is ten times smaller


def refusal(
    backend: ModuleType, dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool = False
) -> str | None:
    """What of a call a backend does not take, and what would work; None if it takes it, as one without `refuses` does.

    `deterministic` asks for the same bits in every process.
    """
    said: str | None = backend.refuses(dtype, activation, bias, deterministic) if hasattr(backend, "refuses") else None
    return said


def failure(backend: ModuleType, device: torch.device) -> str | None:
    """What is wrong with a backend's outputs and gradients on a device, in one line; None if nothing is.

    One small call in fp32 and one in bf16 (fp16 on GPUs without bf16), with a dropped slot and an idle expert, against
    `reference` in float64 on the CPU: of what the backend takes, and with biases where it takes those. Waits for the
    device.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    with torch.inference_mode(False), torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16 if has_bf16 else torch.float16):
            bias = refusal(backend, dtype, "gelu", bias=True) is None
            if not bias and refusal(backend, dtype, "gelu", bias=False) is not None:
                continue
            name = str(dtype).removeprefix("torch.")
            expected = _results(reference, torch.float64, torch.device("cpu"), bias)
            try:
                found = _results(backend, dtype, device, bias)
            except Exception as problem:  # whatever it is, it is the reason that the user is told
                line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
                return f"a trial call in {name} failed ({line})"
            for what, value in found.items():
                error = ((value - expected[what]).norm() / expected[what].norm()).item()
                if not error <= TOLERANCE:
                    return f"a trial call in {name} gave a wrong {what}, {error:.2g} off relative to float64"
    return None


def _results(backend: ModuleType, dtype: torch.dtype, device: torch.device, bias: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of one call, as float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (TOKENS, WIDTH),
        "weights": (TOKENS, TOP_K),
        "w_in": (EXPERTS, HIDDEN, WIDTH),
        "w_out": (EXPERTS, WIDTH, HIDDEN),
    }
    if bias:
        shapes |= {"b_in": (EXPERTS, HIDDEN), "b_out": (EXPERTS, WIDTH)}
    drawn = {name: torch.randn(shape, generator=generator, device="cpu") / 2 for name, shape in shapes.items()}
    upstream = torch.randn(shapes["x"], generator=generator, device="cpu").to(device, dtype)
    indices = torch.arange(TOKENS * TOP_K, device="cpu").view(TOKENS, TOP_K) * 7 % (EXPERTS - 1)  # the last one is idle
    indices[3, 1] = -1
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: t.to(device, wide if name == "weights" else dtype).requires_grad_()
        for name, t in drawn.items()
    }  # fmt: skip
    x, weights, *parameters = leaves.values()
    biases = [] if bias else [None, None]
    y = backend.expert_mlp(x, weights, indices.to(device), *parameters, *biases, "gelu")
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    named = {"output": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.cpu().double() for name, t in named.items()}
