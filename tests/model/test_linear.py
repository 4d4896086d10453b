"""Products with weights and norms: plain on CPUs, and compiled on a GPU with backward passes of their own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from moelab.config import ModelConfig
from moelab.model import linear as module
from moelab.model.gpt import Block

CONFIG = ModelConfig(layers=1, heads=4, width=256, context=96, vocabulary=64)


def test_on_cpus_they_are_pytorchs_own_compiled_or_not() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    w, b = torch.ones(24, 8), torch.zeros(24)
    assert torch.equal(module.linear(x, w, b), torch.nn.functional.linear(x, w.bfloat16(), b.bfloat16()))
    assert not module.own_backward(x, w)
    q, _, v = module.heads_linear(x, w, b, 2)
    assert q.shape == v.shape == (2, 2, 5, 4)


def drawn(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return layer


def results(block: nn.Module, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of x and of every parameter."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(3, 96, 256, generator=generator).bfloat16() for _ in range(2))
    x = x.to(device, dtype).requires_grad_()
    block.zero_grad()
    y, _ = block(x, 0, None)
    y.backward(upstream.to(device, dtype))
    assert x.grad is not None
    return [t.detach().clone() for t in (y, x.grad, *(p.grad for p in block.parameters() if p.grad is not None))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_compiled_on_a_gpu_gradients_are_those_of_float64_and_the_same_twice(norm: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    block = drawn(Block(replace(CONFIG, norm=norm), 0))
    exact = results(copy.deepcopy(block).double(), "cpu", torch.float64)
    compiled = torch.compile(block.cuda(), fullgraph=True)
    found, again = (results(compiled, "cuda", dtype) for _ in range(2))
    names = ["y", "x", *(name for name, _ in block.named_parameters())]
    for name, one, same, other in zip(names, found, again, exact, strict=True):
        assert torch.equal(one, same), name
        assert (one.double().cpu() - other).norm() <= 1e-2 * other.norm(), name
    for p in block.parameters():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert not torch.equal(p.grad, p.grad.to(dtype).float())  # as summed, not rounded
