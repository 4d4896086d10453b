"""What `auto` is: the fastest measured of those that work here; said once, and the same for a whole run."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from moelab.config import MoEConfig, RunConfig
from moelab.device import cpu_has_bf16
from moelab.experts import backend_of, choice, expert_mlp, mlp, reference, self_check
from moelab.experts.choice import GPU_ORDER, ORDER, Shape
from moelab.training import train

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SMALL, LARGE = Shape(64, 256, 8, 2), Shape(1024, 4096, 8, 2)

# Times of a GPU that is nowhere: cuda leads at small D, triton at large D, over both numbers of tokens together.
TIMES: dict[str, Any] = {
    "compute capability 99.0": {
        "device": "a GPU",
        "rows": [
            ["bfloat16", 1024, *SMALL, {"grouped_mm": 4.0, "cuda": 2.0, "triton": 1.5, "reference": 1.0}],
            ["bfloat16", 32768, *SMALL, {"grouped_mm": 40.0, "cuda": 10.0, "triton": 20.0, "reference": 90.0}],
            ["bfloat16", 32768, *LARGE, {"grouped_mm": 2.0, "triton": 1.0, "megablocks": 0.5}],
        ],
    }
}


def forget() -> None:
    choice._said.clear()
    for cached in (choice.table, choice.measured_times, choice.order, choice.device_class):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing cached of a table that is not the committed one, and nothing said yet."""
    forget()
    yield
    forget()


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`TIMES` for the table; the class of devices that they are of."""
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(TIMES))
    monkeypatch.setattr(choice, "TABLE", file)
    return next(iter(TIMES))


def test_the_fastest_at_the_nearest_shape_comes_first_and_the_reference_last(times: str) -> None:
    small = choice.order(times, torch.bfloat16, SMALL)
    assert small.backends == ("cuda", "triton", "grouped_mm", "hopper", "reference")  # √(2 · 1), √(1.5 · 2), √(4 · 4)
    large = choice.order(times, torch.bfloat16, Shape(768, 3072, 16, 2))
    assert large.backends == ("triton", "grouped_mm", "cuda", "hopper", "reference")
    assert large.basis == f"by bfloat16 times on {times} at {LARGE}, the nearest measured"
    assert "nearest" not in small.basis


def test_what_was_not_measured_has_the_stated_order_and_says_so(times: str) -> None:
    for devices, dtype, right in (
        ("CPUs with bf16 units", torch.bfloat16, ORDER),
        (times, torch.float32, GPU_ORDER),
        ("compute capability 8.6", torch.float32, GPU_ORDER),
    ):
        found = choice.order(devices, dtype, SMALL)
        assert found.backends == right
        assert found.basis == f"{str(dtype).removeprefix('torch.')} was not measured on {devices}"


@pytest.mark.parametrize(
    ("devices", "dtype", "basis"),
    [
        ("compute capability 99.0", torch.float16, "float16 was not measured on compute capability 99.0; by bfloat16"),
        ("compute capability 8.6", torch.bfloat16, "bfloat16 was not measured on compute capability 8.6; by bfloat16"),
        ("compute capability 8.6", torch.float16, "float16 was not measured on compute capability 8.6; by bfloat16"),
    ],
)
def test_the_other_16_bit_type_and_other_gpus_stand_in_for_what_was_not_measured(
    devices: str, dtype: torch.dtype, basis: str, times: str
) -> None:
    found = choice.order(devices, dtype, SMALL)
    assert found.backends == choice.order(times, torch.bfloat16, SMALL).backends
    assert found.basis == f"{basis} times on {times} at {SMALL}"


def test_of_the_gpus_measured_the_nearest_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "compute capability 9.0": {"triton": 1.0, "cuda": 2.0},
        "compute capability 12.0": {"cuda": 1.0, "triton": 2.0},
    }
    table = {name: {"rows": [["bfloat16", 1024, *SMALL, ms]]} for name, ms in rows.items()}
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(table))
    monkeypatch.setattr(choice, "TABLE", file)
    first = {
        c: choice.order(f"compute capability {c}", torch.bfloat16, SMALL).backends[0] for c in ("8.0", "10.0", "12.1")
    }
    assert first == {"8.0": "triton", "10.0": "triton", "12.1": "cuda"}


# Of the committed table's bf16 times on 9.0, where the products of cuda and grouped_mm are one kernel. Elsewhere these
# multiply expert by expert, and wait for the host.
@pytest.mark.parametrize("width", [256, 512, 768, 1024])
@pytest.mark.parametrize(
    ("capability", "dtype", "experts"),
    [
        ("9.0", torch.float16, 8), ("9.0", torch.bfloat16, 1024), ("10.0", torch.float16, 8),
        *((number, dtype, 8) for number in ("8.0", "8.9", "12.0") for dtype in (torch.bfloat16, torch.float16)),
    ],
)  # fmt: skip
def test_times_of_one_kernel_for_all_experts_say_nothing_of_one_an_expert(
    capability: str, dtype: torch.dtype, experts: int, width: int
) -> None:
    found = choice.order(f"compute capability {capability}", dtype, Shape(width, 4 * width, experts, 2))
    assert [name for name in found.backends if name != "hopper"] == ["triton", "cuda", "grouped_mm", "reference"]
    assert found.basis.endswith(", but for cuda and grouped_mm, whose products are one kernel only there")


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_where_products_are_one_kernel_too_its_times_stand_in(capability: str) -> None:
    for width, second in ((256, "triton"), (512, "triton"), (768, "triton"), (1024, "cuda")):
        found = choice.order(f"compute capability {capability}", torch.bfloat16, Shape(width, 4 * width, 8, 2))
        assert found.backends[:2] == ("hopper", second)
        assert found.basis.endswith(f"D = {width:,}, F = {4 * width:,}, E = 8, K = 2")


def test_info_says_whose_times_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    said = choice.in_words(torch.device("cuda", 0))
    assert said == "by times of compute capability 9.0; compute capability 8.0 was not measured"


def test_the_page_on_kernels_states_the_orders() -> None:
    page = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    for right in (ORDER, GPU_ORDER):
        assert ", ".join(f"`{name}`" for name in right) in page


def test_every_backend_of_the_orders_is_one_that_auto_may_pick() -> None:
    assert set(ORDER) == set(GPU_ORDER) < set(mlp.BACKENDS)
    assert ORDER[-1] == GPU_ORDER[-1] == "reference"


def test_a_precision_that_a_backend_does_not_take_is_passed_over() -> None:
    """On a GPU, where both come before those that take float64."""
    for backend in ("triton", "cuda"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert self_check.refusal(mlp.BACKENDS[backend], dtype, "gelu", bias=True) is None
        assert "precision = float64: " in str(
            self_check.refusal(mlp.BACKENDS[backend], torch.float64, "gelu", bias=True)
        )


def test_the_committed_table_has_what_it_was_measured_on() -> None:
    for entry in choice.table().values():
        assert {"device", "moelab", "torch", "date", "rows"} <= entry.keys()
        for precision, tokens, *sizes, ms in entry["rows"]:
            assert hasattr(torch, precision)
            assert len(sizes) == 4
            assert all(isinstance(size, int) and size > 0 for size in (tokens, *sizes))
            assert set(ms) <= set(ORDER)
            assert all(time > 0 for time in ms.values())


def test_no_row_of_the_committed_table_was_disturbed() -> None:
    """A time grows with the tokens at most in proportion, by half again where caches are left."""
    for entry in choice.table().values():
        fewer: dict[tuple[Any, ...], tuple[int, dict[str, float]]] = {}
        for precision, tokens, *sizes, ms in sorted(entry["rows"], key=lambda row: row[1]):
            before, least = fewer.setdefault((precision, *sizes), (tokens, ms))
            for name in ms.keys() & least:
                assert ms[name] / least[name] <= 1.5 * tokens / before, (precision, tokens, sizes, name)


def plain(refuse: str | None = None) -> ModuleType:
    made = ModuleType("plain")
    made.unusable = lambda device: None  # type: ignore[attr-defined]
    made.expert_mlp = reference.expert_mlp  # type: ignore[attr-defined]
    made.refuses = lambda dtype, activation, bias, deterministic: refuse if bias else None  # type: ignore[attr-defined]
    return made


def test_a_backend_that_refuses_the_call_or_is_wrong_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = plain()
    wrong.expert_mlp = lambda *inputs: -reference.expert_mlp(*inputs)  # type: ignore[attr-defined]
    for name, module in (("grouped_mm", plain("bias = True: no")), ("triton", wrong), ("cuda", plain())):
        monkeypatch.setitem(mlp.BACKENDS, name, module)
    with_bias = mlp.choose_backend("auto", CPU, torch.float32, "gelu", True, SMALL)
    assert with_bias.backend == "cuda"
    assert str(with_bias.why).endswith("; passed over, see moelab info: grouped_mm, triton")
    assert mlp.choose_backend("auto", CPU, torch.float32, "gelu", False, SMALL).backend == "grouped_mm"


def inputs(tokens: int = 6, width: int = 8, hidden: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    shapes = {"x": (tokens, width), "weights": (tokens, 2), "w_in": (4, hidden, width), "w_out": (4, width, hidden)}
    drawn = {n: torch.randn(s, generator=g).requires_grad_() for n, s in shapes.items()}
    return drawn | {"indices": torch.randint(0, 4, (tokens, 2), generator=g)}


def test_a_bare_call_says_its_choice_to_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moelab"):
        for tokens in (6, 9, 6):
            expert_mlp(**inputs(tokens))
        expert_mlp(**inputs(), backend="reference")
    assert [record.message.partition(",")[0] for record in caplog.records] == ["backend = auto: grouped_mm"]


def test_a_call_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    expert_mlp(**inputs())
    assert capfd.readouterr() == ("", "")


def test_a_run_says_it_on_the_console_and_the_summary_has_who_computed_the_experts(
    tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    said = io.StringIO()
    for place in ("first", "second"):
        console = Console(file=said, width=80)
        summary = train(tiny_run("moe"), tmp_path / place, console=console)
        assert summary["backend"] == "grouped_mm"
    assert said.getvalue().count("backend = auto: grouped_mm, ") == 1
    named = train(tiny_run("moe", moe=MoEConfig(4, 2, backend="reference")), tmp_path / "named")
    assert named["backend"] == "reference"
    assert "backend" not in train(tiny_run("dense"), tmp_path / "dense")


def test_what_a_run_is_told_is_what_its_layers_use(
    tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own call, with its dtype and shape, comes to the choice that the run announces."""
    from moelab.model import GPT

    run = tiny_run("moe")
    config = replace(run.model, vocabulary=64)
    used: list[tuple[str, Shape]] = []
    chosen = mlp.choose_backend

    def seen(*call: Any) -> choice.Choice:
        found = chosen(*call)
        used.append((found.backend, call[5]))
        return found

    monkeypatch.setattr(mlp, "choose_backend", seen)
    announced = backend_of(config, CPU, torch.bfloat16)
    GPT(config, dtype=torch.bfloat16, seed=0)(torch.zeros(2, 8, dtype=torch.int64))
    assert set(used) == {(announced.backend, Shape(32, 128, 4, 2))}
    assert len(used) == 1 + config.layers


def test_auto_traces_into_one_graph_whatever_sizes_the_compiler_makes_dynamic() -> None:
    traced = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    for sizes in ((5, 8, 16), (7, 8, 24), (9, 12, 40)):
        call = inputs(*sizes)
        y = traced(**call)
        y.sum().backward()
        assert torch.equal(y, expert_mlp(**call))


def made_table(*files: Path, table: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "choose.py"), *map(str, files), "--table", str(table)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_makes_a_table_of_the_benchs_files_and_keeps_other_devices(tmp_path: Path, times: str) -> None:
    from moelab.bench import LayerBench, bench_layer

    settings = LayerBench(
        widths=(16, 8), tokens=20, experts=4, rounds=1, steps=1, precision="fp32", device="cpu",
        backends=("grouped_mm", "reference", "triton"),
    )  # fmt: skip
    results = bench_layer(settings)
    (tmp_path / "one.json").write_text(json.dumps(results))
    (tmp_path / "two.json").write_text(json.dumps(results | {"tokens": 40, "date": "2999-01-01"}))
    done = made_table(tmp_path / "one.json", tmp_path / "two.json", table=choice.TABLE)
    assert done.returncode == 0, done.stderr
    table = json.loads(choice.TABLE.read_text())
    assert table[times] == TIMES[times]
    made = table[choice.device_class(CPU)]
    assert made["date"] == "2999-01-01"
    assert made["torch"] == torch.__version__
    assert [row[:-1] for row in made["rows"]] == [
        ["float32", tokens, width, 4 * width, 4, 2] for width in (8, 16) for tokens in (20, 40)
    ]
    fastest = {
        row["width"]: row["backend"]
        for row in sorted(results["rows"], key=lambda row: -row.get("wall_ms", 0))
        if row["backend"] in ORDER and "wall_ms" in row
    }
    assert [next(iter(row[-1])) for row in made["rows"][::2]] == [fastest[8], fastest[16]]
    assert "float32 T = 20 D = 8 F = 32 E = 4 K = 2: " in done.stdout


def test_the_script_refuses_to_mix_machines(tmp_path: Path) -> None:
    results = {
        "environment": {"precision": "float32", "device": "one", "torch": "2"}, "devices": "some", "date": "2026-01-01",
        "settings": {
            "multiple": 4, "experts": 4, "top_k": 2, "activation": "gelu", "bias": False, "routing": "router",
            "rounds": 1, "steps": 1,
        },
        "tokens": 20, "rows": [],
    }  # fmt: skip
    other = results | {"environment": results["environment"] | {"device": "two"}}  # type: ignore[operator]
    (tmp_path / "one.json").write_text(json.dumps(results))
    (tmp_path / "two.json").write_text(json.dumps(other))
    done = made_table(tmp_path / "one.json", tmp_path / "two.json", table=tmp_path / "t.json")
    assert done.returncode == 2
    assert "two.json: device = two: other files have one" in done.stderr
    assert not (tmp_path / "t.json").exists()


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="PyTorch says nothing to compare with")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it otherwise")
def test_a_processor_has_bf16_units_whoever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    by_pytorch = cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before 2.12
    assert cpu_has_bf16() == by_pytorch
