"""One step of AdamW in one pass over memory, for all parameters of a group in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def adamw(
    table, owners, rate, factor, found_inf, rest1, rest2, log1, log2, epsilon, decay,
    MOMENTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`optimizer.update_by_operators` of BLOCK · BLOCKS numbers of one parameter, with the gradient times factor.

    Args:
        table: int64, a row a parameter: addresses of p fp32, its gradient fp32, exp_avg and exp_avg_sq MOMENTS, step
            fp32, then how many numbers, of which 0 are left alone, and its first span. All but step from whole lines
            of 16 bytes on.
        owners: int32, the row of each span of BLOCK · BLOCKS numbers.
        rate, factor, found_inf: one fp32 number each; with found_inf nothing changes unless it is 0. Or None.
        rest1, rest2, log1, log2: 1 − β and log β of the two moments.
        LANES: threads of a program.
    """
    row = table + tl.load(owners + tl.program_id(0)) * COLUMNS
    p = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    grad = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    exp_avg = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(MOMENTS)), 16)
    exp_avg_sq = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(MOMENTS)), 16)
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    size = tl.load(row + 5)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) == 0, size, 0)
    lr, scale = tl.load(rate), tl.load(factor)
    keep, unbiased = 1 - lr * decay, lr / one_less_exp(step * log1)
    root = tl.sqrt(one_less_exp(step * log2))
    begin = (tl.program_id(0) - tl.load(row + 6)) * (BLOCK * BLOCKS)
    for start in range(begin, begin + BLOCK * BLOCKS, BLOCK):
        if start + BLOCK <= size:
            at = start + tl.arange(0, BLOCK)
            _update(p, grad, exp_avg, exp_avg_sq, at, None, step, scale, unbiased, root, keep, rest1, rest2, epsilon)
        else:  # a number a thread, or the registers for so many single addresses would be taken from the blocks too
            for few in range(start, min(start + BLOCK, size), LANES):
                at = few + tl.arange(0, LANES)
                inside = at < size
                _update(
                    p, grad, exp_avg, exp_avg_sq, at, inside, step, scale, unbiased, root, keep, rest1, rest2, epsilon
                )


@triton.jit
def _update(p, grad, exp_avg, exp_avg_sq, at, inside, step, scale, unbiased, root, keep, rest1, rest2, epsilon):
    g = tl.load(grad + at, mask=inside) * scale
    old = tl.load(p + at, mask=inside)
    mean = tl.load(exp_avg + at, mask=inside).to(tl.float32)
    square = tl.load(exp_avg_sq + at, mask=inside).to(tl.float32)
    mean += rest1 * (g - mean)
    square += rest2 * (g * g - square)
    tl.store(p + at, old * keep - unbiased * mean / (tl.sqrt(square) / root + epsilon), mask=inside)
    if exp_avg.dtype.element_ty == tl.bfloat16:
        chance = scattered(at.to(tl.uint32) + step.to(tl.int32).to(tl.uint32) * 0x9E3779B9)
        tl.store(exp_avg + at, rounded(mean, chance & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq + at, rounded(square, chance >> 16), mask=inside)
    else:
        tl.store(exp_avg + at, mean, mask=inside)
        tl.store(exp_avg_sq + at, square, mask=inside)


@triton.jit
def one_less_exp(x):
    """1 − exp(x) of x ≤ 0, near 0 too, where exp(x) would be rounded to nearly 1."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def scattered(x):
    """uint32 → uint32, `optimizer.scattered`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def rounded(x, chance):
    """fp32 → bf16, `optimizer.rounded`."""
    bits = x.to(tl.uint32, bitcast=True) + chance
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
