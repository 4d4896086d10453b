"""The router's kernels, interpreted on a CPU, against the router without them; `test_triton.py` runs this file."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from moelab.config import ModelConfig, MoEConfig
from moelab.model import fused_router
from moelab.model.moe import MoE
from moelab.model.router import Router

RULES = [("softmax", "chosen"), ("softmax", "all"), ("sigmoid", "chosen"), ("sigmoid", "all"), ("sigmoid", "none")]


def made(experts: int, top_k: int, scores: str, normalize: str, bias: bool, width: int = 40) -> Router:
    config = MoEConfig(experts, top_k, scores=scores, normalize=normalize, bias_rate=0.1 if bias else 0.0)  # type: ignore[arg-type]
    router = Router(width, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) / 3)
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.randn(experts, generator=generator) / 5)
    return router


def results(router: Router, x: torch.Tensor, fused: bool, through: bool = True) -> list[torch.Tensor]:
    """Weights, indices, logits, and the gradients of x and the router's weight."""
    x = x.clone().requires_grad_()
    with patch.object(fused_router, "usable", lambda *_: fused):
        passed, weights, indices, logits = router.decide(x)
    generator = torch.Generator().manual_seed(3)
    loss = (weights * torch.randn(weights.shape, generator=generator)).sum()
    if through:
        loss = loss + (passed.float() * torch.randn(x.shape, generator=generator)).sum() + logits.sin().sum()
    return [weights, indices, logits, *torch.autograd.grad(loss, [x, router.weight])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scores", "normalize"), RULES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(70, 5, 2), (130, 64, 4), (9, 3, 3), (20, 1, 1)])
def test_decisions_and_gradients_are_those_of_the_router_without_kernels(
    tokens: int, experts: int, top_k: int, scores: str, normalize: str, bias: bool
) -> None:
    router = made(experts, top_k, scores, normalize, bias)
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = results(router, x.to(dtype), fused=True)
        expected = results(router, x.to(dtype), fused=False)
        assert torch.equal(found[1], expected[1])
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other.float()).norm() <= tolerance * other.float().norm() + 1e-6


def test_gradients_arrive_from_the_weights_alone() -> None:
    router = made(5, 2, "softmax", "chosen", bias=False)
    x = torch.randn(70, 40, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        results(router, x, True, through=False), results(router, x, False, through=False), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_lower_expert_goes_first_between_equals_and_a_nan_stays_in_its_token() -> None:
    router = made(6, 3, "softmax", "chosen", bias=False)
    with torch.no_grad():
        router.weight[1:] = router.weight[0]
    x = torch.randn(70, 40, generator=torch.Generator().manual_seed(1))
    x[7, 3] = torch.nan
    with patch.object(fused_router, "usable", lambda *_: True):
        _, weights, indices, _ = router.decide(x)
    assert (indices == torch.arange(3)).all()
    assert weights.isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_operators_fit_their_fake_kernels(scores: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(70, 40, generator=generator), torch.randn(6, 40, generator=generator)
    bias = torch.randn(6, generator=generator)
    weights, indices, logits = torch.ops.moelab.route(x, w, bias, 2, scores, "chosen")
    torch.library.opcheck(torch.ops.moelab.route.default, (x, w, bias, 2, scores, "chosen"))
    given = (x, weights, logits, x, w, indices, logits, scores, "chosen")
    torch.library.opcheck(torch.ops.moelab.route_backward.default, given)


def test_a_layer_traces_into_one_graph() -> None:
    config = ModelConfig(1, 1, 16, 8, moe=MoEConfig(4, 2, backend="triton"))
    assert config.moe is not None
    layer = MoE(config, config.moe)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 3)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outcomes = []
    for run in (layer, compiled):
        y, routed = run(x)
        loss = y.square().sum() + routed.balance_loss + routed.z_loss
        outcomes.append([y, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
