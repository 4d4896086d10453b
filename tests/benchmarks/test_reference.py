"""The reference results: trained on a small scale, stopped and gone on with, scored, published and read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    SIZES,
    TRIAL,
    Reference,
    Size,
    chosen,
    comparison,
    finished_part,
    main,
    of_one_micro_batch,
    unpacked,
)
from rich.console import Console

from moelab.compare import Comparison
from moelab.config import DataConfig, TrainingConfig, UsageError
from moelab.device import compute_dtype
from moelab.training import memory

WORDS = "the cat sat on a mat and saw the dog that ran to the tree".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar archive of a folder with a held-out file, and something in WikiText-103's layout."""
    place = tmp_path_factory.mktemp("texts")
    lines = [" ".join(WORDS[(a * b) % 14 :] + WORDS[: (a + b) % 14]) + ".\n" for a in range(90) for b in range(40)]
    (place / "english").mkdir()
    (place / "english" / "shard-000.txt").write_text("".join(lines))
    (place / "english" / "valid.txt").write_text("".join(lines[::20]))
    with tarfile.open(place / "english.tar.xz", "w:xz") as archive:
        archive.add(place / "english", "english")
    (place / "wiki.test.tokens").write_text(" \n = Title = \n \n The cat sat on a @-@ mat . \n")
    return place


@pytest.fixture
def command(texts: Path, tmp_path: Path) -> list[str]:
    return [
        *("--only", "smoke", "--steps", "20", "--tokenizer", "bytes", "--device", "cpu", "--seeds", "0"),
        *("--text", str(texts / "english.tar.xz"), "--wikitext", str(texts), "--out", str(tmp_path / "runs/reference")),
    ]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smoke" / "results.json").read_text())


def stop_when_there_is(path: Path) -> threading.Thread:
    def wait() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (path.exists() and path.read_text()):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_it_stops_goes_on_scores_and_publishes(command: list[str], tmp_path: Path, home: Path) -> None:
    out = tmp_path / "runs/reference"
    assert main([*command, "--minutes", "0"]) == 0  # the time was over before it began
    assert "Nothing is stored here yet." in (out / "README.md").read_text()

    stopping = stop_when_there_is(out / "smoke/moe-seed0/metrics.jsonl")
    assert main([*command, "--arms", "dense,moe"]) == 130
    stopping.join()
    assert list((out / "smoke/moe-seed0/checkpoints").glob("step-*"))
    assert not (out / "smoke/dense-seed0/checkpoints").exists()
    assert not (out / "smoke/results.json").exists()

    dense = (out / "smoke/dense-seed0/metrics.jsonl").stat().st_mtime_ns
    assert main([*command, "--arms", "dense,moe"]) == 0
    assert (out / "smoke/dense-seed0/metrics.jsonl").stat().st_mtime_ns == dense
    assert not (out / "smoke/moe-seed0/checkpoints").exists()
    assert list(results(out)["arms"]) == ["dense", "moe"]
    assert results(out)["data"]["name"] == f"text:{tmp_path}/runs/english"
    scores = json.loads((out / "smoke/wikitext-103.json").read_text())
    assert list(scores) == ["dense-seed0", "moe-seed0"]
    assert {(score["split"], score["data"]) for score in scores.values()} == {("test", "wikitext-103, detokenized")}

    assert main([*command, "--read", "--publish", str(tmp_path / "published")]) == 0
    files = {str(path.relative_to(tmp_path / "published")) for path in (tmp_path / "published").rglob("*.*")}
    assert files == {"README.md", "smoke/results.json", "smoke/report.html", "smoke/wikitext-103.json"}
    page = (tmp_path / "published/README.md").read_text()
    assert page == (out / "README.md").read_text()
    assert f"{scores['moe-seed0']['loss']:.4f}" in page
    assert "| 350m | 1,024 | – | – | – | all of it |" in page
    assert "dense seed 1; moe seed 1; dense-wide; moe-matched |" in page
    assert "It was not measured." in page  # the goal, at 124m


def test_processes_side_by_side_share_the_runs(command: list[str], tmp_path: Path, home: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/reference.py"
    both = [subprocess.Popen([sys.executable, script, *command, "--arms", "dense,moe,dense-wide"]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    out = tmp_path / "runs/reference"
    assert list(results(out)["arms"]) == ["dense", "moe", "dense-wide"]
    assert len(json.loads((out / "smoke/wikitext-103.json").read_text())) == 3
    for arm in ("dense", "moe", "dense-wide"):
        steps = [json.loads(line)["step"] for line in (out / f"smoke/{arm}-seed0/metrics.jsonl").open()]
        assert steps == sorted(set(steps))  # nobody trained it again


def smoke(texts: Path) -> Comparison:
    """The plan that `command` trains a part of."""
    data = DataConfig(f"text:{texts / 'english'}", tokenizer="bytes")
    return comparison(TRIAL["smoke"], Reference(steps=20, device="cpu"), data)


def room_for(planned: Comparison, arm: str, sequences: int) -> int:
    """Free bytes that hold an arm's step in micro-batches of so many sequences, and no larger ones."""
    cpu, model = torch.device("cpu"), replace(planned.model_of(arm), vocabulary=320)
    training = replace(planned.training, batch_size=sequences, accumulation=8 // sequences)
    takes = memory.training_memory(model, training, cpu, compute_dtype("auto", cpu)).total
    return int(1.001 * takes / memory.FILL)


def micro_batches(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path.parent.name: json.loads(path.read_text())["training"] for path in folder.glob("*/config.json")}
    return {run: (training["batch_size"], training["accumulation"]) for run, training in found.items()}


@pytest.mark.parametrize("sittings", [["dense,moe"], ["dense", "moe"]], ids=["at once", "an arm a sitting"])
def test_all_arms_have_the_micro_batch_that_the_largest_of_the_size_has_room_for(
    command: list[str], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sittings: list[str]
) -> None:
    room = room_for(smoke(texts), "moe", 4)
    assert room > room_for(smoke(texts), "dense", 8)  # which alone would take all 8 sequences
    monkeypatch.setattr(memory, "available_memory", lambda _: room)
    for arms in sittings:
        assert main([*command, "--arms", arms]) == 0
        monkeypatch.setattr(memory, "available_memory", lambda _: None)  # the next sitting is on another machine
    out = tmp_path / "runs/reference"
    assert micro_batches(out / "smoke") == {"dense-seed0": (4, 2), "moe-seed0": (4, 2)}
    assert results(out)["training"]["batch_size"] == 4
    assert (out / "smoke/report.html").exists()


def test_the_micro_batch_is_kept_from_before_the_first_run_has_begun(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for sequences in (2, 8):
        monkeypatch.setattr(memory, "available_memory", lambda _, s=sequences: room_for(smoke(texts), "moe", s))
        found.append(of_one_micro_batch(smoke(texts), tmp_path, Console(file=(tmp_path / "said").open("w"))).training)
    assert found[0] == found[1]
    assert not found[0].auto_batch


def test_an_arm_that_no_micro_batch_fits_has_no_part_in_the_choice(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_for(smoke(texts), "moe-matched", 8)
    assert room < room_for(smoke(texts), "moe", 1)
    monkeypatch.setattr(memory, "available_memory", lambda _: room)
    planned = of_one_micro_batch(smoke(texts), tmp_path, Console(file=(tmp_path / "said").open("w")))
    assert (planned.training.batch_size, planned.training.accumulation) == (8, 1)


def test_a_run_that_diverges_is_noted_not_tried_again_and_stops_no_other_size(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "wild", Size("smoke", arms=("dense", "moe"), learning_rate=1e12))
    out, published = tmp_path / "runs/reference", tmp_path / "published"
    both = [*command, "--only", "wild,smoke", "--arms", "dense,moe", "--publish", str(published)]
    assert main(both) == 1
    assert list(results(out)["arms"]) == ["dense", "moe"]
    reason = r"diverged, step \d+: the (loss|gradient) is not finite"
    assert re.search(rf"reference.py: not made: wild/dense-seed0 \({reason}\); wild/moe-", capsys.readouterr().err)
    for folder in (out, published):
        page = (folder / "README.md").read_text()
        assert re.search(rf"\| wild \| .* \| dense \({reason}\); moe \({reason}\) \|", page)
    note = out / "wild/dense-seed0.diverged.txt"
    assert "--" not in note.read_text()  # flags that this command does not have
    assert "Delete this file to try it again" in note.read_text()

    note.unlink()
    assert main(both) == 1  # tries dense again, and moe not
    said = capsys.readouterr().out.splitlines()
    assert str(out / "wild/dense-seed0") in said
    assert str(out / "wild/moe-seed0") not in said
    assert note.exists()


def test_a_run_that_the_memory_does_not_hold_is_noted_and_tried_again(
    command: list[str], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_for(smoke(texts), "moe-matched", 8)
    monkeypatch.setattr(memory, "available_memory", lambda _: room)
    out, published = tmp_path / "runs/reference", tmp_path / "published"
    three = [*command, "--arms", "dense,moe,dense-wide", "--publish", str(published)]
    assert main(three) == 1
    assert list(results(out)["arms"]) == ["dense", "dense-wide"]
    why = "memory = 0.1 GiB free on cpu: smoke moe needs 0.1 GiB in micro-batches of 8"
    assert f"dense seed 1; moe seed 0 ({why}); moe seed 1; dense-wide seed 1;" in (out / "README.md").read_text()
    assert "--" not in (published / "smoke/moe-seed0.failed.txt").read_text()

    monkeypatch.setattr(memory, "available_memory", lambda _: None)
    assert main(three) == 0
    assert list(results(out)["arms"]) == ["dense", "moe", "dense-wide"]
    assert not list(tmp_path.glob("*/**/*.failed.txt"))


def test_a_size_of_which_the_memory_holds_nothing_is_noted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: 1_000_000)
    assert main([*command, "--arms", "moe"]) == 1
    out = tmp_path / "runs/reference"
    assert "moe seed 0 (memory = 0.0 GiB free on cpu: smoke dense needs 0.0 GiB" in (out / "README.md").read_text()


def test_runs_of_other_settings_stop_no_other_report(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "first", Size("smoke", arms=("dense", "moe")))
    two = [*command, "--only", "first,smoke", "--arms", "dense,moe", "--steps", "10"]
    assert main(two) == 0
    out = tmp_path / "runs/reference"
    for name in ("first", "smoke"):
        (out / name / "results.json").unlink()
    config = out / "first/moe-seed0/config.json"
    config.write_text(config.read_text().replace('"batch_size": 8', '"batch_size": 4'))
    assert main(two) == 1
    assert "not made: the report of first (batch-size = 8: the run" in capsys.readouterr().err
    assert list(results(out)["arms"]) == ["dense", "moe"]


def test_runs_of_further_budgets_follow_when_all_others_are_there(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRIAL, "smoke", Size("smoke", arms=("dense", "moe")))
    both, out = [*command, "--budgets", "tokens,flops"], tmp_path / "runs/reference"
    assert main([*both, "--arms", "dense"]) == 0
    assert not (out / "smoke/moe-seed0-flops").exists()
    assert main(both) == 0
    assert results(out)["budgets"] == ["tokens", "flops"]
    assert [run["folder"] for run in results(out)["arms"]["moe"]["runs"]] == ["moe-seed0", "moe-seed0-flops"]
    assert list(json.loads((out / "smoke/wikitext-103.json").read_text())) == ["dense-seed0", "moe-seed0"]
    assert not list(out.glob("smoke/*/checkpoints"))


def test_another_learning_rate_ends_at_the_same_share_of_it() -> None:
    base, other = (comparison(SIZES[name], Reference(), DataConfig()).training for name in ("40m", "40m-lr3e-3"))
    assert (base.learning_rate, base.min_learning_rate) == (3e-4, 3e-5)
    assert (other.learning_rate, other.min_learning_rate) == (pytest.approx(3e-3), pytest.approx(3e-4))


def test_larger_steps_see_the_same_tokens_in_the_same_shape_of_schedule() -> None:
    base, larger = (comparison(SIZES[name], Reference(), DataConfig()).training for name in ("124m", "124m-b32"))
    assert (larger.batch_size, larger.steps, larger.learning_rate) == (32, 1_250, 6e-4)
    for setting in ("steps", "warmup_steps", "evaluation_interval", "checkpoint_interval"):
        assert getattr(larger, setting) * 32 == pytest.approx(getattr(base, setting) * 8, rel=0.01), setting


def test_what_is_finished_of_all_arms_is_compared(tmp_path: Path) -> None:
    planned = Comparison(arms=("dense", "moe", "dense-wide"), seeds=3, training=TrainingConfig(steps=4))

    def finish(*runs: str) -> Comparison | None:
        for run in runs:
            (tmp_path / run).mkdir()
            (tmp_path / run / "summary.json").write_text('{"finished": true}')
        return finished_part(planned, tmp_path)

    assert finish("dense-seed0") is None
    assert finish("dense-seed1", "moe-seed1") is None  # no arm to go with dense at the first seed
    part = finish("moe-seed0")
    assert part is not None
    assert (part.arms, part.seeds) == (("dense", "moe"), 2)
    assert finish("dense-seed2", "moe-seed2", *(f"dense-wide-seed{seed}" for seed in range(3))) == planned


def test_an_archive_is_unpacked_once(texts: Path, tmp_path: Path) -> None:
    place = unpacked(texts / "english.tar.xz", tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["shard-000.txt", "valid.txt"]
    (place / "valid.txt").unlink()
    assert not (unpacked(texts / "english.tar.xz", tmp_path) / "valid.txt").exists()


@pytest.mark.parametrize("words", ["5m,6m", "", "5m 40m"])
def test_names_that_are_not_known_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match=r"only = .*give some of 5m, 40m"):
        chosen(words, SIZES, "only")


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--arms", "dens", "--only", "smoke", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "reference.py: arms = dens: give some of dense, moe, dense-wide, moe-matched\n"
