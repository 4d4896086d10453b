"""Balance over a whole step: accumulation and data-parallel ranks change nothing at equal scope."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moelab.config import ModelConfig, MoEConfig
from moelab.model import GPT
from moelab.model.router import expert_load
from moelab.presets import arm_model
from moelab.training.balance import Balancer

SMALL = ModelConfig(layers=2, heads=2, width=16, context=12, vocabulary=64)


def gpt(scope: str, **rules: object) -> GPT:
    moe = MoEConfig(experts=4, top_k=2, balance_scope=scope, bias_rate=0.1, **rules)  # type: ignore[arg-type]
    return GPT(arm_model("moe", SMALL, moe), dtype=torch.float64)


def ids(sequences: int) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, 12), generator=torch.Generator().manual_seed(1))


def balance_gradient(model: GPT, micro_batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the first router by the balance loss of a step, and its bias after it."""
    balancer = Balancer(model)
    for part in micro_batches:
        out = model(part, part)
        (out.balance_loss / len(micro_batches)).backward()
        balancer.add(out.expert_counts)
    balancer.step()
    gradient, bias = model.routers[0].weight.grad, model.routers[0].selection_bias
    assert gradient is not None
    assert bias is not None
    return gradient, bias


@pytest.mark.parametrize("made", [True, False])
def test_no_bias_moves_in_a_step_that_the_optimizer_passes_over(made: bool) -> None:
    model = gpt("step")
    balancer, out = Balancer(model), model(ids(2), ids(2))
    balancer.add(out.expert_counts)
    balancer.step(torch.tensor(made))
    bias = model.routers[0].selection_bias
    assert bias is not None
    assert bool(bias.any()) == made
    assert not model.routers[0].seen.any()


def test_the_step_scope_counts_the_step_so_far_and_starts_anew_with_the_next() -> None:
    model = gpt("step")
    balancer = Balancer(model)
    router = model.routers[0]
    parts = ids(6).split(2)
    total = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        total.zero_()
        for part in parts:
            out = model(part, part, keep_routing=True)
            total += out.expert_counts[0]
            routed = out.routed[0]
            expected = 4 * (expert_load(total) * routed.shares.mean(0)).sum()
            torch.testing.assert_close(routed.balance_loss, expected)
            balancer.add(out.expert_counts)
            assert router.seen.tolist() == total.tolist()
        balancer.step()
        assert router.seen.tolist() == [0] * 4


def test_the_bias_moves_once_a_step_by_the_counts_of_all_its_micro_batches() -> None:
    _, whole = balance_gradient(gpt("micro-batch"), [ids(6)])
    _, parts = balance_gradient(gpt("micro-batch"), list(ids(6).split(2)))
    assert whole.abs().sum() > 0
    assert torch.equal(whole, parts)


def test_the_bias_stays_in_evaluation() -> None:
    model = gpt("micro-batch").eval()
    before = model.routers[0].selection_bias.clone()
    model(ids(4), ids(4))
    assert torch.equal(model.routers[0].selection_bias, before)


@pytest.mark.parametrize("scope", ["sequence", "micro-batch", "step"])
def test_two_ranks_give_the_gradient_and_bias_of_one_process(scope: str, tmp_path: Path) -> None:
    """Each rank has half of every micro-batch, and gradients are averaged, as data parallelism does."""
    expected, bias = balance_gradient(gpt(scope), list(ids(8).split(4)))
    mp.spawn(_rank, (scope, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["gradient"], expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(found["bias"], bias)


def _rank(rank: int, scope: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradient, bias = balance_gradient(gpt(scope), [part[2 * rank : 2 * rank + 2] for part in ids(8).split(4)])
    dist.all_reduce(gradient)
    torch.save({"gradient": gradient / 2, "bias": bias}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
