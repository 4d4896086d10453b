"""Corpora: which files they are, in which order, and what is said when they are not there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from moelab.config import DataConfig, UsageError
from moelab.text import prepare
from moelab.text.corpora import LocalFiles, open_corpus


def names(corpus: object) -> list[str]:
    assert isinstance(corpus, LocalFiles)
    return [name for name, _ in corpus.files]


def test_glob_chooses_files_and_their_order_is_by_path(tmp_path: Path) -> None:
    for name in ("b/z.md", "a.md", "b/a.md", "skip.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}", glob="**/*.md"))
    assert names(corpus) == ["a.md", "b/a.md", "b/z.md"]


def test_hidden_files_and_folders_are_no_text_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.txt", ".git/index", ".DS_Store", "b/.hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert names(open_corpus(DataConfig(data=f"text:{tmp_path}"))) == ["a.txt"]


def test_what_moelab_writes_is_no_text_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    run, comparison = tmp_path / "out-moe", tmp_path / "runs" / "compare-smoke"
    for path in (
        tmp_path / "a.txt", tmp_path / "config.json", tmp_path / "home/prepared/x/tokens.bin", run / "config.json",
        run / "metrics.jsonl", run / "checkpoints/step-1/model.safetensors", comparison / "results.json",
        comparison / "report.html", comparison / "figures/loss.svg",
    ):  # fmt: skip
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("{}")
    assert names(open_corpus(DataConfig(data=f"text:{tmp_path}"))) == ["a.txt", "config.json"]


def test_a_folder_with_a_file_valid_comes_with_its_own_splits(tmp_path: Path) -> None:
    written = {"a.txt": "train", "b/valid.txt": "train", "test.txt": "test", "valid.txt": "valid"}
    for name, split in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{split} of {name}")
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}"))
    for split in ("train", "valid", "test"):
        expected = [piece for name, of in written.items() if of == split for piece in (f"{split} of {name}", None)]
        assert list(corpus.pieces(split)) == expected
        assert corpus.size(split) == sum(len(piece or "") for piece in expected)


@pytest.mark.parametrize("files", [("a.txt", "test.txt"), ("valid.txt",), ("b/a.txt", "b/valid.txt")])
def test_without_a_file_valid_and_others_to_train_on_documents_are_dealt_out(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(f"{line} of {name}\n" for line in range(100)))
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}"))
    assert corpus.splits() == ("train", "valid", "test")
    pieces = [piece for split in corpus.splits() for piece in corpus.pieces(split) if piece]
    assert sum(len(piece) for piece in pieces) == sum(place.stat().st_size for _, place in corpus.files)


def test_a_split_that_a_folder_has_not_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "validation.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises(UsageError, match=r"has no test split of text:.*, only train, valid"):
        prepare(DataConfig(data=f"text:{tmp_path}", tokenizer="bytes"), splits=("train", "test"))


def test_a_preparation_by_dealt_splits_is_not_taken_for_one_by_own_splits(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("")
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}"))
    with_own = replace(corpus, own_splits={"train": corpus.files, "valid": corpus.files})
    assert with_own.signature("train") != corpus.signature("train")


def test_a_folder_that_is_hidden_itself_can_be_named(tmp_path: Path) -> None:
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("a")
    assert names(open_corpus(DataConfig(data=f"text:{tmp_path / '.notes'}"))) == ["a.txt"]


def test_stdlib_leaves_out_tests_and_site_packages() -> None:
    found = names(open_corpus(DataConfig()))
    assert found == sorted(found)
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    parts = {part for name in found for part in name.split("/")[:-1]}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert all(name.endswith(".py") for name in found)


@pytest.mark.parametrize("change", ["text", "time", "another file", "another folder"])
def test_the_signature_changes_with_the_source(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a" / "x.txt"
    path.parent.mkdir()
    path.write_text("text")
    os.utime(path, ns=(1, 1))
    before = open_corpus(DataConfig(data=f"text:{path.parent}")).signature("train")
    match change:
        case "text":
            path.write_text("tex")
            os.utime(path, ns=(1, 1))
        case "time":
            os.utime(path, ns=(1, 2))
        case "another file":
            (path.parent / "y.txt").write_text("")
        case "another folder":
            path = path.parent.rename(tmp_path / "b") / "x.txt"
    assert open_corpus(DataConfig(data=f"text:{path.parent}")).signature("train") != before


def test_a_source_that_goes_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}"))
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UsageError, match=r"x\.txt: cannot be read \(No such file or directory\)"):
        list(corpus.pieces("train"))


REFUSED = {
    "unknown": (DataConfig(data="wikitext-7"), "data = wikitext-7: give one of stdlib"),
    "no path": (DataConfig(data="text:"), "data = text:: give one of stdlib"),
    "missing": (DataConfig(data="text:/no/such"), "text:/no/such: there is no such file or folder"),
    "wrong source": (
        DataConfig(data="wikitext-2-raw", source=Path("/no")),
        "source = /no: there is no such folder or zip; give --source",
    ),
    "no library": (DataConfig(source=Path("/no")), "data = stdlib: there is no .py file in /no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_corpus_that_is_not_there_is_refused_in_one_line(case: str) -> None:
    data, line = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        open_corpus(data)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("glob", "line"),
    [("*.md", r"no file there matches --glob '\*.md'"), ("", "glob = : give a"), ("/a/*", "glob = /a/.: give a")],
)
def test_a_glob_that_finds_nothing_is_refused(tmp_path: Path, glob: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        open_corpus(DataConfig(data=f"text:{tmp_path}", glob=glob))
