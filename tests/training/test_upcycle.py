"""Starting from a dense run: what is exact is exact, what is not is said, and what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.cli import main
from moelab.config import Activation, ModelConfig, MoEConfig, RunConfig, UpcyclingConfig, UsageError
from moelab.experts.activation import activate
from moelab.model import GPT
from moelab.model.moe import MoE
from moelab.training import train
from moelab.training.loop import Interrupted, Trainer
from moelab.training.upcycle import departures, fill

MakeRun = Callable[..., RunConfig]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "relu2", "silu", "swiglu")
COPIES = UpcyclingConfig(upcycle=Path("dense"))
SPLIT = UpcyclingConfig(upcycle=Path("dense"), upcycle_split=True)
GROUPS = UpcyclingConfig(upcycle=Path("dense"), upcycle_split=True, upcycle_groups=True)
DENSE = ModelConfig(layers=2, heads=2, width=16, context=8, vocabulary=64, hidden=48)
IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def trained_like(config: ModelConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """A model in which nothing is zero or one, as after training."""
    model = GPT(config, dtype=dtype, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def loss(model: GPT) -> float:
    out = model.eval()(IDS[:, :-1], IDS[:, 1:]).loss
    assert out is not None
    return float(out)


def upcycled(dense: GPT, moe: MoEConfig, settings: UpcyclingConfig, seed: int = 0) -> GPT:
    model = GPT(replace(dense.config, moe=moe), dtype=dense.dtype, seed=seed)
    fill(model, dense, settings, seed)
    return model


def difference(config: ModelConfig, moe: MoEConfig, settings: UpcyclingConfig) -> float:
    dense = trained_like(config)
    return abs(loss(upcycled(dense, moe, settings)) - loss(dense))


def says_exact(config: ModelConfig, moe: MoEConfig, settings: UpcyclingConfig) -> bool:
    return not departures(replace(config, moe=moe), config.hidden_size, settings)


@given(
    st.integers(1, 5), st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from(["every", "every 2nd", "0"]),
    st.booleans(), st.sampled_from(["softmax", "sigmoid"]), st.sampled_from([1.0, 2.5]), st.integers(0, 2),
    st.booleans(),
)  # fmt: skip
def test_copies_begin_with_the_dense_loss_where_weights_sum_to_a_constant(
    top_k: int, activation: Activation, bias: bool, layers: str, tied: bool, scores: Any, scale: float, shared: int,
    learned: bool,
) -> None:  # fmt: skip
    config = replace(DENSE, activation=activation, bias=bias, tied_head=tied)
    moe = MoEConfig(5, top_k, moe_layers=layers, scores=scores, score_scale=scale, shared_experts=shared)
    moe = replace(moe, learned_scale=learned)
    assert says_exact(config, moe, COPIES)
    assert difference(config, moe, COPIES) < 1e-12


def test_copies_are_exact_with_all_experts_chosen_and_shares_over_all() -> None:
    moe = MoEConfig(4, 4, normalize="all")
    assert says_exact(DENSE, moe, COPIES)
    assert difference(DENSE, moe, COPIES) < 1e-12


def test_in_single_precision_copies_begin_with_the_dense_loss_to_rounding() -> None:
    dense = trained_like(DENSE, torch.float32)
    assert loss(upcycled(dense, MoEConfig(8, 2), COPIES)) == pytest.approx(loss(dense), abs=2e-6)


def test_each_copy_is_bit_for_bit_the_dense_feed_forward() -> None:
    dense = trained_like(DENSE)
    model = upcycled(dense, MoEConfig(4, 2), COPIES)
    for block, dense_block in zip(model.blocks, dense.blocks, strict=True):
        for leaf in ("w_in", "b_in", "w_out", "b_out"):
            for copy in getattr(block.feed_forward.experts, leaf):
                assert torch.equal(copy, getattr(dense_block.feed_forward, leaf))


INEXACT = {
    "normalize all": (MoEConfig(4, 2, normalize="all"), COPIES),
    "normalize none": (MoEConfig(4, 2, scores="sigmoid", normalize="none"), COPIES),
    "noise": (MoEConfig(4, 2), replace(COPIES, upcycle_noise=0.1)),
    "drops": (MoEConfig(4, 2, capacity_factor=0.5, drop_in_evaluation=True), COPIES),
    "no groups": (MoEConfig(8, 2, expert_hidden=24), SPLIT),
    "part of a group": (MoEConfig(8, 3, expert_hidden=24), GROUPS),
}


@pytest.mark.parametrize("case", INEXACT)
def test_a_start_that_is_not_the_dense_model_is_said_to_be_none(case: str) -> None:
    moe, settings = INEXACT[case]
    assert not says_exact(DENSE, moe, settings)
    assert difference(DENSE, moe, settings) > 1e-6


@pytest.mark.parametrize(("scores", "normalize"), [("softmax", "all"), ("sigmoid", "all"), ("sigmoid", "none")])
def test_a_router_without_preference_begins_with_the_dense_loss_whatever_the_weights_sum_to(
    scores: Any, normalize: Any
) -> None:
    dense = trained_like(DENSE)
    model = upcycled(dense, MoEConfig(4, 2, scores=scores, normalize=normalize, score_scale=1.5), COPIES)
    with torch.no_grad():
        for router in model.routers:
            router.weight.zero_()
    assert loss(model) == pytest.approx(loss(dense), abs=1e-12)


@given(
    st.sampled_from([(2, 2), (4, 2), (3, 3), (4, 4), (6, 3)]), st.sampled_from(ACTIVATIONS), st.booleans(),
    st.sampled_from([1.0, 2.5]), st.integers(0, 2), st.sampled_from(["every", "every 2nd"]),
)  # fmt: skip
def test_shards_begin_with_the_dense_loss_where_a_token_chooses_whole_groups(
    top_k_and_group: tuple[int, int], activation: Activation, bias: bool, scale: float, shared: int, layers: str
) -> None:
    top_k, group = top_k_and_group
    config = replace(DENSE, hidden=12 * (group + shared), activation=activation, bias=bias)
    moe = MoEConfig(12, top_k, expert_hidden=12, score_scale=scale, shared_experts=shared, moe_layers=layers)
    assert says_exact(config, moe, GROUPS)
    assert difference(config, moe, GROUPS) < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_over_all_choices_shards_average_to_the_dense_feed_forward(activation: Activation) -> None:
    dense = trained_like(replace(DENSE, activation=activation))
    model = upcycled(dense, MoEConfig(8, 1, expert_hidden=12), SPLIT)
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MoE)
    e = layer.experts
    assert e.b_in is not None
    assert e.b_out is not None
    outputs = [
        activate(x @ e.w_in[i].T + e.b_in[i], activation) @ e.w_out[i].T + e.b_out[i] for i in range(len(e.w_in))
    ]
    wanted = dense.blocks[0].feed_forward(x)
    torch.testing.assert_close(torch.stack(outputs).mean(0), wanted, rtol=1e-12, atol=1e-12)


def test_the_router_begins_as_it_does_from_scratch() -> None:
    config, moe = replace(DENSE, moe=MoEConfig(4, 2)), MoEConfig(4, 2)
    model = upcycled(trained_like(DENSE), moe, COPIES, seed=3)
    for router, fresh in zip(model.routers, GPT(config, dtype=torch.float64, seed=3).routers, strict=True):
        assert torch.equal(router.weight, fresh.weight)


def noise(experts: int, seed: int, size: float, leaf: str = "w_in") -> torch.Tensor:
    dense = trained_like(replace(DENSE, width=64, hidden=256))
    settings = replace(COPIES, upcycle_noise=size)
    model = upcycled(dense, MoEConfig(experts, 1), settings, seed).requires_grad_(False)
    plain = upcycled(dense, MoEConfig(experts, 1), COPIES, seed).requires_grad_(False)
    name = f"blocks.1.feed_forward.experts.{leaf}"
    return (model.get_parameter(name) - plain.get_parameter(name)) / plain.get_parameter(name).std()


def test_noise_is_that_of_the_seed_and_of_the_size_that_was_asked_for() -> None:
    first = noise(4, 0, 0.05)
    assert torch.equal(first, noise(4, 0, 0.05))
    torch.testing.assert_close(first * 2, noise(4, 0, 0.1))
    assert not torch.equal(first, noise(4, 1, 0.05))
    assert first.std().item() == pytest.approx(0.05, rel=0.01)  # 65,536 draws: a standard error of 0.3 %
    assert not torch.allclose(first[0], first[1])
    assert not noise(4, 0, 0.05, "b_in").any()


def test_without_noise_experts_are_alike() -> None:
    assert not noise(4, 0, 0.0).any()


def dense_run(tiny_run: MakeRun, folder: Path, **training: object) -> RunConfig:
    run = tiny_run("dense", **training)
    train(run, folder)
    return run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start_from(run: RunConfig, **settings: Any) -> RunConfig:
    return replace(run, upcycling=UpcyclingConfig(**settings))


def test_a_resumed_run_is_the_uninterrupted_one_and_needs_its_source_no_more(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_run(tiny_run, tmp_path / "dense")
    run = start_from(tiny_run("moe", checkpoint_interval=3), upcycle=tmp_path / "dense", upcycle_noise=0.01)
    whole = train(run, tmp_path / "whole")
    take_step = Trainer._step

    def stop_at_step_4(self: Trainer, windows: torch.Tensor) -> None:
        if self.progress.step == 3:
            self.stop.set()
        take_step(self, windows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_at_step_4)
        with pytest.raises(Interrupted):
            train(run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "dense")
    parts = train(run, tmp_path / "cut", resume=True)
    assert parts["val_loss"] == whole["val_loss"]
    assert parts["started_from"] == whole["started_from"]
    assert [line["step"] for line in metrics(tmp_path / "cut")].count(0) == 1


def test_a_run_that_was_stopped_before_its_first_checkpoint_upcycles_again_and_says_so_once(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    dense_run(tiny_run, tmp_path / "dense")
    run = start_from(tiny_run("moe"), upcycle=tmp_path / "dense")
    whole = train(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "summary.json").unlink()
    assert train(run, tmp_path / "run", resume=True)["val_loss"] == whole["val_loss"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 2, 4, 6, 8, 10, 12]


def test_a_corrupt_checkpoint_of_the_source_is_passed_over_and_what_is_recorded_is_its_predecessors(
    tiny_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = dense_run(tiny_run, tmp_path / "dense")  # checkpoints at 8 and 12, evaluations at 6 and 12
    (tmp_path / "dense" / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"")
    started = train(start_from(tiny_run("moe"), upcycle=tmp_path / "dense"), tmp_path / "run")["started_from"]
    tokens = 8 * source.training.batch_size * source.model.context
    assert (started["step"], started["tokens"], started["val_loss"]) == (8, tokens, None)
    said = capfd.readouterr()
    assert "step-00000012 is not usable" in said.out
    assert "the dense run's not measured" in said.err


def test_resume_refuses_another_source(tiny_run: MakeRun, tmp_path: Path) -> None:
    dense_run(tiny_run, tmp_path / "dense")
    run = start_from(tiny_run("moe"), upcycle=tmp_path / "dense")
    train(run, tmp_path / "run")
    with pytest.raises(UsageError, match=r"upcycle = elsewhere: the run that is there has .*dense"):
        train(start_from(run, upcycle=Path("elsewhere")), tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match=r"upcycle-noise = 0\.5: the run that is there has 0\.0"):
        train(start_from(run, upcycle=tmp_path / "dense", upcycle_noise=0.5), tmp_path / "run", resume=True)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": 3}, "layers = 3: the dense run .* has 2; give --layers 2"),
    "width": ({"width": 64}, "width = 64: the dense run .* has 32; give --width 32"),
    "heads": ({"heads": 4}, "heads = 4: the dense run .* has 2; give --heads 2"),
    "activation": ({"activation": "relu2"}, "activation = relu2: .* has gelu; give --activation gelu"),
    "norm": ({"norm": "rmsnorm"}, "norm = rmsnorm: .* has layernorm; give --norm layernorm"),
    "positions": ({"positions": "rope"}, "positions = rope: .* has learned; give --positions learned"),
    "bias": ({"bias": False}, "bias = False: .* has True; give --bias"),
    "head": ({"tied_head": False}, "tied-head = False: .* has True; give --tied-head"),
    "context": ({"context": 16}, "context = 16: .* has 32; give --context 32"),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the dense run of the tests of misfits is, once it is trained."""
    return {"folder": tmp_path_factory.mktemp("source") / "dense"}


@pytest.fixture
def dense(source: dict[str, Path], tiny_run: MakeRun) -> Path:
    if not source["folder"].exists():
        train(tiny_run("dense", steps=1), source["folder"])
    return source["folder"]


def refusal(run: RunConfig, folder: Path) -> str:
    with pytest.raises(UsageError) as refused:
        train(run, folder)
    assert "\n" not in str(refused.value)
    assert not (folder / "config.json").exists()
    return str(refused.value)


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_refused_with_both_values(
    case: str, dense: Path, tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = start_from(tiny_run("moe"), upcycle=dense)
    changes, wanted = MISFITS[case]
    assert run.model.moe is not None
    run = replace(run, model=replace(run.model, **changes, moe=replace(run.model.moe, expert_hidden=128)))
    assert re.search(wanted, refusal(run, tmp_path / "run"))


SIZES: dict[str, tuple[MoEConfig, bool, str]] = {
    "narrow": (
        MoEConfig(4, expert_hidden=64),
        False,
        "has hidden size 128; give --upcycle-split, which cuts it into 2",
    ),
    "odd": (MoEConfig(4, expert_hidden=100), False, "expert-hidden = 100: the dense run .* has hidden size 128; give"),
    "wide": (MoEConfig(4, expert_hidden=256), True, "expert-hidden = 256: .* give a size that divides it"),
    "whole": (MoEConfig(4), True, "upcycle-split = True: experts have the dense hidden size 128 already"),
    "groups": (MoEConfig(6, expert_hidden=32), True, "experts = 6: a group has 4 experts; give a multiple of 4"),
    "shared": (MoEConfig(4, expert_hidden=64, shared_experts=2), True, "shared-experts = 2: .* cut into 2; give fewer"),
}


@pytest.mark.parametrize("case", SIZES)
def test_experts_that_the_dense_feed_forward_cannot_make_are_refused(
    case: str, dense: Path, tiny_run: MakeRun, tmp_path: Path
) -> None:
    moe, split, wanted = SIZES[case]
    run = start_from(tiny_run("moe", moe=moe), upcycle=dense, upcycle_split=split)
    assert re.search(wanted, refusal(run, tmp_path / "run"))


def test_layers_that_stay_dense_need_the_dense_hidden_size(dense: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    run = start_from(tiny_run("moe", moe=MoEConfig(4, moe_layers="every 2nd", expert_hidden=128)), upcycle=dense)
    run = replace(run, model=replace(run.model, hidden=64))
    assert "hidden = 64: the dense run" in refusal(run, tmp_path / "run")


def test_another_tokenizer_is_refused_even_of_the_same_name(
    tiny_run: MakeRun, dense: Path, tmp_path: Path, story: Path
) -> None:
    def with_data(arm: str, **data: Any) -> RunConfig:
        run = tiny_run(arm, steps=1)
        return replace(run, data=replace(run.data, **data))

    other = start_from(with_data("moe", tokenizer="bpe:300"), upcycle=dense)
    assert "has bytes; give --tokenizer bytes" in refusal(other, tmp_path / "run")
    train(with_data("dense", tokenizer="bpe:300"), tmp_path / "bpe")
    text = tmp_path / "other.txt"
    text.write_text("Quite another text, with other words in it altogether.\n" * 300)
    other = start_from(with_data("moe", tokenizer="bpe:300", data=f"text:{text}"), upcycle=tmp_path / "bpe")
    said = refusal(other, tmp_path / "run")
    assert "has another bpe:300" in said
    assert f"give --data text:{story}" in said


def test_a_run_with_experts_one_without_a_checkpoint_and_none_are_refused(
    dense: Path, tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = start_from(tiny_run("moe", steps=1), upcycle=dense)
    train(run, tmp_path / "moe")
    assert "its arm moe has experts already" in refusal(start_from(run, upcycle=tmp_path / "moe"), tmp_path / "run")
    shutil.copytree(dense, tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    assert "no checkpoint yet" in refusal(start_from(run, upcycle=tmp_path / "new"), tmp_path / "run")
    assert "upcycle = /no/such: there is no run" in refusal(start_from(run, upcycle=Path("/no/such")), tmp_path / "run")


SMALL = (
    "--layers 2 --heads 2 --width 32 --context 32 --batch-size 4 --warmup-steps 2 --tokenizer bytes --log-interval 5 "
    "--evaluation-interval 20 --device cpu --precision fp32 --learning-rate 3e-3 --min-learning-rate 3e-4 --experts 4"
).split()


def moelab(*words: object) -> int:
    return main([str(word) for word in words])


BAD = {
    "--upcycle {dense}": "the arm dense has no experts; give --arm moe",
    "--arm moe --upcycle-split": "upcycle-split = True: give --upcycle RUN too",
    "--arm moe --upcycle-noise 0.1": "upcycle-noise = 0.1: give --upcycle RUN too",
    "--arm moe --upcycle {dense} --upcycle-noise -1": "upcycle-noise = -1.0: give 0 (none) or more",
    "--arm moe --upcycle {dense} --upcycle-groups": "upcycle-groups = True: give --upcycle-split too",
}


@pytest.mark.parametrize("flags", BAD)
def test_flags_that_mean_nothing_are_refused_in_one_line(
    flags: str, dense: Path, tmp_path: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags.replace("{dense}", str(dense)).split()
    assert moelab("train", "smoke", "--data", f"text:{story}", "--out", tmp_path / "run", *SMALL[:-2], *words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert BAD[flags] in said[0]


def test_an_upcycled_run_begins_at_the_dense_loss_and_ends_below_one_from_scratch(
    tmp_path: Path, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", f"text:{story}", *SMALL]
    dense, scratch = tmp_path / "dense", tmp_path / "scratch"
    assert moelab("train", "smoke", "--out", dense, *common[:-2], "--steps", 60) == 0
    assert moelab("train", "smoke", "--arm", "moe", "--out", scratch, *common, "--steps", 20) == 0
    summary = json.loads((dense / "summary.json").read_text())
    from_scratch = json.loads((scratch / "summary.json").read_text())
    assert "started_from" not in from_scratch
    starts = {
        "copies": ("--arm", "moe"),
        "groups": ("--arm", "moe-matched", "--upcycle-split", "--upcycle-groups"),
    }
    for name, flags in starts.items():
        out = tmp_path / name
        capsys.readouterr()
        assert moelab("train", "smoke", *flags, "--upcycle", dense, "--out", out, *common, "--steps", 20) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "upcycled from" in line]
        assert len(said) == 1
        assert "step 0 is the dense model" in said[0]
        first, last = metrics(out)[0], json.loads((out / "summary.json").read_text())
        assert first["step"] == first["tokens"] == 0
        assert first["val_loss"] == pytest.approx(summary["val_loss"], abs=2e-6)
        assert last["val_loss"] < from_scratch["val_loss"]
        source = last["started_from"]
        assert (source["run"], source["step"], source["tokens"]) == (str(dense), 60, summary["tokens"])
        assert source["training_flops"] == summary["tokens"] * summary["flops_per_token"]
        assert (source["val_loss"], source["departures"]) == (summary["val_loss"], [])
        config = json.loads((out / "config.json").read_text())["upcycling"]
        assert config["upcycle"] == str(dense)
        assert moelab("train", "smoke", *flags[:2], "--out", out, "--resume") == 0
        assert moelab("eval", out, "--device", "cpu") == 0
