"""One run: same bits however it is cut, honest files, and a clear stop when something is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moelab.config import MoEConfig, RunConfig, RunFailed, UsageError
from moelab.training import load, loop, train
from moelab.training.loop import Interrupted, Trainer, first_difference, padded_vocabulary

MakeRun = Callable[..., RunConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return {name: t.clone() for name, t in load_file(newest / "model.safetensors").items()}  # not a view of the file


def optimizer_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    files = set(newest.glob("*.safetensors")) - {newest / "model.safetensors"}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process Ctrl-C's signal while a step is under way."""
    take_step = Trainer._step

    def step_and_signal(self: Trainer, windows: torch.Tensor) -> None:
        if self.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        take_step(self, windows)

    monkeypatch.setattr(Trainer, "_step", step_and_signal)


STATEFUL = MoEConfig(
    experts=4, top_k=2, bias_rate=0.01, balance_scope="step", capacity_factor=1.0, learned_scale=True, scores="sigmoid"
)


@pytest.mark.parametrize(("arm", "moe"), [("dense", None), ("moe", None), ("moe", STATEFUL)], ids=["0", "1", "2"])
@pytest.mark.parametrize("cut", [1, 5, 8])
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, moe: MoEConfig | None, cut: int
) -> None:
    run = tiny_run(arm, moe=moe, accumulation=2)
    whole = train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, cut)
        with pytest.raises(Interrupted, match=f"stopped at step {cut} of 12; add --resume to go on"):
            train(run, tmp_path / "cut")
    parts = train(run, tmp_path / "cut", resume=True)
    for read in (weights, optimizer_state):
        left, right = read(tmp_path / "whole"), read(tmp_path / "cut")
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert parts["batches_sha256"] == whole["batches_sha256"]
    assert parts["val_loss"] == whole["val_loss"]
    assert [m["val_loss"] for m in metrics(tmp_path / "cut") if "val_loss" in m] == [
        m["val_loss"] for m in metrics(tmp_path / "whole") if "val_loss" in m
    ]


@pytest.mark.parametrize("moe", [None, STATEFUL], ids=["dense", "moe"])
def test_checkpointed_activations_leave_every_bit_of_a_run(
    tiny_run: MakeRun, tmp_path: Path, moe: MoEConfig | None
) -> None:
    run = tiny_run("moe" if moe else "dense", moe=moe, accumulation=2)
    train(run, tmp_path / "kept")
    train(replace(run, training=replace(run.training, checkpoint_activations=True)), tmp_path / "again")
    left, right = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_a_run_of_lower_state_resumes_bit_for_bit_and_learns(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    if state == "8bit":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install 'moelab[8bit]'")
    exact = train(tiny_run("moe", accumulation=2), tmp_path / "exact")
    run = tiny_run("moe", accumulation=2, optimizer_state=state)
    whole = train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            train(run, tmp_path / "cut")
    train(run, tmp_path / "cut", resume=True)
    left, right = optimizer_state(tmp_path / "whole"), optimizer_state(tmp_path / "cut")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole["val_loss"] == pytest.approx(exact["val_loss"], abs=0.01)


def test_resume_after_a_crash_makes_the_lost_steps_again(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    train(run, tmp_path / "run")
    expected, lines = weights(tmp_path / "run"), metrics(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"cut short")
    train(run, tmp_path / "run", resume=True)
    assert all(torch.equal(expected[name], value) for name, value in weights(tmp_path / "run").items())
    again = metrics(tmp_path / "run")
    assert [m["step"] for m in again] == [m["step"] for m in lines]
    assert [m["train_loss"] for m in again] == [m["train_loss"] for m in lines]


def test_accumulation_gives_the_gradient_of_the_larger_batch(tiny_run: MakeRun, tmp_path: Path) -> None:
    large = train(tiny_run(batch_size=4, accumulation=1), tmp_path / "large")
    cut = train(tiny_run(batch_size=1, accumulation=4), tmp_path / "cut")
    assert cut["batches_sha256"] == large["batches_sha256"]
    assert cut["val_loss"] == pytest.approx(large["val_loss"], rel=1e-5)  # sums in another order


def test_a_line_of_metrics_that_was_half_written_is_left_out_on_resume(tiny_run: MakeRun, tmp_path: Path) -> None:
    run, folder = tiny_run(steps=4, checkpoint_interval=2, log_interval=1), tmp_path / "run"
    summary = train(run, folder)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 5, "tok')
    assert train(run, folder, resume=True)["val_loss"] == summary["val_loss"]
    assert (folder / "metrics.jsonl").read_text() == whole


def test_a_run_goes_on_in_the_precision_that_it_began_in(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = tiny_run(precision="auto"), tmp_path / "run"
    monkeypatch.setattr("moelab.device.cpu_has_bf16", lambda: True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            train(run, folder)
    monkeypatch.setattr("moelab.device.cpu_has_bf16", lambda: False)
    with pytest.raises(UsageError, match=r"trained in bfloat16, and on cpu this is float32; give --precision bf16"):
        train(run, folder, resume=True)
    asked = replace(run, training=replace(run.training, precision="bf16"))
    assert train(asked, folder, resume=True)["environment"]["precision"] == "bfloat16"


def test_two_processes_do_not_train_in_one_folder(tiny_run: MakeRun, tmp_path: Path) -> None:
    hold = (
        "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(1, flush=True); sys.stdin.read()"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match="run: another process is training there; wait, or choose another --out"):
            train(tiny_run(), tmp_path / "run")
        other.communicate("")
    assert train(tiny_run(), tmp_path / "run")["finished"]


def test_resume_without_a_checkpoint_starts_at_step_0(tiny_run: MakeRun, tmp_path: Path) -> None:
    assert train(tiny_run(), tmp_path / "run", resume=True)["steps"] == 12


def test_resume_of_a_finished_run_changes_nothing(
    tiny_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny_run(), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert train(tiny_run(), tmp_path / "run", resume=True) == first
    assert "finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} | {tmp_path / "run": 0} == before | {tmp_path / "run": 0}


def test_a_summary_that_was_cut_short_is_written_again(tiny_run: MakeRun, tmp_path: Path) -> None:
    first = train(tiny_run(), tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"finished": tr')
    again = train(tiny_run(), tmp_path / "run", resume=True)
    assert (again["steps"], again["val_loss"]) == (12, first["val_loss"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == again


def test_a_run_that_is_there_is_not_overwritten(tiny_run: MakeRun, tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run")
    kept = (tmp_path / "run" / "summary.json").read_text()
    with pytest.raises(UsageError, match="add --resume to go on, or choose another --out"):
        train(tiny_run(), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == kept


def test_a_run_of_other_settings_is_refused_by_the_setting_that_differs(tiny_run: MakeRun, tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run")
    with pytest.raises(UsageError, match=r"learning-rate = 0.004: the run that is there has 0.003"):
        train(tiny_run(learning_rate=4e-3), tmp_path / "run", resume=True)


def test_settings_that_change_no_result_may_differ_on_resume(tiny_run: MakeRun) -> None:
    assert first_difference(tiny_run(), tiny_run(checkpoint_interval=7, log_interval=3)) is None


def test_a_folder_that_cannot_be_written_is_refused_before_training(tiny_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match=r"out = .*: cannot be written"):
        train(tiny_run(), tmp_path / "file" / "run")


@pytest.mark.parametrize("rate", [1e12])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_what_to_try(
    tiny_run: MakeRun, tmp_path: Path, rate: float
) -> None:
    run = tiny_run(learning_rate=rate, warmup_steps=0, clip=0.0, steps=60)
    with pytest.raises(RunFailed, match=r"step \d+: the (loss|gradient) is not finite; try a lower --learning-rate"):
        train(run, tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())


def test_the_reported_loss_is_cross_entropy_alone(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run("moe")
    loud = replace(run, model=replace(run.model, moe=replace(run.model.moe, balance_loss=50.0)))
    train(loud, tmp_path / "run")
    first = metrics(tmp_path / "run")[0]
    assert first["train_loss"] < 1.1 * math.log(padded_vocabulary(257))  # 50 × the balance loss would add 100
    assert 0.9 * 2 < first["balance_loss"] < 4  # apart, and without its coefficient: about 1 for each of two layers


def test_metrics_and_summary_say_the_same_at_the_end(tiny_run: MakeRun, tmp_path: Path) -> None:
    summary = train(tiny_run("moe"), tmp_path / "run", command="moelab train")
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], last["tokens"], last["val_loss"]) == (12, summary["tokens"], summary["val_loss"])
    assert summary["tokens"] == 12 * 4 * 32
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["mfu"] is None  # no peak is known for a CPU
    assert summary["command"] == "moelab train"


def test_expert_load_is_a_share_for_each_expert_of_each_layer(tiny_run: MakeRun, tmp_path: Path) -> None:
    train(tiny_run("moe"), tmp_path / "run")
    for line in metrics(tmp_path / "run"):
        assert [len(layer) for layer in line["expert_load"]] == [4, 4]
        assert [sum(layer) for layer in line["expert_load"]] == pytest.approx([1, 1], abs=1e-4)


def test_the_routing_is_measured_at_its_interval_and_at_the_end(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run("moe", moe=STATEFUL, routing_interval=5)
    train(run, tmp_path / "run")
    lines = {line["step"]: line for line in metrics(tmp_path / "run")}
    assert [step for step, line in lines.items() if "routing" in line] == [5, 10, 12]
    assert all(len(line["dropped"]) == 2 for line in lines.values())
    assert 0 < max(lines[10]["routing"]["dropped"]) < 1
    assert [len(layer) for layer in lines[12]["routing"]["load"]] == [4, 4]
    assert ["overlap" in lines[step]["routing"] for step in (5, 10, 12)] == [False, False, True]
    train(tiny_run("dense", routing_interval=5), tmp_path / "dense")
    assert not any("routing" in line for line in metrics(tmp_path / "dense"))


def test_measuring_the_routing_changes_nothing_that_is_trained(tiny_run: MakeRun, tmp_path: Path) -> None:
    for interval in (1, 100):
        train(tiny_run("moe", moe=STATEFUL, routing_interval=interval), tmp_path / str(interval))
    left, right = weights(tmp_path / "1"), weights(tmp_path / "100")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert left["blocks.0.feed_forward.router.selection_bias"].abs().sum() > 0


def test_measuring_the_routing_and_the_loss_is_not_time_of_training(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an arm with experts would be charged for figures that a dense one does not have."""
    now = 0.0

    def passing(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            nonlocal now
            now += 1000
            return function(*arguments)

        return slow

    monkeypatch.setattr(loop, "routing", passing(loop.routing))
    monkeypatch.setattr(loop, "score", passing(loop.score))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    take_step = Trainer._step

    def step_of_a_second(self: Trainer, windows: torch.Tensor) -> None:
        nonlocal now
        now += 1
        take_step(self, windows)

    monkeypatch.setattr(Trainer, "_step", step_of_a_second)
    summary = train(tiny_run("moe", steps=7, routing_interval=2, evaluation_interval=3), tmp_path / "moe")
    assert summary["seconds"] == 7


def test_load_gives_the_model_that_was_scored(tiny_run: MakeRun, tmp_path: Path) -> None:
    from moelab.evaluation import score
    from moelab.text import prepare

    run = tiny_run("moe")
    summary = train(run, tmp_path / "run")
    found = score(load(tmp_path / "run", "cpu"), prepare(run.data).splits["valid"])
    assert found.loss == summary["val_loss"]


def test_both_arms_see_identical_token_ids(tiny_run: MakeRun, tmp_path: Path) -> None:
    hashes = {train(tiny_run(arm), tmp_path / arm)["batches_sha256"] for arm in ("dense", "moe", "dense-wide")}
    assert len(hashes) == 1
    assert train(tiny_run("dense", seed=1), tmp_path / "other")["batches_sha256"] not in hashes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_gives_the_same_bits_twice(
    tiny_run: MakeRun, tmp_path: Path, precision: str, device: str
) -> None:
    compiled = "on" if device == "cuda" else "off"
    run = tiny_run("moe", deterministic=True, precision=precision, device=device, compile=compiled)
    train(run, tmp_path / "a")
    train(run, tmp_path / "b")
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["dense", "moe"])
@pytest.mark.parametrize(
    ("precision", "compiled"), [("fp32", "off"), ("bf16", "off"), ("fp16", "off"), ("bf16", "on"), ("fp16", "on")]
)
def test_every_precision_learns_on_a_gpu(
    tiny_run: MakeRun, tmp_path: Path, precision: str, compiled: str, arm: str
) -> None:
    run = tiny_run(
        arm, device="cuda", precision=precision, compile=compiled, steps=150, evaluation_interval=150, warmup_steps=10
    )
    assert train(run, tmp_path / "run")["val_loss"] < 2.0  # from ln 320 = 5.8


@pytest.mark.gpu
def test_fp16_resumes_with_its_loss_scale(tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("moe", device="cuda", precision="fp16", deterministic=True, compile="off")
    whole = train(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            train(run, tmp_path / "cut")
    assert train(run, tmp_path / "cut", resume=True)["val_loss"] == whole["val_loss"]


def test_a_full_disk_is_said_in_one_line(tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, line: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_write_metrics", full)
    with pytest.raises(RunFailed, match=r"cannot be written \(No space left on device\); make room and add --resume"):
        train(tiny_run("dense"), tmp_path / "run")


@pytest.mark.gpu
def test_two_runs_of_a_process_take_the_same_memory_on_a_gpu(tiny_run: MakeRun, tmp_path: Path) -> None:
    """None leaves workspaces of a library behind, which the next would be charged with."""
    peaks = [
        train(tiny_run("moe", device="cuda", compile="on", capture="on"), tmp_path / str(number))["peak_memory_bytes"]
        for number in range(3)
    ]
    assert max(peaks) - min(peaks) < 2**20
