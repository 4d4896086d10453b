"""Products with weights, and what a compiler leaves open in their backward passes on a GPU.

`torch.compile` makes three passes over memory there that nothing asks for: it copies the gradients of queries, keys and
values side by side and reads the copy again for the bias's gradient, it reads the gradient of a feed-forward's hidden
layer again for that of its bias, and it rounds the gradient of a weight to 16 bits and widens it again. Compiled, in 16
bits and on a GPU, the functions here do without; everywhere else they are plain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moelab.config import Activation
from moelab.experts.activation import activate

Tensors = tuple[torch.Tensor, ...]
GATED = "swiglu"


class Tile(NamedTuple):
    """What a program of a kernel takes at once (`benchmarks/passes.py` times others)."""

    rows: int
    columns: int
    warps: int


ACTIVATION, HEADS = Tile(4, 256, 8), Tile(32, 256, 4)
HALF = (torch.bfloat16, torch.float16)


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """x @ w.T + b in x's dtype: the fp32 master weight is cast here, where it is used."""
    y: torch.Tensor = Linear.apply(x, w, b) if own_backward(x, w) else _plain(x, w, b)
    return y


def activated_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """act(x @ w.T + b), see `linear` and `activate`."""
    if not own_backward(x, w) or b is None or activation == GATED:
        return activate(linear(x, w, b), activation)
    h: torch.Tensor = ActivatedLinear.apply(x, w, b, activation)
    return h


def heads_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, heads: int) -> Tensors:
    """Queries, keys and values, (B, heads, C, head) each, of x (B, C, D) and one weight (3·D, D)."""
    if not own_backward(x, w):
        return _heads(_plain(x, w, b), heads)
    found: Tensors = HeadsLinear.apply(x, w, b, heads)
    return found


def own_backward(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the functions here, and `Norm.fork`, have backward passes of their own."""
    return x.is_cuda and x.dtype in HALF and w.dtype == torch.float32 and torch.compiler.is_compiling()


def _tall(tokens: int) -> int:
    """Rows of which a program of the kernels sums each column: so few that all multiprocessors have some."""
    return 128 if tokens >= 16_384 else 64


def _room(like: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
    """For the sums of columns over each `_tall` rows, (parts, width) fp32."""
    return like.new_empty(-(-tokens // _tall(tokens)), width, dtype=torch.float32)


def _plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def _heads(qkv: torch.Tensor, heads: int) -> Tensors:
    batch, length, width = qkv.shape
    return qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


class Linear(torch.autograd.Function):
    """`linear`, with the gradients of w and b in fp32 as their products are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        cast = w.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.biased = b is not None
        return _plain(x, cast, b)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        db = dy.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.biased else None
        return *_gradients(dy, x, cast), db


class ActivatedLinear(torch.autograd.Function):
    """`activated_linear` with a bias, whose gradient is summed where the hidden layer's is made."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, activation: Activation) -> torch.Tensor:
        cast = w.to(x.dtype)
        z = _plain(x, cast, b)
        ctx.save_for_backward(x, cast, z)
        ctx.activation = activation
        return activate(z, activation)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, cast, z = ctx.saved_tensors
        dz, parts = torch.ops.moelab.activation_backward(dh.flatten(0, -2), z.flatten(0, -2), ctx.activation)
        return *_gradients(dz.view(z.shape), x, cast), parts.sum(0), None


class HeadsLinear(torch.autograd.Function):
    """`heads_linear`, whose gradients are put side by side and summed in one pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, heads: int) -> Tensors:
        cast = w.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.biased = b is not None
        return _heads(_plain(x, cast, b), heads)

    @staticmethod
    def backward(
        ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        x, cast = ctx.saved_tensors
        d_qkv, parts = torch.ops.moelab.heads_backward(dq, dk, dv)
        return *_gradients(d_qkv, x, cast), parts.sum(0) if ctx.biased else None, None


def _gradients(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x in its dtype, and of w in fp32."""
    left, right = dy.flatten(0, -2).mT, x.flatten(0, -2)
    if x.is_cuda:
        return dy @ w, torch.mm(left, right, out_dtype=torch.float32)
    return dy @ w, torch.mm(left, right).float()  # only CUDA multiplies into another dtype


@torch.library.custom_op("moelab::activation_backward", mutates_args=())
def _activation_backward(
    dh: torch.Tensor, z: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dh, z (T, F) → dz (T, F) = dh · act'(z), and the sums of its columns over each `_tall` rows, (parts, F) fp32."""
    from moelab.model import linear_kernels as kernels

    (tokens, width), dz = z.shape, torch.empty_like(z)
    parts = _room(z, tokens, width)
    kernels.activation_backward[(-(-width // ACTIVATION.columns), len(parts))](
        dh.contiguous(), z, dz, parts, tokens, width,
        ACTIVATION=activation, TALL=_tall(tokens), ROWS=ACTIVATION.rows, COLUMNS=ACTIVATION.columns,
        num_warps=ACTIVATION.warps,
    )  # fmt: skip
    return dz, parts


@_activation_backward.register_fake
def _(dh: Any, z: Any, activation: str) -> Tensors:
    return torch.empty_like(z), _room(z, *z.shape)


@torch.library.custom_op("moelab::heads_backward", mutates_args=())
def _heads_backward(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, heads, C, head) each → (B, C, 3·D) side by side, and sums of columns over each `_tall` rows, (parts, 3·D)."""
    from moelab.model import linear_kernels as kernels

    (batch, heads, length, head), tokens = dq.shape, dq.shape[0] * dq.shape[2]
    if not (dq.stride() == dk.stride() == dv.stride() and dq.stride(3) == 1):
        dq, dk, dv = (d.contiguous() for d in (dq, dk, dv))
    width = heads * head
    d_qkv = dq.new_empty(batch, length, 3 * width)
    parts = _room(dq, tokens, 3 * width)
    kernels.heads_backward[(-(-width // HEADS.columns), len(parts), 3)](
        dq, dk, dv, d_qkv, parts, tokens, length, width, *dq.stride()[:3],
        HEAD=head, TALL=_tall(tokens), ROWS=HEADS.rows, COLUMNS=HEADS.columns, num_warps=HEADS.warps,
    )  # fmt: skip
    return d_qkv, parts


@_heads_backward.register_fake
def _(dq: Any, dk: Any, dv: Any) -> Tensors:
    batch, heads, length, head = dq.shape
    wide = 3 * heads * head
    return dq.new_empty(batch, length, wide), _room(dq, batch * length, wide)
