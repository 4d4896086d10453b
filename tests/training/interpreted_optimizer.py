"""The optimizer's kernel, interpreted on a CPU, against the operators; `test_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from moelab.training.optimizer import update_by_kernel, update_by_operators


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("size", [7, 5_000])
def test_the_kernel_does_as_the_operators(size: int, betas: tuple[float, float]) -> None:
    g = torch.Generator().manual_seed(0)
    p, grad, mean, square = (torch.randn(size, generator=g) for _ in range(4))
    start = [p, grad, mean.bfloat16(), square.square().bfloat16()]
    rest = (torch.tensor(7.0), torch.tensor(1e-3), *betas, 1e-8, 0.1)
    one, other = ([t.clone() for t in start] for _ in range(2))
    update_by_kernel(*one, *rest)
    update_by_operators(*other, *rest)
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for left, right in zip(one[2:], other[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=1 / 100, atol=1e-30)  # where a product was fused
        assert (left == right).float().mean() > 0.99  # the same chance
