"""Backend `hopper`: the products too in CUDA C++ (`hopper.cu`), for compute capability 9.0 and bf16.

    x ──dispatch──▶ rows ──W_in, + b_in, activation──▶ z, h ──W_out──▶ row outputs ──combine, + b_out, weights──▶ y

Products run on warpgroup matrix units; those with the activation or its backward have two blocks on a multiprocessor,
of which one follows the curve while the other multiplies. Routing, dispatch and combine are those of the backend `cuda`.

- What is kept for the backward pass is x, the activation's input z (N·F) and the routing. Rows of x are gathered again;
  the outputs of rows are never kept: ⟨dL/dh, h⟩ of a row is the gradient of its weight.
- No float atomics and no host synchronisation: the same call twice gives the same bits, and a step can be captured.

Both passes are operators of `torch.library`, with shapes for the compiler and a backward formula.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from moelab.config import Activation
from moelab.experts import cuda as rows_backend
from moelab.experts import nvrtc
from moelab.experts.choice import Shape
from moelab.experts.cuda import Routing, Rows

TRIAL = (128, 256)  # D and F of a self-check
ROWS = 128  # of a product's tile: tiles.cuh
COLUMNS, CURVED_COLUMNS = 256, 128  # of one without and with a curve; of those two blocks share a multiprocessor
THREADS, CURVED_THREADS = 384, 256
MOST_EXPERTS = 128
TABLE = 4 * (MOST_EXPERTS + 1)
SHARED, CURVED_SHARED = 1024 + 224 * 1024 + TABLE, 1024 + 112 * 1024
SHORTEST = 1024  # rows of an expert that a weight gradient sums at once, where it cuts them
SPARE = 1.0625  # times the rows of an even expert: a few more are not another part


def unusable(device: torch.device) -> str | None:
    """Why this backend cannot be used on a device; None if it can."""
    if (reason := rows_backend.unusable(device)) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0, and this GPU has {major}.{minor}"
    try:
        from cuda.core import TensorMapDescriptor  # noqa: F401
    except ImportError:
        return f"needs cuda-core 1.2; {nvrtc.MEND}"
    return None


def identity(device: torch.device) -> tuple[str, ...]:
    """What decides whether these kernels end: their source, and what compiles and runs them."""
    from cuda.bindings import driver
    from cuda.bindings import nvrtc as compiler

    versions = (compiler.nvrtcVersion()[1:], driver.cuDriverGetVersion()[1:], torch.__version__)
    return (_source("gelu", 1).text(), torch.cuda.get_device_name(device), repr(versions))


def refuses(dtype: torch.dtype, activation: Activation, bias: bool, deterministic: bool) -> str | None:
    """Why calls of this kind are not taken; None if they are."""
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"precision = {name}: the backend hopper takes bf16; give --precision bf16 or another --backend"
    if activation == "swiglu":
        return "activation = swiglu: the backend hopper takes the others; give another --backend"
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
    """See `moelab.expert_mlp`; the inputs are already checked and of x's dtype, the weights fp32."""
    y: torch.Tensor = torch.ops.moelab.hopper_experts(
        _aligned(x_TD), weights_TK.contiguous(), indices_TK.long().contiguous(), _aligned(w_in), _aligned(w_out),
        None if b_in is None else b_in.contiguous(), None if b_out is None else b_out.contiguous(), activation,
    )[0]  # fmt: skip
    return y


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    t = t.contiguous()
    return t if torch.compiler.is_compiling() or t.data_ptr() % 16 == 0 else t.clone()


@functools.cache
def _source(activation: str, blocks: int) -> nvrtc.Source:
    number = rows_backend.ACTIVATIONS.index(activation)
    headers = ("ptx.cuh", "curve.cuh", "hopper.cuh", "tiles.cuh")
    return nvrtc.Source("hopper.cu", ("ACTIVATION", number), headers=headers, feature="a", blocks=blocks)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Products:
    """The kernels of `hopper.cu` for one call: rows (N, …) sorted by expert, of which each has a matrix.

    Args:
        launch: on the device.
        activation: whose curve is followed.
        offsets: (E,) int32, the row after each expert's last.
        device: of the tensors.
    """

    def __init__(self, launch: nvrtc.Launch, activation: str, offsets: torch.Tensor, device: torch.device) -> None:
        self.launch, self.activation, self.offsets, self.device = launch, activation, offsets, device

    def up(
        self, rows: torch.Tensor, w: torch.Tensor, z: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """rows (N, I), w (E, O, I) → z = rows · wᵀ + bias and h = act(z), (N, O)."""
        self._product("up", rows, w, (z, h), 0 if bias is None else bias.data_ptr())

    def down(self, rows: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """rows (N, I), w (E, O, I) → out = rows · wᵀ, (N, O)."""
        return self._product("down", rows, w, (out,))

    def back(self, rows: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """rows (N, I), w (E, I, O) → out = rows · w, (N, O)."""
        return self._product("back", rows, w, (out,))

    def slope(
        self, rows: torch.Tensor, w: torch.Tensor, d_z: torch.Tensor, h: torch.Tensor, z: torch.Tensor,
        weights: torch.Tensor, slot_of_row: torch.Tensor, partial: torch.Tensor,
    ) -> None:  # fmt: skip
        """Rows (N, I) without their weights, w (E, I, O), z (N, O) → weight · (rows · w) · act'(z) and weight · act(z).

        partial (N, O / 128), fp32: Σ (rows · w) · act(z) over the columns of a tile.
        """
        given = (z, weights, slot_of_row, partial)
        self._product("slope", rows, w, (d_z, h), *(t.data_ptr() for t in given))

    def _product(
        self, name: str, rows: torch.Tensor, w: torch.Tensor, results: tuple[torch.Tensor, ...], *given: int
    ) -> torch.Tensor:
        """The first result."""
        (count, inside), outside = rows.shape, results[0].shape[1]
        if count > 0:
            curved = name in ("up", "slope")
            blocks = _cluster(outside, CURVED_COLUMNS if curved else COLUMNS)
            maps = [self.launch.map(rows, ROWS // blocks)]
            maps += [self.launch.map(w.flatten(0, 1), 128 if name in ("up", "down") else 64)]
            maps += [] if curved else [self.launch.map(results[0], 64)]
            addresses = (t.data_ptr() for t in results)
            sizes = (len(self.offsets), inside, outside)
            self._run(name, blocks, curved, *maps, self.offsets.data_ptr(), *sizes, *addresses, *given)
        return results[0]

    def weight_gradient(self, d_y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Σ over an expert's rows of d_y ⊗ x, like w (E, O, I): d_y (N, O), x (N, I)."""
        experts, outside, inside = w.shape
        if len(x) == 0:
            return torch.zeros_like(w)
        blocks, dw = _cluster(inside, COLUMNS), torch.empty_like(w)
        tiles = outside // ROWS * -(-inside // COLUMNS) // blocks
        longest = _rows_at_once(len(x), experts, tiles, _multiprocessors(self.device) // blocks)
        several = 2 * len(x) // longest if len(x) > longest else 0
        parts = torch.empty(several, outside, inside, dtype=torch.float32, device=x.device)
        maps = self.launch.map(d_y, 64), self.launch.map(x, 64), self.launch.map(dw.flatten(0, 1), 64)
        self._run(
            "weight_gradient", blocks, False, *maps, self.offsets.data_ptr(), experts, outside, inside, longest,
            dw.data_ptr(), parts.data_ptr(),
        )  # fmt: skip
        self.launch(
            _source(self.activation, blocks), "sum_parts", (64, experts), (256, 1), parts.data_ptr(),
            self.offsets.data_ptr(), dw.data_ptr(), outside * inside, longest,
        )  # fmt: skip
        return dw

    def _run(self, name: str, blocks: int, curved: bool, *arguments: Any) -> None:
        grid = ((2 if curved else 1) * _multiprocessors(self.device) // blocks * blocks, 1)
        threads, shared = (CURVED_THREADS, CURVED_SHARED) if curved else (THREADS, SHARED)
        self.launch(_source(self.activation, blocks), name, grid, (threads, 1), *arguments, shared=shared)


def _rows_at_once(rows: int, experts: int, tiles: int, clusters: int) -> int:
    """Rows that a weight gradient sums at once: as leave the fewest clusters idle, were the experts alike.

    tiles: of an expert, that a cluster has one of at a time.
    """
    even = -(-rows // experts)

    def time(cuts: int) -> float:  # in rows: those of the busiest cluster, and what a tile that is cut costs besides
        turns = -(-experts * tiles * cuts // clusters)
        return turns * (even / cuts + (640 if cuts > 1 else 0))

    cuts = min(range(1, max(1, even // SHORTEST) + 1), key=time)
    return max(SHORTEST, -(-int(even / cuts * SPARE) // 64) * 64)


def _cluster(outside: int, columns: int) -> int:
    """Blocks of a cluster, which have neighbouring tiles of columns."""
    return 2 if outside % (2 * columns) == 0 else 1


Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("moelab::hopper_experts", mutates_args=())
def hopper_experts(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor,
    b_in: torch.Tensor | None, b_out: torch.Tensor | None, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ y (T, D), z (N, F) and the routing."""
    with nvrtc.launches(x.device) as launch:
        routing = rows_backend.route(launch, indices, w_in.shape[0])
        kernels = Rows(launch, rows_backend._rows(x.dtype, activation), routing, indices)
        products = Products(launch, activation, routing.offsets, x.device)
        z = x.new_empty(indices.numel(), w_in.shape[1])
        h = torch.empty_like(z)
        products.up(kernels.dispatch(x), w_in, z, h, b_in)
        outputs = products.down(h, w_out, x.new_empty(len(z), x.shape[1]))
        return kernels.combine(outputs, weights, b_out), z, *routing


@hopper_experts.register_fake
def _(x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, activation: str) -> Tensors:
    slots = indices.numel()
    row = indices.new_empty(slots, dtype=torch.int32)
    offsets = indices.new_empty(w_in.shape[0], dtype=torch.int32)
    return torch.empty_like(x), x.new_empty(slots, w_in.shape[1]), row, torch.empty_like(row), offsets


@torch.library.custom_op("moelab::hopper_experts_backward", mutates_args=())
def hopper_experts_backward(
    dy: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, w_in: torch.Tensor,
    w_out: torch.Tensor, b_in: torch.Tensor | None, b_out: torch.Tensor | None, z: torch.Tensor,
    row_of_slot: torch.Tensor, slot_of_row: torch.Tensor, offsets: torch.Tensor, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ gradients of x, weights, w_in, w_out, b_in and b_out; of a bias that is None an empty tensor."""
    dy = _aligned(dy)
    with nvrtc.launches(dy.device) as launch:
        routing = Routing(row_of_slot, slot_of_row, offsets)
        kernels = Rows(launch, rows_backend._rows(dy.dtype, activation), routing, indices)
        products = Products(launch, activation, offsets, dy.device)
        d_z, h, d_rows = torch.empty_like(z), torch.empty_like(z), kernels.dispatch(dy)
        partial = weights.new_empty(len(z), z.shape[1] // CURVED_COLUMNS)
        products.slope(d_rows, w_out, d_z, h, z, weights, slot_of_row, partial)
        d_weights = kernels.slot_gradient(partial, dy, b_out)
        d_w_out = products.weight_gradient(d_rows, h, w_out)
        del h, d_rows
        d_b_out = dy.new_empty(0) if b_out is None else kernels.bias_gradient(dy, weights)
        d_w_in = products.weight_gradient(d_z, kernels.dispatch(x), w_in)
        d_b_in = dy.new_empty(0) if b_in is None else kernels.bias_gradient(d_z)
        d_x = kernels.combine(products.back(d_z, w_in, dy.new_empty(len(z), dy.shape[1])))
        return d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out


@hopper_experts_backward.register_fake
def _(
    dy: Any, x: Any, weights: Any, indices: Any, w_in: Any, w_out: Any, b_in: Any, b_out: Any, *_: Any
) -> Tensors:  # fmt: skip
    biases = [x.new_empty(0) if b is None else torch.empty_like(b) for b in (b_in, b_out)]
    return (*(torch.empty_like(t) for t in (x, weights, w_in, w_out)), *biases)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.activation = inputs
    ctx.set_materialize_grads(False)  # else zeros, of what is kept, for each step
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    d_x, d_weights, d_w_in, d_w_out, d_b_in, d_b_out = torch.ops.moelab.hopper_experts_backward(
        dy, *tensors, ctx.activation
    )
    b_in, b_out = tensors[5:7]
    biases = (None if b_in is None else d_b_in, None if b_out is None else d_b_out)
    return d_x, d_weights, None, d_w_in, d_w_out, *biases, None


hopper_experts.register_autograd(_backward, setup_context=_keep)
