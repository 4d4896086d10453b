"""The command line as a user types it: what it prints, what it writes, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelab.cli import COMMANDS, main

SMALL = (
    "--layers 1 --heads 2 --width 16 --context 16 --steps 6 --batch-size 2 --warmup-steps 2 --tokenizer bytes "
    "--evaluation-interval 3 --checkpoint-interval 2 --log-interval 1 --device cpu --precision fp32"
).split()


def moelab(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def trained(story: Path, tmp_path: Path) -> Path:
    assert moelab("train", "smoke", "--arm", "moe", "--data", f"text:{story}", "--out", tmp_path / "run", *SMALL) == 0
    return tmp_path / "run"


def test_train_eval_and_sample_work_on_one_run(
    trained: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab("eval", trained, "--split", "test", "--json", tmp_path / "eval.json") == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    wanted = "split, loss, perplexity, bits_per_byte, word_perplexity, tokens, bytes, words, context, stride"
    assert list(figures)[:10] == wanted.split(", ")
    assert (figures["data"], figures["form"], figures["tokenizer"]) == (f"text:{story}", None, "bytes")
    assert (figures["split"], figures["context"], figures["stride"]) == ("test", 16, 16)
    assert moelab("sample", trained, "--prompt", "1 plus", "--tokens", 5) == 0
    assert "1 plus" in capsys.readouterr().out


def test_eval_of_the_validation_split_is_what_training_reported(trained: Path, tmp_path: Path) -> None:
    assert moelab("eval", trained, "--json", tmp_path / "eval.json", "--device", "cpu") == 0
    reported = json.loads((trained / "summary.json").read_text())
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] == reported["val_loss"]


def test_eval_on_another_corpus_uses_the_runs_tokenizer(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether.\n" * 200)
    assert moelab("eval", trained, "--data", f"text:{other}", "--json", tmp_path / "eval.json") == 0
    assert json.loads((tmp_path / "eval.json").read_text())["tokens"] > 0


def test_defaults_for_out_are_those_of_the_contract(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arm in ("dense", "moe", "dense-wide"):
        assert moelab("train", "smoke", "--arm", arm, "--data", f"text:{story}", *SMALL) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out-baseline", "out-moe", "out-dense-wide"}


def test_resume_needs_no_flags_beside_the_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moelab("train", "smoke", "--arm", "moe", "--out", trained, "--resume") == 0
    assert "finished" in capsys.readouterr().err


def test_a_new_run_whose_warm_up_is_as_long_is_told_and_one_that_goes_on_is_not(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "smoke", "--data", f"text:{story}", "--out", tmp_path / "run", *SMALL, "--warmup-steps", 500]
    assert moelab(*words) == 0
    line = "moelab: warmup-steps = 500: with steps = 6 the learning rate only rises; give --warmup-steps 0"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    (tmp_path / "run" / "summary.json").unlink()
    assert moelab(*words, "--resume") == 0
    assert "the learning rate only rises" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["warmup_steps"] == 500


def test_a_flag_that_the_run_was_not_made_with_is_refused_on_resume(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab("train", "smoke", "--arm", "moe", "--out", trained, "--resume", "--width", 64) == 2
    assert "width = 64: the run that is there has 16" in capsys.readouterr().err


def test_a_flag_that_says_the_presets_default_is_said_on_resume_too(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab("train", "smoke", "--arm", "moe", "--out", trained, "--resume", "--steps", 300) == 2
    assert "steps = 300: the run that is there has 6" in capsys.readouterr().err


def test_resume_keeps_the_micro_batch_that_the_memory_decided_and_refuses_another(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, smaller = tmp_path / "run", [*SMALL[:10], *SMALL[12:]]  # without --batch-size: smoke's 16 sequences
    words = ["train", "smoke", "--data", f"text:{story}", "--out", out, *smaller]
    monkeypatch.setattr("moelab.training.memory.available_memory", lambda _: 900_000)
    assert moelab(*words) == 0
    said = capsys.readouterr().err
    kept = json.loads((out / "config.json").read_text())["training"]
    assert f"{kept['accumulation']} micro-batches of {kept['batch_size']} sequences a step" in said
    assert (kept["batch_size"] < 16, kept["batch_size"] * kept["accumulation"]) == (True, 16)
    (out / "summary.json").unlink()
    monkeypatch.setattr("moelab.training.memory.available_memory", lambda _: 2**40)
    assert moelab("train", "smoke", "--out", out, "--resume") == 0
    assert json.loads((out / "config.json").read_text())["training"] == kept
    capsys.readouterr()
    assert moelab("train", "smoke", "--out", out, "--resume", "--batch-size", 16) == 2
    assert f"batch-size = 16: the run that is there has {kept['batch_size']}" in capsys.readouterr().err


BAD = {
    "train nano": "preset = nano: give one of smoke, 5m",
    "compare nano": "preset = nano: give one of smoke, 5m",
    "train smoke --arm sparse": "arm = sparse: give one of dense",
    "compare smoke --arms dense,sparse": "sparse",
    "compare smoke --seeds 0": "seeds = 0",
    "compare smoke --budgets dollars": "dollars",
    "train smoke --data wikipedia-9": "data = wikipedia-9",
    "train smoke --data text:/no/such/file": "/no/such/file",
    "train smoke --arm moe --backend fast": "backend = fast",
    "compare smoke --backend fast": "backend = fast",
    "compare smoke --device cpu --precision fp16": "precision = fp16",
    "compare smoke --arm few:batch-size=4": "batch-size is the same for every arm of a comparison; give --batch-size",
    "compare smoke --arm few:experts=none": "experts = none: give a whole number",
    "compare smoke --arm other:backend=fast": "backend = fast",
    "compare smoke --sweep learning-rate=1e-3": "sweep = learning-rate=1e-3: give two or more values",
    "compare smoke --out /proc/comparison": "/proc/comparison",
    "train smoke --heads 3": "heads = 3: give a number that divides the width 128",
    "train smoke --arm moe --top-k 9": "top-k = 9: give 1 to 8",
    "train smoke --top-k 4": "top-k = 4: the arm dense has no experts",
    "train smoke --tokenizer words": "tokenizer = words",
    "train smoke --device tpu": "device = tpu",
    "train smoke --device cpu --precision fp16": "precision = fp16",
    "train smoke --steps none": "--steps",
    "train smoke --stepz 3": "--stepz",
    "train smoke --out /proc/run": "out = /proc/run: cannot be written",
    "eval /no/such/run": "run = /no/such/run",
    "sample /no/such/run": "run = /no/such/run",
    "report /no/such/comparison": "/no/such/comparison",
    "report": "report",
    "fly": "command = fly",
    "data": "command = data",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_gets_one_line_and_status_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert BAD[command] in said[0]


def test_text_shorter_than_one_context_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Too short.\n" * 3)
    out = tmp_path / "run"
    assert moelab("train", "smoke", "--data", f"text:{tmp_path}/short.txt", "--tokenizer", "bytes", "--out", out) == 2
    assert "fewer than one context of 128" in capsys.readouterr().err


def test_empty_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert moelab("train", "smoke", "--data", f"text:{tmp_path}/empty.txt", "--out", tmp_path / "run") == 2
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert not stop.value.code
    assert f"moelab {command}" in capsys.readouterr().out


def test_data_list_and_info_print_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert moelab("data", "list") == 0
    assert {"stdlib", "wikitext-103", "text:PATH"} <= set(capsys.readouterr().out.split())
    assert moelab("info") == 0
    out = capsys.readouterr().out
    assert "backend reference" in out
    assert "torch" in out


def test_ctrl_c_saves_says_how_to_go_on_and_resume_goes_on(story: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--data", f"text:{story}", "--out", str(tmp_path / "run")]
    flags[flags.index("--steps") + 1] = "600"
    flags[flags.index("--evaluation-interval") + 1] = "600"
    command = [sys.executable, "-m", "moelab", "train", "smoke", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "add --resume to go on" in said
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 601))


def test_compare_trains_each_arm_once_and_writes_the_report(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    words = ["compare", "smoke", "--data", f"text:{story}", "--out", out, "--seeds", 2, *SMALL]
    words += ["--experts", 4, "--budgets", "tokens,flops"]
    assert moelab(*words) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert set(results["arms"]) == {"dense", "moe", "dense-wide"}
    assert {r["seed"] for r in results["arms"]["moe"]["runs"]} == {0, 1}
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("summary.json")}
    assert moelab(*words) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("summary.json")} == stamps
    assert moelab("report", out) == 0


def test_compare_tunes_arms_made_by_override_and_reports_their_test_loss(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    words = ["compare", "smoke", "--data", f"text:{story}", "--out", out, "--seeds", 2, *SMALL, "--arms", ""]
    words += ["--arm", "softmax:", "--arm", "sigmoid-bias:scores=sigmoid,balance-loss=0,bias-rate=0.001,match=active"]
    words += ["--sweep", "training.learning-rate=1e-3,1e30"]  # the second does not stay finite
    assert moelab(*words) == 0
    shown = capsys.readouterr().out
    assert "sigmoid-bias: match active: experts of hidden size F = " in shown
    results = json.loads((out / "results.json").read_text())
    tried = {arm: [trial["val_loss"] for trial in found["tried"]] for arm, found in results["sweep"]["arms"].items()}
    assert [losses[1] for losses in tried.values()] == [None, None]
    for found in results["arms"].values():
        for run in found["runs"]:
            assert moelab("eval", out / run["folder"], "--split", "test", "--json", tmp_path / "eval.json") == 0
            assert json.loads((tmp_path / "eval.json").read_text())["loss"] == run["test_loss"]
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("summary.json")}
    assert len(stamps) == 4  # the chosen value's first run is the first seed's
    capsys.readouterr()
    assert moelab(*words) == 0
    shown = capsys.readouterr().out
    assert "scoring" not in shown
    assert shown.count("its loss did not stay finite before") == 2  # what diverged is not trained again either
    assert {p: p.stat().st_mtime_ns for p in out.rglob("summary.json")} == stamps


def test_train_prints_what_match_solved(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arm", "moe", "--match", "total", "--data", f"text:{story}", "--out", tmp_path / "run", *SMALL]
    assert moelab("train", "smoke", *words) == 0
    assert "moe: match total: experts of hidden size F = " in capsys.readouterr().err


def test_inspect_shows_a_text_and_writes_its_routing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab("inspect", trained, "--text", "1 plus 2", "--json", tmp_path / "i.json") == 0
    assert "layer 0: entropy" in capsys.readouterr().out
    written = json.loads((tmp_path / "i.json").read_text())
    assert "".join(token["text"] for token in written["tokens"]) == "1 plus 2"
    assert [len(layer["indices"]) for layer in written["layers"]] == [8]
    assert moelab("inspect", trained) == 0  # the run's own validation text
    assert moelab("inspect", trained, "--layer", "3") == 2
    assert "layer = 3: give all, or an MoE layer of this run: 0" in capsys.readouterr().err
    assert moelab("inspect", trained, "--file", tmp_path / "none") == 2


def test_eval_detokenizes_when_asked(tmp_path: Path) -> None:
    article = " \n = Title = \n \n It is so , @-@ or ( not ) . \n" * 40
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(article)
    data = ["--data", "wikitext-2", "--source", tmp_path]
    assert moelab("train", "smoke", *data, "--out", tmp_path / "run", *SMALL) == 0
    found = {}
    for flags in ([], ["--detokenize"]):
        assert moelab("eval", tmp_path / "run", *flags, "--json", tmp_path / "e.json") == 0
        found[len(flags)] = json.loads((tmp_path / "e.json").read_text())
    assert found[0]["words"] == found[1]["words"]
    assert found[0]["bytes"] == len(article.encode()) > found[1]["bytes"]
    assert "detokenized" in found[1]["form"]


def test_a_file_of_figures_that_cannot_be_written_is_refused_before_scoring(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moelab("eval", trained, "--json", tmp_path / "no" / "e.json") == 2
    assert "cannot be written (No such file or directory); give another file" in capsys.readouterr().err
