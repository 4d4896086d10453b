"""What a model holds and what a token costs."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: all; those that one token touches; those of the token and position tables."""

    total: int
    active: int
    embedding: int


def count_parameters(config: ModelConfig) -> Parameters:
    """Closed form; the tests hold it to the modules' own parameters. A tied head is counted once, as embedding."""
    width, moe = config.width, config.moe
    norm = width * (2 if config.norm == "layernorm" and config.bias else 1)
    attention = 4 * width * width + (4 * width if config.bias else 0)
    block = attention + 2 * norm
    total = active = config.layers * block + norm
    for layer in range(config.layers):
        if moe is not None and layer in config.moe_layers:
            expert = _feed_forward_parameters(config, config.expert_hidden_size)
            always = moe.experts * width + (1 if moe.learned_scale else 0)  # the router
            if moe.shared_experts:  # side by side, with one output bias
                always += _feed_forward_parameters(config, moe.shared_experts * config.expert_hidden_size)
            total += moe.experts * expert + always
            active += moe.top_k * expert + always
        else:
            dense = _feed_forward_parameters(config, config.hidden_size)
            total += dense
            active += dense
    embedding = config.vocabulary * width + (config.context * width if config.positions == "learned" else 0)
    head = 0 if config.tied_head else config.vocabulary * width
    return Parameters(total + embedding + head, active + embedding + head, embedding)


def _feed_forward_parameters(config: ModelConfig, hidden: int) -> int:
    inner = 2 * hidden if config.activation == "swiglu" else hidden
    return (inner + hidden) * config.width + (inner + config.width if config.bias else 0)


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs (forward and backward) of one token, on active parameters.

    6·P + 12·L·C·D: P the weights of every matrix product that the token takes part in (attention, router, its K
    experts or the dense feed-forward, and the output head), L layers, C context, D width. The second term is the two
    products of attention against the whole context; its causal half is not taken off. This is the count of PaLM
    (Chowdhery et al. 2022, appendix B), which nanoGPT's `estimate_mfu` follows too. Norms, biases, activations and
    embedding look-ups are not counted.
    """
    width, moe = config.width, config.moe
    matrices = 3 if config.activation == "swiglu" else 2
    weights = config.layers * 4 * width * width + config.vocabulary * width
    for layer in range(config.layers):
        if moe is not None and layer in config.moe_layers:
            used = moe.top_k + moe.shared_experts
            weights += used * matrices * width * config.expert_hidden_size + moe.experts * width
        else:
            weights += matrices * width * config.hidden_size
    return 6 * weights + 12 * config.layers * config.context * width


def model_flops_utilization(tokens_per_second: float, flops: int, peak: float | None) -> float | None:
    """Share of the device's peak FLOP/s that the counted FLOPs reach (MFU, PaLM appendix B); None without a peak."""
    return tokens_per_second * flops / peak if peak else None
