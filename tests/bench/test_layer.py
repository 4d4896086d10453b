"""The layer bench: what it times is right, in order, and said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from moelab.bench import LayerBench, bench_layer
from moelab.bench.defaults import filled
from moelab.bench.layer import SMALL_LAYERS, FullLayerBench, Layer, _laid_down
from moelab.bench.peers import PEERS
from moelab.bench.report import busier_than_their_step, print_layer
from moelab.cli import main
from moelab.config import ModelConfig, MoEConfig, UsageError
from moelab.experts import mlp, reference
from moelab.model.router import Router

USABLE = [name for name in mlp.BACKENDS if mlp.availability(name, torch.device("cpu")).usable]
SMALL = LayerBench(widths=(16, 24), tokens=40, experts=4, multiple=2, rounds=2, steps=1, precision="fp32", device="cpu")


def test_every_usable_backend_and_the_twin_have_a_time_at_every_width() -> None:
    results = bench_layer(SMALL)
    assert [(row["width"], row["backend"]) for row in results["rows"]] == [
        (width, name) for width in (16, 24) for name in ("dense twin", *mlp.BACKENDS, *PEERS)
    ]
    timed = [row for row in results["rows"] if row["backend"] in ("dense twin", *USABLE)]
    assert all("wall_ms" in row or row["reason"] for row in results["rows"])
    for row in timed:
        assert row["wall_ms"] > 0
        assert row["busy_ms"] is row["captured_ms"] is row["peak_mib"] is None  # not measured on a CPU
        assert row["forward_ms"] + row["backward_ms"] == pytest.approx(row["wall_ms"])
        assert row["tflops"] == pytest.approx(12 * 40 * 2 * row["width"] ** 2 * 2 / row["wall_ms"] / 1e9)
    twin = [row for row in results["rows"] if row["backend"] == "dense twin"]
    assert [row["ratio"] for row in twin] == [1, 1]
    assert results["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("experts", [1, 4])
def test_one_expert_a_token_is_timed_though_its_router_has_no_gradient(experts: int) -> None:
    rows = bench_layer(replace(SMALL, widths=(16,), experts=experts, top_k=1, backends=("grouped_mm",)))["rows"]
    assert [row["backend"] for row in rows if "wall_ms" in row] == ["dense twin", "grouped_mm"]


def test_on_a_cpu_what_was_not_given_is_small_and_said() -> None:
    said: list[str] = []
    results = bench_layer(LayerBench(tokens=9, rounds=1, device="cpu", backends=("reference",)), said.append)
    assert said[0] == "on cpu it runs small: --widths 128 256 --steps 4; give these flags for more"
    assert [row["width"] for row in results["rows"]] == [128, 128, 256, 256]
    asked = results["settings"]
    assert (asked["widths"], asked["tokens"], asked["rounds"], asked["steps"]) == ((128, 256), 9, 1, 4)


def test_what_is_given_is_taken_on_a_cpu_without_a_word() -> None:
    said: list[str] = []
    bench_layer(replace(SMALL, backends=("reference",)), said.append)
    assert said == ["D = 16", "D = 24"]


def test_a_gpu_is_given_large_layers_without_a_word() -> None:
    said: list[str] = []
    full = filled(LayerBench(rounds=3), FullLayerBench, SMALL_LAYERS, torch.device("cuda"), said.append)
    assert (full.widths, full.tokens, full.rounds, full.steps) == ((256, 512, 768, 1024), 32_768, 3, 8)
    assert not said


def test_a_backend_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ModuleType("wrong")
    wrong.unusable = lambda device: None
    wrong.expert_mlp = lambda *args: 1.001 * reference.expert_mlp(*args)  # too little for the check of `backends()`
    monkeypatch.setitem(mlp.BACKENDS, "wrong", wrong)
    (row,) = [row for row in bench_layer(replace(SMALL, widths=(16,)))["rows"] if row["backend"] == "wrong"]
    assert "wall_ms" not in row
    assert row["error"] == pytest.approx(1e-3, rel=0.1)
    assert "relative to float64" in row["reason"]


def test_a_router_that_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked is what is timed: the router's own weights, and their gradient."""
    right = Router.decide

    def decide(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weights, indices, logits = right(router, x)
        return x, weights if x.dtype == torch.float64 else 1.001 * weights, indices, logits

    monkeypatch.setattr(Router, "decide", decide)
    _, *rows = bench_layer(replace(SMALL, widths=(16,), backends=("grouped_mm", "reference")))["rows"]
    assert all("relative to float64" in row["reason"] and "wall_ms" not in row for row in rows)


@pytest.mark.parametrize("tipped", [1, 2])
def test_a_token_that_rounding_tips_to_another_expert_is_compared_there(
    tipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Router.decide

    def decide(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weights, indices, logits = right(router, x)
        if x.dtype != torch.float64:
            swapped = (torch.arange(4) != indices[0, 0]).nonzero()[:2, 0]
            indices = torch.cat([swapped.expand(tipped, -1), indices[tipped:]])
            weights = torch.softmax(logits.gather(1, indices), dim=-1)
        return x, weights, indices, logits

    monkeypatch.setattr(Router, "decide", decide)
    _, row = bench_layer(replace(SMALL, widths=(16,), backends=("grouped_mm",)))["rows"]
    if tipped == 1:
        assert row["wall_ms"] > 0
    else:
        assert row["reason"] == "sends 2 of 40 tokens to other experts than float64 does"


def test_a_backend_with_a_gradient_that_is_not_a_number_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def expert_mlp(*given: Any) -> torch.Tensor:
        given[4].register_hook(lambda gradient: gradient * math.nan)  # w_out's alone
        return reference.expert_mlp(*given)

    wrong = ModuleType("wrong")
    wrong.unusable = lambda device: None  # type: ignore[attr-defined]
    wrong.expert_mlp = expert_mlp  # type: ignore[attr-defined]
    monkeypatch.setitem(mlp.BACKENDS, "wrong", wrong)
    monkeypatch.setattr(mlp.self_check, "failure", lambda module, device: None)  # it would be found there first
    (row,) = [row for row in bench_layer(replace(SMALL, widths=(16,)))["rows"] if row["backend"] == "wrong"]
    assert "wall_ms" not in row
    assert "wrong by nan" in row["reason"]


def test_a_backend_that_refuses_such_a_layer_gets_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ModuleType("plain")
    plain.unusable = lambda device: None
    plain.refuses = lambda dtype, activation, bias, deterministic: "bias = True: give --no-bias" if bias else None
    plain.expert_mlp = reference.expert_mlp
    monkeypatch.setitem(mlp.BACKENDS, "plain", plain)
    for bias in (False, True):
        rows = bench_layer(replace(SMALL, widths=(16,), bias=bias))["rows"]
        (row,) = [row for row in rows if row["backend"] == "plain"]
        assert ("wall_ms" in row) is not bias
        assert row.get("reason") == ("bias = True: give --no-bias" if bias else None)


def test_only_backends_that_are_named_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    slow = ModuleType("slow")
    slow.unusable = lambda device: tried.append("slow") or "not here"  # type: ignore[attr-defined]
    monkeypatch.setitem(mlp.BACKENDS, "slow", slow)
    rows = bench_layer(replace(SMALL, widths=(16,), backends=("reference",)))["rows"]
    assert [row["backend"] for row in rows] == ["dense twin", "reference"]
    assert not tried
    bench_layer(replace(SMALL, widths=(16,), backends=("slow",)))
    assert tried


@pytest.mark.parametrize(
    "rules", [{"activation": "swiglu", "bias": True}, {"routing": "one-hot"}, {"routing": "zipf:1.5"}], ids=str
)
def test_other_layers_are_checked_and_timed_too(rules: dict[str, object]) -> None:
    results = bench_layer(replace(SMALL, widths=(16,), **rules))  # type: ignore[arg-type]
    rows = {row["backend"]: row for row in results["rows"]}
    assert all(rows[name]["wall_ms"] > 0 and rows[name]["error"] < 1e-5 for name in USABLE)


def test_laid_down_routing_has_its_skew() -> None:
    draw = _laid_down(LayerBench(routing="zipf:1", experts=8, top_k=1), 20_000, torch.Generator().manual_seed(0))
    assert draw is not None
    share = torch.bincount(draw.flatten(), minlength=8) / 20_000
    harmonic = sum(1 / (e + 1) for e in range(8))
    assert share.tolist() == pytest.approx([1 / (e + 1) / harmonic for e in range(8)], abs=0.02)
    all_to_two = _laid_down(LayerBench(routing="one-hot"), 5, torch.Generator())
    assert all_to_two is not None
    assert all_to_two.tolist() == [[0, 1]] * 5


def test_the_timed_layer_is_the_models_own() -> None:
    """With the router's routing, what is timed computes what `MoE` does."""
    from moelab.model.moe import MoE

    config = ModelConfig(1, 1, 16, 1, moe=MoEConfig(4, 2, expert_hidden=32))
    assert config.moe is not None
    model = MoE(config, config.moe)
    layer = Layer(config, config.moe, "auto", None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    layer.load_state_dict(model.state_dict())
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), model(x.unsqueeze(0))[0].squeeze(0))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"routing": "zipf"}, "routing = zipf: give router, zipf:1.2"),
        ({"top_k": 9}, "top-k = 9: give 1 to 4"),
        ({"widths": ()}, r"widths = \(\): give one or more"),
        ({"tokens": 0}, "tokens = 0: give 1 or more"),
        ({"multiple": math.inf}, "multiple = inf: give more than 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(change: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(SMALL, **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="backends = fast: give some of grouped_mm, reference"):
        bench_layer(replace(SMALL, backends=("fast",)))


def test_a_layer_that_has_no_room_is_one_line_and_the_widths_before_it_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench layer --widths 16 {2**40} --tokens 20 --rounds 1 --steps 1 --device cpu --backends reference"
    assert main([*words.split(), "--json", str(tmp_path / "a.json")]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        f"moelab: memory: cpu has too little for T = 20, D = {2**40:,}, F = 4·D, E = 8; "
        "give fewer --tokens or --experts, or smaller --widths or --multiple"
    )
    assert "reference" in out
    results = json.loads((tmp_path / "a.json").read_text())
    assert (results["stopped"], results["failed"]) == (False, err.splitlines()[-1].removeprefix("moelab: "))
    assert [row["width"] for row in results["rows"]] == [16, 16]


@pytest.mark.parametrize(
    "size", ["--multiple 1e12", "--multiple 1e15", "--multiple 1e20", "--tokens 1" + 12 * "0", "--experts 1" + 12 * "0"]
)
def test_no_size_that_memory_lacks_ends_in_a_traceback(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench layer --widths 256 --tokens 20 --rounds 1 --steps 1 --device cpu --backends reference {size}"
    assert main([*words.split(), "--picture", str(tmp_path / "a.png")]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("moelab: memory: cpu has too little for T = ")
    assert not out  # nor an empty table
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_has_no_room_for_the_reference_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")

    monkeypatch.setattr(Layer, "double", full)
    assert bench_layer(SMALL)["failed"].startswith("memory: cpu has too little for T = 40, D = 16, F = 2·D, E = 4;")


def test_an_error_that_is_not_of_memory_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a device that is lost")

    monkeypatch.setattr(Layer, "double", broken)
    with pytest.raises(RuntimeError, match="a device that is lost"):
        bench_layer(SMALL)


def test_the_table_fits_a_terminal_and_says_what_was_timed(capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_layer(replace(SMALL, backends=("grouped_mm",)))
    results["rows"][1] |= {
        "wall_ms": 1234.5,
        "busy_ms": 123.45,
        "captured_ms": 99.9,
        "peak_mib": 12345.6,
        "kept_mib": 9999.0,
        "backend": max(mlp.BACKENDS, key=len),
        "width": 1024,
    }
    results["rows"] += [
        {"width": width, "backend": name, "reason": "no GPU"} for width in (16, 24) for name in ("triton", "cuda")
    ] + [{"width": 16, "backend": "reference", "reason": "too wide"}]
    print_layer(results, Console(width=80))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "triton, cuda: no time: no GPU" in out
    assert "D = 16, reference: no time: too wide" in out
    assert "T = 40, E = 4, K = 2, F = 2·D" in out


def shown(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What stands under a table, as one line."""
    print_layer(results, Console(width=80))
    return " ".join(capsys.readouterr().out.split())


def test_the_caption_says_which_figures_are_medians_of_which_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_layer(replace(SMALL, widths=(16,), backends=("reference",)))
    assert "; medians of 2 rounds of 1 steps. busy:" in shown(results, capsys)
    for row in results["rows"]:
        row |= {"busy_ms": 1.0, "captured_ms": 1.0}
    for rounds, profiled in ((7, 3), (2, 2)):
        results["settings"]["rounds"] = rounds
        assert (
            f"; wall and graph: medians of {rounds} rounds of 1 steps; "
            f"busy, fwd, bwd, ÷ twin and TFLOP/s: of the first {profiled}. busy:" in shown(results, capsys)
        )


def made_up(width: int, backend: str, wall: float, busy: float | None, captured: float | None) -> dict[str, Any]:
    return {"width": width, "backend": backend, "wall_ms": wall, "busy_ms": busy, "captured_ms": captured}


def test_rows_whose_kernels_ran_for_longer_than_their_step_took_are_found() -> None:
    over = [
        made_up(768, "dense twin", wall=3.27, busy=3.39, captured=3.22),
        made_up(768, "hopper", wall=9.0, busy=1.04, captured=1.0),
        made_up(768, "megablocks", wall=1.0, busy=1.04, captured=None),
    ]
    fair = [
        made_up(512, "dense twin", wall=1.0, busy=1.03, captured=1.0),
        made_up(512, "triton", wall=1.0, busy=1.5, captured=1.5),
        made_up(512, "megablocks", wall=1.0, busy=1.02, captured=None),
        made_up(512, "reference", wall=1.0, busy=None, captured=None),
        {"width": 512, "backend": "cuda", "reason": "no GPU"},
    ]
    assert busier_than_their_step([*fair, *over]) == over


def test_the_caption_names_the_rows_that_were_profiled_at_other_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_layer(replace(SMALL, backends=("reference",)))
    assert "clocks" not in shown(results, capsys)
    for row, busy in zip(results["rows"], (1.0, 1.1, 1.1, 1.0), strict=True):
        row |= {"busy_ms": busy, "captured_ms": 1.0}
    assert shown(results, capsys).endswith(
        "busy is above the captured (or wall) time of: reference at D = 16, dense twin at D = 24: "
        "the GPU ran at other clocks; compare graph ms."
    )


def test_the_command_writes_its_figures_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench layer --widths 16 --tokens 20 --rounds 1 --steps 1 --device cpu --precision fp32".split()
    assert main([*words, "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["dense twin", *mlp.BACKENDS, *PEERS]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "dense twin" in capsys.readouterr().out
    assert main([*words, "--json", str(tmp_path / "no" / "a.json")]) == 2
    assert not math.isnan(rows[1]["ratio"])


NAMED = {"layer": "--widths 16 --tokens 20", "step": "--arms dense moe --sequences 1 --no-parts"}


@pytest.mark.parametrize("bench", NAMED)
def test_where_no_named_backend_gets_a_time_the_table_says_why_and_the_bench_has_failed(
    bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench {bench} {NAMED[bench]} --rounds 1 --steps 1 --device cpu --backends cuda hopper --json"
    assert main([*words.split(), str(tmp_path / "a.json")]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        "moelab: backends = cuda, hopper: none got a time, for the reasons above; moelab info lists those usable here"
    )
    assert "dense" in out
    assert "hopper: no time: " in out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["backend"] for row in rows if "reason" in row] == ["cuda", "hopper"]


@pytest.mark.parametrize(
    "words",
    [
        f"layer {NAMED['layer']} --backends cuda reference",
        f"step {NAMED['step']} --backends cuda auto",
        f"step {NAMED['step']} --backends cuda --arms dense",
    ],
)
def test_one_named_backend_with_a_time_or_no_experts_to_time_is_no_failure(words: str) -> None:
    assert main(f"bench {words} --rounds 1 --steps 1 --device cpu".split()) == 0


@pytest.mark.parametrize("bench", ["layer --widths 16 --tokens 20", "step --arms dense --sequences 1 --no-parts"])
@pytest.mark.parametrize("name", ["a.bmp", "a"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_timed(
    bench: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / name
    words = f"bench {bench} --rounds 1 --steps 1 --device cpu --picture".split()
    assert main([*words, str(picture)]) == 2
    assert capsys.readouterr() == ("", f"moelab: picture = {picture}: give a name that ends in .png, .svg or .pdf\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "start"), [("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_every_picture_that_is_taken_is_drawn(name: str, start: bytes, tmp_path: Path) -> None:
    words = "bench layer --widths 16 --tokens 20 --rounds 1 --steps 1 --device cpu --backends reference".split()
    assert main([*words, "--picture", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.gpu
def test_on_a_gpu_every_column_is_measured() -> None:
    results = bench_layer(LayerBench(widths=(128,), tokens=2048, rounds=2, steps=2, backends=("grouped_mm",)))
    for row in results["rows"]:
        for name in ("wall_ms", "busy_ms", "captured_ms", "forward_ms", "backward_ms", "peak_mib", "kept_mib", "ratio"):
            assert row[name] > 0, (row["backend"], name)
        assert row["busy_ms"] <= 1.1 * row["wall_ms"]
