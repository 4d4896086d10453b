"""Backend `megablocks`: the dropless layer of the package megablocks (Gale et al. 2022, "MegaBlocks").

The rows of each expert side by side, and grouped products over them: `ParallelDroplessMLP`, the experts of its dMoE.
Routing and balance loss are moelab's, the parameters those of every backend. `megablocks_capacity` is the same
package's older layer, with bins; `megablocks_layers` runs both.

Its row counts go to the host, so a step with it cannot be captured in a CUDA graph, and `torch.compile` leaves the
layer as it is, with a break in the graph before and after.
"""

from __future__ import annotations

import importlib

import torch

from moelab.config import Activation, first_line
from moelab.experts import requirements
from moelab.experts.megablocks_standins import installed

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Its pins exclude the PyTorch that moelab needs (--no-deps), its build imports PyTorch (--no-build-isolation), and with
# CUDA 13 its extension does not compile (build_py and --skip-build leave it out).
PIP = "pip install --no-deps --no-build-isolation"
INSTALL = {
    "stk": ("stanford-stk", f"{PIP} stanford-stk==0.7.1"),
    "megablocks": ("megablocks", f"{PIP} -C--global-option=build_py -C--build-option=--skip-build megablocks==0.10.0"),
}


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device, with the commands that would mend it; None if it can."""
    reasons = [] if requirements.interpreted(device) else [requirements.no_gpu(device)]
    if not any(reasons):
        reasons.append(requirements.no_triton())
    if absent := [INSTALL[module] for module in INSTALL if not installed(module)]:
        names, commands = zip(*absent, strict=True)
        reasons.append(f"not installed: {' and '.join(names)}; {' && '.join(commands)}")
    if not any(reasons):
        try:
            importlib.import_module("moelab.experts.megablocks_layers")
        except Exception as problem:  # of another version, or of an extension built for another PyTorch
            line = first_line(problem)
            names, commands = zip(*INSTALL.values(), strict=True)
            again = " && ".join((f"pip uninstall -y {' '.join(names)}", *commands))
            reasons.append(f"importing megablocks failed ({line}); {again}")
    return "; ".join(filter(None, reasons)) or None


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """What of a call this backend does not take, and what would work; None if it takes it."""
    if dtype in (torch.float16, torch.float32) and installed("grouped_gemm"):
        return f"precision = {DTYPES[dtype]}: the package grouped_gemm takes bf16; give that or uninstall it"
    return refused_in_both_forms(dtype, bias, deterministic)


def refused_in_both_forms(dtype: torch.dtype, bias: bool, deterministic: bool) -> str | None:
    """See `refuses`; every activation is taken."""
    if bias:
        return "bias = True: megablocks has no biases of experts; give --no-bias, or another --backend"
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"precision = {name}: the kernels of megablocks take {', '.join(DTYPES.values())}"
    if deterministic:
        return "deterministic = True: megablocks picks kernels by time, and last bits move; give another --backend"
    return None


def expert_mlp(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights fp32, the biases None."""
    if x_TD.shape[0] == 0:
        return without_tokens(x_TD, weights_TK, w_in, w_out)
    from moelab.experts import megablocks_layers

    y: torch.Tensor = megablocks_layers.run("dropless", x_TD, weights_TK, indices_TK, w_in, w_out, activation)
    return y


def without_tokens(x_TD: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """No rows, through which every input's gradient is zeros."""
    return x_TD + 0 * sum(t.sum().to(x_TD.dtype) for t in others)
