"""The figures of the routing, each computed again slowly from the routers' decisions."""

from __future__ import annotations

import math

import pytest
import torch

from moelab.config import ModelConfig, MoEConfig
from moelab.evaluation import routing
from moelab.model import GPT
from moelab.presets import arm_model

MODEL = ModelConfig(layers=3, heads=2, width=16, context=12, vocabulary=64)


@pytest.mark.parametrize("rules", [{}, {"capacity_factor": 0.5}, {"scores": "sigmoid", "moe_layers": "0,2"}], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_each_figure_is_its_definition(rules: dict[str, object], top_k: int) -> None:
    model = GPT(arm_model("moe", MODEL, MoEConfig(experts=5, top_k=top_k, **rules)), dtype=torch.float64)  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    found = routing(model, ids)
    decided = model(ids, keep_routing=True).routed
    assert {len(values) for values in found.values()} == {len(decided)}
    for layer, routed in enumerate(decided):
        slots = routed.indices.numel()
        load = (routed.counts / slots).tolist()
        assert found["load"][layer] == pytest.approx(load, abs=1e-5)
        assert found["max_violation"][layer] == pytest.approx(5 * max(load) - 1, abs=1e-4)
        assert found["mean_violation"][layer] == pytest.approx(sum(abs(5 * x - 1) for x in load) / 5, abs=1e-4)
        rows = routed.shares.tolist()
        entropy = -sum(p * math.log(p) for row in rows for p in row) / len(rows)
        assert found["entropy"][layer] == pytest.approx(entropy, abs=1e-5)
        assert found["logit_rms"][layer] == pytest.approx(math.sqrt(routed.logits.square().mean().item()), abs=1e-5)
        dropped = sum(i < 0 for row in routed.indices.tolist() for i in row) / slots
        assert found["dropped"][layer] == pytest.approx(dropped, abs=1e-5)
        chosen = [{i for i in row if i >= 0} for row in routed.indices.tolist()]
        for i in range(5):
            e = model.experts[layer]
            norm = math.sqrt(e.w_in[i].square().sum().item() + e.w_out[i].square().sum().item())
            assert found["weight_norm"][layer][i] == pytest.approx(norm, abs=1e-5)
            for j in range(5):
                both = sum(i in row and j in row for row in chosen) / len(chosen)
                assert found["overlap"][layer][i][j] == pytest.approx(both, abs=1e-5)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = GPT(arm_model("moe", MODEL, MoEConfig(experts=4, bias_rate=0.1, balance_scope="step")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routing(model, torch.zeros(2, 12, dtype=torch.int64))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.gpu
def test_measuring_waits_for_the_gpu_once() -> None:
    model = GPT(arm_model("moe", MODEL, MoEConfig(experts=4)), dtype=torch.bfloat16).cuda()
    ids = torch.zeros(2, 12, dtype=torch.int64, device="cuda")
    routing(model, ids)
    with torch.profiler.profile() as profile:
        routing(model, ids)
    copies = [event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"]
    assert sum(copies) == 0
    assert sum(event.count for event in profile.key_averages() if "DtoH" in event.key) <= 1
