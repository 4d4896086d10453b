"""Other packages' expert layers, where they can be imported: ScatterMoE and SonicMoE.

They are given the router, routing and weights of the layer that is timed. A gated package has the rows of w_in in an
order of its own: they are put into it once, and not in the timed step.

- ScatterMoE (Tan et al. 2024, "Scattered Mixture-of-Experts Implementation"): `scattermoe.mlp`, of its version 0.3.
- SonicMoE (Guo et al. 2025, "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations"):
  `sonicmoe.functional.moe_general_routing_inputs`, of its version 0.1.2. Its GELU is the tanh form.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moelab.config import Activation, UsageError, first_line
from moelab.experts.activation import activate


def scattermoe(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`; for swiglu the first F rows of w_in are the value, the last F the gate."""
    layer = _scattermoe_layer(
        x_TD.shape[1], w_out.shape[2], len(w_in), indices_TK.shape[1], b_in is not None, activation
    )
    parameters = {"experts.weight": w_in, "output_experts.weight": w_out}
    if b_in is not None and b_out is not None:
        parameters |= {"experts.bias": b_in, "output_experts.bias": b_out}
    y: torch.Tensor = torch.func.functional_call(layer, parameters, (x_TD, weights_TK.to(x_TD.dtype), indices_TK))
    return y


@functools.cache
def _scattermoe_layer(
    width: int, hidden: int, experts: int, top_k: int, bias: bool, activation: Activation
) -> nn.Module:
    """A layer whose own parameters have no storage."""
    from scattermoe.mlp import GLUMLP, MLP

    kind = GLUMLP if activation == "swiglu" else MLP
    with torch.device("meta"):
        made: nn.Module = kind(
            input_size=width, hidden_size=hidden, num_experts=experts, top_k=top_k,
            activation=F.silu if activation == "swiglu" else functools.partial(activate, activation=activation),
            **({"bias": True} if bias else {}),  # which came with its version 0.3
        )  # fmt: skip
    return made


# By the values of sonicmoe's ActivationType: its names stayed and what they compute did not.
SONIC_ACTIVATIONS: dict[Activation, str] = {
    "swiglu": "swiglu",
    "silu": "silu",
    "relu2": "relu_sq",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh_approx",
}


def sonicmoe(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`; for swiglu the rows of w_in are gate and value in turns."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    try:
        kind = ActivationType(SONIC_ACTIVATIONS[activation])
    except ValueError:
        raise UsageError(
            f"activation = {activation}: sonicmoe has {', '.join(k.value for k in ActivationType)}"
        ) from None
    tokens, top_k = indices_TK.shape
    y: torch.Tensor
    y, _ = moe_general_routing_inputs(
        x_TD, weights_TK.flatten(),
        torch.arange(tokens, dtype=torch.int32, device=x_TD.device).repeat_interleave(top_k),
        indices_TK.flatten().int(), w_in.permute(1, 2, 0), b_in, w_out.permute(1, 2, 0), b_out, len(w_in),
        torch.cuda.current_stream(x_TD.device).cuda_stream if x_TD.is_cuda else 0, kind, False,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class Peer:
    """A package that computes the experts."""

    distribution: str
    """Its name in package indexes."""
    module: str
    """What is imported of it."""
    expert_mlp: Callable[..., torch.Tensor]
    """x, fp32 weights, indices and parameters of x's dtype, rows of w_in and b_in in its order → y."""
    gated_rows: Callable[[int], torch.Tensor]
    """F → which of the 2F rows of w_in, the gate's before the value's, stands at each place of its own."""

    def obstacle(self) -> str | None:
        """Why it cannot be timed, in one line; None if it is there."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return "not installed"
        try:
            importlib.import_module(self.module)
        except Exception as problem:  # whatever it wants that is not here
            line = first_line(problem)
            return f"importing {self.module} failed ({line})"
        return None

    def version(self) -> str | None:
        """None where it is not installed as a package."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


PEERS = {
    "scattermoe": Peer(
        "scattermoe", "scattermoe.mlp", scattermoe, lambda hidden: torch.arange(2 * hidden).roll(hidden)
    ),
    "sonicmoe": Peer(
        "sonic-moe", "sonicmoe.functional", sonicmoe, lambda hidden: torch.arange(2 * hidden).view(2, -1).T.flatten()
    ),
}


def peer_mlp(peer: Peer) -> Callable[..., torch.Tensor]:
    """Its `expert_mlp` with parameters cast to x's dtype, as `moelab.expert_mlp` casts them."""

    def call(
        x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, *parameters: Any, activation: Activation
    ) -> torch.Tensor:
        return peer.expert_mlp(
            x, weights, indices, *(p if p is None else p.to(x.dtype) for p in parameters), activation
        )

    return call
