"""The step bench: what it times is what training runs, its parts are whole, and what cannot be timed is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from moelab.bench import parts as parts_module
from moelab.bench import step as step_module
from moelab.bench.defaults import filled
from moelab.bench.parts import PARTS, TimedStep
from moelab.bench.step import SMALL_STEPS, VOCABULARY, FullStepBench, StepBench, bench_step
from moelab.bench.step_report import draw_step, print_step
from moelab.cli import main
from moelab.config import ModelConfig, MoEConfig, TrainingConfig, UsageError
from moelab.meters import count_parameters, flops_per_token
from moelab.model import GPT
from moelab.presets import PRESETS, arm_model
from moelab.training import memory as memory_module
from moelab.training.batches import Batches
from moelab.training.memory import FILL, training_memory
from moelab.training.step import Step

SMALL = StepBench(sizes=("smoke",), arms=("dense", "moe-matched"), sequences=2, rounds=2, steps=1, device="cpu")
MODEL = ModelConfig(layers=2, heads=2, width=32, context=16, vocabulary=64, moe=MoEConfig(4, 2))
TRAINING = TrainingConfig(steps=4, batch_size=2, accumulation=2, warmup_steps=1, device="cpu", log_interval=4)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return bench_step(SMALL)


def test_a_row_says_what_was_trained_how_fast_and_where_the_time_went(results: dict[str, Any]) -> None:
    assert [(row["arm"], row["backend"]) for row in results["rows"]] == [("dense", None), ("moe-matched", "grouped_mm")]
    for row in results["rows"]:
        chosen = PRESETS["smoke"]
        model = arm_model(row["arm"], replace(chosen.model, vocabulary=50_304), chosen.moe)
        assert row["batch_size"] * row["accumulation"] == 2
        assert row["tokens"] == 2 * 128
        assert row["tokens_per_second"] == pytest.approx(2 * 128 / row["ms"] * 1e3)
        assert row["flops_per_token"] == flops_per_token(model)
        assert (row["parameters"], row["active_parameters"]) == (
            count_parameters(model).total,
            count_parameters(model).active,
        )
        assert list(row["parts"]) == list(PARTS)
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert min(row["parts"].values()) > 0
        assert row["idle"] is row["mfu"] is row["peak_bytes"] is None  # not known of a CPU
        assert not row["captured"]
    dense, matched = results["rows"]
    assert matched["twin"] == "dense"
    assert matched["ratio"] == pytest.approx(matched["tokens_per_second"] / dense["tokens_per_second"])
    assert "ratio" not in dense


def test_on_a_cpu_what_was_not_given_is_small_and_said() -> None:
    said: list[str] = []
    found = bench_step(StepBench(arms=("dense",), steps=1, parts=False, device="cpu"), said.append)
    assert said[:2] == [
        "on cpu it runs small: --sizes smoke --sequences 8 --rounds 3; give these flags for more",
        "smoke dense",
    ]
    (row,) = found["rows"]
    assert (row["size"], row["batch_size"] * row["accumulation"], len(row["rounds_ms"])) == ("smoke", 8, 3)
    asked = found["settings"]
    assert (asked["sizes"], asked["sequences"], asked["rounds"], asked["steps"]) == (("smoke",), 8, 3, 1)


def test_a_gpu_is_given_large_models_without_a_word() -> None:
    said: list[str] = []
    full = filled(StepBench(steps=3), FullStepBench, SMALL_STEPS, torch.device("cuda"), said.append)
    assert (full.sizes, full.sequences, full.rounds, full.steps) == (("5m", "40m", "124m", "350m"), 32, 5, 3)
    assert not said


def test_a_micro_batch_that_does_not_divide_the_devices_sequences_is_refused() -> None:
    with pytest.raises(UsageError, match="batch-size = 3: give a number that divides the 8 sequences of a step"):
        bench_step(StepBench(batch_size=3, device="cpu"))


def batches() -> Batches:
    return Batches(np.arange(1000, dtype=np.uint16) % 64, 16, TRAINING.batch_size, TRAINING.accumulation, 0)


def test_the_step_whose_parts_are_timed_trains_as_the_other_does() -> None:
    plain = Step(GPT(MODEL), TRAINING, batches())
    timed = TimedStep(GPT(MODEL), TRAINING, batches(), captured=False)
    for number in range(3):
        for step in (plain, timed):
            step(batches().windows(number))
    for one, other in zip(plain.model.parameters(), timed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_part_begins_when_its_work_does_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts its own readings: a part has as many as it was entered."""
    readings = iter(range(10_000))
    monkeypatch.setattr(parts_module.time, "perf_counter", lambda: next(readings))
    whole = Batches(np.zeros(1000, dtype=np.uint16), 16, 4, 1, 0)
    timed = TimedStep(GPT(MODEL), replace(TRAINING, batch_size=4, accumulation=1), whole, captured=False)
    timed(torch.arange(4 * 17).view(4, 17) % 64)
    forward = ["other", "attention", "other", "experts", "other", "attention", "other", "experts", "other", "head"]
    backward = ["other", "head", "experts", "attention", "experts", "attention", "other", "optimizer", "other", "other"]
    assert [part for part, _ in timed.timeline.moments] == forward + backward
    assert timed.timeline.spent() == {"attention": 4e3, "experts": 4e3, "head": 2e3, "optimizer": 1e3, "other": 8e3}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": ("7b",)}, "sizes = 7b: give some of smoke, 5m"),
        ({"arms": ("sparse",)}, "arms = sparse: give some of dense, moe"),
        ({"backends": ("fast",)}, "backends = fast: give some of auto, grouped_mm"),
        ({"batch_size": 3}, "batch-size = 3: give a number that divides the 2 sequences of a step"),
        ({"batch_size": 0}, "batch-size = 0: give 1 or more"),
        ({"rounds": 0}, "rounds = 0: give 1 or more"),
    ],
)
def test_what_cannot_be_timed_is_refused(change: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_a_capture_that_the_device_has_not_is_refused() -> None:
    with pytest.raises(UsageError, match="capture = on: needs a CUDA device, and this run is on cpu"):
        bench_step(replace(SMALL, capture="on"))


def test_a_backend_that_cannot_be_used_gets_a_row_with_the_reason() -> None:
    found = bench_step(replace(SMALL, arms=("moe-matched",), backends=("cuda",)))
    (row,) = found["rows"]
    assert "ms" not in row
    assert row["reason"].startswith("backend = cuda: needs")


def test_an_arm_that_cannot_be_made_or_fails_leaves_the_others_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench_step(replace(SMALL, arms=("moe-matched", "dense"), experts=4, top_k=3))
    matched, dense = found["rows"]
    assert "top-k = 3: moe-matched needs a top-k that divides the hidden size 512" in matched["reason"]
    assert dense["ms"] > 0

    def fail(*_: object) -> None:
        raise ValueError("a compiler that does not know the device")

    monkeypatch.setattr("moelab.bench.step._timed", fail)
    (row,) = bench_step(replace(SMALL, arms=("dense",)))["rows"]
    assert row["reason"] == "failed (a compiler that does not know the device)"


def test_what_was_timed_before_ctrl_c_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    measured, calls = step_module._measured, iter([False, True])
    monkeypatch.setattr(step_module, "_measured", lambda *given: stop() if next(calls) else measured(*given))
    words = "bench step --sizes smoke --arms dense dense-wide --sequences 1 --rounds 1 --steps 1 --device cpu".split()
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row.get("reason") for row in rows] == [None, "stopped"]
    assert "dense-wide: no time: stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "last", "timed"),
    [
        ("step --sizes smoke --arms dense moe --sequences 1 --rounds 1 --steps 1", "smoke moe", [("dense", None)]),
        ("layer --widths 8 768 --tokens 9 --rounds 2 --steps 2 --backends grouped_mm", "D = 768", [(8, "grouped_mm")]),
    ],
    ids=["step", "layer"],
)
@pytest.mark.parametrize("signal", ["terminate", "kill"])
def test_what_was_timed_before_a_signal_is_written(
    words: str, last: str, timed: list[tuple[object, object]], signal: str, tmp_path: Path
) -> None:
    """As `timeout` sends them; of the second it cannot know."""
    file = tmp_path / "a.json"
    command = [sys.executable, "-m", "moelab", "bench", *words.split(), "--device", "cpu", "--json", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while last not in (line := process.stderr.readline()):
            assert line, "it ended before"
        getattr(process, signal)()
        process.communicate(timeout=100)
    assert process.returncode == {"terminate": 130, "kill": -9}[signal]
    results = json.loads(file.read_text())
    assert results["stopped"]
    found = [(row.get("arm", row.get("width")), row["backend"]) for row in results["rows"] if "reason" not in row]
    assert [row for row in found if row[1] != "dense twin"] == timed


def room_for(arm: str, sequences: int) -> int:
    """Bytes that hold a step of an arm of smoke, of 4 sequences in micro-batches of so many, and no larger ones."""
    chosen = PRESETS["smoke"]
    model = arm_model(arm, replace(chosen.model, vocabulary=VOCABULARY), chosen.moe)
    training = replace(chosen.training, batch_size=sequences, accumulation=4 // sequences)
    return int(1.01 * training_memory(model, training, torch.device("cpu"), torch.float32).total / FILL)


QUICK = StepBench(
    sizes=("smoke",), arms=("dense", "moe"), sequences=4, rounds=1, steps=1, parts=False, precision="fp32", device="cpu"
)


def test_the_micro_batch_is_one_that_every_arm_and_backend_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(config: ModelConfig, training: TrainingConfig, *_: object) -> dict[str, float]:
        return {"ms": 1.0, "tokens_per_second": 1.0, "batch_size": training.batch_size}

    monkeypatch.setattr(memory_module, "available_memory", lambda _: room_for("moe", 2))
    monkeypatch.setattr(step_module, "_measured", measured)
    rows = bench_step(replace(QUICK, backends=("reference", "grouped_mm")))["rows"]
    assert [(row["arm"], row["backend"], row["batch_size"]) for row in rows] == [
        ("dense", None, 2), ("moe", "reference", 2), ("moe", "grouped_mm", 2),
    ]  # fmt: skip


def test_an_arm_that_the_device_does_not_hold_leaves_the_others_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_module, "available_memory", lambda _: room_for("dense", 1))
    dense, moe = bench_step(QUICK)["rows"]
    assert dense["ms"] > 0
    assert (dense["batch_size"], dense["accumulation"]) == (1, 4)
    assert re.fullmatch(r"memory = .* free on cpu: smoke moe needs .* in micro-batches of 1 \(.*\)", moe["reason"])


@pytest.mark.parametrize(("held", "said"), [(1, "; leave --batch-size out"), (None, "")])
def test_a_given_batch_that_does_not_fit_is_refused_with_what_the_bench_can_change(
    held: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = room_for("dense", held) if held else 2**20
    monkeypatch.setattr(memory_module, "available_memory", lambda _: free)
    (row,) = bench_step(replace(QUICK, arms=("dense",), sequences=32, batch_size=32))["rows"]
    assert re.fullmatch(rf"memory = .* needs .* in micro-batches of 32 \(.*\){said}", row["reason"])


def test_nothing_timed_is_a_failure_and_what_was_found_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_module, "available_memory", lambda _: 2**20)
    words = "bench step --sizes smoke --arms dense moe --sequences 1 --rounds 1 --steps 1 --device cpu".split()
    assert main([*words, "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.svg")]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "moelab: bench: nothing got a time, for the reasons above"
    assert [line.partition(": no time: memory = ")[0] for line in shown.out.splitlines()] == [
        "smoke dense", "smoke moe auto",
    ]  # fmt: skip
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2
    assert not (tmp_path / "a.svg").exists()


def test_without_parts_nothing_is_compiled_for_them_and_they_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(step_module, "TimedStep", None)
    found = bench_step(replace(SMALL, arms=("dense",), parts=False))
    assert found["rows"][0]["parts"] is None
    assert found["rows"][0]["ms"] > 0
    print_step(found, Console(width=80))
    assert "perts" not in capsys.readouterr().out
    draw_step(found, tmp_path / "a.svg")


def test_what_has_no_memory_for_its_parts_keeps_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("too small")

    monkeypatch.setattr(TimedStep, "parts", out_of_memory)
    found = bench_step(replace(SMALL, arms=("dense",)))
    assert found["rows"][0]["parts"] is None
    assert found["rows"][0]["ms"] > 0
    print_step(found, Console(width=80))
    assert "dense" in capsys.readouterr().out
    draw_step(found, tmp_path / "a.svg")


def test_the_tables_fit_a_terminal_and_say_what_was_timed(
    results: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wide = {"tokens_per_second": 1_234_567.0, "ms": 1234.5, "mfu": 0.478, "idle": 0.031, "peak_bytes": 123 << 30}
    longest = results["rows"][1] | wide | {"size": "350m", "backend": "megablocks-capacity"}
    lost = {"size": "350m", "arm": "moe", "backend": "triton", "reason": "not enough memory"}
    shown = results | {"rows": [*results["rows"], longest, lost]}
    print_step(shown, Console(width=80))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "1.23M" in out
    assert "350m moe triton: no time: not enough memory" in out
    assert "2 sequences a step, E = 8, K = 2" in out
    said = " ".join(out.split())
    assert "ms: the median of 2 rounds of 1 steps." in said
    assert "idle: no kernel ran, by the profiler in one round more." in said
    assert "Shares: medians of 5 steps whose halves of the blocks are compiled each by itself." in said


def test_the_picture_holds_all_that_is_written_in_it(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    faster = results["rows"][1] | {"tokens_per_second": 1_001_279.0}
    named = results["environment"] | {"device": "NVIDIA H100 80GB HBM3", "precision": "bfloat16"}
    draw_step(results | {"rows": [*results["rows"], faster], "environment": named}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    FigureCanvasAgg(figures[0]).draw()
    (left, bottom), (right, top) = figures[0].bbox.get_points()
    written = [
        t for axes in figures[0].axes for t in (*axes.texts, axes.title, axes.xaxis.label, *axes.get_yticklabels())
    ]
    written += figures[0].legends[0].get_texts()
    for text in written:
        box = text.get_window_extent()
        assert left <= box.x0 <= box.x1 <= right, text
        assert bottom <= box.y0 <= box.y1 <= top, text
    assert any(text.get_text().strip() == "1.00M" for text in written)


def test_the_command_writes_its_figures_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench step --sizes smoke --arms dense --sequences 1 --rounds 1 --steps 1 --device cpu".split()
    assert main([*words, "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.svg")]) == 0
    assert [row["arm"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["dense"]
    assert "</svg>" in (tmp_path / "a.svg").read_text()
    assert "dense" in capsys.readouterr().out
    for place in (tmp_path / "no" / "a.json", tmp_path):
        assert main([*words, "--json", str(place)]) == 2
        assert f"json = {place}: cannot be written" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["dense", "moe"])
def test_on_a_gpu_every_column_is_measured(arm: str) -> None:
    settings = StepBench(sizes=("5m",), arms=(arm,), sequences=8, rounds=2, steps=3, device="cuda")
    (row,) = bench_step(settings)["rows"]
    assert row["captured"]
    for name in ("ms", "tokens_per_second", "peak_bytes"):
        assert row[name] > 0
    assert 0 <= row["idle"] < 1
    assert sum(row["parts"].values()) + row["idle"] == pytest.approx(1)
    assert min(row["parts"].values()) > 0
