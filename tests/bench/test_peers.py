"""Other packages in the layer bench: right ones are timed beside ours, and where there is none the table says so.

The packages themselves need a GPU; `others/` stands for them, with their signatures and layouts.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moelab.bench import LayerBench, bench_layer, peers
from moelab.bench.report import print_layer
from moelab.cli import main

SMALL = {
    "widths": (16,), "tokens": 24, "experts": 4, "multiple": 1.5, "rounds": 1, "steps": 1, "precision": "fp32",
    "device": "cpu", "backends": tuple(peers.PEERS),
}  # fmt: skip


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the names, signatures and layouts of ScatterMoE and SonicMoE."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "others")
    before = set(sys.modules)
    yield
    peers._scattermoe_layer.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in peers.PEERS:
            del sys.modules[name]


def rows_of(**changes: Any) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row for row in bench_layer(LayerBench(**SMALL | changes))["rows"]}


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh", "silu", "relu2"])
def test_packages_that_can_be_imported_compute_the_layer_and_are_timed(activation: str, bias: bool) -> None:
    rows = rows_of(activation=activation, bias=bias)
    for name in peers.PEERS:
        assert rows[name]["error"] < 1e-5, rows[name]
        assert rows[name]["wall_ms"] > 0


@pytest.mark.usefixtures("others")
def test_an_activation_that_a_package_does_not_have_is_no_time_and_a_reason() -> None:
    rows = rows_of(activation="gelu")
    assert rows["scattermoe"]["wall_ms"] > 0
    assert "wall_ms" not in rows["sonicmoe"]
    assert rows["sonicmoe"]["reason"].startswith("activation = gelu: sonicmoe has swiglu, geglu")


@pytest.mark.usefixtures("others")
def test_a_package_that_is_wrong_or_fails_gets_no_time_and_leaves_the_others_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scattermoe.mlp import MLP
    from sonicmoe import functional

    right = functional.moe_general_routing_inputs

    def half(*inputs: Any) -> tuple[Any, Any]:
        y, counts = right(*inputs)
        return y / 2, counts

    def broken(*_: Any) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(functional, "moe_general_routing_inputs", half)
    monkeypatch.setattr(MLP, "forward", broken)
    rows = rows_of(activation="silu", backends=("reference", *peers.PEERS))
    assert rows["reference"]["wall_ms"] > 0
    assert rows["sonicmoe"]["reason"].startswith("wrong by 0.5 relative to float64")
    assert rows["scattermoe"]["reason"] == "failed (no kernel image)"
    assert not any("wall_ms" in rows[name] for name in peers.PEERS)


def test_a_package_that_cannot_be_imported_is_named_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scattermoe").mkdir()
    (tmp_path / "scattermoe" / "mlp.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = peers.PEERS["scattermoe"].obstacle()
    assert reason == "importing scattermoe.mlp failed (No module named 'a_package_that_is_nowhere')"
    sys.modules.pop("scattermoe", None)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in peers.PEERS), reason="scattermoe or sonicmoe is installed here"
)
def test_packages_that_are_absent_are_one_line_under_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_layer(LayerBench(**SMALL | {"backends": ("reference", *peers.PEERS)}))
    print_layer(results, Console(width=80))
    assert "scattermoe, sonicmoe: no time: not installed" in capsys.readouterr().out
    assert results["peers"] == {}


@pytest.mark.usefixtures("others")
def test_the_command_takes_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench layer --widths 8 --tokens 8 --rounds 1 --steps 1 --device cpu --precision fp32".split()
    assert main([*words, "--activation", "swiglu", "--backends", "sonicmoe"]) == 0
    assert "sonicmoe" in capsys.readouterr().out
    assert main([*words, "--backends", "megablox"]) == 2
    assert "megablocks, megablocks-capacity, scattermoe, sonicmoe" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", peers.PEERS)
def test_on_a_gpu_the_package_itself_is_right(name: str) -> None:
    peer = peers.PEERS[name]
    if (reason := peer.obstacle()) is not None:
        pytest.skip(f"{name}: {reason}")
    sizes = {"widths": (128,), "tokens": 1024, "multiple": 2, "activation": "swiglu", "precision": "bf16"}
    row = rows_of(**sizes, device="cuda", backends=(name,))[name]
    assert "wall_ms" in row, row["reason"]
