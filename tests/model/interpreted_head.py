"""The head's kernel, interpreted on a CPU, against float64; `test_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moelab.model import head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [64, 8_192, 9_000])  # less than a block, one, and more
def test_losses_and_gradients_are_those_of_float64(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, vocabulary, generator=generator)).to(dtype)
    targets = torch.tensor([0, vocabulary - 1, 7, 7, 63])
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses = head.softmax_kernel(logits, targets)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    allowed = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (logits.double() - exact.grad).norm() <= allowed * exact.grad.norm()


def test_a_nan_stays_in_its_token_and_no_logit_is_too_large() -> None:
    logits = torch.zeros(3, 300)
    logits[1, 40], logits[2, 5], logits[2, 6] = torch.nan, 2e38, -torch.inf
    losses = head.softmax_kernel(logits, torch.tensor([1, 1, 5]))
    assert losses.isnan().tolist() == [False, True, False]
    assert losses[2] == 0
    assert not logits[2].any()
