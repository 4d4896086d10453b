"""The softmax of the output head: losses, and the gradient of the logits in their own place.

A program takes a row of V logits. It reads it twice, the second time from a cache: V = 50,304 in bf16 are 98 KiB, and a
row has so many warps that what the programs at work hold fits the L2 cache of data-centre GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _below(z, top, total):
    """The maxima and the sums of 2^(z·log2 e − top·log2 e) of lanes that have seen z (LANES, EACH) too."""
    higher = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2(z * LOG2E - (higher * LOG2E)[:, None]), 1)
    return higher, total


@triton.jit
def loss_and_gradient(logits, targets, losses, VOCABULARY: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """logits (T, V) below 2e38 → their gradient softmax − 1 at the target; losses (T,) fp32 of targets (T,) int64.

    Each lane keeps the maximum of what it has read and the sum of exponentials below it (Milakov and Gimelshein 2018),
    which it corrects once for EACH logits.
    """
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * VOCABULARY
    target = tl.load(targets + t)
    chosen = tl.load(row + target).to(tl.float32)
    STEP: tl.constexpr = LANES * EACH
    WHOLE: tl.constexpr = VOCABULARY // STEP * STEP
    at = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    inside = WHOLE + at < VOCABULARY
    # Not −∞, from which −∞ cannot be subtracted: what lies outside of the row is that.
    top = tl.full((LANES,), -2.0e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, WHOLE, STEP):
        top, total = _below(tl.load(row + start + at).to(tl.float32), top, total)
    if WHOLE < VOCABULARY:
        z = tl.load(row + WHOLE + at, mask=inside, other=float("-inf")).to(tl.float32)
        top, total = _below(z, top, total)
    highest = tl.max(top, 0)
    logsumexp = highest * LOG2E + tl.log2(tl.sum(total * tl.exp2((top - highest) * LOG2E), 0))
    tl.store(losses + t, logsumexp / LOG2E - chosen)
    tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
    for start in range(0, WHOLE, STEP):
        z = tl.load(row + start + at).to(tl.float32)
        tl.store(row + start + at, tl.exp2(z * LOG2E - logsumexp).to(logits.dtype.element_ty))
    if WHOLE < VOCABULARY:
        z = tl.load(row + WHOLE + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(row + WHOLE + at, tl.exp2(z * LOG2E - logsumexp).to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    tl.store(row + target, (tl.exp2(chosen * LOG2E - logsumexp) - 1).to(logits.dtype.element_ty))
