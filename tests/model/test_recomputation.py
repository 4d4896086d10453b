"""Blocks that are computed again in the backward pass: the same bits, and less kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from moelab.config import ModelConfig, MoEConfig
from moelab.model import GPT, recomputation
from moelab.presets import arm_model
from moelab.training.balance import Balancer

SMALL = ModelConfig(layers=3, heads=2, width=32, context=24, vocabulary=128)
SETTINGS = {
    "dense": None,
    "modern": None,
    "plain": MoEConfig(4, 2),
    "bias": MoEConfig(4, 2, scores="sigmoid", bias_rate=0.1, balance_loss=0),
    "scope-step": MoEConfig(4, 2, balance_scope="step"),
    "scope-sequence": MoEConfig(4, 2, balance_scope="sequence", z_loss=0.1),
    "drop-by-score": MoEConfig(4, 2, capacity_factor=0.8),
    "drop-by-position": MoEConfig(4, 2, capacity_factor=0.8, drop="position"),
    "shared": MoEConfig(6, 3, shared_experts=1, learned_scale=True, moe_layers="every 2nd"),
    "many-chosen": MoEConfig(12, 10, normalize="all"),
    "everything": MoEConfig(
        4, 2, scores="sigmoid", bias_rate=0.1, balance_scope="step", capacity_factor=0.9, z_loss=0.1, shared_experts=1
    ),
}


def made(name: str, dtype: torch.dtype, checkpointed: bool) -> GPT:
    config, moe = SMALL, SETTINGS[name]
    if name == "modern":
        config = replace(config, positions="rope", norm="rmsnorm", activation="swiglu", bias=False)
    arm = "dense" if moe is None else "moe"
    return GPT(arm_model(arm, config, moe or MoEConfig()), dtype, checkpoint_activations=checkpointed)


def step(model: GPT, compiled: bool = False, micro_batches: int = 3) -> dict[str, torch.Tensor]:
    """Losses, gradients and buffers of two optimizer steps, without an optimizer."""
    forward = model.compiled(backend="aot_eager", fullgraph=True) if compiled else model
    balancer, found = Balancer(model), {}
    g = torch.Generator().manual_seed(0)
    for number in range(2):
        for part in range(micro_batches):
            ids = torch.randint(0, 128, (4, 25), generator=g)
            out = forward(ids[:, :-1], ids[:, 1:])
            loss = out.loss + out.balance_loss + out.z_loss
            loss.backward()
            if out.expert_counts is not None:
                balancer.add(out.expert_counts)
            found[f"loss {number} {part}"] = loss.detach()
        balancer.step()
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_kept_activations_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    kept, again = step(made(name, dtype, False)), step(made(name, dtype, True))
    assert kept.keys() == again.keys()
    for key in kept:
        assert torch.equal(kept[key], again[key]), key


@pytest.mark.parametrize("name", ["dense", "everything"])
def test_a_compiled_model_recomputes_too(name: str) -> None:
    eager, compiled = step(made(name, torch.float32, True)), step(made(name, torch.float32, True), compiled=True)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-4, atol=1e-6)


def kept_bytes(model: GPT) -> int:
    """Of everything kept for the backward pass, each storage once, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.randint(0, 128, (4, 25), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(ids[:, :-1], ids[:, 1:])
    del out
    return sum(seen.values())


@pytest.mark.parametrize("name", ["dense", "plain"])
def test_less_is_kept(name: str) -> None:
    assert kept_bytes(made(name, torch.float32, True)) < kept_bytes(made(name, torch.float32, False)) / 3


def test_evaluation_and_sampling_are_as_they_were() -> None:
    plain, other = made("plain", torch.float32, False).eval(), made("plain", torch.float32, True).eval()
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = other.new_cache(2)
    with torch.no_grad():
        parts = [other(part, cache=cache).logits for part in ids.split([5, 4], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), plain(ids).logits)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["plain", "drop-by-score", "many-chosen", "everything"])
def test_a_compiled_backward_pass_decides_nothing(name: str, device: str) -> None:
    """Whatever the compiler rounds, the decisions are those of the forward pass: no operator there makes any."""
    forward: list[list[object]] = []
    backward: list[list[object]] = []

    def noted(seen: list[list[object]], graph: torch.fx.GraphModule, _: object) -> object:
        seen.append([node.target for node in graph.graph.nodes if node.target in recomputation.DECISIONS])
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=partial(noted, forward),
        bw_compiler=partial(noted, backward),
        partition_fn=min_cut_rematerialization_partition,
    )
    model = made(name, torch.bfloat16, True).to(device)
    ids = torch.randint(0, 128, (4, 25), generator=torch.Generator().manual_seed(0)).to(device)
    out = model.compiled(fullgraph=True, backend=backend)(ids[:, :-1], ids[:, 1:])
    (out.loss + out.balance_loss + out.z_loss).backward()
    assert sum(map(bool, forward)) == 1  # blocks that are alike are one graph, in which all is decided
    assert len(backward) == len(forward) >= 3
    assert not any(backward)


def gradients_on_a_gpu(
    name: str, dtype: torch.dtype, checkpointed: bool, compiled: bool = False
) -> dict[str, torch.Tensor]:
    torch.compiler.reset()
    config = replace(SMALL, width=256, heads=4, context=256, layers=2)
    arm = "dense" if SETTINGS[name] is None else "moe"
    model = GPT(arm_model(arm, config, SETTINGS[name] or MoEConfig()), dtype, checkpoint_activations=checkpointed)
    forward = model.cuda().compiled(fullgraph=True) if compiled else model.cuda()
    ids = torch.randint(0, 128, (16, 257), generator=torch.Generator().manual_seed(0)).cuda()
    out = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    (out.loss + out.balance_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "plain", "everything"])
def test_gradients_on_a_gpu_are_those_of_kept_activations(name: str) -> None:
    kept, again = (gradients_on_a_gpu(name, torch.bfloat16, checkpointed) for checkpointed in (False, True))
    for key, expected in kept.items():
        assert (again[key] - expected).norm().item() <= 1e-6 * expected.norm().item(), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_compiled_gradients_on_a_gpu_are_as_near_to_fp32_as_plain_ones(name: str) -> None:
    """The compiler rounds elsewhere, by which tokens on the edge go to other experts: it need not be the same gradient.

    Twice as far is allowed: of an expert that a token was not sent to, a gradient would be off by a whole share.
    """
    exact = gradients_on_a_gpu(name, torch.float32, False)
    plain, again = gradients_on_a_gpu(name, torch.bfloat16, False), gradients_on_a_gpu(name, torch.bfloat16, True, True)
    for key, expected in exact.items():
        near, found = ((g[key] - expected).norm().item() for g in (plain, again))
        assert found <= 2 * near + 5e-3 * expected.norm().item(), key
