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
import os
from typing import Any, NamedTuple

import torch

from moelab.config import Activation, UsageError
from moelab.experts import requirements
from moelab.experts.choice import Shape
from moelab.experts.self_check import SMALL, Trial

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RECOMPUTES = True  # of the rows keeps z alone for the backward pass
BLOCKS, COUNTS = 128, 2**17  # programs of the sort, and counts in all of them, at most: a tile that compiles in seconds
MOST_EXPERTS = 2**13 - 1  # and a bin of dropped slots
# Every tile of `TILES`, with rows enough for all of its loops, as most models launch it: 8 experts, biases. What is
# compiled for a trial is there for training then.
TRIALS = (SMALL, Trial(40, 256, 256, 8, fp32=False), Trial(700, 1024, 512, 8, fp32=False))
MOST_SLOTS = 2**31 - 2**15  # places in the sort are int32, rounded up to whole steps of its programs


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    reason = None if requirements.interpreted(device) else requirements.no_gpu(device)
    return reason or requirements.no_triton()


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """Why calls of this kind are not taken; None if they are."""
    if dtype not in DTYPES:
        precision = str(dtype).removeprefix("torch.")
        return f"precision = {precision}: the backend triton takes bf16, fp16 and fp32; give another --backend"
    return None


def refuses_shape(shape: Shape) -> str | None:
    """Why experts of such sizes are not taken; None if they are."""
    if shape.experts > MOST_EXPERTS:
        return f"experts = {shape.experts}: the backend triton takes {MOST_EXPERTS}; give another --backend"
    return None


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
    if x_TD.shape[0] == 0:
        parameters = [t for t in (weights_TK, w_in, w_out, b_in, b_out) if t is not None]
        return x_TD + 0 * sum(t.sum().to(x_TD.dtype) for t in parameters)  # gradients of zeros
    y: torch.Tensor = torch.ops.moelab.fused_experts(
        x_TD.contiguous(), weights_TK.contiguous(), indices_TK.contiguous(), w_in.contiguous(), w_out.contiguous(),
        None if b_in is None else b_in.contiguous(), None if b_out is None else b_out.contiguous(), activation,
    )[0]  # fmt: skip
    return y


Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("moelab::fused_experts", mutates_args=())
def fused_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ y (T, D), z (N, F or 2F), slot_of_row (N,) and row_of_slot (N,) int32, offsets (E,) int32."""
    slot_of_row, row_of_slot, offsets = sort_slots(indices, w_in.shape[0])
    slots, width, hidden = indices.numel(), x.shape[1], w_out.shape[2]
    z = x.new_empty(slots, w_in.shape[1])
    h = x.new_empty(slots, hidden)
    _product(
        "up", x, w_in, hidden, offsets, out=z, h=h, bias=b_in, slot_of_row=slot_of_row, top_k=indices.shape[1],
        epilogue="act", activation=activation,
    )  # fmt: skip
    rows = x.new_empty(slots, width)
    _product("down", h, w_out, width, offsets, bias=b_out, out=rows)
    y = _combine(rows, row_of_slot, offsets, indices, weights)
    return y, z, slot_of_row, row_of_slot, offsets


@fused_experts.register_fake
def _(x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, activation: str) -> Tensors:
    slots = indices.numel()
    rows = indices.new_empty(slots, dtype=torch.int32)
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
    tile = tile_of("slope", x.dtype, width, hidden, activation)
    dz, h = torch.empty_like(z), x.new_empty(slots, hidden)
    partial = torch.empty(slots, -(-hidden // tile.columns), dtype=torch.float32, device=x.device)
    tiles = _tiles(slots, experts, tile.rows)
    bias_parts = torch.empty(tiles if b_in is not None else 0, inner, dtype=torch.float32, device=x.device)
    _product(
        "slope", dy, w_out, hidden, offsets, out=dz, h=h, slot_of_row=slot_of_row,
        top_k=top_k, epilogue="slope", activation=activation, z=z, weights=weights, partial=partial,
        bias_parts=bias_parts, bias=b_in,
    )  # fmt: skip
    d_weights = torch.empty_like(weights)
    kernels.slot_gradient[(-(-slots // 64),)](
        partial, dy, b_out if b_out is not None else dy, row_of_slot, indices, offsets, d_weights, slots,
        partial.shape[1], width, TOP_K=top_k, EXPERTS=experts, HAS_BIAS=b_out is not None, SLOTS=64,
        BLOCKS=power_of_2(partial.shape[1]), COLUMNS=64,
    )  # fmt: skip
    d_w_out = _weight_gradient("out", dy, h, offsets, slot_of_row, top_k, w_out)
    del h
    d_b_out = x.new_empty(0)
    if b_out is not None:
        chunk = _chunk(BIAS_CHUNK, slots)
        chunks = _tiles(slots, experts, chunk)
        parts = torch.empty(chunks, width, dtype=torch.float32, device=x.device)
        kernels.bias_parts[(-(-width // 64), chunks)](
            dy, slot_of_row, weights, offsets, parts, width, TOP_K=top_k, EXPERTS=experts,
            EXPERTS_2=power_of_2(experts), LONGEST=chunk, STEP=64, COLUMNS=64,
        )  # fmt: skip
        d_b_out = _sum_bias_parts(parts, offsets, chunk, b_out)
    d_b_in = _sum_bias_parts(bias_parts, offsets, tile.rows, b_in) if b_in is not None else x.new_empty(0)
    d_rows = x.new_empty(slots, width)
    _product("back", dz, w_in, width, offsets, out=d_rows)
    d_x = _combine(d_rows, row_of_slot, offsets, indices, None)
    del d_rows
    d_w_in = _weight_gradient("in", dz, x, offsets, slot_of_row, top_k, w_in)
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
    ctx.set_materialize_grads(False)  # else zeros, of what is kept, for each step
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


WHOLE = 1 << 30  # rows that no expert has more than: a sum that is not cut


class Tile(NamedTuple):
    """What a program of a product computes, and how."""

    rows: int
    columns: int
    depth: int
    """Of the dimension that is summed over, multiplied at once."""
    warps: int = 8
    stages: int = 3
    """Of loads, held in shared memory."""
    group: int = 8
    """Tiles of rows that go down a column of tiles before the next column."""
    halves: bool = False
    """The epilogue in two halves, for fewer registers."""
    registers: int | None = None
    """At most so many a thread, so that two programs fit a multiprocessor."""
    maps: bool = False
    """Operands that are not gathered come through the tensor memory accelerator, on GPUs that have one."""
    chunk: int = WHOLE
    """Weight gradients: at most so many rows in a sum; longer ones are summed in parts, in their order."""


# By product and largest width D: the fastest of `benchmarks/tiles.py` on one NVIDIA H100 (docs/kernels.md).
#   up: x W_inᵀ and the activation    down: h W_outᵀ    slope: dy W_out and the activation's backward    back: dz W_in
#   in, out: the gradients of W_in and W_out
TILES: dict[str, dict[int, Tile]] = {
    "up": {768: Tile(128, 128, 64, maps=True), 1 << 30: Tile(128, 256, 64, stages=4, group=4)},
    "down": {256: Tile(128, 256, 64, stages=4), 1 << 30: Tile(128, 256, 64, stages=4, maps=True)},
    "slope": {1 << 30: Tile(128, 128, 64, halves=True, registers=128)},
    "back": {256: Tile(128, 256, 64, stages=4), 1 << 30: Tile(128, 256, 64, stages=4, maps=True)},
    "in": {
        256: Tile(64, 128, 64, warps=4, stages=4, chunk=10240),
        1 << 30: Tile(256, 128, 64, stages=4, maps=True, chunk=10240),
    },
    "out": {256: Tile(128, 128, 64, stages=4, chunk=10240), 1 << 30: Tile(128, 256, 64, maps=True, chunk=10240)},
}
ENOUGH = 128  # tiles of a matrix whose gradient is summed whole: they fill a GPU, and parts would take much memory
WIDE = Tile(64, 64, 32, warps=4, chunk=4096)  # fp32, on the ordinary cores
BIAS_CHUNK = 1024


def tile_of(product: str, dtype: torch.dtype, width: int, hidden: int, activation: str = "") -> Tile:
    """The tile of a product for experts (D = width, F = hidden), no larger than they are."""
    table = TILES[product]
    tile = WIDE if dtype == torch.float32 else next(table[most] for most in sorted(table) if width <= most)
    outside, inside = {
        "up": (hidden, width), "down": (width, hidden), "slope": (hidden, width), "back": (width, hidden),
        "in": (hidden, width), "out": (width, hidden),
    }[product]  # fmt: skip
    if product in ("in", "out"):  # both sides of the tile are of the weights
        rows, columns = min(tile.rows, _side(outside)), min(tile.columns, _side(inside))
        return tile._replace(rows=rows, columns=columns)
    columns = min(tile.columns, _side(outside))
    if activation == "swiglu" and product in ("up", "slope"):  # two products, or two inputs, to hold
        columns = max(16, columns // 2)
    return tile._replace(columns=columns, depth=min(tile.depth, _side(inside)), halves=tile.halves and columns >= 64)


def _side(size: int) -> int:
    return max(16, power_of_2(size))


def _chunk(rows: int, slots: int) -> int:
    """Rows of a sum: `rows`, or a multiple where that would be more chunks than a grid is wide (65,535)."""
    return rows * max(1, -(-slots // (rows << 15)))


def _tiles(slots: int, experts: int, rows: int) -> int:
    """As many tiles of rows as there can be: each expert's last one may be cut."""
    return slots // rows + min(experts, slots)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


@functools.cache
def _generation(device: torch.device) -> int | None:
    """The compute capability's major number, 0 of a GPU that is not NVIDIA's; None where kernels are interpreted."""
    if device.type != "cuda":
        return None
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def _pairs(device: torch.device) -> bool:
    """Whether an accumulator's columns 2i and 2i + 1 lie in one thread (`triton_kernels._read`)."""
    return _generation(device) in (8, 9)


def _has_maps(device: torch.device) -> bool:
    """Whether there is a tensor memory accelerator, or an interpreter that does as it does."""
    generation = _generation(device)
    return generation is None or generation >= 9


def _compiled(tile: Tile, dtype: torch.dtype, device: torch.device, operands: int, loads: int = 1) -> dict[str, Any]:
    """Options of the compiler; `operands` rows and columns are held a stage, fewer stages where they do not fit.

    `loads` that follow on one another, as a row's number and then the row, are a stage apart each.
    """
    stages, generation = tile.stages, _generation(device)
    if generation is not None:
        buffers = (_shared_memory(device) - 2048) // (operands * tile.depth * dtype.itemsize)
        # Before Hopper, and on small Blackwells, the products read registers: the last stage needs no buffer.
        stages = max(1, min(stages, buffers + (generation not in (9, 10))))
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": loads * (stages - 1) + 1}
    if tile.registers is not None and generation in (9, 10):  # elsewhere operands are in registers too, and spill
        options["maxnreg"] = tile.registers
    return options


def sort_slots(indices: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable counting sort of the slots (t, k), in that order, by expert; dropped ones last.

    Args:
        indices: (T, K) integers; what is not from 0 to E − 1 is a dropped slot.

    Returns:
        slot_of_row (N,) and its inverse row_of_slot (N,), int32; offsets (E,) int32, where each expert's rows end.
    """
    from moelab.experts import triton_kernels as kernels

    slots, bins = indices.numel(), power_of_2(experts + 1)
    if slots > MOST_SLOTS:
        raise UsageError(f"slots = {slots}: the backend triton takes {MOST_SLOTS}; give fewer tokens a step")
    step = max(16, min(256, 16384 // bins))
    programs = min(BLOCKS, COUNTS // bins)  # each of them adds up the counts of all
    span = max(4, -(-slots // (step * programs))) * step
    blocks = -(-slots // span)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=indices.device)
    slot_of_row = torch.empty(slots, dtype=torch.int32, device=indices.device)
    row_of_slot, offsets = torch.empty_like(slot_of_row), slot_of_row.new_empty(experts)
    shape = {"EXPERTS": experts, "EXPERTS_2": bins, "STEP": step}
    kernels.count[(blocks,)](indices, counts, slots, span, **shape)
    kernels.place[(blocks,)](
        indices, counts, slot_of_row, row_of_slot, offsets, slots, span, blocks, BLOCKS=power_of_2(blocks), **shape
    )
    return slot_of_row, row_of_slot, offsets


def _product(
    name: str, a: torch.Tensor, w: torch.Tensor, outside: int, offsets: torch.Tensor, *,
    out: torch.Tensor, bias: torch.Tensor | None = None, slot_of_row: torch.Tensor | None = None,
    top_k: int = 1, epilogue: str = "", activation: str = "", z: torch.Tensor | None = None,
    h: torch.Tensor | None = None, weights: torch.Tensor | None = None, partial: torch.Tensor | None = None,
    bias_parts: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launches `product`."""
    from moelab.experts import triton_kernels as kernels

    experts, inside = len(offsets), a.shape[1]
    width, hidden = (inside, outside) if name in ("up", "slope") else (outside, inside)
    tile = tile_of(name, a.dtype, width, hidden, activation)
    tiles = _tiles(out.shape[0], experts, tile.rows)
    whole = outside % tile.columns == 0
    some = a  # stands where a pointer is not used
    z, h, weights, partial, bias_parts, slot_of_row = (
        t if t is not None else some
        for t in (z if z is not None else out, h, weights, partial, bias_parts, slot_of_row)
    )
    gated = activation == "swiglu" and epilogue == "act"
    even, gather, across = inside % tile.depth == 0, epilogue != "", name in ("slope", "back")
    a_map = w_map = None
    if tile.maps and even and whole and _has_maps(a.device) and w.data_ptr() % 16 == 0:
        from triton.tools.tensor_descriptor import TensorDescriptor

        w_map = TensorDescriptor.from_tensor(
            w.flatten(0, 1), [tile.depth, tile.columns] if across else [tile.columns, tile.depth]
        )
        a_map = None if gather else TensorDescriptor.from_tensor(a, [tile.rows, tile.depth])
    kernels.product[(tiles * -(-outside // tile.columns),)](
        a, slot_of_row, w, bias if bias is not None else some, out, offsets, z, h, weights, partial, bias_parts,
        inside, outside, tiles, a_map, w_map,
        GATHER=gather, ACROSS=across, TOP_K=top_k, EPILOGUE=epilogue, ACTIVATION=activation,
        EXPERTS=experts, EXPERTS_2=power_of_2(experts), HAS_BIAS=bias is not None, **_arithmetic(a.dtype),
        EXACT=a.dtype == torch.float32, EVEN=even, WHOLE=whole,
        DIRECT=whole and a.element_size() == 2 and _pairs(a.device), ROWS=tile.rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, GROUP=tile.group, HALVES=tile.halves and epilogue == "slope",
        **_compiled(tile, a.dtype, a.device, tile.rows + tile.columns * (1 + gated)),
    )  # fmt: skip


def _weight_gradient(
    name: str, dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, slot_of_row: torch.Tensor, top_k: int,
    w: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Gradient of w (E, outside, inside); the operand that is of tokens, dy for "out" and x for "in", is gathered."""
    from moelab.experts import triton_kernels as kernels

    experts, outside, inside = w.shape
    dw, slots = torch.empty_like(w), len(slot_of_row)
    width, hidden = (inside, outside) if name == "in" else (outside, inside)
    tile = tile_of(name, w.dtype, width, hidden)
    tiles = -(-outside // tile.rows) * -(-inside // tile.columns)
    chunk = _chunk(tile.chunk if tiles < ENOUGH else WHOLE, slots)
    chunks = _tiles(slots, experts, chunk)
    several = 0 if slots <= chunk else min(chunks, 2 * slots // chunk)
    parts = torch.empty(several, outside, inside, dtype=torch.float32, device=w.device)
    shared = {"EXPERTS": experts, "EXPERTS_2": power_of_2(experts)}
    whole = outside % tile.rows == 0 and inside % tile.columns == 0
    dy_map = x_map = None
    if tile.maps and whole and _has_maps(w.device):
        from triton.tools.tensor_descriptor import TensorDescriptor

        if name == "in":
            dy_map = TensorDescriptor.from_tensor(dy, [tile.depth, tile.rows])
        else:
            x_map = TensorDescriptor.from_tensor(x, [tile.depth, tile.columns])
    kernels.weight_gradient[(tiles, chunks)](
        dy, x, slot_of_row, offsets, dw, parts, outside, inside, chunk, dy_map, x_map,
        GATHER_DY=name == "out", GATHER_X=name == "in", TOP_K=top_k, **shared, **_arithmetic(w.dtype),
        WHOLE=whole, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        **_compiled(tile, w.dtype, w.device, tile.rows + tile.columns, loads=2),
    )  # fmt: skip
    size = outside * inside
    kernels.sum_parts[(-(-size // 4096), experts)](parts, offsets, dw, size, chunk, **shared, BLOCK=4096)
    return dw


def _sum_bias_parts(parts: torch.Tensor, offsets: torch.Tensor, chunk: int, bias: torch.Tensor) -> torch.Tensor:
    from moelab.experts import triton_kernels as kernels

    experts, width = bias.shape
    db = torch.empty_like(bias)
    kernels.sum_bias_parts[(-(-width // 64), experts)](
        parts, offsets, db, width, EXPERTS=experts, EXPERTS_2=power_of_2(experts), LONGEST=chunk, STEP=64, COLUMNS=64
    )
    return db


def _combine(
    rows: torch.Tensor, row_of_slot: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from moelab.experts import triton_kernels as kernels

    (tokens, top_k), width = indices.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    columns = min(256, power_of_2(width))
    kernels.combine[(-(-tokens // 16), -(-width // columns))](
        rows, row_of_slot, weights if weights is not None else rows, offsets, out, tokens, width,
        TOP_K=top_k, EXPERTS=len(offsets), WEIGHTED=weights is not None, TOKENS=16, COLUMNS=columns,
    )  # fmt: skip
    return out


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """As PyTorch's own products: fp32 is tf32 only where the user has allowed it."""
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {"PRECISION": "ieee" if exact else "tf32", "CAST": _interpreted()}


@functools.cache
def power_of_2(n: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << max(0, n - 1).bit_length()
