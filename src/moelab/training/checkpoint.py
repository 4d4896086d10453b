"""Checkpoints: weights, optimizer and random state as safetensors and JSON.

    checkpoints/step-00000500/
        model.safetensors        fp32 parameters by name, and the routers' biases of selection
        optimizer.safetensors    AdamW's moments, by moment and parameter name, and the generators' states
        state.json               step, counters, and the SHA-256 of the two files

A checkpoint is written beside its place and renamed into it, and the one before is kept, so that there is always a
complete one. One whose checksums do not hold is passed over for its predecessor, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moelab.config import RunConfig, RunFailed, UsageError
from moelab.device import compute_dtype, resolve_device
from moelab.model import GPT
from moelab.training.optimizer import parts

KEPT = 2  # complete checkpoints: the newest and its predecessor


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Seconds of training: evaluations, measurements of the routing, checkpoints and compilation are not counted."""
    batches_digest: str = ""
    """`batches.chain_digest` of every batch so far."""
    loss_scale: dict[str, Any] | None = None
    """State of fp16's loss scaling."""
    precision: str | None = None
    """PyTorch's name of the products' dtype; None in a checkpoint that is older than this."""


class Corrupt(Exception):
    """A checkpoint that is incomplete or fails its checksums; its text says what is wrong."""


def save_checkpoint(run: Path, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Writes the checkpoint of a run folder at `progress.step` and deletes those before its predecessor."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    place, aside = folder / f"step-{progress.step:08d}", folder / f".writing-{progress.step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}, aside / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
    files = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
    (aside / "state.json").write_text(json.dumps({"progress": asdict(progress), "sha256": files}, indent=2) + "\n")
    for file in aside.iterdir():
        _flush(file)
    if place.exists():
        shutil.rmtree(place)
    os.replace(aside, place)
    _flush(folder)
    for old in _checkpoints(run)[KEPT:]:
        shutil.rmtree(old)
    return place


def load_checkpoint(
    run: Path, model: GPT, optimizer: torch.optim.Optimizer | None = None
) -> tuple[Progress | None, list[str]]:
    """Fills the model, and with an optimizer that and the random generators, from a run's newest good checkpoint.

    Returns its progress and what there is to say about checkpoints that were passed over; None where the run has no
    checkpoint yet.

    Raises:
        RunFailed: there are checkpoints, and none of them is good.
        UsageError: the checkpoint is of another model.
    """
    said: list[str] = []
    checkpoints = _checkpoints(run)
    for place in checkpoints:
        try:
            progress = _verified_progress(place)
            weights = load_file(place / "model.safetensors")
            state = load_file(place / "optimizer.safetensors") if optimizer is not None else {}
        except (Corrupt, SafetensorError, OSError) as problem:
            said.append(f"checkpoint {place} is not usable ({problem}); trying the one before it")
            continue
        _fill_model(model, weights, place)
        if optimizer is not None:
            _fill_optimizer(model, optimizer, state)
        return progress, said
    if said:
        reasons = "; ".join(line.removesuffix("; trying the one before it") for line in said)
        raise RunFailed(f"{reasons}. No good checkpoint is left: train again with another --out")
    return None, said


def load(run_folder: str | Path, device: str = "auto") -> GPT:
    """The trained model of a run's folder, in evaluation mode, on `device`.

    Raises:
        UsageError: the folder is not a run, or has no checkpoint yet.
        RunFailed: no checkpoint is good.
    """
    run, config = read_run(run_folder)
    on = resolve_device(device)
    model = GPT(config.model, dtype=_dtype_at_hand(config, on)).to(on)
    progress, said = load_checkpoint(run, model)
    if progress is None:
        raise UsageError(f"run = {run}: it has no checkpoint yet; train it first")
    for line in said:
        print(line)
    return model.eval()


def read_run(run_folder: str | Path) -> tuple[Path, RunConfig]:
    """A run's folder and settings; raises `UsageError` where there is no run."""
    run = Path(run_folder)
    try:
        return run, RunConfig.from_json((run / "config.json").read_text())
    except OSError:
        raise UsageError(f"run = {run}: there is no run here; give a folder that `moelab train --out` wrote") from None
    except ValueError as problem:
        raise UsageError(f"run = {run}: its config.json cannot be read ({problem})") from None


def _dtype_at_hand(config: RunConfig, device: torch.device) -> torch.dtype:
    """The run's own precision, or the device's best where the device at hand does not have it."""
    try:
        return compute_dtype(config.training.precision, device)
    except UsageError:
        return compute_dtype("auto", device)


def has_checkpoint(run: Path) -> bool:
    return bool(_checkpoints(run))


def _checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            for part, tensor in parts(value).items():
                tensors[f"{moment}{part}.{name}"] = tensor.detach().cpu().contiguous()
    return tensors


def _fill_model(model: nn.Module, weights: dict[str, torch.Tensor], place: Path) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"checkpoint = {place}: it is of another model: {name} is {found.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here; give the settings that it was trained with, or another --out"
            )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])


def _fill_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"])
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():  # in the form and the place that the optimizer needs
            for part, tensor in parts(value).items():
                tensor.copy_(state[f"{moment}{part}.{name}"])


def _verified_progress(place: Path) -> Progress:
    try:
        state = json.loads((place / "state.json").read_text())
        for name, digest in state["sha256"].items():
            if _sha256(place / name) != digest:
                raise Corrupt(f"{name} fails its checksum")
        return Progress(**state["progress"])
    except OSError as problem:
        raise Corrupt(f"{Path(problem.filename or place).name}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Corrupt("state.json cannot be read") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
