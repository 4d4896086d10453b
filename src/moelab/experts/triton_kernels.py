"""The kernels of the backend `triton`.

Rows are routed slots sorted by expert; those of one expert lie side by side, dropped ones last. A program of a product
computes a tile of rows of one expert. How many tiles an expert has is known on the device alone: the grid is as large
as it can be, each program finds its expert in the offsets, and programs past the last tile return at once.

Every sum runs in a fixed order. Products accumulate in fp32; `PRECISION` "ieee" keeps fp32 inputs whole.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(offsets, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BLOCK: tl.constexpr, tile):
    """The expert of a tile of rows, its first row, and the end of the expert's rows; EXPERTS past the last tile."""
    e = tl.arange(0, EXPERTS_2)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = tl.where(e < EXPERTS, (ends - starts + BLOCK - 1) // BLOCK, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum(((last <= tile) & (e < EXPERTS)).to(tl.int32), 0)
    here = e == expert
    first_tile = tl.sum(tl.where(here, last - tiles, 0), 0)
    start = tl.sum(tl.where(here, starts, 0), 0) + (tile - first_tile) * BLOCK
    return expert, start, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def _erf_gelu(z):
    return 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """act(z) in fp32; of swiglu the gate's part, silu."""
    if ACTIVATION == "gelu":
        a = _erf_gelu(z)
    elif ACTIVATION == "gelu_tanh":
        a = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu2":
        a = tl.where(z != z, z, tl.maximum(z, 0.0))
        a = a * a
    else:
        a = z * tl.sigmoid(z)
    return a


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """act'(z) in fp32."""
    if ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    elif ACTIVATION == "relu2":
        d = 2 * tl.where(z != z, z, tl.maximum(z, 0.0))
    else:
        s = tl.sigmoid(z)
        d = s * (1 + z * (1 - s))
    return d


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, CAST: tl.constexpr):
    if CAST:  # the interpreter multiplies bf16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(
    a, slot_of_row, w, bias, out, offsets, z, h, row_weights, partial,
    inside, outside, stride_e, stride_o, stride_i,
    GATHER: tl.constexpr, TOP_K: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    CAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows (N, inside) by w[e] (outside, inside, by its strides) → (N, outside), a tile a program.

    GATHER: row r of the left operand is a[slot_of_row[r] // TOP_K].
    EPILOGUE "": out = product + bias. "act": z = product + bias, h = act(z); with swiglu, outside is F and the value's
    rows of w follow F rows below the gate's. "slope": the product is dL/dh of an unweighted row; out = weight · dL/dh ·
    act'(z), h = weight · act(z), and partial[r, column block] = Σ dL/dh · act(z), whose sum is dL/dweight.
    """
    columns = tl.cdiv(outside, COLUMNS)
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    expert, start, end = _tile(offsets, EXPERTS, EXPERTS_2, ROWS, tile)
    if expert >= EXPERTS:
        return
    r = start + tl.arange(0, ROWS)
    inside_rows = r < end
    o = column * COLUMNS + tl.arange(0, COLUMNS)
    inside_columns = o < outside
    i = tl.arange(0, DEPTH)
    source = r.to(tl.int64)
    if GATHER:
        source = tl.load(slot_of_row + r, mask=inside_rows, other=0) // TOP_K
    left = a + source[:, None] * inside + i[None, :]
    matrix = w + expert.to(tl.int64) * stride_e
    right = matrix + i[:, None] * stride_i + o[None, :] * stride_o
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    gated: tl.constexpr = (EPILOGUE == "act") & (ACTIVATION == "swiglu")
    value = acc
    for k in range(0, inside, DEPTH):
        within = i < inside - k
        x = tl.load(left, mask=inside_rows[:, None] & within[None, :], other=0.0)
        m = tl.load(right, mask=within[:, None] & inside_columns[None, :], other=0.0)
        acc = _dot(x, m, acc, PRECISION, CAST)
        if gated:
            m = tl.load(right + outside * stride_o, mask=within[:, None] & inside_columns[None, :], other=0.0)
            value = _dot(x, m, value, PRECISION, CAST)
        left += DEPTH
        right += DEPTH * stride_i
    mask = inside_rows[:, None] & inside_columns[None, :]
    if HAS_BIAS:
        wide: tl.constexpr = 2 if gated else 1
        acc += tl.load(bias + expert * outside * wide + o, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        if gated:
            value += tl.load(bias + expert * outside * 2 + outside + o, mask=inside_columns, other=0.0).to(tl.float32)[
                None, :
            ]
    place = r.to(tl.int64)[:, None] * outside + o[None, :]
    if EPILOGUE == "act":
        if gated:
            twice = r.to(tl.int64)[:, None] * (2 * outside) + o[None, :]
            tl.store(z + twice, acc.to(z.dtype.element_ty), mask=mask)
            tl.store(z + twice + outside, value.to(z.dtype.element_ty), mask=mask)
            # The activation of what is stored: the backward pass sees no other.
            g, v = acc.to(z.dtype.element_ty).to(tl.float32), value.to(z.dtype.element_ty).to(tl.float32)
            tl.store(h + place, (_activated(g, "silu") * v).to(h.dtype.element_ty), mask=mask)
        else:
            tl.store(z + place, acc.to(z.dtype.element_ty), mask=mask)
            tl.store(
                h + place,
                _activated(acc.to(z.dtype.element_ty).to(tl.float32), ACTIVATION).to(h.dtype.element_ty),
                mask=mask,
            )
    elif EPILOGUE == "slope":
        weight = tl.load(row_weights + r, mask=inside_rows, other=0.0)[:, None]
        if ACTIVATION == "swiglu":
            twice = r.to(tl.int64)[:, None] * (2 * outside) + o[None, :]
            g = tl.load(z + twice, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(z + twice + outside, mask=mask, other=0.0).to(tl.float32)
            gate = _activated(g, "silu")
            active = gate * v
            tl.store(out + twice, (weight * acc * v * _slope(g, "silu")).to(out.dtype.element_ty), mask=mask)
            tl.store(out + twice + outside, (weight * acc * gate).to(out.dtype.element_ty), mask=mask)
        else:
            g = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
            active = _activated(g, ACTIVATION)
            tl.store(out + place, (weight * acc * _slope(g, ACTIVATION)).to(out.dtype.element_ty), mask=mask)
        tl.store(h + place, (weight * active).to(h.dtype.element_ty), mask=mask)
        share = tl.sum(tl.where(mask, acc * active, 0.0), 1)
        tl.store(partial + r.to(tl.int64) * columns + column, share, mask=inside_rows)
    else:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(
    dy, x, slot_of_row, row_weights, offsets, dw, db, outside, inside,
    GATHER_DY: tl.constexpr, GATHER_X: tl.constexpr, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHTED_BIAS: tl.constexpr, PRECISION: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dw[e] (outside, inside) = Σ over an expert's rows of dy[row]ᵀ x[row], and db[e] (outside) = Σ (weight ·) dy[row].

    A tile of one expert's matrix a program, its rows in order. An expert without rows gets zeros.
    """
    across = tl.cdiv(inside, COLUMNS)
    o = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(1)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    k = tl.arange(0, DEPTH)
    for first in range(start, end, DEPTH):
        r = first + k
        inside_rows = r < end
        row = r.to(tl.int64)
        token = row
        if GATHER_DY or GATHER_X:
            token = tl.load(slot_of_row + r, mask=inside_rows, other=0) // TOP_K
        left = token if GATHER_DY else row
        right = token if GATHER_X else row
        d = tl.load(
            dy + left[None, :] * outside + o[:, None], mask=inside_rows[None, :] & (o < outside)[:, None], other=0.0
        )
        v = tl.load(
            x + right[:, None] * inside + i[None, :], mask=inside_rows[:, None] & (i < inside)[None, :], other=0.0
        )
        acc = _dot(d, v, acc, PRECISION, CAST)
        if HAS_BIAS:
            part = d.to(tl.float32)
            if WEIGHTED_BIAS:
                part = part * tl.load(row_weights + r, mask=inside_rows, other=0.0)[None, :]
            bias += tl.sum(part, 1)
    matrix = dw + expert.to(tl.int64) * outside * inside
    mask = (o < outside)[:, None] & (i < inside)[None, :]
    tl.store(matrix + o[:, None] * inside + i[None, :], acc.to(dw.dtype.element_ty), mask=mask)
    if HAS_BIAS:  # noqa: SIM102 - the first is known to the compiler
        if tl.program_id(0) % across == 0:
            tl.store(db + expert * outside + o, bias.to(db.dtype.element_ty), mask=o < outside)


@triton.jit
def combine(
    rows, row_of_slot, weights, offsets, out, tokens, width,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k (weight[t, k] ·) rows[row of slot (t, k)], in fp32, in the order of k, without dropped slots."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.load(offsets + EXPERTS - 1)
    mask = (t < tokens)[:, None] & (c < width)[None, :]
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for k in range(TOP_K):
        row = tl.load(row_of_slot + t * TOP_K + k, mask=t < tokens, other=0)
        there = mask & (row < kept)[:, None]
        term = tl.load(rows + row[:, None] * width + c[None, :], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + t * TOP_K + k, mask=t < tokens, other=0.0)
            term = tl.where(there, term * weight[:, None], 0.0)
        acc += term
    tl.store(out + t[:, None] * width + c[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def slot_gradient(
    partial, dy, b_out, row_of_slot, expert_of_slot, offsets, d_weights, slots, blocks, width,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dL/dweight of each slot: Σ of its row's partial sums, and dL/dy · b_out of its expert; 0 for a dropped slot."""
    s = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_of_slot + s, mask=s < slots, other=0)
    there = (s < slots) & (row < tl.load(offsets + EXPERTS - 1))
    b = tl.arange(0, BLOCKS)
    parts = tl.load(
        partial + row[:, None] * blocks + b[None, :], mask=there[:, None] & (b < blocks)[None, :], other=0.0
    )
    total = tl.sum(parts, 1)
    if HAS_BIAS:
        expert = tl.load(expert_of_slot + s, mask=there, other=0).to(tl.int64)
        for first in range(0, width, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            mask = there[:, None] & (c < width)[None, :]
            g = tl.load(dy + (s // TOP_K)[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(b_out + expert[:, None] * width + c[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(g * bias, 1)
    tl.store(d_weights + s, tl.where(there, total, 0.0), mask=s < slots)
