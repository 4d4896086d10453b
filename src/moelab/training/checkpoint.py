"""Checkpoints: weights, optimizer and random state as safetensors and JSON.

    checkpoints/step-00000500/
        model.safetensors         fp32 parameters by name, and the routers' biases of selection
        exp_avg.safetensors, …    AdamW's moments, a file each, by moment and parameter name
        random.safetensors        the generators' states
        state.json                step, counters, and the SHA-256 of each of these files

A checkpoint is written beside its place and renamed into it, and the one before is kept, so that there is always a
complete one. One whose checksums do not hold is passed over for its predecessor, and that is said. On a GPU training
goes on while it is written (`Checkpoints`): that of the 350M MoE has 21 GB.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moelab.config import RunConfig, RunFailed, UsageError
from moelab.device import available_memory, compute_dtype, resolve_device
from moelab.model import GPT
from moelab.training.optimizer import parts

KEPT = 2  # complete checkpoints: the newest and its predecessor
HOST_SHARE = 0.5  # of the host's free memory, that a copy of a GPU's tensors may take
Files = dict[str, dict[str, torch.Tensor]]  # tensors by name, by the file's name


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


class Checkpoints:
    """Writes a run's checkpoints, those of a GPU while training goes on: it waits only for the copy on the host.

    As a context it waits for the last one to be complete.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._copy: Files = {}
        self._writing: Background | None = None
        self._given_up = threading.Event()

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> str | None:
        """Writes, or begins to write, the checkpoint at `progress.step`, when the one before is complete.

        Where the one before could not be written this one is written at once, and that is what it returns.

        Raises:
            RunFailed: this one cannot be written.
        """
        said = None
        try:
            self.wait()
        except RunFailed as problem:
            said = str(problem)
        files, progress = _files(model, optimizer), replace(progress)
        if said is not None or not self._copied(files):
            _write(self.run, files, progress)
        else:
            self._writing = Background(lambda: _write(self.run, self._copy, progress, self._given_up))
        return said

    def wait(self) -> None:
        """Until what was begun is complete. Raises `RunFailed` where it cannot be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()

    def _copied(self, files: Files) -> bool:
        """Copies tensors of a GPU to memory that is kept for the next time; whether there is enough of it."""
        if not _on_gpu(files):
            return False  # threads that write would take cores from training
        if not self._copy:
            left = available_memory(torch.device("cpu"))
            if left is not None and _bytes(files) > HOST_SHARE * left:
                return False
            self._copy = {file: _empty(tensors) for file, tensors in files.items()}
        for copy, tensor in zip(_tensors(self._copy), _tensors(files), strict=True):
            copy.copy_(tensor)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):  # which is what is to be said
            with suppress(RunFailed):
                self.wait()
        else:  # a second Ctrl-C does not wait, and what another process may do here is left alone
            self._given_up.set()


class Background(threading.Thread):
    """A call in a thread that does not keep the process alive."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as problem:
            self._problem = problem

    def wait(self) -> None:
        """Raises what the call raised."""
        self.join()
        if self._problem is not None:
            raise self._problem


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Writes the checkpoint of a run folder at `progress.step` and deletes those before its predecessor.

    Raises:
        RunFailed: it cannot be written.
    """
    return _write(run, _files(model, optimizer), progress)


def writing() -> bool:
    """Whether a checkpoint is being written, which an interpreter that ends now would not survive."""
    return any(isinstance(thread, Background) for thread in threading.enumerate())


def _write(run: Path, files: Files, progress: Progress, given_up: threading.Event | None = None) -> Path:
    folder = run / "checkpoints"
    place, aside = folder / f"step-{progress.step:08d}", folder / f".writing-{progress.step:08d}"
    digests: dict[str, str] = {}

    def write(name: str) -> None:
        file = aside / f"{name}.safetensors"
        save_file({n: tensor.cpu() for n, tensor in files[name].items()}, file)
        digests[file.name] = _sha256(file)
        _flush(file)

    try:
        for left in folder.glob(".writing-*"):  # by a process that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        if _on_gpu(files):  # one after another: the host has no room for all
            for name in files:
                write(name)
        else:
            _at_once(write, files)
        state = {"progress": asdict(progress), "sha256": dict(sorted(digests.items()))}
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        _flush(aside / "state.json")
        if given_up is not None and given_up.is_set():
            return place
        if place.exists():
            shutil.rmtree(place)
        os.replace(aside, place)
        _flush(folder)
        for old in _checkpoints(run)[KEPT:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(aside, ignore_errors=True)
        size = f"{_bytes(files) / 1e6:,.1f} MB"
        kept = f"; {_checkpoints(run)[0].name} is kept" if _checkpoints(run) else ""
        raise RunFailed(
            f"checkpoint = {place}: its {size} cannot be written ({problem}){kept}; make room and add --resume to go on"
        ) from None
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
            state: dict[str, torch.Tensor] = {}
            if optimizer is not None:
                for file in sorted(set(place.glob("*.safetensors")) - {place / "model.safetensors"}):
                    state |= load_file(file)
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


def _files(model: nn.Module, optimizer: torch.optim.Optimizer) -> Files:
    """What a checkpoint holds."""
    files: Files = {"model": model.state_dict(), "random": {"random.cpu": torch.get_rng_state()}}
    if torch.cuda.is_available():
        files["random"]["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state[parameter].items():
            for part, tensor in parts(value).items():
                files.setdefault(moment, {})[f"{moment}{part}.{name}"] = tensor
    return {file: {n: t.detach().contiguous() for n, t in tensors.items()} for file, tensors in files.items()}


def _tensors(files: Files) -> list[torch.Tensor]:
    return [tensor for tensors in files.values() for tensor in tensors.values()]


def _bytes(files: Files) -> int:
    return sum(tensor.nbytes for tensor in _tensors(files))


def _on_gpu(files: Files) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(files))


def _empty(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}


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
        _at_once(lambda named: _verify(place / named[0], named[1]), sorted(state["sha256"].items()))
        return Progress(**state["progress"])
    except OSError as problem:
        raise Corrupt(f"{Path(problem.filename or place).name}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Corrupt("state.json cannot be read") from None


def _verify(file: Path, digest: str) -> None:
    if _sha256(file) != digest:
        raise Corrupt(f"{file.name} fails its checksum")


def _at_once(call: Callable[[Any], object], values: Iterable[Any]) -> None:
    """The calls in threads; raises what the first of them that failed raised."""
    threads = [Background(functools.partial(call, value)) for value in values]
    for thread in threads:
        thread.join()
    for thread in threads:
        thread.wait()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
