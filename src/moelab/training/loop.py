"""Training one run, from its settings to its summary.

A run's folder holds `config.json`, `metrics.jsonl` (one object a step at most), `checkpoints/`, `tokenizer/` and, when
it is finished, `summary.json`. Everything in it can be rebuilt from `config.json` and the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from moelab.config import RunConfig, RunFailed, UsageError
from moelab.device import (
    compute_dtype,
    environment,
    keep_compiled_code,
    keep_freed_memory,
    peak_flops,
    peak_memory,
    reset_peak_memory,
    resolve_device,
    synchronize,
)
from moelab.evaluation import Score, routing, score
from moelab.evaluation.token_types import token_types
from moelab.experts import backend_of
from moelab.experts.choice import announce
from moelab.meters import count_parameters, flops_per_token, model_flops_utilization
from moelab.model import GPT
from moelab.text import PreparedText, prepare
from moelab.training.batches import Batches, prefetched
from moelab.training.checkpoint import Checkpoints, Progress, has_checkpoint, load_checkpoint
from moelab.training.memory import memory_in_words, split_as, split_in_words, split_step
from moelab.training.optimizer import check_optimizer_state, learning_rate
from moelab.training.step import Step, check_capture
from moelab.training.trace import traced
from moelab.training.upcycle import Start, upcycle

# Settings that may differ when a run goes on: they change how fast or how often, never what is computed from what.
MAY_DIFFER = frozenset(
    f"training.{name}"
    for name in (
        "device",
        "compile",
        "capture",
        "checkpoint_activations",
        "evaluation_interval",
        "log_interval",
        "routing_interval",
        "checkpoint_interval",
    )
) | {"model.moe.backend", "data.source", "data.ranks"}


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes no more


class Diverged(RunFailed):
    """The loss or the gradient of a run is not finite."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a run; its checkpoint is complete."""


def train(
    run: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    profile: bool = False,
    command: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains `run` into `folder` and returns its summary.

    With `resume` a run that is there goes on from its newest good checkpoint; a finished one is left as it is, and its
    summary returned. With `profile` a few steps are written to the folder's `trace.json.gz`, which slows those down.

    Raises:
        UsageError: a setting that cannot work; a model that the device's memory does not hold; a folder that cannot be
            written, or that holds a run and `resume` is not set; a run of other settings.
        RunFailed: the loss is not finite (`Diverged`); no checkpoint is good; the device has no more memory.
        Interrupted: Ctrl-C or SIGTERM, after the step at hand and its checkpoint.
    """
    console = console or Console(stderr=True)
    keep_compiled_code()
    device = resolve_device(run.training.device)
    dtype = compute_dtype(run.training.precision, device)
    if run.model.moe is not None:
        backend_of(run.model, device, dtype, run.training.deterministic)
    check_optimizer_state(run.training.optimizer_state)
    check_capture(run.training, device)
    with claimed(folder, "training"):
        try:
            return _train(run, folder, device, dtype, resume, profile, command, console)
        except OSError as problem:
            if problem.errno not in FULL:
                raise
            raise RunFailed(
                f"out = {folder}: cannot be written ({problem.strerror}); make room and add --resume to go on"
            ) from None


def _train(
    run: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype, resume: bool, profile: bool, command: str,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    _refuse_another(folder, resume)
    text = prepare(run.data)
    resuming = resume and (folder / "config.json").exists()
    run = replace(run, model=replace(run.model, vocabulary=padded_vocabulary(text.tokenizer.vocabulary)))
    if resuming:
        run = replace(run, training=split_as(run.training, stored_run(folder).training))
        difference = first_difference(stored_run(folder), run)
        if difference:
            raise UsageError(f"{difference}; give the run's own settings, or another --out")
        if summary := finished_summary(folder):
            console.print(f"{folder}: this run is finished; nothing to do", soft_wrap=True)
            return summary
    if run.model.moe is not None:
        chosen = backend_of(run.model, device, dtype, run.training.deterministic)
        announce(chosen, lambda line: console.print(line, soft_wrap=True, highlight=False))
    given, run = run.training, replace(run, training=split_step([run], device, dtype, resuming=resuming))
    if given.auto_batch:
        console.print(f"{split_in_words(run.training)} a step", highlight=False, soft_wrap=True)
    trainer = Trainer(run, folder, text, device, dtype, console)
    with _determinism(run.training.deterministic), memory_in_words(run.training):
        trainer.set_up(resume)
        trainer.run(profile)
    return trainer.finish(command)


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the embedding: a multiple of 64, as matrix units like it (GPT-2's 50,257 become 50,304)."""
    return -(-vocabulary // 64) * 64


def stored_run(folder: Path) -> RunConfig:
    """The settings of the run in `folder`. Raises `UsageError` if they cannot be read."""
    try:
        return RunConfig.from_json((folder / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise UsageError(f"out = {folder}: its config.json cannot be read ({problem}); choose another --out") from None


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of the run in `folder`, or None if it has not finished."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("finished") else None


def first_difference(stored: RunConfig, wanted: RunConfig) -> str | None:
    """The first setting in which two runs differ, in words; None if one can go on as the other."""
    left, right = _leaves(dataclasses.asdict(stored)), _leaves(dataclasses.asdict(wanted))
    for name in left | right:
        values = left.get(name), right.get(name)
        if name in MAY_DIFFER or values[0] == values[1]:
            continue
        if name == "training.precision" and "auto" in values:  # a checkpoint has which it was
            continue
        setting = name.rsplit(".", 1)[-1].replace("_", "-")
        return f"{setting} = {right.get(name)}: the run that is there has {left.get(name)}"
    return None


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


@contextlib.contextmanager
def claimed(folder: Path, doing: str) -> Iterator[None]:
    """Makes the folder and holds it against other processes. Raises `UsageError` where it cannot."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"out = {folder}: another process is {doing} there; wait, or choose another --out") from None
    except OSError as problem:
        raise UsageError(f"out = {folder}: cannot be written ({problem.strerror}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def _refuse_another(folder: Path, resume: bool) -> None:
    """Refuses a folder that holds something which would be lost."""
    if not resume and ((folder / "config.json").exists() or has_checkpoint(folder)):
        raise UsageError(f"out = {folder}: there is a run here already; add --resume to go on, or choose another --out")


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS documents this as its condition
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Trainer:
    """One run under way."""

    def __init__(
        self,
        run: RunConfig, folder: Path, text: PreparedText, device: torch.device, dtype: torch.dtype, console: Console,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.text = run, folder, text
        self.device, self.dtype, self.console = device, dtype, console
        training, model = run.training, run.model
        self.batches = Batches(
            text.splits["train"].tokens, model.context, training.batch_size, training.accumulation, training.seed
        )
        self.tokens_per_step = self.batches.sequences_per_step * model.context
        self.flops_per_token = flops_per_token(model)
        self.peak_flops = peak_flops(device, dtype)
        self.progress = Progress(precision=str(dtype).removeprefix("torch."))
        self.checkpoints = Checkpoints(folder)
        self.score: Score | None = None
        self.last_line: dict[str, Any] = {}
        self.stop = threading.Event()

    def set_up(self, resume: bool) -> None:
        """Makes the model and its optimizer, from a checkpoint where there is one, and the folder's first files."""
        reset_peak_memory(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(self.config.training.seed)
        training = self.config.training
        self.model = GPT(
            self.config.model, self.dtype, training.seed, checkpoint_activations=training.checkpoint_activations
        ).to(self.device)
        self.step = Step(self.model, training, self.batches)
        if resume:
            progress, said = load_checkpoint(self.folder, self.model, self.step.optimizer)
            for line in said:
                self.console.print(line, soft_wrap=True)
            if progress is not None:
                self._check_precision(progress)
                self.progress = replace(progress, precision=self.progress.precision)
                self.step.go_on_from(progress)
                self.console.print(f"going on from step {progress.step:,} of {self.config.training.steps:,}")
        upcycling = self.config.upcycling.upcycle is not None and self.progress.step == 0
        start = upcycle(self.model, self.config, self.text.tokenizer) if upcycling else None
        self.text.tokenizer.save(self.folder / "tokenizer")
        write_aside(self.folder / "config.json", self.config.to_json())
        self._keep_metrics_until(self.progress.step or -1)  # before the first step there is only an earlier start's
        if start is not None:
            self._log_start(start)

    def _check_precision(self, progress: Progress) -> None:
        """Raises `UsageError` where "auto" is another precision here than it was where the run began."""
        before, now = progress.precision, str(self.dtype).removeprefix("torch.")
        if before is not None and before != now:
            flag = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[before]
            raise UsageError(
                f"precision = {self.config.training.precision}: the run that is there was trained in {before}, and on "
                f"{self.device.type} this is {now}; give --precision {flag}, or another --out"
            )

    def run(self, profile: bool = False) -> None:
        """Trains to the last step."""
        training = self.config.training
        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(self._progress_bar())
            stack.enter_context(self._signals())
            stack.enter_context(self.checkpoints)
            ahead = stack.enter_context(contextlib.closing(self._windows()))
            stack.callback(self.step.release)
            self._warm_up()
            file = self.folder / "trace.json.gz"
            end_step = stack.enter_context(traced(file, self.device, self._say)) if profile else None
            clock = time.perf_counter()
            for windows, digest in ahead:
                self._step(windows)
                if end_step is not None:
                    end_step()
                self.progress.batches_digest = digest
                done = self.progress.step
                last, stopping = done == training.steps, self.stop.is_set()
                evaluate = last or done % training.evaluation_interval == 0
                measure = self.config.model.moe is not None and (last or done % training.routing_interval == 0)
                checkpoint = last or done % training.checkpoint_interval == 0 or stopping
                if evaluate or checkpoint or measure or done % training.log_interval == 0:
                    line = self._read_window()
                    synchronize(self.device)
                    self.progress.seconds += time.perf_counter() - clock
                    if measure:
                        line["routing"] = routing(self.model, next(self.batches.micro_batches(windows))[0])
                        if not last:  # E × E figures a layer: 0.8 MB a line at 24 layers of 64 experts
                            del line["routing"]["overlap"]
                    if evaluate:
                        line |= self._evaluate()
                    self._write_metrics(line)
                    advance(line)
                    if checkpoint:
                        self._save()
                    if stopping and not last:
                        self._say(f"stopping after step {done:,}, when its checkpoint is written")
                        self.checkpoints.wait()
                        raise Interrupted(f"stopped at step {done:,} of {training.steps:,}; add --resume to go on")
                    clock = time.perf_counter()

    def finish(self, command: str) -> dict[str, Any]:
        """Writes and returns the summary."""
        if self.score is None:  # stopped between the last checkpoint and the summary
            self.last_line = self._stored_metrics()[-1]
            self.score = score(self.model, self.text.splits["valid"])
        progress, model = self.progress, self.config.model
        per_second = progress.tokens / progress.seconds if progress.seconds else None
        summary = {
            "finished": True,
            "arm": self.config.arm,
            "seed": self.config.training.seed,
            "steps": progress.step,
            "tokens": progress.tokens,
            "tokens_per_step": self.tokens_per_step,
            "seconds": progress.seconds,
            "val_loss": self.score.loss,
            "val_bits_per_byte": self.score.bits_per_byte,
            "val_word_perplexity": self.score.word_perplexity,
            "train_loss": self.last_line["train_loss"],
            "tokens_per_second": per_second,
            "mfu": model_flops_utilization(per_second, self.flops_per_token, self.peak_flops) if per_second else None,
            "peak_memory_bytes": peak_memory(self.device),
            "parameters": dataclasses.asdict(count_parameters(model)),
            "flops_per_token": self.flops_per_token,
            "batches_sha256": progress.batches_digest,
            "data": {
                "name": self.text.name,
                "form": self.text.form,
                "source": self.text.source,
                "fingerprint": self.text.fingerprint,
                "tokenizer": self.text.tokenizer.name,
                "train_tokens": self.text.splits["train"].scored,
                "valid_tokens": self.text.splits["valid"].scored,
            },
            "environment": environment(self.device, self.dtype),
            "command": command,
        }
        if self.config.upcycling.upcycle is not None:
            starts = [line["started_from"] for line in self._stored_metrics() if "started_from" in line]
            summary["started_from"] = starts[0] if starts else None
        if model.moe is not None:
            deterministic = self.config.training.deterministic
            summary["backend"] = backend_of(model, self.device, self.dtype, deterministic).backend
            summary["token_types"] = token_types(self.model, self.text.splits["valid"], self.text.tokenizer)
        write_aside(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _windows(self) -> Generator[tuple[torch.Tensor, str]]:
        steps = range(self.progress.step, self.config.training.steps)
        return prefetched(self.batches, steps, self.progress.batches_digest, self.device)

    def _step(self, windows: torch.Tensor) -> None:
        self.step(windows)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step

    def _warm_up(self) -> None:
        """Makes the first step ready, before the clock starts."""
        if self.progress.step < self.config.training.steps:
            said = self.step.prepare(self.batches.windows(self.progress.step).to(self.device))
            if said is not None:
                self._say(said)

    def _read_window(self) -> dict[str, Any]:
        """A line of metrics from the window, which is emptied. Raises `RunFailed` on a loss that is not finite."""
        losses, norms, experts = self.step.window.read()
        first = self.progress.step - len(losses) + 1
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
            # Loss scaling meets gradients that are not finite on purpose, and skips their step.
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.step.scaler.is_enabled()):
                self._fail(step, "loss" if not math.isfinite(loss) else "gradient")
        scaler = self.step.scaler
        if scaler.is_enabled() and not math.isfinite(norms[-1]) and scaler.get_scale() < 1:
            self._fail(self.progress.step, "gradient")  # however small the scale
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "train_loss": sum(losses) / len(losses),
            "learning_rate": learning_rate(self.progress.step - 1, self.config.training),
            "gradient_norm": norms[-1] if math.isfinite(norms[-1]) else None,
        } | experts

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False)

    def _fail(self, step: int, what: str) -> None:
        training = self.config.training
        wider = "" if self.dtype == torch.float32 else ", or --precision fp32"
        clip = "" if training.clip else ", or --clip 1"
        with contextlib.suppress(RunFailed):
            self.checkpoints.wait()
        kept = "the checkpoint before it is kept" if has_checkpoint(self.folder) else "there was no checkpoint yet"
        raise Diverged(
            f"step {step}: the {what} is not finite; try a lower --learning-rate (now {training.learning_rate:g}), "
            f"more --warmup-steps (now {training.warmup_steps}){clip}{wider}; {kept}"
        )

    def _evaluate(self) -> dict[str, Any]:
        self.score = score(self.model, self.text.splits["valid"])
        line: dict[str, Any] = {"val_loss": self.score.loss, "val_bits_per_byte": self.score.bits_per_byte}
        if self.score.word_perplexity is not None:
            line["val_word_perplexity"] = self.score.word_perplexity
        return line

    def _log_start(self, start: Start) -> None:
        """Scores an upcycled model before its first step: line 0 of the metrics, and a line for the user."""
        line = {"step": 0, "tokens": 0} | self._evaluate() | {"started_from": dataclasses.asdict(start)}
        self._write_metrics(line)
        moe = self.config.model.moe
        assert moe is not None
        words = start.in_words(moe.experts, len(self.config.model.moe_layers), line["val_loss"])
        self._say(words)

    def _save(self) -> None:
        if self.step.scaler.is_enabled():
            self.progress.loss_scale = self.step.scaler.state_dict()
        said = self.checkpoints.save(self.model, self.step.optimizer, self.progress)
        if said is not None:
            self._say(said)

    def _write_metrics(self, line: dict[str, Any]) -> None:
        line["seconds"] = round(self.progress.seconds, 6)
        self.last_line = line
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _stored_metrics(self) -> list[dict[str, Any]]:
        """The lines so far, without a last one that a killed process left half written."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().split("\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def _keep_metrics_until(self, step: int) -> None:
        """Drops lines after the checkpoint that the run goes on from: those steps are made again."""
        kept = [line for line in self._stored_metrics() if line["step"] <= step]
        write_aside(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Lets the step at hand finish on Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask_to_stop(number: int, _frame: object) -> None:
            self.stop.set()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            for number in before:
                signal.signal(number, ask_to_stop)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        training = self.config.training
        with Bar(*columns, console=self.console, transient=True) as bar:
            name = f"{self.config.arm}, seed {training.seed}"
            task = bar.add_task(name, total=training.steps, completed=self.progress.step, figures="")
            begun = (self.progress.tokens, self.progress.seconds)

            def advance(line: dict[str, Any]) -> None:
                tokens, seconds = line["tokens"] - begun[0], line["seconds"] - begun[1]
                rate = tokens / seconds if seconds else 0
                figures = f"loss {line['train_loss']:.3f}  {rate:,.0f} tokens/s"
                bar.update(task, completed=line["step"], figures=figures)
                if "val_loss" in line:
                    bar.console.print(
                        f"{name}: step {line['step']:>6,}  train {line['train_loss']:.4f}"
                        f"  valid {line['val_loss']:.4f} ({line['val_bits_per_byte']:.4f} bits/byte)"
                        f"  {rate:,.0f} tokens/s",
                        highlight=False,
                        soft_wrap=True,
                    )

            yield advance


def write_aside(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it into it, so that it is never half there."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    os.replace(aside, path)
