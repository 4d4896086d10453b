"""Backend `megablocks-capacity`: the layer with bins of the package megablocks, `ParallelMLP` in its MoE.

Each expert has a bin, padded to the size of all (Lepikhin et al. 2020, GShard), and a product is batched over the bins.

What does not fit a bin the package would drop by itself, by its own rule. Here the bins are as large as the fullest
expert, which the package does when its capacity factor is 0: dropping is the router's, whose `capacity_factor` bounds
the fullest expert, and for the same indices this backend answers as every other one does. So it needs no setting of its
own, but costs as much as the most loaded expert says: with --capacity-factor 1 nothing is padded, with all tokens to
one expert it computes E times what it must.

The size of the bins goes to the host; what follows from it is said in `megablocks`.
"""

from __future__ import annotations

import torch

from moelab.config import Activation
from moelab.experts.megablocks import refused_in_both_forms, unusable, without_tokens

__all__ = ["expert_mlp", "refuses", "unusable"]


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """What of a call this backend does not take, and what would work; None if it takes it."""
    return refused_in_both_forms(dtype, bias, deterministic)


def expert_mlp(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights fp32, the biases None."""
    if x_TD.shape[0] == 0:
        return without_tokens(x_TD, weights_TK, w_in, w_out)
    from moelab.experts import megablocks_layers

    y: torch.Tensor = megablocks_layers.run("capacity", x_TD, weights_TK, indices_TK, w_in, w_out, activation)
    return y
