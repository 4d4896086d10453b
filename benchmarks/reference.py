"""The whole experiment of the project that moelab grows out of, with the same tokens for every arm.

    python benchmarks/reference.py --text english.tar.xz --wikitext wikitext-103 --minutes 8
    python benchmarks/reference.py --read --publish docs/results

Each size is a folder of `moelab compare` below --out. The same command goes on where it stopped, run by run, and trains
nothing twice. It may run several times at once, on a GPU each (CUDA_VISIBLE_DEVICES): a run that another process has is
passed over. A finished run is scored on WikiText-103's test split and its checkpoints are deleted; so of --out
everything but `checkpoints` of a run under way is small, and can be carried to another machine and gone on with there.
Runs that have a checkpoint come first. The micro-batch of a size is the largest that the memory holds in all its arms;
it is chosen once, by the process that comes first, and kept in SIZE/micro-batch.json, on other GPUs too. At the end
README.md in --out reads the results (`reading.py`).

A run that fails does not keep the others from being trained. SIZE/RUN.failed.txt says why, and the next time it is
tried again, as another GPU may have the memory that it lacked. One whose loss did not stay finite is not tried again
until its SIZE/RUN.diverged.txt is deleted. The exit status is 1 as long as a selected run has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from filelock import FileLock, Timeout
from reading import DIVERGED, FAILED, RATE, SEQUENCES_A_STEP, WIKITEXT, reasons, write_page
from rich.console import Console

from moelab.compare import Comparison, run_comparison, with_one_micro_batch
from moelab.compare.plan import BUDGETS, PlannedRun
from moelab.compare.run import costs_of_arms, read_run
from moelab.config import DataConfig, RunFailed, UsageError
from moelab.evaluation import score
from moelab.presets import ARMS, preset
from moelab.text import Tokenizer, prepare
from moelab.training import load, train
from moelab.training.checkpoint import has_checkpoint
from moelab.training.loop import Diverged, Interrupted, finished_summary, write_aside
from moelab.training.memory import NotEnoughMemory, split_as

EVALUATIONS = 40  # along a run; a loss that was reached is read off between two of them
ALL_ARMS = ("dense", "moe", "dense-wide", "moe-matched")
MICRO_BATCH = "micro-batch.json"


@dataclass(frozen=True)
class Size:
    """One comparison of the experiment."""

    preset: str
    seeds: int = 1
    arms: tuple[str, ...] = ALL_ARMS
    context: int | None = None
    """The preset's own when not given."""
    learning_rate: float | None = None
    """At its peak; it ends at the preset's share of it. The preset's own when not given."""
    sequences: int = 8
    """Of a step, of every arm: 8 is the starting point's MoE batch. More make fewer steps, of as many tokens in all."""


SIZES = {
    "5m": Size("5m", seeds=3),
    "40m": Size("40m", seeds=3),
    "124m": Size("124m"),
    # Dense loss over compute is fitted at one context, that of the two large sizes.
    "5m-1024": Size("5m", arms=("dense", "moe", "dense-wide"), context=1024),
    "40m-1024": Size("40m", arms=("dense", "moe", "dense-wide"), context=1024),
    "350m": Size("350m"),
    # The starting point's learning rate was tuned for no arm: all of them at others too, where that is cheap.
    **{
        f"{name}{RATE}{rate}": Size(name, learning_rate=float(rate))
        for name, rates in (("5m", ("1e-3", "3e-3")), ("40m", ("1e-3", "3e-3")), ("124m", ("1e-4", "1e-3")))
        for rate in rates
    },
    # And larger steps, with the learning rate up by the root of the ratio: an expert sees a quarter of a step's tokens.
    f"124m{SEQUENCES_A_STEP}32": Size("124m", sequences=32, learning_rate=6e-4),
}
TRIAL = {"smoke": Size("smoke", seeds=2)}  # the same on a small scale, to see that all of it works


@dataclass(frozen=True)
class Reference:
    """Train, score and read the reference results."""

    text: Path | None = None
    """Text to train on: a file, a folder (its file valid.txt is held out), or a tar archive of one, which is unpacked
    beside --out; this Python's standard library when not given."""
    wikitext: Path | None = None
    """WikiText-103's folder or zip; its test split is scored detokenized. Not scored when not given."""
    ranks: Path | None = None
    """GPT-2's ranks, offline."""
    tokenizer: str = "gpt2"
    """gpt2, bpe:VOCAB or bytes."""
    out: Path = Path("runs/reference")
    """Folder that everything is kept in; what is there is gone on with."""
    only: str = ",".join(SIZES)
    """Sizes to train, in this order; smoke is a trial of the whole."""
    arms: str = ",".join(ALL_ARMS)
    """Arms to train."""
    seeds: str = "0,1,2"
    """Seeds to train, of those that a size has."""
    budgets: str = "tokens"
    """tokens, and flops and seconds for runs that end at equal FLOPs and time, once all others of a size are there."""
    steps: int = 5_000
    """Optimizer steps of a run of 8 sequences a step; fewer where a step has more, for as many tokens."""
    minutes: float | None = None
    """Stop training after so many minutes. The checkpoint of the run under way and the reports are written then."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu."""
    keep_checkpoints: bool = False
    """Keep the checkpoints and the tokenizer of finished runs."""
    read: bool = False
    """Train nothing and write no report; only write the page of what is there."""
    publish: Path | None = None
    """Also copy results, reports and scores to this folder, without the runs, and write the page there."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        reference(tyro.cli(Reference, args=words), shlex.join(["python", "benchmarks/reference.py", *words]))
    except UsageError as problem:
        print(f"reference.py: {problem}", file=sys.stderr)
        return 2
    except RunFailed as problem:
        print(f"reference.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reference.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def reference(settings: Reference, command: str) -> None:
    """Trains what is missing until the time is over, and writes the reports and the page of what is there.

    Raises `RunFailed` at the end where selected runs have failed, or a report could not be written.
    """
    console, failed = Console(), list[str]()
    data = DataConfig() if settings.read else data_config(settings)
    planned = {name: comparison(size, settings, data) for name, size in {**SIZES, **TRIAL}.items()}
    names = chosen(settings.only, planned, "only")
    if not settings.read:
        over = threading.Event()
        try:
            with time_limit(settings.minutes, over):
                for name in names:
                    train_size(planned[name], settings, settings.out / name, command, over, console)
                    report(planned[name], settings.out / name, command, console)  # now, and not after hours
        except Interrupted:
            if not over.is_set():
                raise
            console.print("The time is over; the same command goes on from here.")
        for name in names:
            if problem := report(planned[name], settings.out / name, command, console):
                failed.append(f"the report of {name} ({problem})")
            failed += failures(planned[name], settings, settings.out / name)
    if settings.publish is not None:
        publish(settings.out, settings.publish, names)
    read = {name: planned[name] for name in dict.fromkeys([*SIZES, *names])}
    for folder in filter(None, (settings.out, settings.publish)):
        console.print(str(write_page(folder, read)), soft_wrap=True, highlight=False)
    if failed:
        raise RunFailed(f"not made: {'; '.join(failed)}")


def chosen(words: str, known: Iterable[str], setting: str) -> list[str]:
    """The names that a flag lists. Raises `UsageError` on one that is not known, and on none."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    strange = next((name for name in names if name not in known), None)
    if strange is not None or not names:
        raise UsageError(f"{setting} = {strange or '(nothing)'}: give some of {', '.join(known)}")
    return names


def comparison(size: Size, settings: Reference, data: DataConfig) -> Comparison:
    """The plan of a size: the starting point's settings, the same sequences for every arm."""
    base = preset(size.preset)
    steps = settings.steps * Size.sequences // size.sequences
    rate = size.learning_rate or base.training.learning_rate
    training = replace(
        base.training,
        learning_rate=rate,
        min_learning_rate=rate * base.training.min_learning_rate / base.training.learning_rate,
        steps=steps,
        warmup_steps=min(base.training.warmup_steps, steps // 10),
        batch_size=size.sequences,
        accumulation=1,
        evaluation_interval=max(10, steps // EVALUATIONS),
        checkpoint_interval=steps,  # and where it is stopped: 21 GB each, of the 350M MoE
        device=settings.device,
    )
    return Comparison(
        preset=size.preset,
        arms=size.arms,
        seeds=size.seeds,
        budgets=tuple(chosen(settings.budgets, ("tokens", "flops", "seconds"), "budgets")),
        model=replace(base.model, context=size.context or base.model.context),
        moe=base.moe,
        data=data,
        training=training,
    )


def data_config(settings: Reference) -> DataConfig:
    """The text to train on, unpacked where it comes in an archive."""
    if settings.text is None:
        return DataConfig(tokenizer=settings.tokenizer, ranks=settings.ranks)
    place = settings.text
    if place.is_file() and tarfile.is_tarfile(place):
        place = unpacked(place, settings.out.parent)
    glob = "**/*.txt" if place.is_dir() else DataConfig().glob
    return DataConfig(data=f"text:{place}", glob=glob, tokenizer=settings.tokenizer, ranks=settings.ranks)


def unpacked(archive: Path, beside: Path) -> Path:
    """The folder that an archive holds, unpacked once: a run that goes on reads the same path again."""
    place = beside / archive.name.partition(".")[0]
    beside.mkdir(parents=True, exist_ok=True)
    with FileLock(beside / f".{place.name}.lock"):
        if not place.exists():
            aside = beside / f".{place.name}.unpacking"
            shutil.rmtree(aside, ignore_errors=True)
            with tarfile.open(archive) as files:
                files.extractall(aside, filter="data")
            inside = list(aside.iterdir())
            os.replace(inside[0] if len(inside) == 1 and inside[0].is_dir() else aside, place)
            shutil.rmtree(aside, ignore_errors=True)
    return place


@contextlib.contextmanager
def time_limit(minutes: float | None, over: threading.Event) -> Iterator[None]:
    """Sets `over` after so many minutes and interrupts the block, as SIGTERM does: a run then writes its checkpoint."""
    inside = True

    def stop(*_: object) -> None:
        if inside:
            raise Interrupted("stopped between two runs")

    def ring() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    timer = None if minutes is None else threading.Timer(60 * minutes, ring)
    try:
        if timer is not None:
            timer.start()
        yield
    finally:
        inside = False
        if timer is not None:
            timer.cancel()
            timer.join()  # or its signal could come when nobody expects it
        signal.signal(signal.SIGTERM, before)


def train_size(
    planned: Comparison, settings: Reference, folder: Path, command: str, over: threading.Event, console: Console
) -> None:
    """Trains and scores the selected runs of one size, those first that have a checkpoint."""
    runs = selected(planned, settings)
    if over.is_set():
        raise Interrupted("stopped between two sizes")
    try:
        planned = of_one_micro_batch(planned, folder, console)
    except NotEnoughMemory as problem:
        for plan in runs:
            if finished_summary(folder / plan.folder) is None:
                note_failure(folder, plan.folder, problem)
        return
    for stage in stages(planned, settings, folder):
        for plan in sorted(stage, key=lambda plan: not has_checkpoint(folder / plan.folder)):
            if over.is_set():
                raise Interrupted("stopped between two runs")
            with contextlib.suppress(Timeout), FileLock(folder / f".{plan.folder}.lock", timeout=0):
                finish(plan, settings, folder, command)


def selected(planned: Comparison, settings: Reference) -> list[PlannedRun]:
    """A size's runs of equal tokens, of the arms and seeds that were asked for."""
    arms = chosen(settings.arms, ARMS, "arms")
    seeds = chosen(settings.seeds, [str(seed) for seed in range(3)], "seeds")
    return [run for run in planned.runs() if run.config.arm in arms and str(run.config.training.seed) in seeds]


def stages(planned: Comparison, settings: Reference, folder: Path) -> Iterator[list[PlannedRun]]:
    """The selected runs, and then, once all of a size are there, those of each further budget."""
    yield selected(planned, settings)
    for budget in planned.budgets[1:]:
        if all(finished_summary(folder / plan.folder) for plan in planned.runs()):
            yield further_runs(planned, folder, budget)


def further_runs(planned: Comparison, folder: Path, budget: str) -> list[PlannedRun]:
    """The runs of a further budget of a size whose runs of equal tokens are all finished."""
    runs = [read_run(folder, plan.folder, plan.budget) for plan in planned.runs()]
    return planned.budget_runs(budget, costs_of_arms(runs, budget))


def of_one_micro_batch(planned: Comparison, folder: Path, console: Console) -> Comparison:
    """A size's plan with the micro-batch of all its runs, which whoever comes first chooses before any is trained.

    It is stored beside the runs: another process may come before the first of them has begun. Raises `NotEnoughMemory`
    where the memory holds no arm of the size.
    """
    file = folder / MICRO_BATCH
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".micro-batch.lock"):
        if file.exists():
            before = replace(planned.training, auto_batch=False, **json.loads(file.read_text()))
            planned = replace(planned, training=split_as(planned.training, before))
        if planned.training.auto_batch:
            planned = with_one_micro_batch(planned, folder, console, without_those_too_large=True)
            chosen = {name: getattr(planned.training, name) for name in ("batch_size", "accumulation")}
            write_aside(file, json.dumps(chosen) + "\n")
    return planned


def finish(plan: PlannedRun, settings: Reference, folder: Path, command: str) -> None:
    """Trains a run to its end, scores it on WikiText-103 if it is one of equal tokens, and tidies it up."""
    place = folder / plan.folder
    if finished_summary(place) is None and not trained(plan, folder, command):
        return
    scores = folder / WIKITEXT
    unscored = settings.wikitext is not None and plan.budget == "tokens" and plan.folder not in stored_scores(scores)
    if settings.wikitext is not None and unscored and has_checkpoint(place):
        score = wikitext_score(place, settings.wikitext, settings.device)
        with FileLock(folder / ".scores.lock"):
            write_aside(scores, json.dumps(stored_scores(scores) | {plan.folder: score}, indent=2) + "\n")
        unscored = False
    if not settings.keep_checkpoints and not unscored:
        tidy(place)


def trained(plan: PlannedRun, folder: Path, command: str) -> bool:
    """Trains a run to its end; False where it fails, or its loss did not stay finite before."""
    place, diverged = folder / plan.folder, folder / f"{plan.folder}{DIVERGED}"
    if diverged.exists():
        print(f"{place}: its loss did not stay finite before; {diverged} says how to try it again", flush=True)
        return False
    print(f"{place}", flush=True)
    try:
        train(plan.config, place, resume=True, command=command)
    except (NotEnoughMemory, RunFailed) as problem:
        note_failure(folder, plan.folder, problem)
        return False
    (folder / f"{plan.folder}{FAILED}").unlink(missing_ok=True)
    return True


def note_failure(folder: Path, run: str, problem: NotEnoughMemory | RunFailed) -> None:
    """Says why a run failed, here and in a file beside it. Raises `problem` itself where that cannot be written."""
    what = str(problem).partition(";")[0]  # the rest names flags of `moelab train`
    print(f"reference.py: {folder / run}: {what}", file=sys.stderr, flush=True)
    if isinstance(problem, Diverged):
        ending = DIVERGED
        then = f"Delete this file to try it again from its checkpoint, if it has one, and {run}/ too to begin anew."
    else:
        ending, then = FAILED, "It is tried again the next time."
    try:
        write_aside(folder / f"{run}{ending}", f"{what}\n{then}\n")
    except OSError:
        raise problem from None


def failures(planned: Comparison, settings: Reference, folder: Path) -> list[str]:
    """The selected runs of a size that have failed, each with the reason."""
    asked = {plan.folder for plan in selected(planned, settings)}
    known = reasons(folder)
    asked |= {f"{run}-{budget}" for run in asked for budget in BUDGETS}
    return [f"{folder.name}/{run} ({why})" for run, why in known.items() if run in asked]


def stored_scores(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def tidy(place: Path) -> None:
    """Deletes of a finished run what only going on with it, or scoring it, would need."""
    if finished_summary(place) is not None:
        for name in ("checkpoints", "tokenizer"):
            shutil.rmtree(place / name, ignore_errors=True)


def wikitext_score(place: Path, source: Path, device: str) -> dict[str, Any]:
    """WikiText-103's test split as natural text, which is what the run was trained on; as `moelab eval --json`."""
    tokenizer = Tokenizer.load(place / "tokenizer")
    text = prepare(DataConfig("wikitext-103", source=source, detokenize=True), splits=("test",), tokenizer=tokenizer)
    found = score(load(place, device), text.splits["test"], "test")
    return found.as_json() | {"data": text.name, "form": text.form, "fingerprint": text.fingerprint}


def report(planned: Comparison, folder: Path, command: str, console: Console) -> str | None:
    """Writes results.json and the report of as much of a size as is finished, where they are not there yet.

    Returns why its runs cannot be compared, if they cannot: the other sizes can.
    """
    if not folder.exists():
        return None
    try:
        with FileLock(folder / ".report.lock"):
            report_finished(planned, folder, command, console)
    except (UsageError, RunFailed) as problem:
        return str(problem)
    return None


def report_finished(planned: Comparison, folder: Path, command: str, console: Console) -> None:
    part = finished_part(planned, folder)
    if part is None:
        return
    try:
        stored = json.loads((folder / "results.json").read_text())
        there = (tuple(stored["arms"]), tuple(stored["seeds"]), set(stored["budgets"]))
    except (OSError, ValueError, KeyError):
        there = ((), (), set())
    if there[:2] != (part.names, tuple(part.seed_values)) or not set(part.budgets) <= there[2]:
        run_comparison(part, folder, command, console)


def finished_part(planned: Comparison, folder: Path) -> Comparison | None:
    """The arms that are finished at the first seed, over as many seeds as all of them have; None of less than two.

    Of all arms and seeds with those further budgets whose runs are all finished.
    """
    done = {
        (run.config.arm, run.config.training.seed) for run in planned.runs() if finished_summary(folder / run.folder)
    }
    first, *further = planned.seed_values
    arms = tuple(arm for arm in planned.arms if (arm, first) in done)
    if len(arms) < 2:
        return None
    seeds = 1
    for seed in further:
        if not all((arm, seed) in done for arm in arms):
            break
        seeds += 1
    further = planned.budgets[1:] if (arms, seeds) == (planned.arms, planned.seeds) else ()
    ended = (
        budget
        for budget in further
        if all(finished_summary(folder / run.folder) for run in further_runs(planned, folder, budget))
    )
    return replace(planned, arms=arms, seeds=seeds, budgets=("tokens", *ended))


def publish(out: Path, to: Path, names: Sequence[str]) -> None:
    """Copies what a reader wants of each size: results, report and scores, and why runs failed."""
    for name in names:
        for run in reasons(to / name):  # of which some may be there by now
            for ending in (DIVERGED, FAILED):
                (to / name / f"{run}{ending}").unlink(missing_ok=True)
        failed = [f"{run}{ending}" for run in reasons(out / name) for ending in (DIVERGED, FAILED)]
        for file in ("results.json", "report.html", WIKITEXT, *failed):
            if (out / name / file).exists():
                (to / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / name / file, to / name / file)


if __name__ == "__main__":
    sys.exit(main())
