"""Running a comparison: what is trained, what is left alone, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moelab.compare import Comparison, parse_arm, run_comparison
from moelab.config import DataConfig, ModelConfig, MoEConfig, TrainingConfig, UsageError
from moelab.training import memory
from moelab.training.memory import FILL, training_memory

Finish = Callable[..., Path]
Make = Callable[..., Comparison]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for run in folder.glob("*-seed*") for path in run.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_finished_runs_are_left_untouched(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(seeds=2, budgets=("flops",))
    finish(comparison, tmp_path)
    before = contents(tmp_path)
    assert run_comparison(comparison, tmp_path) == tmp_path / "report.html"
    assert contents(tmp_path) == before


def test_the_order_of_arms_and_fewer_seeds_reuse_the_same_runs(small: Make, finish: Finish, tmp_path: Path) -> None:
    finish(small(seeds=3), tmp_path)
    run_comparison(small(arms=("dense-wide", "moe")), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["dense-wide", "moe"]
    assert {(e["arm"], e["against"], e["runs"]) for e in results["comparisons"]} == {("moe", "dense-wide", 1)}


def test_equal_time_is_planned_from_an_arms_fastest_seed(small: Make, finish: Finish, tmp_path: Path) -> None:
    comparison = small(arms=("dense", "moe"), seeds=2, budgets=("seconds",))
    finish(comparison, tmp_path)
    disturbed = tmp_path / "moe-seed1" / "summary.json"
    summary = json.loads(disturbed.read_text())
    disturbed.write_text(json.dumps(summary | {"seconds": 3 * summary["seconds"]}))
    before = contents(tmp_path)
    run_comparison(comparison, tmp_path)  # would refuse the runs that are there if it planned others
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_a_run_of_other_settings_is_refused_by_the_setting_and_kept(
    small: Make, finish: Finish, tmp_path: Path, finished: bool
) -> None:
    finish(small(), tmp_path)
    if not finished:
        (tmp_path / "moe-seed0" / "summary.json").unlink()
    before = contents(tmp_path)
    other = replace(small(), training=replace(small().training, learning_rate=1e-4))
    with pytest.raises(UsageError, match=r"learning-rate = 0.0001: the run that is there has 0.0003 .*choose another"):
        run_comparison(other, tmp_path)
    assert contents(tmp_path) == before
    assert not (tmp_path / "results.json").exists()


def test_a_comparison_is_refused_where_its_folder_cannot_be(small: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match=r"out = .*file.*: cannot be written"):
        run_comparison(small(), tmp_path / "file" / "folder")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_second_process_is_kept_out_of_a_folder_that_is_being_written(
    small: Make, finish: Finish, tmp_path: Path
) -> None:
    finish(small(), tmp_path)
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process is comparing there"):
            run_comparison(small(), tmp_path)
    finally:
        holder.communicate("")
    assert run_comparison(small(), tmp_path).exists()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_fits_a_terminal_of_80_columns(small: Make, finish: Finish, tmp_path: Path, seeds: int) -> None:
    comparison = small(arms=("dense", "moe", "dense-wide", "moe-matched"), seeds=seeds)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    run_comparison(comparison, finish(comparison, tmp_path), console=console)
    shown = console.export_text()
    assert "…" not in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    results = json.loads((tmp_path / "results.json").read_text())
    for entry in results["comparisons"]:
        (line,) = [line for line in shown.splitlines() if line.startswith(f" {entry['arm']} ")]
        star = "*" if entry["interpolated"] else ""
        if entry["against"] == "dense":
            assert f"{entry['difference']:+.3f}{star}".replace("-", "−") in line
    assert all(sentence in " ".join(shown.split()) for sentence in results["words"]["headline"])


def tiny(story: Path, **fields: Any) -> Comparison:
    """A comparison that trains in a second, of 8 sequences a step, in micro-batches as the memory has room."""
    training = TrainingConfig(
        steps=2, batch_size=8, accumulation=1, auto_batch=True, warmup_steps=1, device="cpu", precision="fp32"
    )
    made: dict[str, Any] = {
        "model": ModelConfig(layers=2, heads=2, width=32, context=32), "moe": MoEConfig(experts=4, top_k=2),
        "data": DataConfig(data=f"text:{story}", tokenizer="bytes"), "training": training, "arms": ("dense", "moe"),
    }  # fmt: skip
    return Comparison(**(made | fields))


def room_for(comparison: Comparison, arm: str, sequences: int) -> int:
    """Bytes that hold an arm's step in micro-batches of so many sequences, and no larger ones."""
    training = replace(comparison.training, batch_size=sequences)
    model = replace(comparison.model_of(arm), vocabulary=320)
    return int(1.02 * training_memory(model, training, torch.device("cpu"), torch.float32).total / FILL)


def cuts(folder: Path) -> dict[str, tuple[int, int, bool]]:
    found = {path.parent.name: json.loads(path.read_text())["training"] for path in folder.glob("*/config.json")}
    return {name: (t["batch_size"], t["accumulation"], t["auto_batch"]) for name, t in found.items()}


def test_every_arm_has_the_micro_batch_that_the_largest_has_room_for_and_keeps_it(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = tiny(story)
    monkeypatch.setattr(memory, "available_memory", lambda _: room_for(comparison, "moe", 4))
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    run_comparison(comparison, tmp_path / "runs", console=console)
    assert cuts(tmp_path / "runs") == {"dense-seed0": (4, 2, False), "moe-seed0": (4, 2, False)}
    assert "every arm: 2 micro-batches of 4 sequences a step" in console.export_text()
    monkeypatch.setattr(memory, "available_memory", lambda _: None)  # elsewhere, with an arm more
    run_comparison(tiny(story, arms=("dense", "moe", "dense-wide")), tmp_path / "runs")
    assert set(cuts(tmp_path / "runs").values()) == {(4, 2, False)}
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert (results["training"]["batch_size"], results["training"]["accumulation"]) == (4, 2)


def test_a_new_comparison_whose_warm_up_is_as_long_is_told_once_and_one_that_goes_on_is_not(
    story: Path, tmp_path: Path
) -> None:
    comparison = tiny(story, seeds=2)
    comparison = replace(comparison, training=replace(comparison.training, warmup_steps=500))
    said = []
    for place in ("first", "again"):
        console = Console(width=200, record=True, file=(tmp_path / place).open("w"))
        run_comparison(comparison, tmp_path / "runs", console=console)
        said.append(console.export_text().count("warmup-steps = 500: with steps = 2 the learning rate only rises"))
    assert said == [1, 0]


def test_choosing_the_micro_batch_leaves_each_arm_its_own_settings(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = tuple(map(parse_arm, ("slow:learning-rate=1e-4,clip=0.5", "plain:")))
    comparison = tiny(story, arms=(), overridden=arms)
    monkeypatch.setattr(memory, "available_memory", lambda _: room_for(comparison, "plain", 2))
    run_comparison(comparison, tmp_path)
    stored = {
        n: json.loads((tmp_path / f"{n}-seed0" / "config.json").read_text())["training"] for n in ("slow", "plain")
    }
    assert [stored[n]["batch_size"] for n in stored] == [2, 2]
    assert [(stored[n]["learning_rate"], stored[n]["clip"]) for n in stored] == [(1e-4, 0.5), (3e-4, 1.0)]


@pytest.mark.parametrize("auto", [True, False], ids=["chosen", "given"])
def test_an_arm_that_the_memory_does_not_hold_is_refused_before_the_first_is_trained(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    comparison = tiny(story)
    training = replace(comparison.training, auto_batch=auto, batch_size=1, accumulation=8)
    comparison = replace(comparison, training=training)
    monkeypatch.setattr(memory, "available_memory", lambda _: int(0.8 * room_for(comparison, "moe", 1)))
    with pytest.raises(UsageError, match=r"memory = 0\.0 GiB free on cpu: smoke moe needs .*what fits: "):
        run_comparison(comparison, tmp_path)
    assert cuts(tmp_path) == {}


def test_a_comparison_that_goes_on_is_refused_with_what_may_change(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not with a micro-batch or arms that the runs which are there do not have."""
    without, comparison = tiny(story, arms=("dense", "dense-wide")), tiny(story, arms=("dense", "moe", "dense-wide"))
    run_comparison(without, tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda _: room_for(comparison, "moe", 1))
    with pytest.raises(UsageError, match=r"smoke moe needs .*what fits: ") as refused:
        run_comparison(comparison, tmp_path)
    assert not re.search("--arm|--batch-size|--layers|--optimizer-state|preset", str(refused.value))
