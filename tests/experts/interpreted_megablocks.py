"""The package megablocks on a CPU, its Triton kernels interpreted. `test_megablocks.py` runs this file."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime import driver

from moelab import ModelConfig, MoEConfig, expert_mlp
from moelab.config import UsageError
from moelab.model.moe import MoE

# Its kernels pick their shapes by time, and ask a driver for it; interpreted, the first is as good as any.
driver.set_active(SimpleNamespace(get_benchmarker=lambda: lambda call, quantiles: [0.0] * len(quantiles)))

from moelab.experts import megablocks_layers, megablocks_standins  # noqa: E402

FORMS = ["megablocks", "megablocks-capacity"]


def drawn(tokens: int = 30, dropped: int = 9) -> dict[str, torch.Tensor]:
    """A call with E = 5, K = 2, D = 12, F = 20, the last expert idle; leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (tokens, 12), "weights": (tokens, 2), "w_in": (5, 20, 12), "w_out": (5, 12, 20)}
    leaves = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    indices = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    indices.view(-1)[torch.randperm(2 * tokens, generator=generator)[:dropped]] = -1
    return leaves | {"indices": indices}


def results(call: Any, inputs: dict[str, torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Output and gradients."""
    y = call(**inputs, backend=backend)
    leaves = [t for t in inputs.values() if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y))]


@pytest.mark.parametrize("form", FORMS)
def test_training_leaves_the_packages_list_of_balance_losses_empty(form: str) -> None:
    from megablocks.layers.moe import get_load_balancing_loss

    for _ in range(3):
        results(expert_mlp, drawn(), form)
    layer = megablocks_layers.layer("dropless" if form == "megablocks" else "capacity", 12, 5, 2, "gelu")
    assert layer.training  # it saves them in training only
    assert get_load_balancing_loss() == []


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_with_capacity_has_the_parameters_and_output_of_another_backends(form: str) -> None:
    made, generator = {}, torch.Generator().manual_seed(0)
    for backend in ("reference", form):
        moe = MoEConfig(4, 2, expert_hidden=24, capacity_factor=1.0, backend=backend)
        made[backend] = MoE(ModelConfig(1, 1, 16, 1, bias=False, activation="swiglu", moe=moe), moe).train()
    for parameter in made["reference"].parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    made[form].load_state_dict(made["reference"].state_dict())
    x = torch.randn(2, 10, 16, generator=generator)
    (expected, _), (found, routed) = (layer(x) for layer in made.values())
    assert (routed.indices < 0).any()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_breaks_its_graph_at_the_layer_and_answers_as_an_eager_one(form: str) -> None:
    def twice(**inputs: Any) -> torch.Tensor:
        return 2 * expert_mlp(**inputs | {"x": inputs["x"] + 1})

    eager = results(twice, drawn(), form)
    compiled = results(torch.compile(twice, backend="aot_eager"), drawn(), form)
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
    torch.compiler.reset()  # or what was compiled with a break would serve
    with pytest.raises(Exception, match="megablocks reads counts on the host"):
        torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)(**drawn(), backend=form)


def test_rows_that_the_installed_grouped_gemm_leaves_unwritten_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from megablocks import grouped_gemm_util

    def spoil(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """NaN after the last expert's rows, in the gradient too."""
        kept = torch.arange(len(rows)) < counts.sum()
        return rows * torch.where(kept[:, None], 1, torch.nan).to(rows.dtype)

    def gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
        assert b.is_contiguous()
        return spoil(megablocks_standins.gmm(spoil(a, batch_sizes), b, batch_sizes, trans_b), batch_sizes)

    inputs = {name: t.detach().bfloat16() if name != "indices" else t for name, t in drawn().items()}
    for name in ("x", "weights", "w_in", "w_out"):
        inputs[name].requires_grad_()
    expected = results(expert_mlp, inputs, "megablocks")
    monkeypatch.setitem(sys.modules, "grouped_gemm", ModuleType("grouped_gemm"))
    monkeypatch.setattr(grouped_gemm_util, "ops", SimpleNamespace(gmm=gmm))
    megablocks_layers.layer.cache_clear()
    try:
        found = results(expert_mlp, inputs, "megablocks")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        with pytest.raises(UsageError, match="precision = fp32: the package grouped_gemm takes bf16"):
            expert_mlp(**drawn(), backend="megablocks")
    finally:
        megablocks_layers.layer.cache_clear()


@pytest.mark.parametrize(
    ("form", "limit", "line"),
    [
        ("megablocks", "INT32", "60 slots of width 12 are more elements"),
        ("megablocks-capacity", "INT32", "slots of one expert are more than its kernels count"),
        ("megablocks-capacity", "GRID", "slots of one expert are more than its kernels count"),
    ],
)
def test_more_than_its_kernels_can_count_is_refused(
    form: str, limit: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megablocks_layers, limit, 10)
    with pytest.raises(UsageError, match=f"backend = {form}: .*{line}"):
        expert_mlp(**drawn(), backend=form)


def test_an_import_that_failed_before_does_no_harm_and_the_stand_ins_are_seen_by_nobody_else() -> None:
    code = """if True:
        import sys, torch
        try:
            import megablocks
        except ModuleNotFoundError as absent:
            assert "megablocks_ops" in str(absent)
        from moelab.experts import megablocks_layers
        assert not {"megablocks_ops", "grouped_gemm"} & sys.modules.keys()
        import megablocks
        assert megablocks.ParallelMLP is megablocks_layers.ParallelMLP
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
