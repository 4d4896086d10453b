"""The softmax of the output head: losses, and the gradient of the logits in their own place.

A program takes a row of V logits: 98 KiB of bf16 at V = 50,304. It reads them a second time, from the L2 cache if that
holds all rows that are at work: two for each of an H200's 132 multiprocessors are 27 MB of its 50, eight are 106 MB.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _power(z, top):
    """2^(z·log2 e − top) in fp32; what is below 2^-126 becomes zero."""
    return tl.exp2(z.to(tl.float32) * LOG2E - top)


@triton.jit
def _highest(top, z):
    return tl.maximum(top, tl.max(z.to(tl.float32), 1) * LOG2E)


@triton.jit
def loss_and_gradient(
    logits, targets, losses, V: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """logits (T, V) below 2e38 → their gradient softmax − 1 at the target; losses (T,) fp32 of targets (T,) int64.

    A row is whole blocks of LANES · EACH, and what is left, kept in registers, of which each lane has up to REST. Each
    lane has a maximum of its own and the sum of exponentials below it (Milakov and Gimelshein 2018), which it corrects
    once for each block.
    """
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * V
    target = tl.load(targets + t)
    chosen = tl.load(row + target).to(tl.float32)
    BLOCK: tl.constexpr = LANES * EACH
    WHOLE: tl.constexpr = V // BLOCK * BLOCK
    lane = tl.arange(0, LANES)[:, None]
    at = lane * EACH + tl.arange(0, EACH)[None, :]

    # Not −∞, from which −∞ cannot be subtracted: what lies outside of the row is that.
    top = tl.full((LANES,), -3.0e38, tl.float32)  # each in base 2, as all that follows
    total = tl.zeros((LANES,), tl.float32)
    if REST > 0:
        last = WHOLE + lane * REST + tl.arange(0, REST)[None, :]
        rest = tl.load(row + last, mask=last < V, other=float("-inf"))
        top = _highest(top, rest)
        total += tl.sum(_power(rest, top[:, None]), 1)
    for start in range(0, WHOLE, BLOCK):
        z = tl.load(row + start + at)
        higher = _highest(top, z)
        total = total * tl.exp2(top - higher) + tl.sum(_power(z, higher[:, None]), 1)
        top = higher

    highest = tl.max(top, 0)
    logsumexp = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    tl.store(losses + t, logsumexp / LOG2E - chosen)
    tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
    dtype: tl.constexpr = logits.dtype.element_ty
    for start in range(0, WHOLE, BLOCK):
        z = tl.load(row + start + at, eviction_policy="evict_first")
        tl.store(row + start + at, _power(z, logsumexp).to(dtype), eviction_policy="evict_first")
    if REST > 0:
        tl.store(row + last, _power(rest, logsumexp).to(dtype), mask=last < V)
    tl.debug_barrier()  # and has written its part before the target's is put right
    tl.store(row + target, (_power(chosen, logsumexp) - 1).to(dtype))
