"""The router's kernels: logits, choice and weights in one pass over x; all gradients in one pass over x.

Logits are products in three tf32 parts ("tf32x3"), whose error is that of fp32; in two where x is of 16 bits, which
tf32 holds exactly. Sums run in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(x):
    """The part of x that tf32 holds exactly, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _scores(logits, inside, SIGMOID: tl.constexpr):
    """Of logits (tokens, experts): logarithms of the scores up to a constant a token, shares, and scores."""
    logarithms = logits
    if SIGMOID:
        logarithms = tl.minimum(logits, 0.0) - tl.log(1 + tl.exp(-tl.abs(logits)))
        logarithms = tl.where(logits != logits, logits, logarithms)
    logarithms = tl.where(inside, logarithms, float("-inf"))
    p = tl.exp(logarithms - tl.max(logarithms, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    scores = p
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    return logarithms, p, scores


@triton.jit
def _first_highest(by, e, EXPERTS_2: tl.constexpr):
    """The expert of the highest value of each token, the lower one between equals, and the values without it."""
    chosen = tl.min(tl.where(by == tl.max(by, 1)[:, None], e[None, :], EXPERTS_2), 1)
    here = e[None, :] == chosen[:, None]
    return chosen, here, tl.where(here, float("-inf"), by)


@triton.jit
def _weights(logarithms, p, scores, taken, NORMALIZE: tl.constexpr):
    """The weight of each expert (tokens, experts) if it is chosen; `taken` are those that are."""
    if NORMALIZE == "chosen":
        kept = tl.where(taken, logarithms, float("-inf"))
        w = tl.exp(kept - tl.max(kept, 1)[:, None])
        w = w / tl.sum(w, 1)[:, None]
    elif NORMALIZE == "all":
        w = p
    else:
        w = scores
    return w


@triton.jit
def route(
    x, w, bias, logits, weights, indices, tokens, width, experts,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS_2: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x (T, D), w (E, D) → logits (T, E), weights (T, K) fp32 and indices (T, K) int64, the highest score first."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e, d = tl.arange(0, EXPERTS_2), tl.arange(0, DEPTH)
    at = x + t.to(tl.int64)[:, None] * width + d[None, :]
    acc = tl.zeros((TOKENS, EXPERTS_2), tl.float32)
    for first in range(0, width, DEPTH):
        within = d < width - first
        a = tl.load(at + first, mask=(t < tokens)[:, None] & within[None, :], other=0.0)
        b = tl.load(
            w + first + e[None, :] * width + d[:, None], mask=(e < experts)[None, :] & within[:, None], other=0.0
        )
        if a.dtype == tl.float32:
            acc = tl.dot(a, b, acc, input_precision="tf32x3")
        else:
            high, low = _halves(b)
            acc = tl.dot(a.to(tl.float32), low, acc, input_precision="tf32")
            acc = tl.dot(a.to(tl.float32), high, acc, input_precision="tf32")
    inside = (e < experts)[None, :]
    tl.store(logits + t.to(tl.int64)[:, None] * experts + e[None, :], acc, mask=(t < tokens)[:, None] & inside)
    logarithms, p, scores = _scores(acc, inside, SIGMOID)
    by = scores
    if HAS_BIAS:
        by += tl.load(bias + e, mask=e < experts, other=0.0)[None, :]
    by = tl.where(by != by, float("inf"), by)  # NaN goes first, as in torch.argmax
    by = tl.where(inside, tl.maximum(by, -3e38), float("-inf"))  # what was taken stays below what was not
    left = by
    for _ in tl.static_range(TOP_K):
        _, _, left = _first_highest(left, e, EXPERTS_2)
    taken = (left == float("-inf")) & inside
    value = _weights(logarithms, p, scores, taken, NORMALIZE)
    for k in tl.static_range(TOP_K):
        chosen, here, by = _first_highest(by, e, EXPERTS_2)
        tl.store(indices + t * TOP_K + k, chosen.to(tl.int64), mask=t < tokens)
        tl.store(weights + t * TOP_K + k, tl.sum(tl.where(here, value, 0.0), 1), mask=t < tokens)


@triton.jit
def logits_gradient(
    logits, indices, d_weights, d_logits, out, tokens, experts,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, HAS_D_LOGITS: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS_2: tl.constexpr,
):  # fmt: skip
    """out (T, E) = dL/dlogits, from that of the weights (T, K) and, if there is any, that of the logits themselves."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS_2)
    inside = (e < experts)[None, :]
    mask = (t < tokens)[:, None] & inside
    spot = t.to(tl.int64)[:, None] * experts + e[None, :]
    own = tl.load(logits + spot, mask=mask, other=0.0)
    logarithms, p, scores = _scores(own, inside, SIGMOID)
    g = tl.zeros((TOKENS, EXPERTS_2), tl.float32)
    taken = tl.zeros((TOKENS, EXPERTS_2), tl.int32)
    for k in tl.static_range(TOP_K):
        chosen = tl.load(indices + t * TOP_K + k, mask=t < tokens, other=0)
        here = e[None, :] == chosen.to(tl.int32)[:, None]
        g += tl.where(here, tl.load(d_weights + t * TOP_K + k, mask=t < tokens, other=0.0)[:, None], 0.0)
        taken += here.to(tl.int32)
    value = _weights(logarithms, p, scores, taken > 0, NORMALIZE)
    if SIGMOID and NORMALIZE == "none":
        d = g * value * (1 - value)
    else:
        d = value * (g - tl.sum(tl.where(inside, g * value, 0.0), 1)[:, None])
        if SIGMOID:
            d *= 1 - scores
    if HAS_D_LOGITS:
        d += tl.load(d_logits + spot, mask=mask, other=0.0)
    tl.store(out + spot, d, mask=mask)


@triton.jit
def route_backward(
    x, w, d_logits, d_through, dx, parts, tokens, width, experts, span,
    TOKENS: tl.constexpr, EXPERTS_2: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx (T, D) = d_through + d_logits · w, and parts[program] (E, D) = Σ over `span` tokens of d_logitsᵀ · x."""
    e = tl.arange(0, EXPERTS_2)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (e < experts)[:, None] & (c < width)[None, :]
    matrix = tl.load(w + e[:, None] * width + c[None, :], mask=inside, other=0.0)
    acc = tl.zeros((EXPERTS_2, COLUMNS), tl.float32)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, tokens)
    t = begin + tl.arange(0, TOKENS)
    spot = t.to(tl.int64)[:, None] * width + c[None, :]
    # Read a turn ahead: the compiler does so with what goes into products alone.
    coming = tl.load(d_through + spot, mask=(t < end)[:, None] & (c < width)[None, :], other=0.0)
    for first in range(begin, end, TOKENS):
        t = first + tl.arange(0, TOKENS)
        spot = t.to(tl.int64)[:, None] * width + c[None, :]
        mask = (t < end)[:, None] & (c < width)[None, :]
        d = tl.load(
            d_logits + t.to(tl.int64)[:, None] * experts + e[None, :],
            mask=(t < end)[:, None] & (e < experts)[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(x + spot, mask=mask, other=0.0)
        through = coming.to(tl.float32)
        after = (t + TOKENS < end)[:, None] & (c < width)[None, :]
        coming = tl.load(d_through + spot + TOKENS * width, mask=after, other=0.0)
        own = tl.dot(d, matrix, input_precision="tf32x3")
        tl.store(dx + spot, (through + own).to(dx.dtype.element_ty), mask=mask)
        if a.dtype == tl.float32:
            acc = tl.dot(tl.trans(d), a, acc, input_precision="tf32x3")
        else:
            high, low = _halves(d)
            acc = tl.dot(tl.trans(low), a.to(tl.float32), acc, input_precision="tf32")
            acc = tl.dot(tl.trans(high), a.to(tl.float32), acc, input_precision="tf32")
    tl.store(parts + (tl.program_id(1).to(tl.int64) * experts + e[:, None]) * width + c[None, :], acc, mask=inside)
