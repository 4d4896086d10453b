"""Why a backend cannot be used, and what would mend it: said in one line, and by `moelab info` in lines that fit."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.cli import main
from moelab.experts import cuda, hopper, megablocks, mlp, requirements, triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DRIVER = "nvidia-smi"


@pytest.fixture(autouse=True)
def tried_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out about backends is of the machine that a test makes up."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mlp._tried.cache_clear()
    yield
    mlp._tried.cache_clear()


def machine(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, driver: bool = False, built: str | None = None,
    capability: tuple[int, int] | None = None, amd: str | None = None,
) -> None:  # fmt: skip
    """What PyTorch and the shell's path say on some machine."""
    if driver:
        (folder / DRIVER).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", amd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_without_a_gpu_nothing_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path)
    assert requirements.no_gpu(CPU) == "needs an NVIDIA GPU, and there is none; nothing mends that here"


def test_a_pytorch_without_cuda_is_mended_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, driver=True)
    reason = str(requirements.no_gpu(CPU))
    assert reason.startswith("needs a GPU, and this PyTorch is built without CUDA; pip install --upgrade torch -i ")


def test_a_gpu_that_pytorch_does_not_see_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, driver=True, built="13.0")
    assert "PyTorch for CUDA 13.0 sees no GPU; look at nvidia-smi" in str(requirements.no_gpu(CPU))


def test_a_gpu_beside_the_device_asked_for_is_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, tmp_path, driver=True, built="13.0", capability=(9, 0))
    assert requirements.no_gpu(CPU) == "needs a GPU, and this is on cpu; give --device cuda"
    assert requirements.no_gpu(GPU) is None


def test_an_old_gpu_and_an_amd_one_are_named_and_nothing_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, built="12.8", capability=(7, 5))
    old = "needs compute capability 8.0 or more, and this GPU has 7.5; nothing mends that here"
    assert cuda.unusable(GPU) == old
    assert str(megablocks.unusable(GPU)).startswith(old)
    machine(monkeypatch, tmp_path, capability=(9, 4), amd="6.4")
    assert cuda.unusable(GPU) == "needs an NVIDIA GPU, and this is an AMD one; nothing mends that here"


@pytest.mark.parametrize("known", [{}, {"built": "13.0", "capability": (7, 5)}, {"capability": (9, 4), "amd": "6.4"}])
def test_every_reason_is_followed_by_what_mends_it(
    known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, **known)
    device = GPU if known else CPU
    reasons = {name: backend.unusable(device) for name, backend in mlp.BACKENDS.items()}
    assert {name for name, reason in reasons.items() if reason} >= {"cuda", "hopper"}
    assert [name for name, reason in reasons.items() if reason and "; " not in reason] == []


def test_triton_asks_for_a_gpu_as_others_do_unless_it_interprets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path)
    assert triton.unusable(CPU) == requirements.no_gpu(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.unusable(CPU) == requirements.no_triton()
    monkeypatch.setitem(sys.modules, "triton", None)  # as Python has a module that cannot be imported
    assert str(triton.unusable(CPU)) == requirements.no_triton()


def test_a_gpu_that_is_not_hopper_is_named_before_what_is_to_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, tmp_path, built="13.0", capability=(10, 0))
    assert hopper.unusable(GPU) == "needs compute capability 9.0, and this GPU has 10.0; nothing mends that here"


def test_a_megablocks_that_cannot_be_imported_is_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in megablocks.INSTALL or name == "moelab.experts.megablocks_layers":
            monkeypatch.delitem(sys.modules, name)
    for module in megablocks.INSTALL:
        (tmp_path / f"{module}.py").write_text("raise ImportError('of another PyTorch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    machine(monkeypatch, tmp_path, built="13.0", capability=(9, 0))
    problem, mended = str(megablocks.unusable(GPU)).split("; ")
    assert problem == "importing megablocks failed (of another PyTorch)"
    removed, *installed = mended.split(" && ")
    assert removed == "pip uninstall -y stanford-stk megablocks"
    assert installed == [command for _, command in megablocks.INSTALL.values()]


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ("Linux", "Triton, which PyTorch's CUDA wheels bring, is not installed; pip install triton"),
        ("Darwin", "there is no Triton for Darwin; use Linux"),
        ("Windows", "there is no Triton for Windows; use Linux, which under Windows is WSL"),
    ],
)
def test_a_triton_that_is_missing_is_mended_where_there_is_one(
    system: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as Python has a module that cannot be imported
    monkeypatch.setattr(platform, "system", lambda: system)
    assert str(requirements.no_triton()).startswith(line)


def test_packages_are_asked_for_beside_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("stk", "megablocks"):
        monkeypatch.setitem(sys.modules, module, None)
    machine(monkeypatch, tmp_path, built="13.0", capability=(9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    first, mended, absent, commands = str(megablocks.unusable(GPU)).split("; ")
    assert first.startswith("Triton, which PyTorch's CUDA wheels bring")
    assert mended == "pip install triton"
    assert absent == "not installed: stanford-stk and megablocks"
    assert [command.split()[-1] for command in commands.split(" && ")] == ["stanford-stk==0.7.1", "megablocks==0.10.0"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_info_has_every_backend_and_lines_that_fit(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["info"]) == 0
    _, first, others = capsys.readouterr().out.partition("backend ")
    lines = (first + others).splitlines()
    assert max(map(len, lines)) <= columns
    headings = [line.replace(",", "").split() for line in lines if line.startswith("backend ")]
    assert sum(words[1] == "auto" for words in headings) == 1
    for name in mlp.BACKENDS:
        assert sum(name in words for words in headings if words[1] != "auto") == 1, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_command_that_is_folded_is_still_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(sys.modules, "megablocks", None)  # as Python has a module that cannot be imported
    assert main(["info"]) == 0
    joined = capsys.readouterr().out.replace("\\\n", "")
    commands = {" ".join(line.split()) for line in joined.splitlines()}
    assert megablocks.INSTALL["megablocks"][1] in commands


def test_where_triton_interprets_info_says_what_that_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert requirements.interpreted(CPU)
    assert not requirements.interpreted(GPU)
