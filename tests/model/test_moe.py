"""The MoE layer: shared experts, capacity, and routers that have collapsed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moelab.config import ModelConfig, MoEConfig
from moelab.model import GPT
from moelab.model.moe import MoE
from moelab.presets import arm_model
from moelab.training.balance import Balancer

SMALL = ModelConfig(layers=2, heads=2, width=16, context=12, vocabulary=64)


def gpt(seed: int = 0, **rules: object) -> GPT:
    moe = MoEConfig(experts=4, top_k=2, **rules)  # type: ignore[arg-type]
    return GPT(arm_model("moe", SMALL, moe), dtype=torch.float64, seed=seed)


def batch(seed: int = 0, sequences: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 64, (sequences, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("drop", ["score", "position"])
@pytest.mark.parametrize("factor", [math.inf, 4.0])
def test_a_capacity_that_nothing_exceeds_is_dropless_bit_for_bit(drop: str, factor: float) -> None:
    models = [gpt(), gpt(capacity_factor=factor, drop=drop)]
    losses = [model(*batch()).loss for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_what_is_dropped_is_counted_and_passes_by_the_layer() -> None:
    model = gpt(capacity_factor=0.25)
    out = model(*batch(), keep_routing=True)
    shares = [(routed.indices < 0).double().mean().item() for routed in out.routed]
    assert out.dropped.tolist() == pytest.approx(shares)
    assert min(shares) >= 0.75 - 2 / 72  # a quarter of the slots is kept at most, rounded up
    assert model.eval()(*batch()).dropped.tolist() == [0, 0]
    assert gpt()(*batch()).dropped is None


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_experts_are_a_dense_feed_forward_beside_the_others(shared: int) -> None:
    config = replace(arm_model("moe", SMALL, MoEConfig(4, 2, expert_hidden=8, shared_experts=shared)), bias=False)
    model = GPT(config, dtype=torch.float64)
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MoE)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, _ = layer(x)
        apart, layer.shared = layer.shared, None
        routed, _ = layer(x)
        inner = [torch.nn.functional.gelu(x @ w.T) for w in apart.w_in.split(8)]
        expected = routed + sum(h @ w.T for h, w in zip(inner, apart.w_out.split(8, dim=1), strict=True))
    assert len(inner) == shared
    torch.testing.assert_close(found, expected)


# Collapse: every token has a large first feature, by which the router sends them all to the first two experts.

RESCUES = {
    "switch": {"balance_loss": 1.0},
    "sequence": {"balance_loss": 1.0, "balance_scope": "sequence"},
    "step": {"balance_loss": 1.0, "balance_scope": "step"},
    "sigmoid, switch": {"balance_loss": 1.0, "scores": "sigmoid"},
    "bias": {"balance_loss": 0.0, "bias_rate": 0.02},
    "sigmoid, bias": {"balance_loss": 0.0, "bias_rate": 0.02, "scores": "sigmoid"},
    "none": {"balance_loss": 0.0},
}


@pytest.mark.parametrize("name", RESCUES)
def test_each_way_to_balance_rescues_a_router_that_collapsed_and_none_does_not(name: str) -> None:
    moe = MoEConfig(experts=8, top_k=2, **RESCUES[name])  # type: ignore[arg-type]
    model = GPT(arm_model("moe", replace(SMALL, layers=1), moe), seed=0)
    router = model.routers[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(0.2 * torch.randn(8, 16, generator=generator))
        router.weight[:2, 0] += 1.5
    balancer = Balancer(model)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    counts = torch.zeros(8)
    for step in range(300):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(4, 32, 16, generator=generator)
            x[..., 0] = 3
            routed = router(x)
            balancer.add(routed.counts.unsqueeze(0))
            (moe.balance_loss * routed.balance_loss).backward()
            if step == 0:
                assert routed.counts[:2].sum() > 0.9 * routed.counts.sum()  # it has collapsed
            if step >= 280:
                counts += routed.counts
        optimizer.step()
        balancer.step()
    idlest, busiest = (counts.min() / counts.mean()).item(), (counts.max() / counts.mean()).item()
    assert (idlest > 0.5 and busiest < 1.5) == (name != "none"), f"{idlest:.2f} to {busiest:.2f} of the fair share"


RULES = {
    "sigmoid": {
        "scores": "sigmoid", "normalize": "none", "learned_scale": True, "bias_rate": 0.01, "balance_scope": "step",
        "shared_experts": 1,
    },
    "capacity": {"capacity_factor": 1.0, "normalize": "all", "score_scale": 2.5, "balance_scope": "sequence"},
}  # fmt: skip


def test_a_model_compiled_for_a_cpu_has_the_gradients_of_the_plain_one() -> None:
    """By PyTorch's own compiler, whose fused scatter was wrong: a router's gradient was a third off."""
    torch.compiler.reset()
    sizes = replace(SMALL, width=64, layers=1, vocabulary=128)
    config = arm_model("moe", sizes, MoEConfig(4, 2, backend="grouped_mm"))
    ids = torch.randint(0, 128, (4, 13), generator=torch.Generator().manual_seed(0))
    plain, compiled = GPT(config), GPT(config)
    for model in (plain, torch.compile(compiled, fullgraph=True)):
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_a_compiled_model_gives_what_the_plain_one_gives_under_every_rule(name: str) -> None:
    torch.compiler.reset()
    config = replace(
        arm_model("moe", replace(SMALL, width=64, layers=1), MoEConfig(8, 2, **RULES[name])), vocabulary=128
    )  # type: ignore[arg-type]
    plain, compiled = GPT(config).cuda(), GPT(config).cuda()
    forward = torch.compile(compiled, fullgraph=True)
    balancers = [Balancer(plain), Balancer(compiled)]
    ids = torch.randint(0, 128, (8, 13), generator=torch.Generator().manual_seed(0)).cuda()
    for _ in range(3):
        outs = [plain(ids[:, :-1], ids[:, 1:]), forward(ids[:, :-1], ids[:, 1:])]
        for out, balancer in zip(outs, balancers, strict=True):
            (out.loss + out.balance_loss + out.z_loss).backward()
            balancer.add(out.expert_counts)
            balancer.step()
        torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outs[0].balance_loss, outs[1].balance_loss, rtol=1e-4, atol=1e-4)
        assert torch.equal(outs[0].expert_counts, outs[1].expert_counts)
    for (parameter, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=parameter)
