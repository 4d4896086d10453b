"""Backward passes that a product's bias is summed in (`linear`): each reads and writes its tensors once.

A program takes COLUMNS columns of TALL rows, ROWS at once, and leaves the sum of each column.
Its threads keep sums of their own until the end, so that none waits for another. Sums of the programs are added by who
calls, in order. A row's number may be such that its place needs 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moelab.experts.triton_kernels import _activated


@triton.jit
def activation_backward(
    dh, z, dz, parts, tokens, width,
    ACTIVATION: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dz = dh · act'(z), all (tokens, width), and parts[program] (width) = Σ of its rows, rounded as stored."""
    part = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, TALL, ROWS):
        t = part * TALL + first + tl.arange(0, ROWS)
        mask = (t < tokens)[:, None] & (c < width)[None, :]
        at = t.to(tl.int64)[:, None] * width + c[None, :]
        x = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
        _, slope = _activated(x, ACTIVATION, False)
        own = (d * slope).to(dz.dtype.element_ty)
        tl.store(dz + at, own, mask=mask)
        total += own.to(tl.float32)
    tl.store(parts + part.to(tl.int64) * width + c, tl.sum(total, 0), mask=c < width)


@triton.jit
def heads_backward(
    dq, dk, dv, out, parts, tokens, length, width, batch_stride, head_stride, token_stride,
    HEAD: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv (B, heads, length, HEAD) to the thirds of out (B, length, 3 · width), and the sums of its columns."""
    part, third = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    source = dq
    if third == 1:
        source = dk
    if third == 2:
        source = dv
    within = (c // HEAD) * head_stride + c % HEAD
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, TALL, ROWS):
        t = part * TALL + first + tl.arange(0, ROWS)
        mask = (t < tokens)[:, None] & (c < width)[None, :]
        row = (t // length).to(tl.int64) * batch_stride + (t % length).to(tl.int64) * token_stride
        d = tl.load(source + row[:, None] + within[None, :], mask=mask, other=0.0)
        tl.store(out + t.to(tl.int64)[:, None] * (3 * width) + third * width + c[None, :], d, mask=mask)
        total += d.to(tl.float32)
    tl.store(parts + part.to(tl.int64) * (3 * width) + third * width + c, tl.sum(total, 0), mask=c < width)
