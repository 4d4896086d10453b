"""The notebooks: committed without outputs, and running from their first cell to their last."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> nbformat.NotebookNode:
    """A notebook run on a small scale, in a folder of its own. Raises on a cell that fails."""
    for parameter, value in parameters.items():
        monkeypatch.setenv(f"MOELAB_NOTEBOOK_{parameter.upper()}", str(value))
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(folder / variable.lower()))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def output(notebook: nbformat.NotebookNode, cell: str) -> str:
    """All that a cell shows, as text."""
    (found,) = [one for one in notebook.cells if one.id == cell]
    return "".join(
        "".join(shown.get("text", "")) + "".join(map(str, shown.get("data", {}).values())) for shown in found.outputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    assert {(str(cell.outputs), cell.execution_count) for cell in notebook.cells if cell.cell_type == "code"} == {
        ("[]", None)
    }


def test_the_comparison_trains_and_shows_its_report(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = executed(
        "compare.ipynb", tmp_path, monkeypatch, steps=20, arms="dense,moe", data=f"text:{story}", out=tmp_path / "out"
    )
    assert "precision" in output(notebook, "device")
    for arm in ("dense", "moe"):
        trained = json.loads((tmp_path / "out" / f"{arm}-seed0" / "config.json").read_text())["training"]
        assert (trained["steps"], trained["warmup_steps"], trained["evaluation_interval"]) == (20, 2, 2)
    assert "In this single run, at equal tokens" in output(notebook, "read")
    assert "&lt;h2&gt;The arms&lt;/h2&gt;" in output(notebook, "report")
    assert "def main(" in output(notebook, "sample")


def test_the_backends_are_checked_timed_and_one_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed("kernels.ipynb", tmp_path, monkeypatch, tokens=64, width=32, rounds=1)
    errors = [line.split() for line in output(notebook, "right").splitlines()[1:]]
    assert {"reference", "grouped_mm"} <= {name for name, *_ in errors}
    assert all(float(error) < 0.02 for _, *found in errors for error in found)
    assert "dense" in output(notebook, "time")
    assert "iVBORw0KGgo" in output(notebook, "picture")  # how a PNG begins, in base 64
    assert "usable=True" in output(notebook, "own")
    assert "every_expert" in output(notebook, "own-time")
