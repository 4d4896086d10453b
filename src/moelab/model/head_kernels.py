"""The softmax of the output head: losses, and the gradient of the logits in their own place.

A program takes a row of V logits. It reads it twice, the second time from a cache: V = 50,304 in bf16 are 98 KiB, and
what the programs at work hold fits the L2 cache of data-centre GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loss_and_gradient(logits, targets, losses, vocabulary, LANES: tl.constexpr, EACH: tl.constexpr):
    """logits (T, V) → their gradient softmax − 1 at the target; losses (T,) fp32 of targets (T,) int64.

    Each lane keeps the maximum of what it has read and the sum of exponentials below it (Milakov and Gimelshein 2018),
    which it corrects once for EACH logits.
    """
    t = tl.program_id(0)
    row = logits + t.to(tl.int64) * vocabulary
    target = tl.load(targets + t)
    chosen = tl.load(row + target).to(tl.float32)
    at = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    # Not −∞, from which −∞ cannot be subtracted: what lies outside of the row is that.
    top = tl.full((LANES,), -3.0e38, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocabulary, LANES * EACH):
        z = tl.load(row + start + at, mask=start + at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    highest = tl.max(top, 0)
    logsumexp = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(losses + t, logsumexp - chosen)
    tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
    for start in range(0, vocabulary, LANES * EACH):
        inside = start + at < vocabulary
        z = tl.load(row + start + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(z - logsumexp) - tl.where(start + at == target, 1.0, 0.0)
        tl.store(row + start + at, gradient.to(logits.dtype.element_ty), mask=inside)
