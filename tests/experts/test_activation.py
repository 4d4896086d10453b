"""The activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moelab.experts.activation import FusedGelu


def gelu_and_slope(call, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    x = x.clone().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_the_fused_gelu_and_its_derivative_are_those_of_float64() -> None:
    """The bounds that its polynomial was fitted to."""
    x = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
    for found, expected, allowed in zip(
        gelu_and_slope(FusedGelu.apply, x), gelu_and_slope(F.gelu, x), (1.1e-6, 2.5e-5), strict=True
    ):
        assert (found - expected).abs().max() <= allowed


def test_the_fused_gelu_of_every_16_bit_number_is_the_nearest_one_to_the_exact_or_its_neighbour() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = every[every.isfinite()]
        exact = F.gelu(x.double())
        found = FusedGelu.apply(x)
        assert found.dtype == dtype
        step = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert ((found.double() - exact).abs() <= step).all()
        _, slope = gelu_and_slope(FusedGelu.apply, x)
        assert slope.isfinite().all()
    assert FusedGelu.apply(torch.tensor([torch.nan], dtype=torch.bfloat16)).isnan().all()


def test_the_fused_gelu_is_traced_into_one_graph() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = torch.compile(FusedGelu.apply, fullgraph=True, backend="aot_eager")
    for one, other in zip(gelu_and_slope(compiled, x), gelu_and_slope(FusedGelu.apply, x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
