"""What the steps since the last line of metrics were like, kept on the device until that line is written."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moelab.config import ModelConfig
from moelab.model.gpt import Output
from moelab.model.router import expert_load


class Seen(NamedTuple):
    """A window, read."""

    losses: list[float]
    """Of each step, the mean over its micro-batches."""
    gradient_norms: list[float]
    """Of each step, before clipping."""
    experts: dict[str, Any]
    """What a line of metrics says of the experts, over the window; empty for a dense model."""


class Window:
    """Figures of up to `steps` steps in tensors that stay where they are, as a captured step needs them.

    A row holds a step: its loss, its gradient's norm, and of each micro-batch the balance loss, the z-loss, and where
    there is a capacity the share of the slots that each MoE layer dropped.
    """

    def __init__(self, model: ModelConfig, accumulation: int, steps: int, device: torch.device) -> None:
        moe, layers = model.moe, len(model.moe_layers)
        drops = moe is not None and moe.capacity_factor is not None
        self.figures = (2 + layers * drops) if layers else 0  # of a micro-batch
        self.rows = torch.zeros(steps, 2 + accumulation * self.figures, device=device)
        self.numbers = torch.arange(steps, device=device)[:, None]
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(layers, moe.experts if moe else 0, dtype=torch.int64, device=device)
        self.row: list[torch.Tensor] = []

    def add(self, out: Output) -> None:
        """Takes in a micro-batch."""
        if out.expert_counts is not None:
            self.row += [out.balance_loss.detach(), out.z_loss.detach()]
            self.row += [] if out.dropped is None else out.dropped.unbind()
            self.counts += out.expert_counts

    def end_step(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        """Takes in the step whose micro-batches were added."""
        row = torch.stack([loss, gradient_norm.detach(), *self.row])
        self.row = []
        # Every row is written: PyTorch's deterministic way to write one that a tensor names may wait for the host.
        self.rows.copy_(torch.where(self.numbers == self.length, row, self.rows))
        self.length += 1

    def read(self) -> Seen:
        """What is there, which is then forgotten. Waits for the device."""
        rows = self.rows[: int(self.length)].cpu()
        experts: dict[str, Any] = {}
        if len(self.counts):
            load = expert_load(self.counts).tolist()
            parts = rows[:, 2:].reshape(-1, self.figures)
            experts["balance_loss"] = parts[:, 0].contiguous().mean().item()
            experts["z_loss"] = parts[:, 1].contiguous().mean().item()
            experts["expert_load"] = [[round(share, 5) for share in layer] for layer in load]
            if parts.shape[1] > 2:
                experts["dropped"] = parts[:, 2:].contiguous().mean(0).tolist()
        self.length.zero_()
        self.counts.zero_()
        return Seen(rows[:, 0].tolist(), rows[:, 1].tolist(), experts)
