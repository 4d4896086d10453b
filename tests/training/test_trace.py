"""`--profile`, and where compiled code is kept."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moelab.config import RunConfig
from moelab.device import keep_compiled_code
from moelab.training import train

MakeRun = Callable[..., RunConfig]


def test_a_profiled_run_leaves_a_timeline_of_its_steps_and_the_same_losses(tiny_run: MakeRun, tmp_path: Path) -> None:
    said = io.StringIO()
    profiled = train(tiny_run(), tmp_path / "run", profile=True, console=Console(file=said, width=200))
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert {name for name in names if str(name).startswith("ProfilerStep#")} == {
        f"ProfilerStep#{n}" for n in range(5, 10)
    }
    assert "aten::scaled_dot_product_attention" in names
    assert "trace.json.gz; open it in https://ui.perfetto.dev" in said.getvalue()
    assert profiled["val_loss"] == train(tiny_run(), tmp_path / "plain")["val_loss"]


@pytest.mark.gpu
def test_a_step_that_is_replayed_shows_its_kernels(tiny_run: MakeRun, tmp_path: Path) -> None:
    train(tiny_run(device="cuda", compile="off", capture="on"), tmp_path / "run", profile=True)
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    launches = [event for event in events if "GraphLaunch" in str(event.get("name"))]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert len(launches) == 5
    assert len(kernels) > 5 * 20


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (3, "profile: nothing is written; it takes more than 5 steps, and this run made 3"),
        (5, "profile: nothing is written; it takes more than 5 steps, and this run made 5"),
        (6, "profile: 1 step is in"),
        (8, "profile: 3 steps are in"),
    ],
)
def test_a_run_too_short_for_a_whole_profile_says_what_there_is(
    steps: int, line: str, tiny_run: MakeRun, tmp_path: Path
) -> None:
    said = io.StringIO()
    train(tiny_run(steps=steps), tmp_path / "run", profile=True, console=Console(file=said, width=200))
    assert [found for found in said.getvalue().splitlines() if "profile:" in found] == [
        found for found in said.getvalue().splitlines() if line in found
    ]
    assert line in said.getvalue()
    assert (tmp_path / "run" / "trace.json.gz").exists() == (steps > 5)


def test_compiled_code_is_kept_under_the_home_unless_the_user_names_a_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/else"
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(home / "compiled")


def test_a_home_that_cannot_be_written_leaves_the_compilers_folders_as_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "compiled").write_text("not a folder")
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "TRITON_CACHE_DIR" not in os.environ
