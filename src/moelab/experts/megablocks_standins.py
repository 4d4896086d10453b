"""In PyTorch, the functions of the two compiled packages that megablocks 0.10 imports, for where they are absent.

`megablocks_ops` is its own extension, which does not compile with CUDA 13; `grouped_gemm` is a package apart. What is
here has their whole interface, since whoever imports megablocks later in a process gets the modules of the first
import. None waits for the device: the counts that size a product are on the host when it is called.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from moelab.experts import products


def installed(name: str) -> bool:
    """Whether a package can be found, without importing it."""
    if name in sys.modules:
        return sys.modules[name] is not None  # None stands for one that cannot be imported
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """While megablocks is imported, the modules that it asks for and that are not installed.

    They are gone from `sys.modules` afterwards: no other package takes them for the real ones.
    """
    made = {name: module for name, module in _stand_ins().items() if not installed(name)}
    if "megablocks" not in sys.modules:  # an import that failed leaves modules behind that went without
        for name in [name for name in sys.modules if name.startswith("megablocks.")]:
            del sys.modules[name]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def _stand_ins() -> dict[str, types.ModuleType]:
    extension = types.ModuleType("megablocks_ops", __doc__)
    vars(extension).update(
        sort=sort, histogram=histogram, inclusive_cumsum=inclusive_cumsum, exclusive_cumsum=exclusive_cumsum,
        replicate_forward=replicate_forward, replicate_backward=replicate_backward, indices=indices,
    )  # fmt: skip
    products = types.ModuleType("grouped_gemm", __doc__)
    vars(products).update(ops=types.SimpleNamespace(gmm=gmm), backend=types.SimpleNamespace(gmm=product))
    return {"megablocks_ops": extension, "grouped_gemm": products}


# megablocks_ops: csrc/*.h of megablocks. B rows at once; `bins` are inclusive sums of counts.


def sort(x: torch.Tensor, end_bit: int, x_out: torch.Tensor, iota_out: torch.Tensor) -> None:
    """x (N,) in the order of its lowest `end_bit` bits, equal ones as they stood, and where each stood."""
    keys = x & ((1 << end_bit) - 1) if end_bit < 8 * x.element_size() else x
    order = torch.sort(keys.to(torch.uint8) if end_bit <= 8 else keys, stable=True).indices
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: torch.Tensor, bins: int) -> torch.Tensor:
    """(N,) or (B, N) → (bins,) or (B, bins) int32: how often 0 … bins − 1 occur; others are not counted."""
    values = torch.arange(bins, dtype=x.dtype, device=x.device)
    return (x.unsqueeze(-2) == values[:, None]).sum(-1, dtype=torch.int32)


def inclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """(B, N): sums up to each element, itself included."""
    out.copy_(x.cumsum(dim, dtype=x.dtype))


def exclusive_cumsum(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    """(B, N): sums of the elements before each."""
    out.copy_(x.cumsum(dim, dtype=x.dtype) - x)


def replicate_forward(x: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """x (B, E), each value repeated over its bin → out (B, N); places after the last bin are left as they were."""
    place = torch.arange(out.shape[1], device=out.device)
    source = torch.searchsorted(bins, place, right=True)
    torch.where(place < bins[-1], x[:, source.clamp_max(len(bins) - 1)], out, out=out)


def replicate_backward(grad: torch.Tensor, bins: torch.Tensor, out: torch.Tensor) -> None:
    """grad (B, N) summed over each bin → out (B, E)."""
    before = F.pad(grad.double().cumsum(1), (1, 0))
    ends = bins.long()
    out.copy_(before[:, ends] - before[:, F.pad(ends[:-1], (1, 0))])


def indices(bins: torch.Tensor, block: int, rows: int, columns: int, out: torch.Tensor) -> None:
    """Block columns of each block row of a block-diagonal matrix, row by row → out (rows · columns,) int16."""
    row = torch.arange(rows, device=bins.device)
    expert = torch.searchsorted(bins // block, row, right=True)
    of_row = expert[:, None] * columns + torch.arange(columns, device=bins.device)
    kept = (row < bins[-1] // block)[:, None]
    torch.where(kept, of_row.to(out.dtype), out.view(rows, columns), out=out.view(rows, columns))


# grouped_gemm: one product for each expert's rows


def product(
    a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_a: bool = False, trans_b: bool = False,
    c: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rows a (N, I) sorted by expert, by b (E, I, O), or by b (E, O, I) with `trans_b` → (N, O); no autograd.

    With `trans_a` b is (N, O), and the sum runs over an expert's rows → (E, I, O). batch_sizes (E,) int64 are an
    expert's rows, on the host. Rows after the last expert's, and the matrix of an expert without rows, are zeros.
    In bf16 on Hopper and data-centre Blackwell one kernel for all experts, else one product an expert.
    """
    experts, ends = len(batch_sizes), batch_sizes.cumsum(0)
    b = b.mT if trans_b else b
    if products.one_kernel(a, experts):
        out = products.grouped(a.mT if trans_a else a, b, ends.to(a.device, torch.int32)).contiguous()
        for e in (batch_sizes == 0).nonzero().flatten().tolist() if trans_a else ():
            out[e].zero_()
    else:
        out = a.new_empty((experts, a.shape[1], b.shape[1]) if trans_a else (a.shape[0], b.shape[2]))
        start = 0
        for e, end in enumerate(ends.tolist()):
            if trans_a:
                torch.mm(a[start:end].T, b[start:end], out=out[e])
            else:
                torch.mm(a[start:end], b[e], out=out[start:end])
            start = end
    if not trans_a:
        out[int(ends[-1]) :].zero_()
    return out if c is None else c.copy_(out)


class _Product(torch.autograd.Function):
    """`product` with gradients, as grouped_gemm.ops has it."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool
    ) -> torch.Tensor:  # fmt: skip
        ctx.trans_b = trans_b
        ctx.save_for_backward(a, b, batch_sizes)
        return product(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, batch_sizes = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_a = product(d_out, b, batch_sizes, trans_b=not ctx.trans_b) if ctx.needs_input_grad[0] else None
        d_b = None
        if ctx.needs_input_grad[1]:
            left, right = (d_out, a) if ctx.trans_b else (a, d_out)
            d_b = product(left, right, batch_sizes, trans_a=True)
        return d_a, d_b, None, None


def gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """Rows a (N, I) sorted by expert, by b (E, I, O), or (E, O, I) with `trans_b` → (N, O)."""
    y: torch.Tensor = _Product.apply(a, b, batch_sizes, trans_b)
    return y
