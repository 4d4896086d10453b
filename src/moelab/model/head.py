"""The output head and next-token cross-entropy, without keeping the T × V logits.

On GPUs, and on CPUs where there are many tokens, they are computed in chunks of tokens, in one operator that makes each
chunk's logits, its loss, and at once the gradients of x and of the head's weight (Hsu et al. 2024, "Liger Kernel",
section 3.2; Wijmans et al. 2024 recompute the logits instead). So a chunk's logits are all that is ever there, nothing
is computed twice, and a backward pass only multiplies by the gradient of the loss.

- Logits are in x's dtype; the softmax, the loss, and the sum over chunks of the weight's gradient are fp32 (float64).
- Every row of the weight takes part, those of a padded vocabulary too: training teaches them that they are not there.
- The operator traces into a full graph, waits for no device, and gives the same bits twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from moelab.experts import triton as triton_backend
from moelab.model.linear import linear

# Tokens whose logits are there at once, by type of device: up to so many they are whole. Each further chunk reads and
# writes the weight's gradient once more. Measured (`benchmarks/head.py`, docs/measured.md): on an H100 chunks of 8,192
# take at most 4 % longer than one chunk, in a third of the memory at 32,768 tokens. There the operator makes whole
# logits too: a compiler's softmax and its gradient read them three times (5m, H100: 2.36 ms against 1.87).
CHUNK = {"cpu": 2048, "cuda": 8192}
LINE = 128  # rows of a chunk are a multiple of it, for the tiles of the products


def next_token_loss(
    x_TD: torch.Tensor,
    w_VD: torch.Tensor,
    targets_T: torch.Tensor,
    reduction: Literal["mean", "none"] = "mean",
    chunk: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of softmax(x @ w.T) with the targets, in nats.

    Chunks are for the mean where it is differentiated, and on GPUs for what is not differentiated; else the logits are
    as many as the caller gives tokens.

    Args:
        x_TD: (T, D) floating point, after the last norm.
        w_VD: (V, D), the head's weight as it is stored; it is cast to x's dtype here.
        targets_T: (T,) int64, from 0 to V − 1.
        reduction: "mean" over tokens, or "none".
        chunk: most tokens at once; `CHUNK` of the device when not given.

    Returns:
        () or (T,), fp32 (float64 for float64).
    """
    chunk = chunk or CHUNK.get(x_TD.device.type, CHUNK["cuda"])
    learns = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    if learns and reduction == "mean" and (x_TD.is_cuda or x_TD.shape[0] > chunk):
        mean: torch.Tensor = torch.ops.moelab.head_loss(x_TD, w_VD, targets_T, chunk)[0]
        return mean
    if not learns and x_TD.is_cuda and not torch.compiler.is_compiling():
        losses = token_losses(x_TD, w_VD, targets_T, chunk)
        return losses if reduction == "none" else losses.mean()
    logits_TV = linear(x_TD, w_VD, None)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), targets_T, reduction=reduction)


@torch.library.custom_op("moelab::head_loss", mutates_args=())
def head_loss(
    x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the mean loss (), and T times its gradients, of x and w in their own dtypes; at most `chunk` tokens at once."""
    cast = w.to(x.dtype)
    losses = _losses(x)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    for here, z in _chunks(x, cast, chunk):
        losses[here] = loss_and_gradient(z, targets[here])
        torch.mm(z, cast, out=dx[here])
        _add_product(dw, z, x[here], first=here.start == 0)
    return losses.mean(), dx, dw


@torch.no_grad()
def token_losses(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Cross-entropy (T,) of softmax(x @ w.T) with the targets, at most `chunk` tokens at once, not differentiable."""
    losses = _losses(x)
    for here, z in _chunks(x, w.to(x.dtype), chunk):
        losses[here] = loss_and_gradient(z, targets[here])
    return losses


def _losses(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _chunks(x: torch.Tensor, w: torch.Tensor, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Tokens of x, and their logits x @ w.T, in memory that the next chunk's are written to."""
    tokens = len(x)
    chunks = max(1, -(-tokens // chunk))
    rows = max(1, -(-tokens // (chunks * LINE))) * LINE  # all of one size, but the last
    logits = x.new_empty(min(rows, tokens), len(w))
    for start in range(0, tokens, rows):
        here = slice(start, min(start + rows, tokens))
        z = logits[: here.stop - start]
        torch.mm(x[here], w.T, out=z)
        yield here, z


@head_loss.register_fake
def _(x: Any, w: Any, targets: Any, chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((), dtype=wide), torch.empty_like(x), torch.empty_like(w)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else zeros, of the kept gradients, for each step
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dx, dw = ctx.saved_tensors
    each = d_loss / len(dx)
    return (dx * each).to(dx.dtype), (dw * each).to(dw.dtype), None, None


head_loss.register_autograd(_backward, setup_context=_keep)


def loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (T,) of logits (T, V), which are overwritten with their gradient, softmax − 1 at the target."""
    if logits.is_cuda and triton_backend.unusable(logits.device) is None and logits.dtype in triton_backend.DTYPES:
        return softmax_kernel(logits, targets)
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    p = log_p.exp_()
    p[torch.arange(len(p), device=p.device), targets] -= 1
    logits.copy_(p)
    return losses


def softmax_kernel(logits: torch.Tensor, targets: torch.Tensor, warps: int = 32, programs: int = 2) -> torch.Tensor:
    """`loss_and_gradient` in one kernel.

    Args:
        logits, targets: as there, the logits contiguous.
        warps: of a program, which takes a row; fewer for a small vocabulary.
        programs: for how many of them at once the registers of a multiprocessor are to suffice.
    """
    from moelab.model import head_kernels as kernels

    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    each = 16 // logits.itemsize
    warps = min(warps, triton_backend.power_of_2(-(-vocabulary // (32 * each))))
    lanes = 32 * warps
    rest = vocabulary % (lanes * each)
    kernels.loss_and_gradient[(tokens,)](
        logits, targets, losses, V=vocabulary, LANES=lanes, EACH=each,
        REST=triton_backend.power_of_2(-(-rest // lanes)) if rest else 0,
        num_warps=warps, maxnreg=min(255, 65_536 // (lanes * programs)),
    )  # fmt: skip
    return losses


def _add_product(dw: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    """dw += dz.T @ x, or = if it is the first; in dw's dtype, which may be wider than that of the factors."""
    if dw.dtype == x.dtype:
        torch.addmm(dw, dz.T, x, beta=0 if first else 1, out=dw)
    elif dw.is_cuda and dw.dtype == torch.float32:
        if first:
            torch.mm(dz.T, x, out_dtype=dw.dtype, out=dw)
        else:
            torch.addmm(dw, dz.T, x, out_dtype=dw.dtype, out=dw)
    else:  # only CUDA multiplies into another dtype
        product = torch.mm(dz.T, x)
        _ = dw.copy_(product) if first else dw.add_(product)
