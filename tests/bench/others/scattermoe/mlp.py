"""What ScatterMoE 0.3 has under these names, with its signatures, by a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class ParallelExperts(nn.Module):
    """E matrices (E, out, in), and E biases."""

    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        nn.init.normal_(self.weight)

    def of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class MLP(nn.Module):
    """Plain experts."""

    gated = False

    def __init__(
        self, input_size: int, hidden_size: int, num_experts: int, top_k: int, bias: bool = False,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts = ParallelExperts(num_experts, input_size, hidden_size * (1 + self.gated), bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias)
        self.top_k, self.activation = top_k, activation

    def forward(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
        assert self.activation is not None
        outputs = []
        for token, experts in zip(x.view(-1, x.shape[-1]), expert_idxs.tolist(), strict=True):
            for expert in experts:
                h = self.experts.of(expert, token)
                if self.gated:
                    h, gate = h.chunk(2)
                    h = self.activation(gate) * h
                else:
                    h = self.activation(h)
                outputs.append(self.output_experts.of(expert, h))
        return (expert_p[:, None] @ torch.stack(outputs).view(len(x), self.top_k, -1)).squeeze(1)


class GLUMLP(MLP):
    """Experts with a gate, whose rows come last."""

    gated = True
