"""Splits: every document in one of them, and there to stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.config import DataConfig, UsageError
from moelab.text.corpora import open_corpus
from moelab.text.splits import HEAD, SPLITS


def split_documents(path: Path) -> dict[str, list[str]]:
    corpus = open_corpus(DataConfig(data=f"text:{path}"))
    streams = {split: corpus.pieces(split) for split in SPLITS}
    joined = {split: "".join("\1" if p is None else p for p in pieces) for split, pieces in streams.items()}
    return {split: text.split("\1")[:-1] for split, text in joined.items()}


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("<|endoftext|>\n".join(texts))
    return path


def test_every_document_is_in_one_split_and_every_split_has_some(tmp_path: Path) -> None:
    for count in (20, 21, 35, 300):
        texts = [f"document number {i} of {count}\n" for i in range(count)]
        found = split_documents(write_documents(tmp_path / f"{count}.txt", texts))
        assert sorted(d for split in found.values() for d in split) == sorted(texts)
        assert all(found.values())
        assert len(found["train"]) > 0.7 * count


def test_about_four_percent_are_held_out_twice(tmp_path: Path) -> None:
    found = split_documents(write_documents(tmp_path / "x.txt", [f"text {i}\n" for i in range(5000)]))
    # A binomial of 5000 and 0.04 has a standard deviation of 14.
    assert [len(found[split]) for split in ("valid", "test")] == pytest.approx([200, 200], abs=5 * 14)


def test_adding_and_reordering_documents_moves_none_of_the_others(tmp_path: Path) -> None:
    texts = [f"text {i}, which is about {i * i}\n" for i in range(500)]
    before = split_documents(write_documents(tmp_path / "a.txt", texts[:400]))
    after = split_documents(write_documents(tmp_path / "b.txt", texts[::-1]))
    for split in SPLITS:
        assert set(before[split]) == set(after[split]) & set(texts[:400])


def test_the_split_of_a_document_is_of_its_text_and_not_of_its_file(tmp_path: Path) -> None:
    texts = [f"text {i}, which is about {i * i}\n" for i in range(300)]
    (tmp_path / "many").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "many" / f"{number * 7919 % 1000}.txt").write_text(text)
    one = split_documents(write_documents(tmp_path / "one.txt", texts))
    many = split_documents(tmp_path / "many")
    assert {split: set(found) for split, found in one.items()} == {split: set(found) for split, found in many.items()}


def test_long_documents_come_whole(tmp_path: Path) -> None:
    texts = [f"{i} " + "word\n" * (HEAD // 5 + i * 50_000) for i in range(25)]
    found = split_documents(write_documents(tmp_path / "x.txt", texts))
    assert sorted(d for split in found.values() for d in split) == sorted(texts)


def test_equal_documents_are_in_one_split(tmp_path: Path) -> None:
    texts = [f"text {i}\n" for i in range(200)]
    found = split_documents(write_documents(tmp_path / "a.txt", texts * 3))
    assert not set(found["train"]) & set(found["valid"])
    assert not set(found["train"]) & set(found["test"])


@pytest.mark.parametrize("line", ["a line of text\n", "x"])
@pytest.mark.parametrize("count", [5000, 200_000])
def test_few_documents_are_split_at_lines_or_else_at_characters(tmp_path: Path, line: str, count: int) -> None:
    (tmp_path / "x.txt").write_text(line * count)
    found = split_documents(tmp_path / "x.txt")
    assert [len(found[split]) for split in SPLITS] == [1, 1, 1]
    assert "".join(found[split][0] for split in SPLITS) == line * count
    sizes = [len(found[split][0]) / len(line * count) for split in SPLITS]
    assert sizes == pytest.approx([0.9, 0.05, 0.05], abs=0.001)
    if line.endswith("\n"):
        assert all(found[split][0].endswith("\n") for split in SPLITS)


def test_nineteen_documents_are_split_at_lines_and_keep_their_ends(tmp_path: Path) -> None:
    texts = [f"{i}\n" * 300 for i in range(10, 29)]
    found = split_documents(write_documents(tmp_path / "x.txt", texts))
    assert "".join("".join(found[split]) for split in SPLITS) == "".join(texts)
    assert found["train"][:17] == texts[:17]


def test_equal_documents_alone_are_still_split(tmp_path: Path) -> None:
    found = split_documents(write_documents(tmp_path / "x.txt", ["the same\n"] * 40))
    assert all(found.values())


def test_a_nul_byte_is_text_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\0b\n" * 50)
    assert "".join("".join(d) for d in split_documents(tmp_path).values()) == "a\0b\n" * 50


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_a_text_that_is_empty_is_refused(tmp_path: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    with pytest.raises(UsageError, match="the text is empty; give some text"):
        split_documents(tmp_path)


def test_empty_files_are_no_documents(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n" if number % 2 else "")
    assert sum(map(len, split_documents(tmp_path).values())) == 30
