"""Backend `grouped_mm`: sort the routed slots by expert, two grouped products, gather back.

    slots (T·K)  ──counting sort──▶  rows, those of one expert side by side
    x[token of row]  ──W_in, b_in──▶  activation  ──W_out, b_out──▶  row outputs
    y[t] = Σ_k weight[t, k] · output[row of slot (t, k)], in slot order, in fp32

The products are those of `products`: `torch.nn.functional.grouped_mm` where it is one kernel, else one an expert. Rows
after the last expert's and the gradients of experts without rows, which it leaves open, are overwritten with zeros.

No float atomics: the sort counts integers, each gather's backward is a gather through the inverse permutation, and sums
run in slot order. The same call twice gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moelab.config import Activation
from moelab.experts import products
from moelab.experts.activation import activate


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.grouped_mm; install torch>=2.10"
    return None


class Routing(NamedTuple):
    """Where each routed slot goes when slots are sorted by expert, dropped ones last."""

    row_of_slot: torch.Tensor
    """(N,) int64."""
    slot_of_row: torch.Tensor
    """(N,) int64, its inverse."""
    offsets: torch.Tensor
    """(E,) int32, where each expert's rows end."""
    expert_of_row: torch.Tensor
    """(N,) int64, 0 for a dropped slot."""
    kept_row: torch.Tensor
    """(N, 1) bool, False for a dropped slot."""


def sort_slots(indices_TK: torch.Tensor, experts: int) -> Routing:
    """Stable counting sort of the slots (t, k), in that order, by expert."""
    expert_N = indices_TK.reshape(-1).long()
    expert_N = torch.where(expert_N < 0, experts, expert_N)
    bins = torch.arange(experts + 1, device=expert_N.device)
    chosen_EN = (expert_N == bins[:, None]).int()  # one row a bin, so that the scan runs along contiguous memory
    rank_EN = chosen_EN.cumsum(1, dtype=torch.int32)
    ends = rank_EN[:, -1].cumsum(0, dtype=torch.int32) if len(expert_N) else bins.int() * 0
    starts = F.pad(ends[:-1], (1, 0)).long()
    row_of_slot = starts[expert_N] + rank_EN.gather(0, expert_N[None])[0] - 1
    rows = torch.arange(len(expert_N), device=expert_N.device)
    slot_of_row = torch.empty_like(rows).scatter(0, row_of_slot, rows)
    expert_of_row = expert_N[slot_of_row]
    kept_row = expert_of_row < experts
    return Routing(row_of_slot, slot_of_row, ends[:experts], torch.where(kept_row, expert_of_row, 0), kept_row[:, None])


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
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights of the combine's."""
    routing = sort_slots(indices_TK, w_in.shape[0])
    w_in, w_out = w_in.contiguous(), w_out.contiguous()  # grouped_mm takes no other strides
    rows_ND = _Gather.apply(x_TD, indices_TK.shape[1], *routing)
    h = _ExpertLinear.apply(rows_ND, w_in, b_in, *routing)
    y_ND = _ExpertLinear.apply(activate(h, activation), w_out, b_out, *routing)
    y_TD: torch.Tensor = _Combine.apply(y_ND, weights_TK, *routing)
    return y_TD.to(x_TD.dtype)


Gradients = tuple[torch.Tensor | None, ...]
NONE_FOR_ROUTING: Gradients = (None,) * len(Routing._fields)


class _Gather(torch.autograd.Function):
    """x (T, D) → its rows in sorted order (N, D); backward sums a token's K gradients in slot order."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, top_k: int, *routing: torch.Tensor) -> torch.Tensor:
        ctx.top_k = top_k
        ctx.save_for_backward(*routing)
        return x_TD[Routing(*routing).slot_of_row // top_k]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        (d_rows,) = gradients
        routing = Routing(*ctx.saved_tensors)
        row_TK = routing.row_of_slot.view(-1, ctx.top_k)
        wide = torch.promote_types(d_rows.dtype, torch.float32)
        total = d_rows[row_TK[:, 0]].to(wide)  # a dropped slot's row has gradient 0
        for k in range(1, ctx.top_k):
            total = total + d_rows[row_TK[:, k]].to(wide)
        return total.to(d_rows.dtype), None, *NONE_FOR_ROUTING


class _Combine(torch.autograd.Function):
    """Row outputs (N, D) and weights (T, K) → Σ_k weight·row (T, D), in slot order and in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, weights_TK: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_ND, weights_TK, *routing)
        r, top_k, wide = Routing(*routing), weights_TK.shape[1], weights_TK.dtype
        row_TK = r.row_of_slot.view(-1, top_k)
        kept_TK = row_TK < r.offsets[-1]
        total = torch.zeros(len(row_TK), y_ND.shape[1], dtype=wide, device=y_ND.device)
        for k in range(top_k):
            term = weights_TK[:, k, None] * y_ND[row_TK[:, k]].to(wide)
            total = total + torch.where(kept_TK[:, k, None], term, 0)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        (d_out,) = gradients
        y_ND, weights_TK, *routing = ctx.saved_tensors
        r, top_k, wide = Routing(*routing), weights_TK.shape[1], weights_TK.dtype
        row_TK = r.row_of_slot.view(-1, top_k)
        weight_N = weights_TK.reshape(-1)[r.slot_of_row]
        d_rows = d_out[r.slot_of_row // top_k] * weight_N[:, None]
        d_y = torch.where(r.kept_row, d_rows, 0).to(y_ND.dtype)
        d_weights = torch.stack([(d_out * y_ND[row_TK[:, k]].to(wide)).sum(-1) for k in range(top_k)], dim=1)
        return d_y, torch.where(row_TK < r.offsets[-1], d_weights, 0), *NONE_FOR_ROUTING


class _ExpertLinear(torch.autograd.Function):
    """Rows (N, I) sorted by expert, w (E, O, I), b (E, O) → (N, O) = row @ w[e].T + b[e], zeros for dropped slots."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, *routing: torch.Tensor
    ) -> torch.Tensor:
        ctx.has_bias = b is not None
        ctx.save_for_backward(rows, w, *routing)
        r = Routing(*routing)
        if not products.one_kernel(rows, len(w)):
            y: torch.Tensor = torch.ops.moelab.expert_product(rows, w.mT, b, r.offsets)
            return y
        y = products.grouped(rows, w.mT, r.offsets)
        if b is not None:
            y = y + b[r.expert_of_row]
        return torch.where(r.kept_row, y, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        rows, w, *routing = ctx.saved_tensors
        r = Routing(*routing)
        d_y = gradients[0].contiguous()
        if not products.one_kernel(rows, len(w)):
            d_rows = torch.ops.moelab.expert_product(d_y, w, None, r.offsets)
            d_w, d_b = torch.ops.moelab.expert_weight_gradient(d_y, rows, r.offsets)
            return d_rows, d_w, d_b if ctx.has_bias else None, *NONE_FOR_ROUTING
        d_y = torch.where(r.kept_row, d_y, 0)
        has_rows = torch.diff(r.offsets, prepend=torch.zeros_like(r.offsets[:1])) > 0
        d_rows = torch.where(r.kept_row, products.grouped(d_y, w, r.offsets), 0)
        d_w = torch.where(has_rows[:, None, None], products.grouped(d_y.mT, rows, r.offsets), 0)
        d_b = None
        if ctx.has_bias:
            # A sum over rows is a product with ones. They stand on the right, where grouped_mm takes them row-major:
            # on the left it needs them column-major, which the compiler forgets of a constant.
            ones = d_y.new_ones(len(d_y), products.LINE)
            d_b = torch.where(has_rows[:, None], products.grouped(d_y.mT, ones, r.offsets)[:, :, 0], 0)
        return d_rows, d_w, d_b, *NONE_FOR_ROUTING
