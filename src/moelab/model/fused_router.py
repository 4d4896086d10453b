"""The router's decisions on a GPU in one kernel, and its gradients in three; `router.Router` says what they are.

Without them a layer launches some forty small kernels to route its tokens. x passes through: its gradient from the
experts comes in here, and leaves with the router's own added, in one pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from moelab.experts import triton as triton_backend
from moelab.experts.self_check import apart

MOST_EXPERTS = 256


class Tile(NamedTuple):
    """Of the backward pass: about so many programs, and what each takes at once (`benchmarks/passes.py`)."""

    programs: int
    rows: int
    columns: int
    warps: int


BACKWARD = Tile(1024, 32, 64, 4)  # few registers, so that many loads are in flight


def usable(x: torch.Tensor, experts: int, top_k: int) -> bool:
    """Whether the kernels take this call, and give right answers on its device."""
    taken = x.dtype in triton_backend.DTYPES and experts <= MOST_EXPERTS and top_k <= 8 and x.numel() > 0
    return taken and _right(x.device)


def _right(device: torch.device) -> bool:
    return _tried(device)


_right._dynamo_marked_constant = True  # type: ignore[attr-defined]  # tried outside the graph, as in experts.mlp


@functools.cache
def _tried(device: torch.device) -> bool:
    """Tries the kernels once on a device."""
    if triton_backend.unusable(device) is not None:
        return False
    return apart(device, _answers, device)


def _answers(device: torch.device) -> bool:
    try:
        return _agrees(torch.float32, 24, device) and _agrees(torch.float16, 256, device)
    except Exception:  # whatever it is, the router can do without
        return False


def _agrees(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether a call with x of a dtype gives what PyTorch gives."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator, device="cpu") for s in ((70, width), (5, width)))
    x = x.to(device, dtype).requires_grad_()
    w = w.to(device).requires_grad_()
    _, weights, indices, logits = route(x, w, None, 2, "softmax", "chosen")
    found = torch.autograd.grad(weights.square().sum() + logits.sin().sum(), [x, w])
    right_logits = x.float() @ w.T
    right_weights = torch.softmax(right_logits.gather(1, indices), 1)
    right = torch.autograd.grad(right_weights.square().sum() + right_logits.sin().sum(), [x, w])
    best = torch.topk(right_logits, 2).indices
    pairs = zip([weights, logits, *found], [right_weights, right_logits, *right], strict=True)
    return torch.equal(best, indices) and all(((a - b).norm() <= 1e-2 * b.norm()).item() for a, b in pairs)


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def route(
    x_TD: torch.Tensor, w_ED: torch.Tensor, bias_E: torch.Tensor | None, top_k: int, scores: str, normalize: str
) -> Four:
    """→ x (T, D) itself, weights (T, K) fp32, indices (T, K) int64 and logits (T, E) fp32.

    Gradients reach x and w through the weights and the logits, and x through x.
    """
    result: Four = _Route.apply(  # type: ignore[no-untyped-call]
        x_TD.contiguous(), w_ED.float().contiguous(), bias_E, top_k, scores, normalize
    )
    return result


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, top_k: int, scores: str, normalize: str
    ) -> Four:
        weights, indices, logits = torch.ops.moelab.route(x, w, bias, top_k, scores, normalize)
        ctx.save_for_backward(x, w, indices, logits)
        ctx.scores, ctx.normalize = scores, normalize
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return x.view_as(x), weights, indices, logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        d_x, d_weights, _, d_logits = gradients
        x, w, indices, logits = ctx.saved_tensors
        if d_weights is None:
            d_weights = logits.new_zeros(indices.shape)
        if d_x is None:
            d_x = torch.zeros_like(x)
        d_x, d_w = torch.ops.moelab.route_backward(
            d_x, d_weights, d_logits, x, w, indices, logits, ctx.scores, ctx.normalize
        )
        return d_x, d_w, None, None, None, None


@torch.library.custom_op("moelab::route", mutates_args=())
def _route(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, top_k: int, scores: str, normalize: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from moelab.model import router_kernels as kernels

    (tokens, width), experts = x.shape, len(w)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = logits.new_empty(tokens, top_k)
    indices = weights.new_empty(tokens, top_k, dtype=torch.int64)
    bins = _bins(experts)
    rows = 64 if bins <= 64 else 16
    kernels.route[(-(-tokens // rows),)](
        x, w, bias if bias is not None else w, logits, weights, indices, tokens, width, experts,
        TOP_K=top_k, SIGMOID=scores == "sigmoid", NORMALIZE=normalize, HAS_BIAS=bias is not None,
        TOKENS=rows, EXPERTS_2=bins, DEPTH=64, num_warps=4,
    )  # fmt: skip
    return weights, indices, logits


@_route.register_fake
def _(x: Any, w: Any, bias: Any, top_k: int, scores: str, normalize: str) -> tuple[torch.Tensor, ...]:
    tokens = x.shape[0]
    fp32: torch.Tensor = w.new_empty(tokens, top_k)
    return fp32, x.new_empty(tokens, top_k, dtype=torch.int64), w.new_empty(tokens, w.shape[0])


@torch.library.custom_op("moelab::route_backward", mutates_args=())
def _route_backward(
    d_x: torch.Tensor, d_weights: torch.Tensor, d_logits: torch.Tensor | None, x: torch.Tensor, w: torch.Tensor,
    indices: torch.Tensor, logits: torch.Tensor, scores: str, normalize: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from moelab.model import router_kernels as kernels

    (tokens, width), (experts, top_k) = x.shape, (len(w), indices.shape[1])
    bins = _bins(experts)
    rows = 64 if bins <= 64 else 16
    total = torch.empty_like(logits)
    kernels.logits_gradient[(-(-tokens // rows),)](
        logits, indices, d_weights.contiguous(), d_logits.contiguous() if d_logits is not None else logits, total,
        tokens, experts, TOP_K=top_k, SIGMOID=scores == "sigmoid", NORMALIZE=normalize,
        HAS_D_LOGITS=d_logits is not None, TOKENS=rows, EXPERTS_2=bins, num_warps=4,
    )  # fmt: skip
    rows, columns = min(rows, BACKWARD.rows), min(BACKWARD.columns, _bins(width))
    across = -(-width // columns)
    each = span(tokens, BACKWARD.programs, across, rows)
    parts = torch.empty(-(-tokens // each), experts, width, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    kernels.route_backward[(across, len(parts))](
        x, w, total, d_x.contiguous(), dx, parts, tokens, width, experts, each,
        TOKENS=rows, EXPERTS_2=bins, COLUMNS=columns, num_warps=BACKWARD.warps,
    )  # fmt: skip
    return dx, parts.sum(0)


def span(tokens: int, programs: int, across: int, rows: int) -> int:
    """Tokens of a program of the backward pass, a multiple of `rows`, for so many in all, `across` side by side."""
    return max(1, -(-tokens * across // (programs * rows))) * rows


@_route_backward.register_fake
def _(d_x: Any, d_weights: Any, d_logits: Any, x: Any, w: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(w)


def _bins(n: int) -> int:
    """The least power of 2 from 16 on, the least side of a product, that is not less."""
    return 1 << max(4, (n - 1).bit_length())
