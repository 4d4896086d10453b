"""Backend `hopper`: the products too in CUDA C++, for compute capability 9.0 and bf16.

    x ──dispatch──▶ rows ──W_in──▶ z ──+ b_in, activation──▶ h ──W_out──▶ row outputs ──combine, + b_out, weights──▶ y

Products run on warpgroup matrix units, with loads and stores by the tensor memory accelerator (`hopper.cu`), and the
activation and its backward beside the products that they follow (`activated.cu`), but for swiglu, whose gate and value
stand in different tiles. The rest are the kernels of the backend `cuda`.

- What is kept for the backward pass is x, z (N·F) and the routing. Rows of x are gathered again, and h is computed
  again beside its gradient; the outputs of rows are never kept: ⟨dL/dh, h⟩ of a row is the gradient of its weight.
- No float atomics and no host synchronisation: the same call twice gives the same bits, and a step can be captured.

Both passes are operators of `torch.library`, with shapes for the compiler and a backward formula.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from moelab.config import Activation
from moelab.experts import cuda as rows_backend
from moelab.experts import nvrtc, requirements
from moelab.experts.choice import Shape
from moelab.experts.cuda import Routing, Rows, address
from moelab.experts.self_check import Trial

CASTS = True  # matrices come as they are, so that their gradients need not be rounded
RECOMPUTES = True  # of the rows keeps z alone for the backward pass
ROWS, COLUMNS, THREADS = 128, 256, 384  # of a product's tile, and of its block: tiles.cuh
MOST_EXPERTS = 128
SHARED = 224 * 1024 + 12 * 8 + 2 * 4 * (MOST_EXPERTS + 1)
SWIGLU: Final = "swiglu"  # has its activation in kernels of its own
SUMMED = 256 * 4 * 4  # numbers of a weight gradient that a block of `sum_parts` adds parts of
LOWEST = 1024  # rows of an expert, of which clusters take 256 at once: fewer would leave too many blocks without any
DEPTH, SHORTEST = 64, 1024  # rows of an expert that a weight gradient sums at once: a multiple, and the least
TRIALS = (  # of a self-check: few rows; clusters of two blocks, and weight gradients that are cut
    Trial(40, 128, 256, 5),
    Trial(3072, 128, 256, 3),
    Trial(3072, 128, 256, 3, SWIGLU),
)


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) != (9, 0):
            return f"needs compute capability 9.0, and this GPU has {major}.{minor}; {requirements.NOTHING}"
    return rows_backend.unusable(device)


def identity(device: torch.device) -> tuple[str, ...]:
    """What decides whether these kernels end and are right: their source, and what compiles, launches and runs them."""
    from cuda.bindings import driver
    from cuda.bindings import nvrtc as compiler

    versions = (compiler.nvrtcVersion()[1:], driver.cuDriverGetVersion()[1:], version("cuda-core"), torch.__version__)
    launching = (Path(file).read_text() for file in (__file__, rows_backend.__file__, nvrtc.__file__))
    code = (*(source.text() for source in _of_trials()), *launching)
    gpu = torch.cuda.get_device_properties(device)
    return (*code, gpu.name, str(gpu.uuid), repr(versions))


def _of_trials() -> tuple[nvrtc.Source, ...]:
    """What the trials compile, in their order."""
    rows = [rows_backend._rows(torch.bfloat16, activation) for activation in ("gelu", SWIGLU)]
    return (
        rows_backend._ROUTE, rows[0], _activated(1, "gelu"), _source(1), _source(2), _activated(2, "gelu"), rows[1]
    )  # fmt: skip


def compile_ahead(device: torch.device) -> Iterator[None]:
    """Compiles what the trials do from the last on, a source at a turn: beside a process that begins with the first."""
    major, minor = torch.cuda.get_device_capability(device)
    for source in reversed(_of_trials()):
        source.cubin(f"sm_{major}{minor}")
        yield


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """Why calls of this kind are not taken; None if they are."""
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"precision = {name}: the backend hopper takes bf16; give --precision bf16 or another --backend"
    return None


def refuses_shape(shape: Shape) -> str | None:
    """Why experts of such sizes are not taken; None if they are."""
    for name, size in (("width", shape.width), ("expert-hidden", shape.hidden)):
        if size % ROWS:
            return f"{name} = {size}: the backend hopper takes multiples of {ROWS}; give another --backend"
    if shape.experts > MOST_EXPERTS:
        return f"experts = {shape.experts}: the backend hopper takes {MOST_EXPERTS}; give another --backend"
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
    """See `moelab.expert_mlp`; the inputs are already checked, the weights fp32, the biases of x's dtype."""
    y: torch.Tensor = torch.ops.moelab.hopper_experts(
        x_TD.contiguous(), weights_TK.contiguous(), indices_TK.long().contiguous(), w_in.contiguous(),
        w_out.contiguous(), *(None if b is None else b.contiguous() for b in (b_in, b_out)), activation,
    )[0]  # fmt: skip
    return y


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


@functools.cache
def _source(blocks: int) -> nvrtc.Source:
    headers = ("ptx.cuh", "hopper.cuh", "tiles.cuh")
    return nvrtc.Source("hopper.cu", ("STAGES", 4), headers=headers, feature="a", blocks=blocks)


@functools.cache
def _activated(blocks: int, activation: str) -> nvrtc.Source:
    macros = ("STAGES", 3), ("ACTIVATION", rows_backend.ACTIVATIONS.index(activation))
    headers = ("ptx.cuh", "curve.cuh", "lines.cuh", "hopper.cuh", "tiles.cuh")
    return nvrtc.Source("activated.cu", *macros, headers=headers, feature="a", blocks=blocks)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Products:
    """The kernels of `hopper.cu` and `activated.cu` for one call: rows (N, …) by expert, of which each has a matrix.

    Args:
        launch: on the device.
        offsets: (E,) int32, the row after each expert's last.
        device: of the tensors.
    """

    def __init__(self, launch: nvrtc.Launch, offsets: torch.Tensor, device: torch.device) -> None:
        self.launch, self.offsets, self.device = launch, offsets, device

    def forward(self, rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """rows (N, I), w (E, O, I) → rows · wᵀ, (N, O)."""
        return self._product("forward", rows, w, w.shape[1], 128)

    def backward(self, rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """rows (N, I), w (E, I, O) → rows · w, (N, O)."""
        return self._product("backward", rows, w, w.shape[2], 64)

    def _product(self, name: str, rows: torch.Tensor, w: torch.Tensor, outside: int, box: int) -> torch.Tensor:
        count, inside = rows.shape
        out = rows.new_empty(count, outside)
        if count > 0:
            maps = self.launch.map(rows, ROWS), self.launch.map(w.flatten(0, 1), box), self.launch.map(out, 64)
            sizes = len(self.offsets), inside, outside
            blocks = self._blocks(count)
            self._run(_source(blocks), name, *maps, self.offsets.data_ptr(), *sizes, out.data_ptr())
        return out

    def up(
        self, rows: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (N, I), w (E, O, I), bias (E, O) → z = rows · wᵀ and act(z + bias), (N, O) both."""
        count, inside = rows.shape
        z, h = (rows.new_empty(count, w.shape[1]) for _ in range(2))
        if count > 0:
            maps = self.launch.map(rows, ROWS), self.launch.map(w.flatten(0, 1), 128)
            sizes = len(self.offsets), inside, w.shape[1]
            self._run(
                _activated(self._blocks(count), activation), "up", *maps, self.offsets.data_ptr(), *sizes,
                address(bias), z.data_ptr(), h.data_ptr(),
            )  # fmt: skip
        return z, h

    def slope(
        self, d_rows: torch.Tensor, w: torch.Tensor, z: torch.Tensor, kernels: Rows, weights: torch.Tensor,
        bias: torch.Tensor | None, activation: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """d_rows (N, I) without the weights (T, K), w (E, I, O), z (N, O) → gradients of z and h = act(z + bias), both
        weighted (N, O); partial (N, strips), whose sums are ⟨d_h, h⟩; and the gradient of the bias, empty without."""
        count, inside = d_rows.shape
        outside = w.shape[2]
        d_z, h = torch.empty_like(z), torch.empty_like(z)
        partial = weights.new_empty(count, -(-outside // COLUMNS))
        parts = count // ROWS + len(self.offsets)  # as many as there may be
        sums = None if bias is None else weights.new_empty(parts, outside)
        if count > 0:
            maps = self.launch.map(d_rows, ROWS), self.launch.map(w.flatten(0, 1), 64)
            sizes = len(self.offsets), inside, outside
            self._run(
                _activated(self._blocks(count), activation), "slope", *maps, self.offsets.data_ptr(), *sizes,
                address(bias), z.data_ptr(), d_z.data_ptr(), h.data_ptr(), weights.data_ptr(), kernels.slot_of_row,
                partial.data_ptr(), address(sums),
            )  # fmt: skip
        return d_z, h, partial, kernels.sum_of_parts(sums, ROWS, z)

    def _blocks(self, count: int) -> int:
        return 2 if count >= LOWEST * len(self.offsets) else 1

    def weight_gradient(self, d_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """d_y (N, O), x (N, I) → Σ over an expert's rows of d_y ⊗ x, (E, O, I) in fp32."""
        experts, outside, inside = len(self.offsets), d_y.shape[1], x.shape[1]
        dw = torch.empty(experts, outside, inside, dtype=torch.float32, device=x.device)
        if len(x) == 0:
            return dw.zero_()
        blocks = 2 if outside % (2 * ROWS) == 0 else 1
        tiles = outside // ROWS // blocks * -(-inside // COLUMNS)
        target, last, most = _cuts(len(x), experts, tiles, _multiprocessors(self.device) // blocks)
        parts = torch.empty(most, outside, inside, dtype=torch.float32, device=x.device)
        maps = self.launch.map(d_y, 64), self.launch.map(x, 64)
        self._run(
            _source(blocks), "weight_gradient", *maps, self.offsets.data_ptr(), experts, outside, inside, target,
            last, dw.data_ptr(), parts.data_ptr(),
        )  # fmt: skip
        size = outside * inside
        self.launch(
            _source(blocks), "sum_parts", (-(-size // SUMMED), experts), (256, 1), parts.data_ptr(),
            self.offsets.data_ptr(), dw.data_ptr(), size, target, last,
        )  # fmt: skip
        return dw

    def _run(self, source: nvrtc.Source, name: str, *arguments: Any) -> None:
        blocks = source.blocks or 1
        grid = (_multiprocessors(self.device) // blocks * blocks, 1)
        self.launch(source, name, grid, (THREADS, 1), *arguments, shared=SHARED)


@functools.cache
def _cuts(rows: int, experts: int, tiles: int, clusters: int) -> tuple[int, int, int]:
    """Rows that a weight gradient sums at once, of all experts and of the last, and parts in all of those it cuts.

    As leave the fewest clusters idle, were the experts alike: a cluster takes each `clusters`-th tile, and where the
    last turn has few of them smaller ones of the last expert fill it.

    tiles: of an expert, that a cluster has one of at a time.
    """
    even = -(-rows // experts)
    most = max(1, even // SHORTEST)

    def time(cuts: int, last: int) -> float:  # in rows: those of the busiest cluster, and what a cut tile costs besides
        costs = [even / n + (640 if n > 1 else 0) for n in (cuts, last)]
        first = (experts - 1) * tiles * cuts
        units = first + tiles * last

        def of(cluster: int) -> float:
            large, both = (len(range(cluster, n, clusters)) for n in (first, units))
            return large * costs[0] + (both - large) * costs[1]

        return max(map(of, range(clusters)))

    pairs = ((n, last) for n in range(1, min(most, 16) + 1) for last in {n, *range(1, min(most, 8) + 1)})
    cuts, ending = min(pairs, key=lambda pair: time(*pair))
    target, last = (max(SHORTEST, -(-even // n // DEPTH) * DEPTH) for n in (cuts, ending))
    # An expert of 1.5 times the target or more is cut; the last one also below that, into those of `last`.
    several = 4 * rows // (3 * target) if 2 * rows >= 3 * target else 0
    return target, last, several + (3 * target // (2 * last) + 1 if last < target else 0)


Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("moelab::hopper_experts", mutates_args=())
def hopper_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, activation: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """→ y (T, D), z (N, F), the routing, and w_in and w_out in x's dtype; empty where they are."""
    x, w_in, w_out = (_aligned(t) for t in (x, w_in, w_out))
    b_in = None if b_in is None else _aligned(b_in)
    with nvrtc.launches(x.device) as launch:
        routing = rows_backend.route(launch, indices, w_in.shape[0])
        kernels = Rows(launch, rows_backend._rows(x.dtype, activation), routing, indices)
        products = Products(launch, routing.offsets, x.device)
        kept = [x.new_empty(0) if w.dtype == x.dtype else w.to(x.dtype) for w in (w_in, w_out)]
        cast_in, cast_out = (w if len(c) == 0 else c for w, c in zip((w_in, w_out), kept, strict=True))
        if activation == SWIGLU:
            z = products.forward(kernels.dispatch(x), cast_in)
            h = kernels.activate(z, b_in, w_out.shape[2])
        else:
            z, h = products.up(kernels.dispatch(x), cast_in, b_in, activation)
        outputs = products.forward(h, cast_out)
        return kernels.combine(outputs, weights, b_out), z, *routing, kept[0], kept[1]


@hopper_experts.register_fake
def _(x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, activation: str) -> Tensors:
    slots = indices.numel()
    row = indices.new_empty(slots, dtype=torch.int32)
    offsets = indices.new_empty(w_in.shape[0], dtype=torch.int32)
    kept = (x.new_empty(0 if w.dtype == x.dtype else w.shape) for w in (w_in, w_out))
    return torch.empty_like(x), x.new_empty(slots, w_in.shape[1]), row, torch.empty_like(row), offsets, *kept


@torch.library.custom_op("moelab::hopper_experts_backward", mutates_args=())
def hopper_experts_backward(
    dy: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor,
    w_out: torch.Tensor, b_in: torch.Tensor | None, b_out: torch.Tensor | None, z: torch.Tensor,
    row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, offsets: torch.Tensor, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ gradients of x, weights, w_in and w_out in fp32, b_in and b_out; of a bias that is None an empty tensor.

    w_in and w_out are of x's dtype.
    """
    dy, x, w_in, w_out = (_aligned(t) for t in (dy, x, w_in, w_out))
    b_in = None if b_in is None else _aligned(b_in)
    with nvrtc.launches(dy.device) as launch:
        routing = Routing(row_of_slot, slot_of_row, offsets)
        kernels = Rows(launch, rows_backend._rows(dy.dtype, activation), routing, indices)
        products = Products(launch, offsets, dy.device)
        d_rows, dots = (kernels.dispatch(dy), None) if b_out is None else kernels.dispatch_dots(dy, b_out)
        if activation == SWIGLU:
            d_h = products.backward(d_rows, w_out)
            d_z, h, d_weights, d_b_in = kernels.weighted_backward(z, b_in, d_h, weights, dots)
            del d_h
        else:
            d_z, h, partial, d_b_in = products.slope(d_rows, w_out, z, kernels, weights, b_in, activation)
            d_weights = kernels.slot_gradient(partial, weights, dots)
        d_w_out = products.weight_gradient(d_rows, h)
        del d_rows, h
        d_b_out = dy.new_empty(0) if b_out is None else kernels.bias_gradient(dy, weights)
        d_w_in = products.weight_gradient(d_z, kernels.dispatch(x))
        d_x = kernels.combine(products.backward(d_z, w_in))
        return d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out


@hopper_experts_backward.register_fake
def _(
    dy: Any, x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, *_: Any
) -> Tensors:  # fmt: skip
    matrices = (torch.empty_like(w, dtype=torch.float32) for w in (w_in, w_out))
    biases = [x.new_empty(0) if b is None else torch.empty_like(b) for b in (b_in, b_out)]
    return torch.empty_like(x), torch.empty_like(weights), *matrices, *biases


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, weights, indices, w_in, w_out, b_in, b_out, ctx.activation = inputs
    _, z, *routing, cast_in, cast_out = output
    ctx.wide = [w.dtype != x.dtype for w in (w_in, w_out)]
    matrices = [cast if wide else w for w, cast, wide in zip((w_in, w_out), (cast_in, cast_out), ctx.wide, strict=True)]
    ctx.set_materialize_grads(False)  # else zeros, of what is kept, for each step
    ctx.save_for_backward(x, weights, indices, *matrices, b_in, b_out, z, *routing)


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    d_x, d_weights, *d_matrices, d_b_in, d_b_out = torch.ops.moelab.hopper_experts_backward(
        dy, *tensors, ctx.activation
    )
    d_w_in, d_w_out = (d if wide else d.to(dy.dtype) for d, wide in zip(d_matrices, ctx.wide, strict=True))
    b_in, b_out = tensors[5:7]
    biases = (None if b_in is None else d_b_in, None if b_out is None else d_b_out)
    return d_x, d_weights, None, d_w_in, d_w_out, *biases, None


hopper_experts.register_autograd(_backward, setup_context=_keep)
