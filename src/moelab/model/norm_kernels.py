"""The backward pass of a norm whose input also goes on beside it (`norm`), with all that is summed over tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_backward(
    d_normed, d_passed, x, weight, dx, parts, tokens, width, epsilon,
    CENTERED: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx (tokens, width) = d_passed + norm's gradient, of x's mean and variance as they are computed again here.

    parts[program] has the sums over its TALL rows, ROWS at once, of the weight's gradient, of dx as stored and, if
    CENTERED (LayerNorm), of the bias's gradient, (3 or 2, width); who calls adds them, in order. COLUMNS ≥ width, and
    TALL is a multiple of ROWS. The next rows are on their way while these are worked on: Triton itself loads ahead only
    what goes into products.
    """
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    there = c < width
    w = tl.load(weight + c, mask=there, other=0.0).to(x.dtype.element_ty).to(tl.float32)  # as the forward pass has it
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    t = part * TALL + tl.arange(0, ROWS)
    at = t[:, None] * width + c[None, :]
    mask = (t < tokens)[:, None] & there[None, :]
    x_ahead = tl.load(x + at, mask=mask, other=0.0)
    d_ahead = tl.load(d_normed + at, mask=mask, other=0.0)
    passed_ahead = tl.load(d_passed + at, mask=mask, other=0.0)
    for first in range(0, TALL, ROWS):
        row, d, passed = x_ahead.to(tl.float32), d_ahead.to(tl.float32), passed_ahead.to(tl.float32)
        to, stored = at, mask
        t += ROWS
        at = t[:, None] * width + c[None, :]
        mask = ((t < tokens) & (first + ROWS < TALL))[:, None] & there[None, :]
        x_ahead = tl.load(x + at, mask=mask, other=0.0)
        d_ahead = tl.load(d_normed + at, mask=mask, other=0.0)
        passed_ahead = tl.load(d_passed + at, mask=mask, other=0.0)
        if CENTERED:
            row = tl.where(there[None, :], row - (tl.sum(row, 1) / width)[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(row * row, 1) / width + epsilon)
        row *= scale[:, None]
        d_weight += d * row
        d_bias += d
        d *= w[None, :]
        inner = d - row * (tl.sum(d * row, 1) / width)[:, None]
        if CENTERED:
            inner -= (tl.sum(d, 1) / width)[:, None]
        own = (passed + inner * scale[:, None]).to(dx.dtype.element_ty)
        tl.store(dx + to, own, mask=stored)
        total += own.to(tl.float32)
    sums = 3 if CENTERED else 2
    sums_to = parts + part * sums * width + c
    tl.store(sums_to, tl.sum(d_weight, 0), mask=there)
    tl.store(sums_to + width, tl.sum(total, 0), mask=there)
    if CENTERED:
        tl.store(sums_to + 2 * width, tl.sum(d_bias, 0), mask=there)
