"""One step of AdamW in one pass over memory, for moments in bf16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw(
    p, grad, exp_avg, exp_avg_sq, step, rate, size, beta1, beta2, epsilon, decay, BLOCK: tl.constexpr
):  # fmt: skip
    """p, grad fp32, exp_avg, exp_avg_sq bf16, all of `size` numbers; step and rate point to one fp32 number each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside, other=0.0)
    old = tl.load(p + at, mask=inside, other=0.0)
    mean = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    lr, steps = tl.load(rate), tl.load(step)
    mean += (1 - beta1) * (g - mean)
    square = beta2 * square + (1 - beta2) * g * g
    unbiased = lr / (1 - tl.exp(steps * tl.log(beta1)))
    root = tl.sqrt(square) / tl.sqrt(1 - tl.exp(steps * tl.log(beta2)))
    tl.store(p + at, old * (1 - lr * decay) - unbiased * mean / (root + epsilon), mask=inside)
    chance = scattered(at.to(tl.uint32) + steps.to(tl.int32).to(tl.uint32) * 0x9E3779B9)
    tl.store(exp_avg + at, rounded(mean, chance & 0xFFFF), mask=inside)
    tl.store(exp_avg_sq + at, rounded(square, chance >> 16), mask=inside)


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
