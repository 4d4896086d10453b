"""Routing and its losses, against definitions written out slowly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import MoEConfig
from moelab.model.router import Router, balance_loss, bias_step, expert_counts, expert_load, highest, z_loss


def router(experts: int, top_k: int, *, width: int = 6, seed: int = 0, **rules: Any) -> Router:
    made = Router(width, MoEConfig(experts, top_k, **rules)).double()
    with torch.no_grad():
        made.weight.copy_(torch.randn(experts, width, generator=torch.Generator().manual_seed(seed)))
        if made.selection_bias is not None:
            made.selection_bias.copy_(torch.randn(experts, generator=torch.Generator().manual_seed(seed + 1)))
        if made.scale is not None:
            made.scale.fill_(rules.get("score_scale", 1.0))
    return made


def hidden(tokens: int, *, seed: int = 0, sequences: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, tokens, 6, dtype=torch.float64, generator=generator)


FORMS = [("softmax", "chosen"), ("softmax", "all"), ("sigmoid", "chosen"), ("sigmoid", "all"), ("sigmoid", "none")]


@given(tokens=st.integers(1, 12), experts=st.integers(1, 12), form=st.sampled_from(FORMS), data=st.data())
def test_routing_is_the_definition(tokens: int, experts: int, form: tuple[str, str], data: st.DataObject) -> None:
    """Shazeer et al. 2017 (softmax), DeepSeek-V3 equations 12 to 16 (sigmoid, bias), a token at a time."""
    top_k = data.draw(st.integers(1, experts))
    scores, normalize = form
    scale, bias_rate = data.draw(st.sampled_from([1.0, 2.5])), data.draw(st.sampled_from([0.0, 0.1]))
    made = router(
        experts, top_k, seed=tokens, scores=scores, normalize=normalize, score_scale=scale, bias_rate=bias_rate,
        learned_scale=data.draw(st.booleans()),
    )  # fmt: skip
    bias = [0.0] * experts if made.selection_bias is None else made.selection_bias.tolist()
    x = hidden(tokens, seed=experts)
    routed = made(x)
    counts = [0] * experts
    for t in range(tokens):
        logits = [sum(a * b for a, b in zip(x[0, t].tolist(), w, strict=True)) for w in made.weight.tolist()]
        raw = [math.exp(z) if scores == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
        shares = [r / sum(raw) for r in raw]
        selected_by = [(s if scores == "softmax" else r) + b for s, r, b in zip(shares, raw, bias, strict=True)]
        chosen = sorted(range(experts), key=lambda e: (-selected_by[e], e))[:top_k]
        total = {"chosen": sum(raw[e] for e in chosen), "all": sum(raw), "none": 1}[normalize]
        assert routed.indices[t].tolist() == chosen
        assert routed.weights[t].tolist() == pytest.approx([scale * raw[e] / total for e in chosen])
        assert routed.shares[t].tolist() == pytest.approx(shares)
        for e in chosen:
            counts[e] += 1
    assert routed.counts.tolist() == counts


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_to_the_router_are_exact_in_every_form(form: tuple[str, str], top_k: int) -> None:
    made = router(5, top_k, scores=form[0], normalize=form[1], learned_scale=True, bias_rate=0.1, z_loss=1.0)
    x = hidden(7).requires_grad_()

    def outputs(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routed = torch.func.functional_call(made, {"weight": weight, "scale": scale}, (x,))
        return routed.weights, routed.balance_loss, routed.z_loss

    assert torch.autograd.gradcheck(outputs, (made.weight, made.scale, x))


@given(st.integers(1, 6), st.integers(1, 20), st.data())
def test_the_highest_are_chosen_and_ties_go_to_the_lowest_index(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    values = data.draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=tokens * experts, max_size=tokens * experts)
    )
    scores = torch.tensor(values).view(tokens, experts)
    expected = [sorted(range(experts), key=lambda e: (-row[e], e))[:top_k] for row in scores.tolist()]
    assert highest(scores, top_k).tolist() == expected


def test_logits_that_are_far_out_give_weights_that_sum_to_1() -> None:
    """A quotient of sigmoids would be 0 / 0."""
    made = router(4, 2, scores="sigmoid")
    routed = made(-1e4 * torch.ones(1, 3, 6, dtype=torch.float64) * made.weight.sum(0).sign())
    torch.testing.assert_close(routed.weights.sum(-1), torch.ones(3, dtype=torch.float64))


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


# The scope over which the balance loss counts


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.data())
def test_the_sequence_scope_is_deepseek_v3s_loss(
    sequences: int, length: int, experts: int, data: st.DataObject
) -> None:
    """Equations 17 to 20 there: Σ f_i P_i, f_i = E / (K T) Σ_t 1(i chosen), P_i the mean of the shares."""
    top_k = data.draw(st.integers(1, experts))
    made = router(experts, top_k, scores="sigmoid", balance_scope="sequence")
    routed = made(hidden(length, sequences=sequences))
    expected = 0.0
    for b in range(sequences):
        rows = range(b * length, (b + 1) * length)
        for e in range(experts):
            f = experts / (top_k * length) * sum(e in routed.indices[t].tolist() for t in rows)
            expected += f * sum(routed.shares[t, e].item() for t in rows) / length / sequences
    assert routed.balance_loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("scope", ["sequence", "micro-batch", "step"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_routing_has_loss_1_in_every_scope(scope: str, top_k: int) -> None:
    """Tokens e_0 … e_3 and a router that sends e_t to expert t and those after it: an expert gets T·K/E slots."""
    made = router(4, top_k, width=4, balance_scope=scope)
    with torch.no_grad():
        made.weight.copy_(sum(torch.eye(4).roll(k, 0) * (4 - k) for k in range(4)))
    routed = made(torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))
    assert routed.counts.tolist() == [2 * top_k] * 4
    assert routed.balance_loss.item() == pytest.approx(1)


def test_with_one_sequence_or_one_micro_batch_the_scopes_are_one() -> None:
    losses = [
        router(5, 2, balance_scope=scope)(hidden(9)).balance_loss.item()
        for scope in ("sequence", "micro-batch", "step")
    ]
    assert losses == pytest.approx([losses[0]] * 3)


# The bias of selection


def test_a_bias_step_is_the_algorithm_written_out() -> None:
    counts = torch.tensor([[4, 0, 2, 2], [3, 3, 3, 3], [1, 0, 0, 0]])
    expected = []
    for row in counts.tolist():
        mean = sum(row) / 4
        expected.append([0.5 * ((mean > c) - (mean < c)) for c in row])
    assert bias_step(counts, 0.5).tolist() == expected


def test_the_bias_changes_who_is_selected_and_no_score() -> None:
    made = router(6, 2, bias_rate=0.1, scores="sigmoid", normalize="none")
    x = hidden(20)
    with torch.no_grad():
        made.selection_bias.zero_()
        plain = made(x)
        made.selection_bias[3] = 10
    biased = made(x)
    assert (biased.indices[:, 0] == 3).all()
    assert not torch.equal(biased.indices, plain.indices)
    assert torch.equal(biased.shares, plain.shares)
    torch.testing.assert_close(biased.weights, torch.sigmoid(biased.logits).gather(1, biased.indices))


# Capacity


@given(
    st.integers(1, 10), st.integers(1, 5), st.floats(0.1, 3), st.sampled_from(["score", "position"]), st.integers(0, 99)
)
def test_capacity_drops_what_the_rule_says(tokens: int, experts: int, factor: float, rule: str, seed: int) -> None:
    top_k = min(2, experts)
    made = router(experts, top_k, capacity_factor=factor, drop=rule, normalize="all").train()
    x = hidden(tokens, seed=seed)
    x[0, tokens // 2 :] = x[0, 0]  # equal weights too
    routed, free = made(x), made.eval()(x)
    capacity = min(tokens * top_k, math.ceil(factor * tokens * top_k / experts))
    kept: dict[int, list[tuple[float, int]]] = {e: [] for e in range(experts)}
    for t in range(tokens):
        for k in range(top_k):
            kept[int(free.indices[t, k])].append((-free.weights[t, k].item(), t * top_k + k))
    stays = set()
    for slots in kept.values():
        inside = sorted(slots)[:capacity] if rule == "score" else slots[:capacity]
        stays |= {slot for _, slot in inside}
    for slot in range(tokens * top_k):
        t, k = divmod(slot, top_k)
        assert routed.indices[t, k] == (free.indices[t, k] if slot in stays else -1)
    assert torch.equal(routed.weights, free.weights)
    assert torch.equal(routed.counts, free.counts)  # the balance loss sees what was routed


@pytest.mark.parametrize("factor", [4.0, 1e9, math.inf])
def test_evaluation_is_dropless_unless_asked(factor: float) -> None:
    x = hidden(30)
    tight = router(4, 2, capacity_factor=0.5)
    assert (tight.train()(x).indices < 0).any()
    assert (tight.eval()(x).indices >= 0).all()
    assert (router(4, 2, capacity_factor=0.5, drop_in_evaluation=True).eval()(x).indices < 0).any()
    assert (router(4, 2, capacity_factor=factor).train()(x).indices >= 0).all()
