"""Routing and its losses, against definitions written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import MoEConfig
from moelab.model.router import Router, balance_loss, expert_counts, expert_load, z_loss


def router(experts: int, top_k: int, *, normalize: bool = True, width: int = 6, seed: int = 0) -> Router:
    made = Router(width, MoEConfig(experts, top_k, normalize="chosen" if normalize else "all")).double()
    with torch.no_grad():
        made.weight.copy_(torch.randn(experts, width, generator=torch.Generator().manual_seed(seed)))
    return made


@given(tokens=st.integers(1, 12), experts=st.integers(1, 8), data=st.data())
def test_routing_is_the_definition(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k, normalize = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    made = router(experts, top_k, normalize=normalize, seed=tokens)
    x = torch.randn(tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(experts))
    routed = made(x.unsqueeze(0))
    counts = [0] * experts
    for t in range(tokens):
        scores = [math.exp(sum(a * b for a, b in zip(x[t].tolist(), w, strict=True))) for w in made.weight.tolist()]
        p = [s / sum(scores) for s in scores]
        chosen = sorted(range(experts), key=lambda e: (-p[e], e))[:top_k]
        total = sum(p[e] for e in chosen) if normalize else 1.0
        assert routed.indices[t].tolist() == chosen
        assert routed.weights[t].tolist() == pytest.approx([p[e] / total for e in chosen])
        for e in chosen:
            counts[e] += 1
    assert routed.counts.tolist() == counts


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_ties_go_to_the_lowest_index(top_k: int) -> None:
    made = router(5, top_k)
    with torch.no_grad():
        made.weight.zero_()
    assert made(torch.randn(1, 7, 6, dtype=torch.float64)).indices.tolist() == [list(range(top_k))] * 7


@pytest.mark.parametrize("experts", [2, 8])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_1_when_balanced_for_any_k(experts: int, top_k: int) -> None:
    indices = torch.stack([(torch.arange(experts) + k) % experts for k in range(top_k)], dim=1)
    uniform = torch.full((experts, experts), 1 / experts)
    assert balance_loss(
        expert_load(expert_counts(indices.reshape(1, -1), experts)[0]), uniform
    ).item() == pytest.approx(1)


def test_balance_loss_is_e_when_collapsed() -> None:
    p = torch.zeros(10, 8)
    p[:, 3] = 1
    assert balance_loss(expert_load(torch.tensor([0, 0, 0, 10, 0, 0, 0, 0])), p).item() == pytest.approx(8)


def test_balance_loss_pushes_probability_away_from_the_busy_expert() -> None:
    p = torch.full((10, 4), 0.25, requires_grad=True)
    balance_loss(expert_load(torch.tensor([0, 0, 10, 0])), p).backward()
    assert p.grad is not None
    assert p.grad[0].argmax() == 2
    assert p.grad[0, 2] > 0


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]], dtype=torch.float64)
    assert z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + (1 + math.log(2)) ** 2) / 2)


def test_the_router_learns_from_the_weights_gradient() -> None:
    made = router(4, 2)
    made(torch.randn(1, 9, 6, dtype=torch.float64)).weights[:, 0].sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0


def test_with_one_normalised_weight_only_the_balance_loss_reaches_the_router() -> None:
    made = router(4, 1)
    routed = made(torch.randn(1, 9, 6, dtype=torch.float64))
    assert (routed.weights == 1).all()
    routed.balance_loss.backward()
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0
