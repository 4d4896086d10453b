"""Backend `cuda`: dispatch, activation and combine in CUDA C++ (`route.cu`, `rows.cu`), grouped products between.

    indices ──route──▶ where each slot goes      x ──dispatch──▶ rows, those of one expert side by side
    rows ──W_in──▶ z ──activate, + b_in──▶ h ──W_out──▶ row outputs ──combine, + b_out, weights──▶ y

Backward: combine's gives the rows' gradients and the router weights'; the products'; activate's; and dispatch's, which
is a combine without weights. What is kept for it is rows, z, h and the row outputs: nothing is computed twice.

- Rows that dropped slots are sorted to are never written and never read, so nothing needs to be cleared. An index
  outside 0 … E − 1 is a dropped slot.
- No float atomics: the same call twice gives the same bits. No host synchronisation of our own: where the products are
  one kernel (bf16 on Hopper and data-centre Blackwell), a step can be captured in a CUDA graph.

Both passes are operators of `torch.library`, with shapes for the compiler and a backward formula.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch

from moelab.config import Activation, UsageError
from moelab.experts import nvrtc, products, requirements
from moelab.experts.activation import inner_size
from moelab.experts.choice import Shape
from moelab.experts.self_check import SMALL, Trial

DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT32"}
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "silu", "swiglu")  # by the numbers that rows.cu knows them by
assert set(ACTIVATIONS) == set(get_args(Activation))
MOST_EXPERTS = 3000  # counters of one warp in the shared memory that a block has without asking
SHARED = 47 * 1024  # bytes; of 48 KiB, clusters keep one
TRIALS = (SMALL, Trial(1200, 128, 256, 3, fp32=False))  # the second for 16-byte accesses, and for products of parts
WARPS, TALL = 8, 256  # of a block, and rows of a part, in rows.cu
TILE, TILES = 128, 256  # a side of what a product's block makes of a weight gradient, and how many keep a GPU busy
FEWEST, LOWEST = 4, 1024  # parts of all rows, where weight gradients are made of parts, and rows of each, at least


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if device.type == "cuda" and torch.version.hip:
        return f"needs an NVIDIA GPU, and this is an AMD one; {requirements.NOTHING}"
    return requirements.no_gpu(device) or nvrtc.no_compiler() or nvrtc.old_driver()


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """Why calls of this kind are not taken; None if they are."""
    if dtype not in DTYPES:
        precision = str(dtype).removeprefix("torch.")
        return f"precision = {precision}: the backend cuda takes bf16, fp16 and fp32; give another --backend"
    return None


def refuses_shape(shape: Shape) -> str | None:
    """Why experts of such sizes are not taken; None if they are."""
    if shape.experts > MOST_EXPERTS:
        return f"experts = {shape.experts}: the backend cuda takes {MOST_EXPERTS}; give another --backend"
    return None


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
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights fp32."""
    y: torch.Tensor = torch.ops.moelab.dispatched_experts(
        x_TD.contiguous(), weights_TK.contiguous(), indices_TK.long().contiguous(), w_in.contiguous(),
        w_out.contiguous(), None if b_in is None else b_in.contiguous(), None if b_out is None else b_out.contiguous(),
        activation,
    )[0]  # fmt: skip
    return y


class Routing(NamedTuple):
    """Where each routed slot goes when slots are sorted by expert, dropped ones last."""

    row_of_slot: torch.Tensor
    """(N,) int32."""
    slot_of_row: torch.Tensor
    """(N,) int32, its inverse."""
    offsets: torch.Tensor
    """(E,) int32, where each expert's rows end."""


_ROUTE = nvrtc.Source("route.cu")


@functools.cache
def _rows(dtype: torch.dtype, activation: str) -> nvrtc.Source:
    return nvrtc.Source("rows.cu", (DTYPES[dtype], 1), ("ACTIVATION", ACTIVATIONS.index(activation)))


def route(launch: nvrtc.Launch, indices_TK: torch.Tensor, experts: int) -> Routing:
    """Stable counting sort of the slots (t, k), in that order, by expert; indices int64, contiguous."""
    slots = indices_TK.numel()
    if slots >= 2**31:
        raise UsageError(
            f"slots = {slots}: the backends cuda and hopper number fewer than 2³¹; give fewer tokens a step"
        )
    row_of_slot = indices_TK.new_empty(slots, dtype=torch.int32)
    slot_of_row = torch.empty_like(row_of_slot)
    offsets = indices_TK.new_empty(experts, dtype=torch.int32)
    bins = experts + 1
    warps = next(w for w in (32, 16, 8, 4, 2, 1) if _route_memory(w, bins) <= SHARED)
    launch(
        _ROUTE, "route", (nvrtc.cluster_blocks(launch.arch), 1), (32 * warps, 1), indices_TK.data_ptr(),
        row_of_slot.data_ptr(), slot_of_row.data_ptr(), offsets.data_ptr(), slots, experts,
        shared=_route_memory(warps, bins),
    )  # fmt: skip
    return Routing(row_of_slot, slot_of_row, offsets)


def _route_memory(warps: int, bins: int) -> int:
    """Bytes of shared memory: counters of every warp, at an odd stride for the banks, and three of the block."""
    return 4 * (warps * (bins | 1) + 3 * bins)


@dataclass(frozen=True)
class Rows:
    """The kernels of `rows.cu` for one call: tokens (T, …), slots (T, K), rows (N, …)."""

    launch: nvrtc.Launch
    source: nvrtc.Source
    routing: Routing
    indices_TK: torch.Tensor

    def dispatch(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x (T, D) → its rows (N, D)."""
        (tokens, top_k), width = self.indices_TK.shape, x_TD.shape[1]
        rows_ND = x_TD.new_empty(tokens * top_k, width)
        self._run(
            "dispatch", tokens, x_TD.data_ptr(), self._row_of_slot, self._kept, rows_ND.data_ptr(), tokens, top_k,
            width, _wide(width, x_TD),
        )  # fmt: skip
        return rows_ND

    def dispatch_dots(self, x_TD: torch.Tensor, bias_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, D) → its rows (N, D), and ⟨x, bias of its expert⟩ of each slot (T, K), open where that is dropped."""
        (tokens, top_k), width = self.indices_TK.shape, x_TD.shape[1]
        rows_ND, dots_TK = x_TD.new_empty(tokens * top_k, width), x_TD.new_empty(tokens, top_k, dtype=torch.float32)
        self._run(
            "dispatch_dots", tokens, x_TD.data_ptr(), self._row_of_slot, self._kept, rows_ND.data_ptr(),
            bias_ED.data_ptr(), self.indices_TK.data_ptr(), dots_TK.data_ptr(), tokens, top_k, width,
            _wide(width, bias_ED, x_TD),
        )  # fmt: skip
        return rows_ND, dots_TK

    def combine(
        self, rows_ND: torch.Tensor, weights_TK: torch.Tensor | None = None, bias_ED: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Σ_k weight · (row + bias of its expert) in slot order, in fp32: (T, D). Without both, dispatch's backward."""
        (tokens, top_k), width = self.indices_TK.shape, rows_ND.shape[1]
        out_TD = rows_ND.new_empty(tokens, width)
        self._run(
            "combine", tokens, rows_ND.data_ptr(), self._row_of_slot, self._kept, address(weights_TK),
            self.indices_TK.data_ptr(), address(bias_ED), out_TD.data_ptr(), tokens, top_k, width,
            _wide(width, bias_ED, rows_ND),
        )  # fmt: skip
        return out_TD

    def combine_backward(
        self, d_out_TD: torch.Tensor, rows_ND: torch.Tensor, weights_TK: torch.Tensor, bias_ED: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ gradients of the rows (N, D) and of the weights (T, K)."""
        (tokens, top_k), width = self.indices_TK.shape, rows_ND.shape[1]
        d_rows_ND, d_weights_TK = torch.empty_like(rows_ND), torch.empty_like(weights_TK)
        self._run(
            "combine_backward", tokens, d_out_TD.data_ptr(), rows_ND.data_ptr(), self._row_of_slot, self._kept,
            weights_TK.data_ptr(), self.indices_TK.data_ptr(), address(bias_ED), d_rows_ND.data_ptr(),
            d_weights_TK.data_ptr(), tokens, top_k, width, _wide(width, bias_ED, d_out_TD),
        )  # fmt: skip
        return d_rows_ND, d_weights_TK

    def activate(self, z: torch.Tensor, bias: torch.Tensor | None, hidden: int) -> torch.Tensor:
        """z (N, F; 2F for swiglu) → h (N, F) = act(z + bias of its expert)."""
        h_NF = z.new_empty(z.shape[0], hidden)
        self._run(
            "activate", z.shape[0], z.data_ptr(), address(bias), self.indices_TK.data_ptr(), self.slot_of_row,
            self._kept, h_NF.data_ptr(), hidden, _wide(hidden, bias, z),
        )  # fmt: skip
        return h_NF

    def activate_backward(
        self, z: torch.Tensor, bias: torch.Tensor | None, d_h_NF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ gradients of z, which overwrite d_h where they are of its size, and of the bias; empty without one."""
        d_z = d_h_NF if d_h_NF.shape == z.shape else torch.empty_like(z)
        sums, strips, wide = self._strips(z, bias, d_h_NF.shape[1])
        self._run_strips(
            "activate_backward", strips, z.data_ptr(), address(bias), self.slot_of_row,
            self.routing.offsets.data_ptr(), len(self.routing.offsets), d_h_NF.data_ptr(), d_z.data_ptr(),
            address(sums), d_h_NF.shape[1], wide,
        )  # fmt: skip
        return d_z, self.sum_of_parts(sums, TALL, z)

    def weighted_backward(
        self, z: torch.Tensor, bias: torch.Tensor | None, d_h_NF: torch.Tensor, weights_TK: torch.Tensor,
        dots_TK: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """From d_h of rows without their weights: gradients of z, which overwrite it where they are of its size, and h
        (N, F), both weighted; gradients of the weights (T, K), and of the bias; empty without one."""
        hidden = d_h_NF.shape[1]
        d_z, h_NF = d_h_NF if d_h_NF.shape == z.shape else torch.empty_like(z), torch.empty_like(d_h_NF)
        sums, strips, wide = self._strips(z, bias, hidden)
        partial = weights_TK.new_empty(len(z), strips)
        self._run_strips(
            "weighted_backward", strips, z.data_ptr(), address(bias), self.slot_of_row,
            self.routing.offsets.data_ptr(), len(self.routing.offsets), d_h_NF.data_ptr(), d_z.data_ptr(),
            address(sums), weights_TK.data_ptr(), h_NF.data_ptr(), partial.data_ptr(), hidden, wide,
        )  # fmt: skip
        d_weights_TK = self.slot_gradient(partial, weights_TK, dots_TK)
        return d_z, h_NF, d_weights_TK, self.sum_of_parts(sums, TALL, z)

    def slot_gradient(
        self, partial: torch.Tensor, weights_TK: torch.Tensor, dots_TK: torch.Tensor | None
    ) -> torch.Tensor:
        """From partial (N, strips), whose rows sum to ⟨d_h, h⟩, and, with an output bias, `dispatch_dots` of dy:
        gradients of the weights (T, K)."""
        d_weights_TK = torch.empty_like(weights_TK)
        self._run(
            "slot_gradient", -(-weights_TK.numel() // 32), partial.data_ptr(), self._row_of_slot, self._kept,
            address(dots_TK), d_weights_TK.data_ptr(), weights_TK.numel(), partial.shape[1],
        )  # fmt: skip
        return d_weights_TK

    def bias_gradient(self, rows: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
        """rows (N, C) → the sum over each expert's (E, C), in fp32; with weights (T, K) rows are tokens (T, C), and
        those of each expert's slots are summed, times the weights."""
        width = rows.shape[1]
        sums, strips, wide = self._strips(rows, rows, width)
        self._run_strips(
            "bias_parts", strips, rows.data_ptr(), address(weights_TK), self.slot_of_row,
            self.routing.offsets.data_ptr(), address(sums), len(self.routing.offsets), self.indices_TK.shape[1],
            width, wide,
        )  # fmt: skip
        return self.sum_of_parts(sums, TALL, rows)

    def _strips(
        self, rows: torch.Tensor, bias: torch.Tensor | None, width: int
    ) -> tuple[torch.Tensor | None, int, int]:
        """Room for the sums of parts of experts' rows (…, C), if there is a bias; strips of columns, of which a block
        has one of a part; and whether accesses are of 16 bytes."""
        wide = _wide(width, bias, rows)
        sums = None if bias is None else rows.new_empty(self._parts, rows.shape[1], dtype=torch.float32)
        return sums, -(-width // (32 * (16 // rows.element_size() if wide else 1))), wide

    def sum_of_parts(self, sums: torch.Tensor | None, tall: int, like: torch.Tensor) -> torch.Tensor:
        """sums (parts, C), of `tall` rows of an expert each → (E, C); empty where there is nothing to sum."""
        if sums is None:
            return like.new_empty(0)
        out = like.new_empty(len(self.routing.offsets), sums.shape[1])
        self.launch(
            self.source, "bias_gradient", (-(-sums.shape[1] // (32 * WARPS)), len(out)), (32, WARPS), sums.data_ptr(),
            self.routing.offsets.data_ptr(), out.data_ptr(), tall, sums.shape[1],
        )  # fmt: skip
        return out

    def weight_gradients(
        self, d_out_ND: torch.Tensor, h_NF: torch.Tensor, w_out: torch.Tensor, d_z: torch.Tensor,
        rows_ND: torch.Tensor, w_in: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Those of w_out (E, D, F) and w_in (E, F or 2F, D), 0 for an expert without rows.

        Where the products are one kernel and a matrix has few tiles for it, an expert's rows are cut into parts, which
        are products of their own, then summed in their order: else an expert that has most of the rows would keep a few
        blocks at work for long, and the others idle.
        """
        pairs = ((d_out_ND, h_NF, w_out), (d_z, rows_ND, w_in))
        tall = part_rows(len(rows_ND), w_out[0])
        experts, count = len(w_out), len(rows_ND) // tall + len(w_out)
        if tall >= len(rows_ND) or not products.one_kernel(rows_ND, count):
            d_w_out, d_w_in = (products.weight_gradient(*pair, self.routing.offsets) for pair in pairs)
            if products.one_kernel(rows_ND, experts):
                self.clear_idle(d_w_in, d_w_out)
            return d_w_out, d_w_in
        ends = self.part_ends(tall, count)
        d_w_out, d_w_in = (self._sum_of_products(products.weight_gradient(*p, ends), p[2], tall) for p in pairs)
        return d_w_out, d_w_in

    def part_ends(self, tall: int, count: int) -> torch.Tensor:
        """(count,) int32: where parts of the experts' rows end, of `tall` rows and an expert's last of what is left;
        after them, again and again, where the last one does."""
        ends, offsets = self.routing.offsets.new_empty(count), self.routing.offsets
        self._run("part_ends", -(-count // 32), offsets.data_ptr(), ends.data_ptr(), len(offsets), tall, count)
        return ends

    def _sum_of_products(self, made: torch.Tensor, like: torch.Tensor, tall: int) -> torch.Tensor:
        """made (parts, …), of `tall` rows of an expert each → (E, …)."""
        out, size = torch.empty_like(like), like[0].numel()
        self.launch(
            self.source, "sum_parts", (64, len(out)), (32, WARPS), made.data_ptr(),
            self.routing.offsets.data_ptr(), out.data_ptr(), tall, size, _wide(size, made, out),
        )  # fmt: skip
        return out

    def clear_idle(self, d_in: torch.Tensor, d_out: torch.Tensor) -> None:
        """Zeros in two tensors (E, …) for experts without rows."""
        self.launch(
            self.source, "clear_idle", (64, len(self.routing.offsets)), (32, WARPS), self.routing.offsets.data_ptr(),
            d_in.data_ptr(), d_in[0].numel(), d_out.data_ptr(), d_out[0].numel(),
        )  # fmt: skip

    def _run(self, name: str, warps: int, *arguments: int) -> None:
        self.launch(self.source, name, (-(-warps // WARPS), 1), (32, WARPS), *arguments)

    def _run_strips(self, name: str, strips: int, *arguments: int) -> None:
        self.launch(self.source, name, (self._parts * strips, 1), (32, WARPS), *arguments)

    @property
    def _parts(self) -> int:
        """Parts of experts' rows, as many as there may be."""
        return self.indices_TK.numel() // TALL + len(self.routing.offsets)

    @functools.cached_property
    def _row_of_slot(self) -> int:
        return self.routing.row_of_slot.data_ptr()

    @functools.cached_property
    def slot_of_row(self) -> int:
        return self.routing.slot_of_row.data_ptr()

    @functools.cached_property
    def _kept(self) -> int:
        """Where the device finds how many rows are not of dropped slots: the last of the offsets."""
        return self.routing.offsets[-1:].data_ptr()


def part_rows(rows: int, matrix: torch.Tensor) -> int:
    """Of how many rows an expert's parts are, for products that make such a matrix; all if it has tiles enough.

    An eighth more than an even share of the rows, or half of the experts with such a share had a few rows too many.
    """
    tiles = -(-matrix.shape[0] // TILE) * -(-matrix.shape[1] // TILE)
    return rows if tiles >= TILES else max(LOWEST, -(-9 * rows // (8 * max(FEWEST, -(-TILES // tiles)))))


def address(t: torch.Tensor | None) -> int:
    """As kernels take what may be absent: 0."""
    return 0 if t is None else t.data_ptr()


def _wide(width: int, *tensors: torch.Tensor | None) -> int:
    """1 if rows of this many elements can be moved in accesses of 16 bytes. What we allocated ourselves is aligned."""
    given = [t for t in tensors if t is not None]
    return int(width * given[0].element_size() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in given))


Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("moelab::dispatched_experts", mutates_args=())
def dispatched_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, activation: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """→ y (T, D), rows (N, D), z (N, F or 2F), h (N, F), row outputs (N, D), and the routing."""
    with nvrtc.launches(x.device) as launch:
        routing = route(launch, indices, w_in.shape[0])
        kernels = Rows(launch, _rows(x.dtype, activation), routing, indices)
        rows = kernels.dispatch(x)
        z = products.product(rows, w_in.mT, routing.offsets)
        h = kernels.activate(z, b_in, w_out.shape[2])
        outputs = products.product(h, w_out.mT, routing.offsets)
        return kernels.combine(outputs, weights, b_out), rows, z, h, outputs, *routing


@dispatched_experts.register_fake
def _(x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, activation: str) -> Tensors:
    slots, hidden = indices.numel(), w_out.shape[2]
    rows, h = x.new_empty(slots, x.shape[1]), x.new_empty(slots, hidden)
    z = x.new_empty(slots, inner_size(activation, hidden))  # type: ignore[arg-type]
    row = indices.new_empty(slots, dtype=torch.int32)
    offsets = indices.new_empty(w_in.shape[0], dtype=torch.int32)
    return torch.empty_like(x), rows, z, h, torch.empty_like(rows), row, torch.empty_like(row), offsets


@torch.library.custom_op("moelab::dispatched_experts_backward", mutates_args=())
def dispatched_experts_backward(
    dy: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, rows: torch.Tensor, z: torch.Tensor, h: torch.Tensor,
    outputs: torch.Tensor, row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, offsets: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ gradients of x, weights, w_in, w_out, b_in and b_out; of a bias that is None an empty tensor."""
    with nvrtc.launches(dy.device) as launch:
        kernels = Rows(launch, _rows(dy.dtype, activation), Routing(row_of_slot, slot_of_row, offsets), indices)
        d_outputs, d_weights = kernels.combine_backward(dy.contiguous(), outputs, weights, b_out)
        d_h = products.product(d_outputs, w_out, offsets)
        d_z, d_b_in = kernels.activate_backward(z, b_in, d_h)
        d_w_out, d_w_in = kernels.weight_gradients(d_outputs, h, w_out, d_z, rows, w_in)
        d_x = kernels.combine(products.product(d_z, w_in, offsets))
        d_b_out = dy.new_empty(0) if b_out is None else kernels.bias_gradient(d_outputs)
        return d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out


@dispatched_experts_backward.register_fake
def _(
    dy: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, *_: Any
) -> Tensors:  # fmt: skip
    biases = [dy.new_empty(0) if b is None else torch.empty_like(b) for b in (b_in, b_out)]
    return (dy.new_empty(dy.shape), *(torch.empty_like(t) for t in (weights, w_in, w_out)), *biases)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    _, *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)  # else zeros, of what is kept, for each step
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out = torch.ops.moelab.dispatched_experts_backward(
        dy, *tensors, ctx.activation
    )
    b_in, b_out = tensors[4:6]
    biases = (None if b_in is None else d_b_in, None if b_out is None else d_b_out)
    return d_x, d_weights, None, d_w_in, d_w_out, *biases, None


dispatched_experts.register_autograd(_backward, setup_context=_keep)
