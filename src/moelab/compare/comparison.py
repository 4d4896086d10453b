"""Training every run of a comparison that is not finished yet, and writing what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moelab.compare.plan import Comparison, PlannedRun
from moelab.compare.report import write_report
from moelab.compare.results import build_results
from moelab.compare.run import Run, costs_of_arms, read_run
from moelab.compare.sweep import Trial, choose, sweep_results
from moelab.compare.table import print_table
from moelab.config import UsageError
from moelab.device import compute_dtype, resolve_device
from moelab.evaluation import score
from moelab.text import Tokenizer, prepare
from moelab.training import train
from moelab.training.checkpoint import load
from moelab.training.loop import (
    Diverged,
    Interrupted,
    claimed,
    finished_summary,
    first_difference,
    padded_vocabulary,
    stored_run,
    write_aside,
)
from moelab.training.memory import NotEnoughMemory, cut_as, split_as, split_in_words, split_step
from moelab.training.optimizer import long_warmup

DIVERGED = "diverged.txt"  # in the folder of a sweep's run whose loss did not stay finite: it is not tried again


def run_comparison(comparison: Comparison, folder: Path, command: str = "", console: Console | None = None) -> Path:
    """Trains what is missing of a comparison in `folder`, prints its table, and returns the path of its report.

    A finished run of the same settings is taken as it is and an unfinished one goes on from its checkpoint, so that the
    same command continues a comparison, and one with more arms, seeds or budgets takes over what it can. (The runs of
    equal FLOPs and seconds are as long as the cheapest arm makes them; where that changes, they are refused.)

    Raises:
        UsageError: the text of a swept comparison has no test split; the folder cannot be written, is being written by
            another process, or holds a run of other settings, which is then left as it was; whatever `training.train`
            raises.
        RunFailed: the arms did not see the same batches or text; no swept value of an arm kept its loss finite;
            whatever `training.train` raises.
        Interrupted: Ctrl-C or SIGTERM. What is finished is kept, and the run under way has its checkpoint.
    """
    console = console or Console()
    with claimed(folder, "comparing"):
        return _run(comparison, folder, command, console)


def _run(comparison: Comparison, folder: Path, command: str, console: Console) -> Path:
    for arm in comparison.names:
        if match := comparison.match_of(arm):
            console.print(f"{arm}: {match}", highlight=False, soft_wrap=True)
    planned = _first_runs(comparison)
    if _begun(planned, folder) is None:  # what goes on keeps its settings
        for line in filter(None, dict.fromkeys(long_warmup(plan.config.training) for plan in planned)):
            console.print(line, highlight=False, soft_wrap=True)
    comparison = with_one_micro_batch(comparison, folder, console)
    trials: dict[str, list[Trial]] = {}
    if comparison.sweeps:
        trials = _tune(comparison, folder, command, console)
        comparison = comparison.tuned({arm: choose(found) for arm, found in trials.items()})
    runs = _finish(comparison.runs(), folder, command, console)
    for budget in comparison.budgets[1:]:
        runs += _finish(comparison.budget_runs(budget, costs_of_arms(runs, budget)), folder, command, console)
    swept = None
    if comparison.sweeps:
        runs = [_with_test_loss(run, folder, comparison.training.device, console) for run in runs]
        swept = sweep_results(comparison.sweeps, comparison.training.seed, trials, comparison.chosen)
    results = build_results(comparison, runs, command, swept)
    write_aside(folder / "results.json", json.dumps(results, indent=2, default=str) + "\n")
    print_table(results, console)
    return write_report([folder])


def _first_runs(comparison: Comparison) -> list[PlannedRun]:
    """The runs that need no other's result: an arm's trials where it is tuned, or its runs."""
    swept = {arm: list(comparison.sweep_runs(arm).values()) for arm in comparison.names}
    tried = [plan for arm in comparison.names for plan in swept[arm]]
    return tried + [plan for plan in comparison.runs() if not swept[plan.config.arm]]


def _begun(planned: Sequence[PlannedRun], folder: Path) -> Path | None:
    """The first of the runs that is there already."""
    return next((folder / plan.folder for plan in planned if (folder / plan.folder / "config.json").exists()), None)


def with_one_micro_batch(
    comparison: Comparison, folder: Path, console: Console, *, without_those_too_large: bool = False
) -> Comparison:
    """The comparison with one micro-batch for all runs: that of a run which is there, or the largest that all take.

    It is part of what is computed, through rounding and the scope of the balance loss. Runs that are trained one by one
    (`training.train`) would each choose their own.

    Args:
        comparison: all of it, however few of its runs are trained now.
        folder: of its runs, those of them that are there already.
        console: where the choice is said.
        without_those_too_large: where the memory does not hold an arm in any micro-batch, choose for the others. That
            arm has the same micro-batch, and is refused when it is trained there.

    Raises:
        NotEnoughMemory: the memory does not hold every arm (or any, with `without_those_too_large`): now, and not when
            the first of them is trained.
        UsageError: a run's settings, or the text, cannot be read.
        RunFailed: the text could not be prepared.
    """
    training, planned = comparison.training, _first_runs(comparison)
    if (begun := _begun(planned, folder)) is not None:
        training = split_as(training, stored_run(begun).training)
    if left := [plan.config for plan in planned if not finished_summary(folder / plan.folder)]:
        vocabulary = padded_vocabulary(prepare(comparison.data).tokenizer.vocabulary)
        device = resolve_device(training.device)
        runs = [
            replace(run, model=replace(run.model, vocabulary=vocabulary), training=cut_as(run.training, training))
            for run in left
        ]
        dtype = compute_dtype(training.precision, device)
        while True:
            try:
                training = cut_as(training, split_step(runs, device, dtype, resuming=begun is not None))
                break
            except NotEnoughMemory as problem:
                runs = [run for run in runs if run.arm != problem.arm]
                if not (without_those_too_large and runs):
                    raise
    if comparison.training.auto_batch:
        console.print(f"every arm: {split_in_words(training)} a step", highlight=False, soft_wrap=True)
    return replace(comparison, training=training)


def _tune(comparison: Comparison, folder: Path, command: str, console: Console) -> dict[str, list[Trial]]:
    """Tries every value for every arm that has a use for one. A run whose loss does not stay finite is a trial too."""
    planned = {arm: comparison.sweep_runs(arm) for arm in comparison.names}
    tried = [(arm, point, plan) for arm, of_arm in planned.items() for point, plan in of_arm.items()]
    for _, _, plan in tried:
        _refuse_other_settings(plan, folder / plan.folder)
    if not all("test_loss" in (finished_summary(folder / plan.folder) or {}) for _, _, plan in tried):
        prepare(comparison.data, splits=("train", "valid", "test"))  # refused now, and not after the sweep
    trials: dict[str, list[Trial]] = {}
    for number, (arm, point, plan) in enumerate(tried, start=1):
        about, diverged = f"{plan.folder} ({number} of {len(tried)} runs of the sweep)", folder / plan.folder / DIVERGED
        loss = None
        if diverged.exists():
            console.print(f"{about}: its loss did not stay finite before", highlight=False, soft_wrap=True)
        else:
            try:
                _train(plan, folder, command, console, about)
                loss = read_run(folder, plan.folder, plan.budget).loss
            except Diverged as problem:
                console.print(f"{plan.folder}: {problem}", highlight=False, soft_wrap=True)
                write_aside(diverged, f"{problem}\n")
        trials.setdefault(arm, []).append(Trial(arm, point, plan.folder, loss))
    return trials


def _finish(planned: Sequence[PlannedRun], folder: Path, command: str, console: Console) -> list[Run]:
    """Trains what is not finished of some runs; refuses all of them if one holds a run of other settings."""
    for plan in planned:
        _refuse_other_settings(plan, folder / plan.folder)
    for number, plan in enumerate(planned, start=1):
        _train(
            plan, folder, command, console, f"{plan.folder} ({number} of {len(planned)} runs at equal {plan.budget})"
        )
    return [read_run(folder, plan.folder, plan.budget) for plan in planned]


def _train(plan: PlannedRun, folder: Path, command: str, console: Console, about: str) -> None:
    """Finishes one run, from its checkpoint where there is one."""
    place = folder / plan.folder
    if finished_summary(place):
        console.print(f"{about}: finished before", highlight=False)
        return
    console.print(about, highlight=False)
    try:
        train(plan.config, place, resume=True, command=command)
    except Interrupted:
        raise Interrupted(
            f"stopped in {place}; what is finished is kept, and the same command goes on from here"
        ) from None


def _with_test_loss(run: Run, folder: Path, device: str, console: Console) -> Run:
    """The run with its figures on the test split, which are taken once and kept in its summary."""
    if "test_loss" in run.summary:
        return run
    place = folder / run.folder
    console.print(f"{run.folder}: scoring the test split", highlight=False)
    text = prepare(stored_run(place).data, splits=("test",), tokenizer=Tokenizer.load(place / "tokenizer"))
    found = score(load(place, device), text.splits["test"], "test")
    summary = run.summary | {
        "test_loss": found.loss,
        "test_bits_per_byte": found.bits_per_byte,
        "test_word_perplexity": found.word_perplexity,
        "test_tokens": found.tokens,
        "test_fingerprint": text.fingerprint,
    }
    write_aside(place / "summary.json", json.dumps(summary, indent=2) + "\n")
    return replace(run, summary=summary)


def _refuse_other_settings(plan: PlannedRun, place: Path) -> None:
    """Raises `UsageError` if there is a run of other settings in a planned run's folder."""
    if not (place / "config.json").exists():
        return
    stored = stored_run(place)
    # The vocabulary is no setting: training takes it from the text, and the fingerprint of the text is compared.
    wanted = replace(plan.config, model=replace(plan.config.model, vocabulary=stored.model.vocabulary))
    if difference := first_difference(stored, wanted):
        raise UsageError(f"{difference} ({place}); choose another --out, or move that folder away")
