"""Checkpoints: complete or passed over, never half there, never pickled."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.config import ModelConfig, MoEConfig, RunFailed, TrainingConfig, UsageError
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.training import checkpoint
from moelab.training.checkpoint import Checkpoints, Progress, load_checkpoint, save_checkpoint
from moelab.training.optimizer import make_optimizer

MODEL = ModelConfig(layers=1, heads=2, width=16, context=8, vocabulary=64)


def trained(
    arm: str = "dense", steps: int = 2, state: str = "fp32", model: ModelConfig = MODEL
) -> tuple[GPT, torch.optim.Optimizer]:
    made = GPT(arm_model(arm, model, MoEConfig(2)))
    optimizer = make_optimizer(made, TrainingConfig(optimizer_state=state))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for parameter in made.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return made, optimizer


def test_weights_moments_and_random_state_come_back(tmp_path: Path) -> None:
    model, optimizer = trained("moe")
    save_checkpoint(tmp_path, model, optimizer, Progress(step=2, tokens=64, seconds=1.5, batches_digest="ab"))
    expected_draw = torch.rand(3)
    torch.manual_seed(999)
    fresh, fresh_optimizer = trained("moe", steps=0)
    progress, said = load_checkpoint(tmp_path, fresh, fresh_optimizer)
    assert (progress, said) == (Progress(2, 64, 1.5, "ab"), [])
    assert torch.equal(torch.rand(3), expected_draw)
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
        for moment, value in optimizer.state[a].items():
            assert torch.equal(value, fresh_optimizer.state[b][moment]), (name, moment)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_moments_of_lower_precision_come_back_bit_for_bit(tmp_path: Path, state: str) -> None:
    if state == "8bit":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install 'moelab[8bit]'")
    wide = replace(MODEL, width=64)  # matrices of 4,096 numbers and more
    outcomes = []
    for resumed in (False, True):
        model, optimizer = trained("moe", steps=3, state=state, model=wide)
        if resumed:
            save_checkpoint(tmp_path, model, optimizer, Progress(step=3))
            model, optimizer = trained("moe", steps=0, state=state, model=wide)
            load_checkpoint(tmp_path, model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        outcomes.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, *trained(), Progress(step=1))
    assert {file.suffix for file in place.iterdir()} == {".safetensors", ".json"}


def test_the_newest_and_its_predecessor_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, *trained(), Progress(step=step))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def damage(place: Path, how: str) -> None:
    weights = place / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "one bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif how == "file missing":
        (place / "exp_avg.safetensors").unlink()
    else:
        (place / "state.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "one bit", "file missing", "state cut"])
def test_a_corrupt_checkpoint_is_passed_over_for_its_predecessor_and_that_is_said(tmp_path: Path, how: str) -> None:
    model, optimizer = trained(steps=1)
    save_checkpoint(tmp_path, model, optimizer, Progress(step=1))
    newest = save_checkpoint(tmp_path, *trained(steps=2), Progress(step=2))
    damage(newest, how)
    fresh, fresh_optimizer = trained(steps=0)
    progress, said = load_checkpoint(tmp_path, fresh, fresh_optimizer)
    assert progress is not None
    assert progress.step == 1
    assert len(said) == 1
    assert str(newest) in said[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_without_a_good_checkpoint_the_run_fails_rather_than_begin_again(tmp_path: Path) -> None:
    damage(save_checkpoint(tmp_path, *trained(), Progress(step=1)), "one bit")
    with pytest.raises(RunFailed, match="No good checkpoint is left"):
        load_checkpoint(tmp_path, *trained(steps=0))


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, *trained(), Progress(step=1))
    place.rename(place.with_name(".writing-00000002"))
    assert load_checkpoint(tmp_path, *trained(steps=0)) == (None, [])


def test_a_checkpoint_of_another_model_is_refused_by_the_parameter_that_differs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *trained("dense"), Progress(step=1))
    with pytest.raises(UsageError, match="of another model"):
        load_checkpoint(tmp_path, *trained("moe", steps=0))


def test_a_checkpoint_names_the_step_it_was_taken_at(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, *trained(), Progress(step=7))
    assert json.loads((place / "state.json").read_text())["progress"]["step"] == 7


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are taken for those of a GPU, from which the host has a copy."""
    monkeypatch.setattr(checkpoint, "_on_gpu", lambda files: True)


def hold_writing(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Events: writing has begun; it may go on."""
    begun, go = threading.Event(), threading.Event()
    save_file = checkpoint.save_file

    def held(*given: Any) -> None:
        begun.set()
        assert go.wait(30)
        save_file(*given)

    monkeypatch.setattr(checkpoint, "save_file", held)
    return begun, go


@pytest.mark.usefixtures("on_gpu")
def test_what_a_gpu_holds_is_written_as_it_was_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained("moe")
    at_two = {name: t.clone() for name, t in model.state_dict().items()}
    begun, go = hold_writing(monkeypatch)
    progress = Progress(step=2)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 3):
            checkpoints.save(model, optimizer, progress)
            assert begun.wait(30)
            if step == 2:
                assert load_checkpoint(tmp_path, *trained("moe", steps=0)) == (None, [])
            progress.step = 3
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()  # also while the second is copied to where the first was
            go.set()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    damage(tmp_path / "checkpoints" / "step-00000003", "state cut")
    fresh, fresh_optimizer = trained("moe", steps=0)
    progress_then, _ = load_checkpoint(tmp_path, fresh, fresh_optimizer)
    assert progress_then == Progress(step=2)
    assert all(torch.equal(t, at_two[name]) for name, t in fresh.state_dict().items())


@pytest.mark.usefixtures("on_gpu")
def test_a_checkpoint_that_cannot_be_written_is_said_in_one_line_and_the_one_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, Progress(step=1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    expected = (
        r"step-00000002: its 0\.1 MB cannot be written \(.*No space left on device\); step-00000001 is kept; make room"
    )
    with pytest.raises(RunFailed, match=expected) as failed, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, Progress(step=2))
    assert "\n" not in str(failed.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path, *trained(steps=0)) == (Progress(step=1), [])


@pytest.mark.usefixtures("on_gpu")
def test_after_a_checkpoint_that_could_not_be_written_the_next_is_tried_at_once_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file, room = checkpoint.save_file, [False]

    def full(*given: Any) -> None:
        if not room[0]:
            raise OSError(28, "No space left on device")
        save_file(*given)

    monkeypatch.setattr(checkpoint, "save_file", full)
    model, optimizer = trained()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(model, optimizer, Progress(step=2)) is None
        with pytest.raises(RunFailed, match="step-00000003"):
            checkpoints.save(model, optimizer, Progress(step=3))
        assert checkpoints.save(model, optimizer, Progress(step=4)) is None
        while checkpoint.writing():
            pass
        room[0] = True
        said = checkpoints.save(model, optimizer, Progress(step=5))
        assert said is not None
        assert "step-00000004: its 0.1 MB cannot be written" in said
        assert load_checkpoint(tmp_path, *trained(steps=0)) == (Progress(step=5), [])


@pytest.mark.usefixtures("on_gpu")
def test_without_room_for_a_copy_a_checkpoint_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    held = sum(t.nbytes for t in model.state_dict().values()) * 3
    monkeypatch.setattr(checkpoint, "available_memory", lambda _: held)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, optimizer, Progress(step=1))
    assert load_checkpoint(tmp_path, *trained(steps=0)) == (Progress(step=1), [])


@pytest.mark.usefixtures("on_gpu")
def test_an_error_of_training_waits_for_the_checkpoint_and_a_second_ctrl_c_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = hold_writing(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(*trained(), Progress(step=1))
    assert begun.wait(30)
    with pytest.raises(KeyboardInterrupt), checkpoints:
        raise KeyboardInterrupt
    go.set()
    while checkpoint.writing():
        pass
    assert load_checkpoint(tmp_path, *trained(steps=0)) == (None, [])  # another process may be at work there by then
    checkpoints = Checkpoints(tmp_path)
    go.clear()
    checkpoints.save(*trained(), Progress(step=1))
    threading.Timer(0.2, go.set).start()
    with pytest.raises(RunFailed, match="not finite"), checkpoints:
        raise RunFailed("the loss is not finite")
    assert load_checkpoint(tmp_path, *trained(steps=0)) == (Progress(step=1), [])


def test_a_process_that_is_stopped_while_it_writes_ends_with_130(tmp_path: Path) -> None:
    """And not by an abort of the interpreter, which ends under the threads that write."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from moelab import cli\n"
        "from moelab.training import checkpoint\n"
        "from moelab.training.checkpoint import Checkpoints, Progress\n"
        "checkpoint._on_gpu = lambda files: True\n"
        "def command(words):\n"
        "    model = torch.nn.Linear(4096, 4096)\n"
        "    with Checkpoints(Path(sys.argv[1])) as checkpoints:\n"
        "        checkpoints.save(model, torch.optim.SGD(model.parameters()), Progress(step=1))\n"
        "        raise KeyboardInterrupt\n"
        "cli.COMMANDS['stopped'] = command\n"
        "sys.exit(cli.main(['stopped']))\n"
    )
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "moelab: stopped\n")
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".writing-00000001"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, *trained(), Progress(step=2))
    assert not left.exists()


@pytest.mark.gpu
def test_of_a_gpu_a_checkpoint_is_copied_and_written_beside(tmp_path: Path) -> None:
    model, optimizer = trained("moe")
    model.cuda()
    for parameter in model.parameters():
        optimizer.state[parameter] = {n: t.cuda() for n, t in optimizer.state[parameter].items()}
    kept = {name: t.cpu() for name, t in model.state_dict().items()}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):  # into the same memory
            checkpoints.save(model, optimizer, Progress(step=step))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += step
    for step in (2, 1):
        fresh, _ = trained("moe", steps=0)
        progress, _ = load_checkpoint(tmp_path, fresh)
        assert progress == Progress(step=step)
        for name, parameter in fresh.named_parameters():
            torch.testing.assert_close(parameter.detach(), kept[name] + (step - 1), rtol=0, atol=1e-6)
        damage(tmp_path / "checkpoints" / f"step-{step:08d}", "state cut")
