"""The command `moelab`: one small function a command.

Flags come from the dataclasses of `config` through tyro, with the preset's values as their defaults. Exit status 0, 1 =
failed, 2 = bad usage, 130 = stopped by the user; an error is one line on the standard error stream.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from moelab.bench.layer import TWIN, LayerBench
from moelab.bench.step import StepBench
from moelab.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    RunFailed,
    TrainingConfig,
    UpcyclingConfig,
    UsageError,
    require,
)
from moelab.presets import ARMS, PRESETS, arm_model, preset, solve_match
from moelab.training.checkpoint import writing

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class SizeFlags:
    """What `train` and `compare` start from, and every setting that changes it."""

    preset: tyro.conf.Positional[str] = "smoke"
    """Size to start from: smoke, 5m, 40m, 124m or 350m."""
    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes] = DataConfig()
    training: Annotated[TrainingConfig, tyro.conf.OmitArgPrefixes] = TrainingConfig()
    model: Annotated[ModelConfig, tyro.conf.OmitArgPrefixes] = ModelConfig()
    moe: Annotated[MoEConfig, tyro.conf.OmitArgPrefixes] = MoEConfig()


@dataclass(frozen=True)
class TrainFlags(SizeFlags):
    """Train one model."""

    arm: str = "dense"
    """Which model: dense, moe, dense-wide (dense, with the MoE's active FLOPs) or moe-matched (MoE, with dense's)."""
    out: Path | None = None
    """Folder of the run; out-baseline for dense, out-moe for moe, out-ARM for others, when not given."""
    resume: bool = False
    """Go on with the run in that folder, from its newest checkpoint."""
    profile: bool = False
    """Also write a timeline of a few steps, trace.json.gz in the run's folder, for https://ui.perfetto.dev."""
    upcycling: Annotated[UpcyclingConfig, tyro.conf.OmitArgPrefixes] = UpcyclingConfig()


@dataclass(frozen=True)
class CompareFlags(SizeFlags):
    """Train every arm on the same tokens and report which won."""

    arms: str = "dense,moe,dense-wide"
    """Arms, separated by commas; the others are compared against the first. Also: moe-matched. "" for none of them."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One more arm, NAME:key=value,…: moe, or another one by base=dense|dense-wide|moe-matched, with settings of its
    own by their flags (scores=sigmoid,bias-rate=0.001), also as moe.scores or training.learning-rate, with which
    min-learning-rate moves in proportion. Layers are moe-layers=1+3. Repeat it for more arms."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Tune every arm: learning-rate=1e-4,3e-4,1e-3 trains each value at the first seed, takes the one of the lowest
    validation loss, and the arms are compared by their test loss. Repeat it for a grid."""
    seeds: int = 1
    """Runs of each arm, with seeds --seed, --seed + 1, …; 3 or more give an interval worth reading."""
    budgets: str = "tokens"
    """What arms are given the same of: tokens, and, by runs of their own, flops and seconds (tokens,flops,seconds)."""
    out: Path | None = None
    """Folder of the comparison; runs/compare-PRESET when not given."""


@dataclass(frozen=True)
class EvalFlags:
    """Score a trained run on a whole split."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: str | None = None
    """Corpus; the run's own when not given."""
    source: Path | None = None
    """Local files of a named corpus."""
    detokenize: bool = False
    """WikiText as natural text, which is what a model trained on natural text is to be scored on."""
    glob: str | None = None
    """Which files of a text:PATH folder are read."""
    tokenizer: str | None = None
    """The run's own tokenizer, which is the only one that its model can read; named for a check."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which part of the corpus."""
    stride: int | None = None
    """Tokens between the starts of contexts; the whole context when not given, so that none overlap."""
    batch_size: int | None = None
    """Contexts computed at once; chosen from the sizes when not given."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class SampleFlags:
    """Write text with a trained run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: str = ""
    """Text to go on from."""
    tokens: int = 200
    """Most tokens to write."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 for all."""
    seed: int = 0
    """Seed of the draw."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu."""


@dataclass(frozen=True)
class InspectFlags:
    """Show which experts a text's tokens are sent to."""

    run: tyro.conf.Positional[Path]
    """Folder of a run with experts."""
    text: str | None = None
    """The text; the beginning of the run's validation text when neither this nor --file is given."""
    file: Path | None = None
    """A file of text."""
    layer: str = "all"
    """Number of an MoE layer (the first layer is 0), or all."""
    json: Path | None = None
    """Also write tokens, experts and weights of every layer to this file."""
    device: str = "auto"
    """cuda, cuda:N, mps or cpu."""


@dataclass(frozen=True)
class ReportFlags:
    """Write the report of finished comparisons again."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of comparisons."""
    out: Path | None = None
    """The page to write; report.html in the folder when there is one, else in the current folder."""


@dataclass(frozen=True)
class PrepareFlags(DataConfig):
    """Turn a corpus into token files, once; training does it by itself when it was not done."""

    data: tyro.conf.Positional[str] = field()
    """stdlib, wikitext-2, wikitext-103 (and their -raw forms), or text:PATH."""


@dataclass(frozen=True)
class BenchLayerFlags:
    """Time one MoE layer with every backend, beside the dense twin."""

    bench: Annotated[LayerBench, tyro.conf.OmitArgPrefixes] = LayerBench()
    json: Path | None = None
    """Also write the figures to this file."""
    picture: Path | None = None
    """Also draw them to this file (.png, .svg or .pdf)."""


@dataclass(frozen=True)
class BenchStepFlags:
    """Time whole optimizer steps of training: sizes, arms and backends, and where the time goes."""

    bench: Annotated[StepBench, tyro.conf.OmitArgPrefixes] = StepBench()
    json: Path | None = None
    """Also write the figures to this file."""
    picture: Path | None = None
    """Also draw them to this file (.png, .svg or .pdf)."""


@dataclass(frozen=True)
class NoFlags:
    """(no flags)"""


def train(arguments: list[str]) -> None:
    """train one model"""
    from moelab.training import train as train_run
    from moelab.training.optimizer import long_warmup

    chosen = _preset_of(arguments)
    base = TrainFlags(preset=chosen, **_preset_settings(chosen))
    flags = of_given_batch(parse(TrainFlags, "train", arguments, base), arguments)
    run = run_config(flags)
    default = run_config(replace(base, arm=flags.arm, preset=flags.preset))
    if run.model.moe is None and flags.arm == "dense" and flags.moe != base.moe:
        name, value = next((n, v) for n, v in asdict(flags.moe).items() if v != asdict(base.moe)[n])
        raise UsageError(f"{name.replace('_', '-')} = {value}: the arm dense has no experts; give --arm moe")
    if match := solve_match(flags.arm, flags.model, flags.moe):
        print(f"moelab: {flags.arm}: {match}", file=sys.stderr)
    out = flags.out or Path({"dense": "out-baseline"}.get(flags.arm, f"out-{flags.arm}"))
    if flags.resume and (out / "config.json").exists():
        run = resumed_config(out, run, default, arguments)
        if _gives_batch(arguments):  # as it was given, even where that is the preset's
            asked = flags.training
            training = replace(run.training, batch_size=asked.batch_size, accumulation=asked.accumulation)
            run = replace(run, training=training)
    elif line := long_warmup(run.training):
        print(f"moelab: {line}", file=sys.stderr)
    summary = train_run(run, out, resume=flags.resume, profile=flags.profile, command=_command("train", arguments))
    print(f"{out}: validation loss {summary['val_loss']:.4f} ({summary['val_bits_per_byte']:.4f} bits per byte)")


def compare(arguments: list[str]) -> None:
    """train every arm on the same tokens and report which won"""
    from moelab.compare import Comparison, parse_arm, parse_sweep, run_comparison
    from moelab.device import compute_dtype, resolve_device
    from moelab.experts import check_backend

    chosen = _preset_of(arguments)
    base = CompareFlags(preset=chosen, **_preset_settings(chosen))
    flags = of_given_batch(parse(CompareFlags, "compare", arguments, base), arguments)
    comparison = Comparison(
        preset=flags.preset,
        arms=_words(flags.arms),
        seeds=flags.seeds,
        budgets=_words(flags.budgets),
        model=flags.model,
        moe=flags.moe,
        data=flags.data,
        training=flags.training,
        overridden=tuple(map(parse_arm, flags.arm)),
        sweeps=tuple(map(parse_sweep, flags.sweep)),
    )
    device = resolve_device(flags.training.device)
    dtype, deterministic = compute_dtype(flags.training.precision, device), flags.training.deterministic
    models = [replace(flags.model, moe=flags.moe), *(comparison.model_of(arm) for arm in comparison.names)]
    for model in models:  # now, and not when the dense arm is trained
        if model.moe is not None:
            check_backend(model.moe.backend, device, dtype, model.activation, model.bias, deterministic)
    out = flags.out or Path("runs") / f"compare-{flags.preset}"
    print(run_comparison(comparison, out, command=_command("compare", arguments)))


def evaluate(arguments: list[str]) -> None:
    """score a trained run on a whole split"""
    from moelab.evaluation import score
    from moelab.text import Tokenizer, prepare
    from moelab.training.checkpoint import load, read_run

    flags = parse(EvalFlags, "eval", arguments)
    _check_writable(flags.json)
    require(flags.batch_size is None or flags.batch_size >= 1, "batch-size", flags.batch_size, "give 1 or more")
    run, config = read_run(flags.run)
    tokenizer = Tokenizer.load(run / "tokenizer")
    if flags.tokenizer not in (None, tokenizer.name):
        raise UsageError(f"tokenizer = {flags.tokenizer}: this run reads {tokenizer.name}; leave --tokenizer out")
    own = DataConfig(data=flags.data, source=flags.source) if flags.data else config.data
    data = replace(own, source=flags.source or own.source, detokenize=flags.detokenize or own.detokenize)
    if flags.glob is not None:
        data = replace(data, glob=flags.glob)
    text = prepare(data, splits=(flags.split,), tokenizer=tokenizer)
    model = load(run, flags.device)
    result = score(model, text.splits[flags.split], flags.split, stride=flags.stride, batch_size=flags.batch_size)
    figures = result.as_json()
    if flags.json:
        about = {"data": text.name, "form": text.form, "source": text.source, "tokenizer": tokenizer.name}
        flags.json.write_text(json.dumps(figures | about, indent=2) + "\n")
    print(f"{run} on {text.name}, {flags.split} split, tokenizer {tokenizer.name}:")
    for name, value in figures.items():
        if name != "split" and value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            print(f"  {name.replace('_', ' '):<16}{shown:>16}")


def _check_writable(file: Path | None, name: str = "json") -> None:
    """Raises `UsageError` now, and not when the figures are there."""
    if file is not None:
        there = file.exists()
        try:
            with file.open("a"):
                pass
        except OSError as problem:
            raise UsageError(f"{name} = {file}: cannot be written ({problem.strerror}); give another file") from None
        if not there:
            file.unlink()


def sample(arguments: list[str]) -> None:
    """write text with a trained run"""
    from moelab.evaluation import sample as continuation
    from moelab.text import Tokenizer
    from moelab.training.checkpoint import load, read_run

    flags = parse(SampleFlags, "sample", arguments)
    run, _ = read_run(flags.run)
    tokenizer = Tokenizer.load(run / "tokenizer")
    written = continuation(
        load(run, flags.device), tokenizer, flags.prompt,
        tokens=flags.tokens, temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed,
    )  # fmt: skip
    print(flags.prompt + tokenizer.decode(list(written)))


def inspect(arguments: list[str]) -> None:
    """show which experts a text's tokens are sent to"""
    from rich.console import Console

    from moelab.evaluation.inspection import inspect_text, print_inspection
    from moelab.text import Tokenizer, prepare
    from moelab.training.checkpoint import load, read_run

    flags = parse(InspectFlags, "inspect", arguments)
    _check_writable(flags.json)
    run, config = read_run(flags.run)
    if config.model.moe is None:
        raise UsageError(f"run = {run}: it is dense and has no experts; give a run of an MoE arm")
    tokenizer = Tokenizer.load(run / "tokenizer")
    layers = sorted(config.model.moe_layers)
    if flags.layer != "all":
        known = ", ".join(map(str, layers))
        if not flags.layer.isdigit() or int(flags.layer) not in layers:
            raise UsageError(f"layer = {flags.layer}: give all, or an MoE layer of this run: {known}")
        layers = [int(flags.layer)]
    if flags.text is not None:
        text = flags.text
    elif flags.file is not None:
        try:
            text = flags.file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"file = {flags.file}: cannot be read as UTF-8 text ({problem})") from None
    else:
        valid = prepare(config.data, splits=("valid",), tokenizer=tokenizer).splits["valid"].tokens
        text = tokenizer.decode(valid[1 : config.model.context]).replace("<|endoftext|>", "")
    found = inspect_text(load(run, flags.device), tokenizer, text)
    if flags.json:
        flags.json.write_text(json.dumps(found.as_json(), indent=1) + "\n")
    print_inspection(found, layers, Console(soft_wrap=False))


def report(arguments: list[str]) -> None:
    """write the report of finished comparisons again"""
    from moelab.compare import write_report

    flags = parse(ReportFlags, "report", arguments)
    if not flags.folders:
        raise UsageError("report: give the folder of a comparison")
    print(write_report(flags.folders, flags.out))


def data_list(arguments: list[str]) -> None:
    """the corpora that --data knows"""
    from moelab.text import CORPORA

    parse(NoFlags, "data list", arguments)
    for name, description in CORPORA.items():
        print(f"{name:<18} {description}")


def data_prepare(arguments: list[str]) -> None:
    """turn a corpus into token files"""
    from moelab.text import prepare

    flags = parse(PrepareFlags, "data prepare", arguments)
    text = prepare(flags, splits=("train", "valid", "test"))
    print(f"{text.name} from {text.source}")
    print(f"tokenizer {text.tokenizer.name}, fingerprint {text.fingerprint[:12]}: {text.folder}")
    for name, split in text.splits.items():
        words = f" {split.words:>12,} words" if split.words is not None else ""
        print(f"  {name:<6}{split.scored:>14,} tokens {split.bytes:>15,} bytes {split.documents:>10,} documents{words}")


def bench_layer(arguments: list[str]) -> None:
    """time one MoE layer with every backend, beside the dense twin"""
    from moelab.bench.layer import bench_layer as measure
    from moelab.bench.report import draw_layer, print_layer

    flags = parse(BenchLayerFlags, "bench layer", arguments)
    _timed(flags, measure, print_layer, draw_layer)


def bench_step(arguments: list[str]) -> None:
    """time whole steps of training: sizes, arms and backends, and where the time goes"""
    from moelab.bench.step import bench_step as measure
    from moelab.bench.step_report import draw_step, print_step

    flags = parse(BenchStepFlags, "bench step", arguments)
    _timed(flags, measure, print_step, draw_step)


def _timed(
    flags: BenchLayerFlags | BenchStepFlags,
    measure: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any], Console], None],
    draw: Callable[[dict[str, Any], Path], None],
) -> None:
    """Measures, prints, and writes what is to be written, the figures as they come in."""
    picture = flags.picture
    drawn = picture is None or picture.suffix.lower() in (".png", ".svg", ".pdf")
    require(drawn, "picture", picture, "give a name that ends in .png, .svg or .pdf")
    _check_writable(flags.json)
    _check_writable(picture, "picture")

    from moelab.training.loop import write_aside

    def keep(results: dict[str, Any]) -> None:
        if flags.json is not None and (flags.json.is_file() or not flags.json.exists()):  # and not a pipe
            write_aside(flags.json.resolve(), json.dumps(results, indent=2) + "\n")

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `timeout` sends it: what was timed is kept
    try:
        results = measure(flags.bench, lambda line: print(f"moelab: {line}", file=sys.stderr), keep)
    finally:
        signal.signal(signal.SIGTERM, before)
    if results["rows"]:
        show(results, Console())
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=2) + "\n")
    timed = [row for row in results["rows"] if "reason" not in row]
    if picture and timed:
        draw(results, picture)
    if results["stopped"]:
        raise KeyboardInterrupt
    if results.get("failed"):
        raise RunFailed(results["failed"])
    named, experts = flags.bench.backends, [row for row in results["rows"] if row["backend"] not in (None, TWIN)]
    if named != type(flags.bench).backends and experts and all("reason" in row for row in experts):
        known = "moelab info lists those usable here"
        raise RunFailed(f"backends = {', '.join(named)}: none got a time, for the reasons above; {known}")
    if not timed:
        raise RunFailed("bench: nothing got a time, for the reasons above")


def info(arguments: list[str]) -> None:
    """versions, devices, and each way to compute the experts: usable, or why not"""
    from moelab.config import moelab_home
    from moelab.device import compute_dtype, environment, resolve_device
    from moelab.experts import backends, choice

    parse(NoFlags, "info", arguments)
    device = resolve_device("auto")
    facts = environment(device, compute_dtype("auto", device)) | {"prepared data": str(moelab_home())}
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<27} {'unknown' if value is None else value}")
    alike: dict[str, list[str]] = {}
    for name, found in backends().items():
        if found.usable:
            print(f"{'backend ' + name:<27} usable {found.reason}")
        else:
            alike.setdefault(found.reason, []).append(name)
    print(f"{'backend auto':<27} {choice.in_words(device)}")
    for reason, names in alike.items():
        print(f"{'backend ' + ', '.join(names):<27} not usable")
        for line in re.split("; | && ", reason):
            print(_folded(line))


def _folded(text: str) -> str:
    """Indented, in lines no longer than the terminal's; a command goes on after a backslash."""
    end = " \\" if text.startswith("pip ") else ""
    width = shutil.get_terminal_size().columns - len("      ") - len(end)
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "    " + f"{end}\n      ".join(lines)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "info": info,
    "data list": data_list,
    "data prepare": data_prepare,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "inspect": inspect,
    "compare": compare,
    "report": report,
    "bench layer": bench_layer,
    "bench step": bench_step,
}


def run_config(flags: TrainFlags) -> RunConfig:
    """The run that flags of `train` describe."""
    model = arm_model(flags.arm, flags.model, flags.moe)
    return RunConfig(flags.preset, flags.arm, model, flags.data, flags.training, flags.upcycling)


def resumed_config(out: Path, given: RunConfig, default: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Settings to go on with: those that the run in `out` has, wherever the command line says nothing.

    What it says is kept, even where that is the default, for `training.train` to refuse what differs.
    """
    from moelab.training.loop import stored_run

    stored = stored_run(out)
    merged = _merge(asdict(stored), asdict(given), asdict(default), arguments)
    return RunConfig.from_json(json.dumps(merged, default=str))


def _merge(stored: Any, given: Any, default: Any, arguments: Sequence[str], name: str = "") -> Any:
    if isinstance(stored, dict) and isinstance(given, dict) and isinstance(default, dict):
        return {key: _merge(stored.get(key), given[key], default.get(key), arguments, key) for key in given}
    flag = name.replace("_", "-")
    said = given != default or _gives(arguments, f"--{flag}") or _gives(arguments, f"--no-{flag}")
    return given if said else stored


def parse(kind: type[Parsed], command: str, arguments: Sequence[str], default: Parsed | None = None) -> Parsed:
    """The flags of a command. tyro's framed messages become one line, a `UsageError`; `--help` prints and exits."""
    errors = io.StringIO()
    given = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=f"moelab {command}", args=list(arguments), default=given)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_one_line(errors.getvalue())}; see moelab {command} --help") from None


def _one_line(framed: str) -> str:
    """What tyro's frame says, without the frame, the title and the help text."""
    sections = [""]  # the title, the message, and what there is of help, between rules
    for row in framed.splitlines():
        text = row.strip("│╭╮╰╯─- ")
        if row.startswith("╭") or not text:
            sections.append("")
        else:
            sections[-1] += f" {row.strip('│ ')}"
    message = sections[1].strip().rstrip(".")
    if " = " in message:  # one of our own, from a dataclass that checked itself
        return message.split(": ", 1)[1]
    suggestion = re.search(r"Perhaps you meant: +(--[a-z0-9-]+)", "".join(sections))
    return f"{message}; did you mean {suggestion.group(1)}?" if suggestion else message


def _preset_of(arguments: Sequence[str]) -> str:
    """The preset, which decides the defaults of the flags: the first argument, unless that is a flag."""
    if arguments and not arguments[0].startswith("-"):
        preset(arguments[0])
        return arguments[0]
    misplaced = next((word for word in arguments if word in PRESETS), None)
    if misplaced and arguments:
        raise UsageError(f"preset = {misplaced}: give it first, before the flags")
    return "smoke"


def _preset_settings(name: str) -> dict[str, Any]:
    chosen = preset(name)
    return {"model": chosen.model, "moe": chosen.moe, "data": chosen.data, "training": chosen.training}


Sized = TypeVar("Sized", bound=SizeFlags)


def of_given_batch(flags: Sized, arguments: Sequence[str]) -> Sized:
    """The flags with `auto_batch` off where the batch was given, and it was not asked for beside."""
    if not _gives_batch(arguments) or _gives(arguments, "--auto-batch"):
        return flags
    return replace(flags, training=replace(flags.training, auto_batch=False))


def _gives_batch(arguments: Sequence[str]) -> bool:
    return _gives(arguments, "--batch-size") or _gives(arguments, "--accumulation")


def _gives(arguments: Sequence[str], name: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == name for word in arguments)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _command(name: str, arguments: Sequence[str]) -> str:
    return shlex.join(["moelab", name, *arguments])


def usage() -> str:
    commands = "\n".join(f"  moelab {name:<14} {function.__doc__}" for name, function in COMMANDS.items())
    arms = "\n".join(f"  {name:<14} {text}" for name, text in ARMS.items())
    return (
        "moelab: does a Mixture-of-Experts GPT beat the dense GPT it replaces?\n\n"
        f"{commands}\n\nEach takes --help. Presets: {', '.join(PRESETS)}. Arms:\n{arms}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    for length in (2, 1):
        function = COMMANDS.get(" ".join(words[:length]))
        if function is not None:
            break
    else:
        near = [name for name in COMMANDS if name.startswith(words[0])] or list(COMMANDS)
        print(f"moelab: command = {words[0]}: give one of {', '.join(near)}", file=sys.stderr)
        return 2
    try:
        function(words[length:])
    except UsageError as problem:
        print(f"moelab: {problem}", file=sys.stderr)
        return 2
    except RunFailed as problem:
        print(f"moelab: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"moelab: {str(stop) or 'stopped'}", file=sys.stderr)
        if writing():  # the interpreter would end under its threads, and abort
            sys.stderr.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:
        return 1
    return 0
