"""Documents and splits: byte for byte the source's, stable, and never in two splits."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import DataConfig, UsageError
from moelab.text.corpora import SPLITS, open_corpus, read_articles, read_blocks, read_plain


def documents(pieces) -> list[str]:  # type: ignore[no-untyped-def]
    found, current = [], []
    for piece in pieces:
        if piece is None:
            found.append("".join(current))
            current = []
        else:
            current.append(piece)
    assert not current, "a document without its end"
    return found


def split_documents(path: Path, glob: str = "**/*") -> dict[str, list[str]]:
    corpus = open_corpus(DataConfig(data=f"text:{path}", glob=glob))
    return {split: documents(corpus.pieces(split)) for split in SPLITS}


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("<|endoftext|>\n".join(texts))
    return path


@given(st.lists(st.lists(st.sampled_from(["a b", "", "<|endoftext|> x", " <|endoftext|>", "é", "end"])), max_size=5))
def test_a_line_that_is_only_the_separator_separates_documents(texts: list[list[str]]) -> None:
    import tempfile

    whole = ["".join(f"{line}\n" for line in lines) for lines in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.txt"
        path.write_text("<|endoftext|>\n".join(whole), newline="")
        assert documents(read_plain(path)) == (whole or [""])


def test_a_separator_across_blocks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\n<|endoftext|>\ntwo\nlong line without end <|endoftext|>\n<|endoftext|>")
    for size in range(1, 40):
        monkeypatch.setattr("moelab.text.corpora._BLOCK", size)
        found = [d for d in documents(read_plain(path)) if d]
        assert found == ["one\n", "two\nlong line without end <|endoftext|>\n"]


@given(st.text(st.characters(codec="utf-8"), max_size=50), st.integers(1, 9))
def test_blocks_laid_end_to_end_are_the_file(text: str, size: int) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(text.encode())
        file.flush()
        patch.setattr("moelab.text.corpora._BLOCK", size)
        assert "".join(read_blocks(Path(file.name))) == text


def test_bytes_that_are_not_utf8_are_named_by_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine \xc3\xa9 \xff broken")
    with pytest.raises(UsageError, match=r"x.txt: byte 8 is not UTF-8"):
        split_documents(tmp_path)


def test_a_nul_byte_is_text_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\0b\n" * 50)
    assert "".join("".join(d) for d in split_documents(tmp_path).values()) == "a\0b\n" * 50


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path: Path) -> None:
    texts = [f"document {i}\nwith <|endoftext|>\n<|endoftext|>\ninside" for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts[:200]) + "\n")
    pq.write_table(pa.table({"id": list(range(200)), "text": texts[200:]}), tmp_path / "b.parquet", row_group_size=30)
    found = split_documents(tmp_path)
    assert sorted(d for split in found.values() for d in split) == sorted(texts)


BROKEN = {
    "not json": ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl: line 2 is not JSON"),
    "no field": ("x.jsonl", b'{"body": "a"}\n', "x.jsonl: line 1 has no string in a field `text`"),
    "number": ("x.jsonl", b'{"text": 3}\n', "x.jsonl: line 1 has no string"),
    "half a pair": ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl: line 1 is not UTF-8"),
    "not parquet": ("x.parquet", b"PAR1", "x.parquet: not a parquet file"),
    "empty": ("x.txt", b"", "the text is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, line = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as refused:
        split_documents(tmp_path)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_parquet_without_the_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="no column `text`; it has id, body"):
        split_documents(tmp_path)


def test_glob_chooses_files_and_their_order_is_by_path(tmp_path: Path) -> None:
    for name in ("b/z.md", "a.md", "b/a.md", "skip.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = open_corpus(DataConfig(data=f"text:{tmp_path}", glob="**/*.md"))
    assert [name for name, _ in corpus.files] == ["a.md", "b/a.md", "b/z.md"]


def test_every_document_is_in_one_split_and_every_split_has_some(tmp_path: Path) -> None:
    for count in (20, 21, 35, 300):
        texts = [f"document number {i} of {count}\n" for i in range(count)]
        found = split_documents(write_documents(tmp_path / f"{count}.txt", texts))
        assert sorted(d for split in found.values() for d in split) == sorted(texts)
        assert all(found.values())
        assert len(found["train"]) > 0.7 * count


def test_adding_and_reordering_documents_moves_none_of_the_others(tmp_path: Path) -> None:
    texts = [f"text {i}, which is about {i * i}\n" for i in range(500)]
    before = split_documents(write_documents(tmp_path / "a.txt", texts[:400]))
    after = split_documents(write_documents(tmp_path / "b.txt", texts[::-1]))
    for split in SPLITS:
        assert set(before[split]) == set(after[split]) & set(texts[:400])


def test_equal_documents_are_in_one_split(tmp_path: Path) -> None:
    texts = [f"text {i}\n" for i in range(200)]
    found = split_documents(write_documents(tmp_path / "a.txt", texts * 3))
    assert not set(found["train"]) & set(found["valid"])
    assert not set(found["train"]) & set(found["test"])


@pytest.mark.parametrize("line", ["a line of text\n", "x"])
def test_few_documents_are_split_at_lines_or_else_at_characters(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.txt").write_text(line * 5000)
    found = split_documents(tmp_path / "x.txt")
    assert [len(found[split]) for split in SPLITS] == [1, 1, 1]
    assert "".join(found[split][0] for split in SPLITS) == line * 5000
    sizes = [len(found[split][0]) / len(line * 5000) for split in SPLITS]
    assert sizes == pytest.approx([0.9, 0.05, 0.05], abs=0.001)
    if line.endswith("\n"):
        assert all(found[split][0].endswith("\n") for split in SPLITS)


def test_twenty_equal_documents_are_still_split(tmp_path: Path) -> None:
    found = split_documents(write_documents(tmp_path / "x.txt", ["the same\n"] * 40))
    assert all(found.values())


def test_stdlib_leaves_out_tests_and_site_packages() -> None:
    corpus = open_corpus(DataConfig())
    names = [name for name, _ in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert all(name.endswith(".py") for name in names)


WIKI = (
    " \n = First = \n \n Text of the first . \n \n = = Section = = \n \n x = y \n = not a title \n"
    " \n = A = B = \n more\n"
)


def test_articles_begin_at_titles_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text(WIKI)
    found = documents(read_articles(tmp_path / "wiki.train.tokens"))
    assert len(found) == 2
    assert found[1] == " = A = B = \n more\n"
    assert "".join(found) == WIKI


@given(st.text(st.sampled_from(" =\nab"), max_size=80), st.integers(1, 7))
def test_articles_laid_end_to_end_are_the_file(text: str, size: int) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(text.encode())
        file.flush()
        patch.setattr("moelab.text.corpora._BLOCK", size)
        assert "".join(documents(read_articles(Path(file.name)))) == text


REFUSED = {
    "unknown": (DataConfig(data="wikitext-7"), "data = wikitext-7: give one of stdlib"),
    "no path": (DataConfig(data="text:"), "data = text:: give one of stdlib"),
    "missing": (DataConfig(data="text:/no/such"), "text:/no/such: there is no such file or folder"),
    "no source": (DataConfig(data="wikitext-2"), "give --source FOLDER with wiki.train.tokens"),
    "wrong source": (DataConfig(data="wikitext-2-raw", source=Path("/no")), "source = /no: there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_corpus_that_is_not_there_is_refused_in_one_line(case: str) -> None:
    data, line = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        open_corpus(data)
    assert line in str(refused.value)


def test_a_folder_where_nothing_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file there matches --glob '\*.md'"):
        open_corpus(DataConfig(data=f"text:{tmp_path}", glob="*.md"))
