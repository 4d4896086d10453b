"""Documents: byte for byte the source's, whatever the blocks they are read in, and never more in memory than a few."""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import UsageError
from moelab.text import documents as module
from moelab.text.documents import Pieces, articles, read_any, read_blocks, read_jsonl, separated


def documents(pieces: Pieces) -> list[str]:
    """The documents of a stream of text without NULs."""
    *found, rest = "".join("\0" if piece is None else piece for piece in pieces).split("\0")
    assert not rest, "a document without its end"
    return found


def blocks(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


@given(
    st.lists(st.lists(st.sampled_from(["a b", "", "<|endoftext|> x", " <|endoftext|>", "é", "end"])), max_size=5),
    st.integers(1, 40),
)
def test_a_line_that_is_only_the_separator_separates_documents(texts: list[list[str]], size: int) -> None:
    whole = ["".join(f"{line}\n" for line in lines) for lines in texts]
    assert documents(separated(blocks("<|endoftext|>\n".join(whole), size))) == (whole or [""])


@given(st.integers(1, 40), st.sampled_from([14, 30, 1000]))
def test_a_separator_is_found_after_long_lines_and_at_the_end(size: int, longest: int) -> None:
    text = "one\n<|endoftext|>\r\ntwo\nlong line without end <|endoftext|>\n<|endoftext|>"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONGEST_LINE", longest)
        found = [d for d in documents(separated(blocks(text, size))) if d]
    assert found == ["one\n", "two\nlong line without end <|endoftext|>\n"]


@given(st.text(st.characters(codec="utf-8"), max_size=50), st.integers(1, 9))
def test_blocks_laid_end_to_end_are_the_file(text: str, size: int) -> None:
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(text.encode())
        file.flush()
        patch.setattr(module, "_BLOCK", size)
        assert "".join(read_blocks(Path(file.name))) == text.removeprefix("\ufeff")


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["without", "with a byte order mark"])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(
    mark: bytes, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", size)
    (tmp_path / "a.txt").write_bytes(mark + "né ".encode() + b"\xff and on")
    with pytest.raises(UsageError, match=f"byte {len(mark) + 4} is not UTF-8"):
        list(read_blocks(tmp_path / "a.txt"))


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path: Path) -> None:
    texts = [f"document {i}\nwith <|endoftext|>\n<|endoftext|>\ninside" for i in range(400)]
    rows = "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{rows}\n")
    pq.write_table(pa.table({"id": list(range(400)), "text": texts}), tmp_path / "b.parquet", row_group_size=30)
    assert documents(read_any(tmp_path / "a.jsonl")) == texts
    assert documents(read_any(tmp_path / "b.parquet")) == texts


BROKEN = {
    "not utf-8": ("x.txt", b"fine \xc3\xa9 \xff broken", "x.txt: byte 8 is not UTF-8"),
    "half a character": ("x.txt", b"fine \xc3", "x.txt: byte 5 is not UTF-8"),
    "json not utf-8": ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "x.jsonl: byte 24 is not UTF-8"),
    "not json": ("x.jsonl", b'{"text": "a"}\n{"text"\n', "x.jsonl: line 2 is not JSON"),
    "deep json": ("x.jsonl", b"[" * 200_000, "x.jsonl: line 1 is not JSON"),
    "no field": ("x.jsonl", b'{"body": "a"}\n', "x.jsonl: line 1 has no string in a field `text`"),
    "a list": ("x.jsonl", b"[]\n", "x.jsonl: line 1 has no string in a field `text`"),
    "number": ("x.jsonl", b'{"text": 3}\n', "x.jsonl: line 1 has no string"),
    "half a pair": ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl: line 1 spells half of a surrogate pair"),
    "not parquet": ("x.parquet", b"PAR1", "x.parquet: not a parquet file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, line = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as refused:
        documents(read_any(tmp_path / name))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def parquet(path: Path, column: pa.Array, name: str = "text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path)
    return path


def test_parquet_without_a_column_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column `text`; it has id, body"):
        documents(read_any(parquet(tmp_path / "a.parquet", pa.array(["a"]), "body")))
    with pytest.raises(UsageError, match="the column `text` holds int, not strings"):
        documents(read_any(parquet(tmp_path / "b.parquet", pa.array([1]))))


def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", pa.array([f"text {i}" for i in range(1000)]))
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:footer] = bytes(footer - 4)  # its footer is whole, its pages are not
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x.parquet: not a parquet file that can be read \(.+\)") as refused:
        documents(read_any(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "wiki"])
def test_readers_report_the_bytes_they_have_read_as_they_read(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / name, "some words of a document\n" * 3000
    match path.suffix:
        case ".jsonl":
            path.write_text((json.dumps({"text": text}) + "\n") * 40)
        case ".parquet":
            parquet(path, pa.array([f"{i} {text}" for i in range(600)]))
        case _:
            path.write_text(text * 40)
    heard: list[int] = []
    for _ in articles(read_blocks(path, heard.append)) if name == "wiki" else read_any(path, heard.append):
        pass
    assert len(heard) > 1
    assert sum(heard) == pytest.approx(path.stat().st_size, rel=0.01)


WIKI = (
    " \n = First = \n \n Text of the first . \n \n = = Section = = \n \n x = y \n = not a title \n"
    " \n = in a list = \n more of the list \n \n Played , W \n = Won , D = \n \n"
    " \n = A = B = \n \n more\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_articles_begin_at_titles_between_empty_lines_and_nowhere_else(size: int) -> None:
    found = documents(articles(blocks(WIKI, size)))
    assert len(found) == 2
    assert found[1] == " = A = B = \n \n more\n"
    assert "".join(found) == WIKI


@given(st.text(st.sampled_from(" =\nab"), max_size=80), st.integers(1, 7), st.sampled_from([3, 1000]))
def test_articles_laid_end_to_end_are_the_text(text: str, size: int, longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONGEST_LINE", longest)
        assert "".join(documents(articles(blocks(text, size)))) == text


def endless(block: str, count: int) -> Iterator[str]:
    return (block for _ in range(count))


@pytest.mark.parametrize("block", ["a line of text\n" * 5000, "no line end " * 6000], ids=["lines", "one line"])
@pytest.mark.parametrize("reader", [separated, articles])
def test_a_document_of_any_length_is_given_out_as_it_is_read(reader, block: str) -> None:  # type: ignore[no-untyped-def]
    def lengths(blocks: Iterable[str]) -> Iterator[int]:
        return (len(piece) for piece in reader(blocks) if piece is not None)

    assert max(lengths(endless(block, 60))) < 3 * len(block)


def test_a_line_of_json_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "word " * 1_000_000}))
    assert documents(read_jsonl(tmp_path / "x.jsonl")) == ["word " * 1_000_000]


@pytest.mark.parametrize(("name", "count"), [("train", 600), ("valid", 60), ("test", 60)])
def test_wikitext_2_has_its_published_number_of_articles(shared_data: Path, name: str, count: int) -> None:
    path = shared_data / "wikitext-2" / f"wiki.{name}.tokens"
    found = documents(articles(read_blocks(path)))
    assert len(found) == count
    assert "".join(found).encode() == path.read_bytes()
