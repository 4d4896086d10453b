"""Products of rows that are sorted by expert with each expert's matrix.

In bf16 on Hopper and data-centre Blackwell they are `torch.nn.functional.grouped_mm`: one kernel for all experts, no
host synchronisation, and it traces into a full graph. Everywhere else (fp16, fp32, other GPUs, CPUs) they are an
operator of our own that reads the counts and runs one product an expert: PyTorch's own fallback does the same, but does
not trace in fp32.

What `grouped_mm` asks for and leaves open: rows must be a multiple of 16 bytes long (padded here); rows after the last
expert's, which dropped slots are sorted to, come back uninitialised; an expert without rows leaves its weight gradient
open. The operator gives zeros for both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LINE = 8  # bf16 elements of 16 bytes, the least that a row's stride may be a multiple of
# Elements that a CPU's matrix unit (AMX) takes at once. Of a shorter row oneDNN reads into the next one, times 0, which
# a NaN there makes NaN; seen with PyTorch 2.13.
AMX_LINE = 32


def one_kernel(rows: torch.Tensor, experts: int) -> bool:
    """Whether grouped_mm has a kernel that takes all experts at once, without the host.

    It refuses the strides of fewer rows than 16 bytes hold.
    """
    if not rows.is_cuda or rows.shape[0] < LINE:
        return False
    return built_as_one(rows.dtype, torch.cuda.get_device_capability(rows.device)[0], experts)


def built_as_one(dtype: torch.dtype, generation: int, experts: int) -> bool:
    """Whether PyTorch builds that kernel for NVIDIA GPUs of compute capability `generation`.x."""
    return dtype == torch.bfloat16 and generation in (9, 10) and experts < 1024


def grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` for sizes that are not multiples of 16 bytes, and for no rows at all.

    Rows (N, I) by (E, I, O) → (N, O), or, summed over an expert's rows, (I, N) by (N, O) → (E, I, O).
    """
    left, inside, right = a.shape[0], a.shape[1], b.shape[-1]
    if b.ndim == 2:
        if inside == 0:
            return a.new_zeros(len(offsets), left, right)
        padded = F.grouped_mm(_pad(a.mT).contiguous().mT, _pad(b).contiguous(), offs=offsets)
        return padded[:, :left, :right]
    if left == 0:
        return a.new_zeros(0, right)
    if inside % LINE or right % LINE:
        a, b = _pad(a), F.pad(b, (0, -right % LINE, 0, -inside % LINE))
    return F.grouped_mm(a.contiguous(), b, offs=offsets)[:, :right]


def product(rows: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows (N, I), w (E, I, O) → row @ w[e] (N, O), contiguous; rows after the last expert's are left open."""
    if one_kernel(rows, len(w)):
        return grouped(rows, w, offsets).contiguous()
    y: torch.Tensor = torch.ops.moelab.expert_product(rows, w, None, offsets)
    return y


def weight_gradient(d_y: torch.Tensor, rows: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """d_y (N, O), rows (N, I) → Σ over an expert's rows of d_y ⊗ row, like w (E, O, I); an idle expert's is open."""
    if one_kernel(rows, len(w)):
        return grouped(d_y.mT, rows, offsets).contiguous()
    d_w: torch.Tensor = torch.ops.moelab.expert_weight_gradient(d_y, rows, offsets)[0]
    return d_w


def _pad(t: torch.Tensor) -> torch.Tensor:
    extra = -t.shape[-1] % LINE
    return F.pad(t, (0, extra)) if extra else t


@torch.library.custom_op("moelab::expert_product", mutates_args=())
def _expert_product(rows: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """Rows (N, I) sorted by expert, w (E, I, O), b (E, O) or None → (N, O), one product an expert, zeros after them."""
    out = rows.new_empty(rows.shape[0], w.shape[2])
    step = _row_step(rows)
    if step > 1 and (extra := -w.shape[1] % AMX_LINE):
        rows, w = F.pad(rows, (0, extra)), F.pad(w, (0, 0, 0, extra))
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            # Up to the next multiple of `step` rows: those after `end` are written again by the experts they belong to.
            stop = min(start + -(-(end - start) // step) * step, len(rows))
            if b is None:
                torch.mm(rows[start:stop], w[e], out=out[start:stop])
            else:
                torch.addmm(b[e], rows[start:stop], w[e], out=out[start:stop])
        start = end
    out[start:].zero_()
    return out


def _row_step(rows: torch.Tensor) -> int:
    """Rows of a product are rounded up to a multiple of this.

    On CPUs oneDNN generates a kernel for each new shape in bf16 and fp16, 0.4 ms each; an expert's count of tokens is
    new at every step.
    """
    return 64 if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16) else 1


def _rounded_up(rows: torch.Tensor) -> torch.Tensor:
    """The same rows with zeros after them."""
    extra = -len(rows) % _row_step(rows)
    return F.pad(rows, (0, 0, 0, extra)) if extra else rows


@_expert_product.register_fake
def _(rows: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], w.shape[2])


@torch.library.custom_op("moelab::expert_weight_gradient", mutates_args=())
def _expert_weight_gradient(
    d_y: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_y (N, O), rows (N, I) sorted by expert → gradients of w (E, O, I) and b (E, O); zeros for an idle expert."""
    experts = len(offsets)
    d_w = rows.new_empty(experts, d_y.shape[1], rows.shape[1])
    d_b = rows.new_empty(experts, d_y.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        torch.mm(_rounded_up(d_y[start:end]).T, _rounded_up(rows[start:end]), out=d_w[e])
        torch.sum(d_y[start:end], dim=0, out=d_b[e])
        start = end
    return d_w, d_b


@_expert_weight_gradient.register_fake
def _(d_y: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts = offsets.shape[0]
    return rows.new_empty(experts, d_y.shape[1], rows.shape[1]), rows.new_empty(experts, d_y.shape[1])
