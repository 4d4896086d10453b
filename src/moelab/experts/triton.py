"""Backend `triton`: scatter, compute and gather end to end, in kernels of our own (`triton_kernels`).

    x ──gathered by──▶ product with W_in, + b_in, activation ──▶ product with W_out, + b_out ──▶ combine

- No copy of x sorted by expert exists, forward or backward; what is kept for the backward pass is x, the activation's
  input z (N·F) and the routing.
- Backward: one product gives dL/dh of the unweighted rows; its epilogue makes dL/dz, the weighted hidden layer for
  dL/dW_out, and ⟨dL/dh, h⟩, whose sum over F is the gradient of the router's weight: the rows' outputs are not kept.
- No float atomics and no host synchronisation: the same call twice gives the same bits, and a step can be captured in a
  CUDA graph.

Both passes are operators of `torch.library`, with shapes for the compiler and a backward formula.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from moelab.config import Activation, UsageError
from moelab.experts.grouped_mm import sort_slots

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with CUDA builds of PyTorch"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"needs compute capability 8.0 or more, and this GPU has {major}.{minor}"
    return None if _interpreted() else f"needs a CUDA device, and this is {device.type}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights fp32."""
    if x_TD.dtype not in DTYPES:
        raise UsageError(f"x = {x_TD.dtype}: the backend triton takes bf16, fp16 and fp32; use another backend")
    if x_TD.shape[0] == 0:
        parameters = [t for t in (weights_TK, w_in, w_out, b_in, b_out) if t is not None]
        return x_TD + 0 * sum(t.sum().to(x_TD.dtype) for t in parameters)  # gradients of zeros
    y: torch.Tensor = torch.ops.moelab.fused_experts(
        x_TD.contiguous(), weights_TK.contiguous(), indices_TK, w_in.contiguous(), w_out.contiguous(),
        None if b_in is None else b_in.contiguous(), None if b_out is None else b_out.contiguous(), activation,
    )[0]  # fmt: skip
    return y


Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("moelab::fused_experts", mutates_args=())
def fused_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ y (T, D), z (N, F or 2F), slot_of_row (N,) and row_of_slot (N,) int64, offsets (E,) int32."""
    routing = sort_slots(indices, w_in.shape[0])
    slot_of_row, row_of_slot, offsets = routing.slot_of_row, routing.row_of_slot, routing.offsets
    slots, width, hidden = indices.numel(), x.shape[1], w_out.shape[2]
    z = x.new_empty(slots, w_in.shape[1])
    h = x.new_empty(slots, hidden)
    _product(
        x, w_in, (w_in.shape[1] * width, width, 1), hidden, offsets,
        bias=b_in, slot_of_row=slot_of_row, top_k=indices.shape[1], epilogue="act", activation=activation, z=z, h=h,
    )  # fmt: skip
    rows = x.new_empty(slots, width)
    _product(h, w_out, (width * hidden, hidden, 1), width, offsets, bias=b_out, out=rows)
    y = _combine(rows, row_of_slot, offsets, indices, weights)
    return y, z, slot_of_row, row_of_slot, offsets


@fused_experts.register_fake
def _(x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, activation: str) -> Tensors:
    slots = indices.numel()
    rows = indices.new_empty(slots, dtype=torch.int64)
    z = x.new_empty(slots, w_in.shape[1])
    return torch.empty_like(x), z, rows, torch.empty_like(rows), indices.new_empty(w_in.shape[0], dtype=torch.int32)


@torch.library.custom_op("moelab::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    dy: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor,
    w_out: torch.Tensor, b_in: torch.Tensor | None, b_out: torch.Tensor | None, z: torch.Tensor,
    slot_of_row: torch.Tensor, row_of_slot: torch.Tensor, offsets: torch.Tensor, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ gradients of x, weights, w_in, w_out, b_in and b_out; of a bias that is None an empty tensor."""
    from moelab.experts import triton_kernels as kernels

    dy = dy.contiguous()
    experts, inner, width = w_in.shape
    hidden, top_k = w_out.shape[2], indices.shape[1]
    slots = indices.numel()
    row_weights = weights.flatten()[slot_of_row]
    dz, h = torch.empty_like(z), x.new_empty(slots, hidden)
    blocks = -(-hidden // _shape(x.dtype, hidden, width)["COLUMNS"])
    partial = torch.empty(slots, blocks, dtype=torch.float32, device=x.device)
    _product(
        dy, w_out, (width * hidden, 1, hidden), hidden, offsets, out=dz, slot_of_row=slot_of_row, top_k=top_k,
        epilogue="slope", activation=activation, z=z, h=h, row_weights=row_weights, partial=partial,
    )  # fmt: skip
    d_weights = torch.empty_like(weights)
    kernels.slot_gradient[(-(-slots // 64),)](
        partial, dy, b_out if b_out is not None else dy, row_of_slot, indices.flatten(), offsets, d_weights, slots,
        blocks, width, TOP_K=top_k, EXPERTS=experts, HAS_BIAS=b_out is not None, SLOTS=64, BLOCKS=_power_of_2(blocks),
        COLUMNS=64,
    )  # fmt: skip
    d_w_out, d_b_out = _weight_gradient(
        dy, h, offsets, slot_of_row, top_k, w_out, b_out, gather_dy=True, row_weights=row_weights
    )
    d_rows = x.new_empty(slots, width)
    _product(dz, w_in, (inner * width, 1, width), width, offsets, out=d_rows)
    d_w_in, d_b_in = _weight_gradient(dz, x, offsets, slot_of_row, top_k, w_in, b_in, gather_dy=False)
    d_x = _combine(d_rows, row_of_slot, offsets, indices, None)
    return d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out


@fused_experts_backward.register_fake
def _(
    dy: Any, x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, *_: Any
) -> Tensors:  # fmt: skip
    like = [x, weights, w_in, w_out]
    biases = [x.new_empty(0) if b is None else torch.empty_like(b) for b in (b_in, b_out)]
    return (*(torch.empty_like(t) for t in like), *biases)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.activation = inputs
    _, z, slot_of_row, row_of_slot, offsets = output
    ctx.save_for_backward(*tensors, z, slot_of_row, row_of_slot, offsets)


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, z, slot_of_row, row_of_slot, offsets = ctx.saved_tensors
    d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out = torch.ops.moelab.fused_experts_backward(
        dy, *tensors, z, slot_of_row, row_of_slot, offsets, ctx.activation
    )
    b_in, b_out = tensors[5], tensors[6]
    biases = (None if b_in is None else d_b_in, None if b_out is None else d_b_out)
    return d_x, d_weights, None, d_w_in, d_w_out, *biases, None


fused_experts.register_autograd(_backward, setup_context=_keep)


# Launches


def _shape(dtype: torch.dtype, outside: int, inside: int) -> dict[str, int]:
    """Tile of a product: rows, columns, and how much of the inside is multiplied at once."""
    wide = dtype == torch.float32
    return {
        "ROWS": 64 if wide else 128,
        "COLUMNS": min(64 if wide else 128, max(16, _power_of_2(outside))),
        "DEPTH": min(32 if wide else 64, max(16, _power_of_2(inside))),
    }


def _product(
    a: torch.Tensor, w: torch.Tensor, strides: tuple[int, int, int], outside: int, offsets: torch.Tensor, *,
    out: torch.Tensor | None = None, bias: torch.Tensor | None = None, slot_of_row: torch.Tensor | None = None,
    top_k: int = 1, epilogue: str = "", activation: str = "", z: torch.Tensor | None = None,
    h: torch.Tensor | None = None, row_weights: torch.Tensor | None = None, partial: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launches `product`; strides are those of w by expert, output and input."""
    from moelab.experts import triton_kernels as kernels

    slots = next(t for t in (out, h) if t is not None).shape[0]
    experts, inside = len(offsets), a.shape[1]
    shape = _shape(a.dtype, outside, inside)
    tiles = -(-slots // shape["ROWS"]) + experts
    some = a  # stands where a pointer is not used
    kernels.product[(tiles * -(-outside // shape["COLUMNS"]),)](
        a, slot_of_row if slot_of_row is not None else some, w, bias if bias is not None else some,
        out if out is not None else some, offsets, z if z is not None else some, h if h is not None else some,
        row_weights if row_weights is not None else some, partial if partial is not None else some,
        inside, outside, *strides,
        GATHER=slot_of_row is not None, TOP_K=top_k, EPILOGUE=epilogue, ACTIVATION=activation,
        EXPERTS=experts, EXPERTS_2=_power_of_2(experts), HAS_BIAS=bias is not None, **_arithmetic(a.dtype), **shape,
        num_warps=4 if a.dtype == torch.float32 else 8, num_stages=3,
    )  # fmt: skip


def _weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, slot_of_row: torch.Tensor, top_k: int,
    w: torch.Tensor, b: torch.Tensor | None, *, gather_dy: bool, row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from moelab.experts import triton_kernels as kernels

    experts, outside, inside = w.shape
    dw, db = torch.empty_like(w), torch.empty_like(b) if b is not None else w.new_empty(0)
    wide = w.dtype == torch.float32
    shape = {
        "ROWS": min(64 if wide else 128, max(16, _power_of_2(outside))),
        "COLUMNS": min(64 if wide else 128, max(16, _power_of_2(inside))),
        "DEPTH": 32 if wide else 64,
    }
    grid = (-(-outside // shape["ROWS"]) * -(-inside // shape["COLUMNS"]), experts)
    kernels.weight_gradient[grid](
        dy, x, slot_of_row, row_weights if row_weights is not None else dy, offsets, dw, db, outside, inside,
        GATHER_DY=gather_dy, GATHER_X=not gather_dy, TOP_K=top_k, HAS_BIAS=b is not None,
        WEIGHTED_BIAS=row_weights is not None, **_arithmetic(w.dtype), **shape, num_warps=4 if wide else 8,
        num_stages=3,
    )  # fmt: skip
    return dw, db


def _combine(
    rows: torch.Tensor, row_of_slot: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from moelab.experts import triton_kernels as kernels

    (tokens, top_k), width = indices.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    columns = min(256, _power_of_2(width))
    kernels.combine[(-(-tokens // 16), -(-width // columns))](
        rows, row_of_slot, weights if weights is not None else rows, offsets, out, tokens, width,
        TOP_K=top_k, EXPERTS=len(offsets), WEIGHTED=weights is not None, TOKENS=16, COLUMNS=columns,
    )  # fmt: skip
    return out


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", "CAST": _interpreted()}


@functools.cache
def _power_of_2(n: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << max(0, n - 1).bit_length()
