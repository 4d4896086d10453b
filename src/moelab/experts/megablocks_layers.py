"""The layers of the package megablocks 0.10, with weights and routing that are not its own.

    dropless   ParallelDroplessMLP (in its dMoE):  gather rows,  grouped products,  scatter
    capacity   ParallelMLP (in its MoE):           gather bins,  batched products,  scatter

Of the two ways to compute the dropless form this is mlp_impl "grouped", the one that the package's README advises on
Hopper; "sparse" its `Arguments` refuse with Triton 3.2 or later.

A layer is made once for each shape, with parameters that have no storage; a call puts the model's own tensors in their
place. The transposes between their layouts are views, through which gradients pass as they are.

A dropped slot is sent to expert E, one past the last: it is sorted behind all others and not counted, so no bin holds
it, and the rows after the last expert's are zeros.

Importing this module imports the package, with what `megablocks_standins` puts in the place of its extensions.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal

import torch

from moelab.config import Activation, UsageError
from moelab.experts.activation import activate
from moelab.experts.megablocks_standins import installed, standing_in

with warnings.catch_warnings(), standing_in():
    warnings.simplefilter("ignore")  # that an extension is absent, and that torch.jit.script is deprecated
    from megablocks import grouped_gemm_util
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP
    from megablocks.layers.moe import ParallelMLP

if grouped_gemm_util.ops is None:
    raise ImportError("megablocks was imported before without grouped_gemm: let moelab import it first")

Form = Literal["dropless", "capacity"]
INT32 = 2**31 - 1  # the kernels count elements in it
GRID = 65_535  # programs along a CUDA grid's second axis, one for each place in a bin


class BinnedMLP(ParallelMLP):  # type: ignore[misc]
    """The capacity form, which says so where its bins are larger than its kernels can count."""

    def permute_and_compute(
        self, x: torch.Tensor, tokens_per_expert: torch.Tensor, indices: torch.Tensor, bin_ids: torch.Tensor,
        expert_weights: torch.Tensor, bins: torch.Tensor, expert_capacity: int, top_k: int,
    ) -> torch.Tensor:  # fmt: skip
        """x (T, 1, D) → (T, D); called by `ParallelMLP.forward`, which finds the capacity."""
        if expert_capacity > GRID or len(bins) * expert_capacity * x.shape[-1] > INT32:
            raise UsageError(
                f"backend = megablocks-capacity: {expert_capacity:,} slots of one expert are more than its kernels "
                "count; give a smaller --batch-size, or --backend megablocks"
            )
        y: torch.Tensor = super().permute_and_compute(
            x, tokens_per_expert, indices, bin_ids, expert_weights, bins, expert_capacity, top_k
        )
        return y


@functools.cache
def layer(form: Form, width: int, experts: int, top_k: int, activation: Activation) -> torch.nn.Module:
    """A layer without weights. Its own balance loss is off, so that the package's list of them stays empty."""
    settings = Arguments(
        hidden_size=width,
        ffn_hidden_size=128,  # of its own parameters, which are never used
        bias=False,
        return_bias=False,
        activation_fn=functools.partial(activate, activation=activation),
        moe_num_experts=experts,
        moe_top_k=top_k,
        moe_capacity_factor=0,  # the package's word for bins as large as the fullest expert
        moe_loss_weight=0,
        mlp_impl="grouped",
        fp16=False,
        device=torch.device("meta"),
    )
    made: torch.nn.Module = (ParallelDroplessMLP if form == "dropless" else BinnedMLP)(settings)
    made.sort_end_bit = experts.bit_length()  # type: ignore[assignment]  # of 0 … E, not 0 … E − 1
    if form == "dropless" and installed("grouped_gemm"):
        # The package leaves rows after the last expert's as they were; the stand-in has zeros there.
        mlp = made.get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda _, inputs: (_counted_rows(*inputs), inputs[1]))
        mlp.register_forward_hook(lambda _, inputs, y: _counted_rows(y, inputs[1]))
    return made


def _counted_rows(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Zeros after the last expert's rows, and in their gradient."""
    kept = torch.arange(len(rows), device=rows.device) < counts.sum()
    return torch.where(kept[:, None], rows, 0)


@torch.compiler.disable(reason="megablocks reads counts on the host")  # type: ignore[untyped-decorator]
def run(
    form: Form,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    indices_TK: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """See `moelab.expert_mlp`. (T, D), of x's dtype; eager, also inside a compiled model."""
    (tokens, top_k), experts, width = indices_TK.shape, len(w_in), x_TD.shape[1]
    if form == "dropless" and tokens * top_k * width > INT32:
        raise UsageError(
            f"backend = megablocks: {tokens * top_k:,} slots of width {width:,} are more elements than its kernels "
            "count; give a smaller --batch-size, or another --backend"
        )
    w_in, w_out_EFD = w_in.contiguous(), w_out.contiguous().mT
    if form == "capacity":
        w_in = w_in.mT
    elif installed("grouped_gemm"):
        w_out_EFD = w_out_EFD.contiguous()  # the package takes no other strides
    kept_TK = indices_TK >= 0
    y: torch.Tensor = torch.func.functional_call(
        layer(form, width, experts, top_k, activation),
        {"mlp.w1": w_in, "mlp.w2": w_out_EFD},
        (
            x_TD.contiguous()[:, None], None,  # None: the scores, for its balance loss
            torch.where(kept_TK, weights_TK, 0), torch.where(kept_TK, indices_TK, experts),
        ),
    )  # fmt: skip
    return y[:, 0]
