"""Files as documents, in constant memory.

Text is a stream of pieces (`str`) in which `None` ends a document, so that no document has to fit in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from moelab.config import UsageError

Pieces = Iterator[str | None]
Advance = Callable[[int], None]  # called with the bytes of the source that were read

_SEPARATOR_TO_END = re.compile(r"<\|endoftext\|>\r?(?:\n|\Z)")
_BLOCK = 1 << 20  # bytes read at once
_LONGEST_LINE = 1 << 16  # characters; a longer line is given out in several pieces


def unheard(_: int) -> None:
    """An `Advance` for when nobody watches."""


def read_any(path: Path, advance: Advance = unheard) -> Pieces:
    """A file of text by its extension: .jsonl, .parquet, anything else as plain text."""
    match path.suffix.lower():
        case ".jsonl":
            return read_jsonl(path, advance)
        case ".parquet":
            return read_parquet(path, advance)
    return read_plain(path, advance)


def read_plain(path: Path, advance: Advance = unheard) -> Pieces:
    """A text file; a line that is only `<|endoftext|>` separates documents."""
    return separated(read_blocks(path, advance))


def read_blocks(path: Path, advance: Advance = unheard) -> Iterator[str]:
    """A UTF-8 file in blocks, newlines as they are, without a byte order mark at its start.

    Raises `UsageError` naming the byte that is not UTF-8.
    """
    with path.open("rb") as file:
        yield from blocks_of(file, str(path), advance)


def blocks_of(file: IO[bytes], name: str, advance: Advance = unheard) -> Iterator[str]:
    """The same of an open file; `name` is what an error calls it."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    while True:
        block = file.read(_BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as problem:
            raise _not_utf8(name, done + len(block) - len(problem.object) + problem.start) from None
        if text:
            yield text
        if not block:
            return
        done += len(block)
        advance(len(block))


def _not_utf8(name: str, byte: int) -> UsageError:
    return UsageError(f"{name}: byte {byte:,} is not UTF-8; convert the file, for example with iconv")


def read_jsonl(path: Path, advance: Advance = unheard) -> Pieces:
    """One JSON object a line, one document an object, in its field `text`."""
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of_row(path, number, line, done)
                yield None
            done += len(line)
            advance(len(line))


def _text_of_row(path: Path, number: int, line: bytes, start: int) -> str:
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        text.encode()
    except UnicodeDecodeError as problem:
        raise _not_utf8(str(path), start + problem.start) from None
    except UnicodeEncodeError:
        raise UsageError(f"{path}: line {number:,} spells half of a surrogate pair, which no UTF-8 text has") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: line {number:,} is not JSON; give one object a line") from None
    except (LookupError, TypeError, AttributeError):
        raise UsageError(f"{path}: line {number:,} has no string in a field `text`") from None
    assert isinstance(text, str)
    return text


def read_parquet(path: Path, advance: Advance = unheard) -> Pieces:
    """One row a document, in the column `text`, read in batches of rows."""
    for rows in parquet_rows(path, advance):
        for text in rows:
            yield text or ""
            yield None


def parquet_rows(path: Path, advance: Advance = unheard) -> Iterator[list[str | None]]:
    """The column `text` in batches of rows, a row group in memory at most.

    Raises `UsageError` on a file that is damaged, has no such column, or one that is not of strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise UsageError(f"{path}: has no column `text`; it has {', '.join(names)}")
            bytes_a_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                rows = batch.column(0).to_pylist()
                strange = next((row for row in rows if not isinstance(row, str | None)), None)
                if strange is not None:
                    raise UsageError(f"{path}: the column `text` holds {type(strange).__name__}, not strings")
                yield rows
                advance(round(bytes_a_row * len(batch)))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: the column `text` has a row that is not UTF-8; write the file again") from None
    except (pa.ArrowException, OSError) as problem:
        raise UsageError(f"{path}: not a parquet file that can be read ({str(problem).splitlines()[0]})") from None


def separated(blocks: Iterable[str]) -> Pieces:
    """Documents of a plain text, between lines that are only `<|endoftext|>`.

    Pieces end at line ends, or inside a line longer than `_LONGEST_LINE`.
    """
    carry, at_line_start = "", True
    for block in blocks:
        text = carry + block
        cut = text.rfind("\n") + 1
        if len(text) - cut > _LONGEST_LINE:
            cut = len(text)
        text, carry = text[:cut], text[cut:]
        yield from _at_separators(text, at_line_start)
        if text:
            at_line_start = text.endswith("\n")
    yield from _at_separators(carry, at_line_start)
    yield None


def _at_separators(text: str, at_line_start: bool) -> Pieces:
    start = 0
    for found in _SEPARATOR_TO_END.finditer(text):
        if text[found.start() - 1] == "\n" if found.start() else at_line_start:
            yield text[start : found.start()]
            yield None
            start = found.end()
    yield text[start:]


def articles(blocks: Iterable[str]) -> Pieces:
    """Documents of WikiText: each ` = Title = ` between two empty lines begins an article.

    Sections have two or more `=` on each side. A line of a list or a formula can look like a title, but has no empty
    line on both sides. The articles laid end to end are the text, byte for byte.
    """
    lines: list[str] = []  # of this article, not given out yet
    begun, after_empty, maybe_title = False, True, False
    carry = ""
    for block in blocks:
        *complete, carry = (carry + block).split("\n")
        new = [f"{line}\n" for line in complete]
        if len(carry) > _LONGEST_LINE:
            new.append(carry)
            carry = ""
        for line in new:
            empty = not line.strip()
            if maybe_title and empty:
                title = lines.pop()
                if begun:
                    yield "".join(lines)
                    yield None
                    lines.clear()
                lines.append(title)
                begun = True
            maybe_title = after_empty and _looks_like_title(line)
            after_empty = empty
            lines.append(line)
        yield "".join(lines[:-1])
        del lines[:-1]
    yield "".join(lines) + carry
    yield None


def _looks_like_title(line: str) -> bool:
    if not line.startswith(" = "):
        return False
    words = line.split()
    return len(words) >= 3 and words[-1] == "=" and words[1] != "=" and words[-2] != "="


def without_empty_documents(pieces: Pieces) -> Pieces:
    """The same stream without empty pieces and documents."""
    begun = False
    for piece in pieces:
        if piece:
            begun = True
            yield piece
        elif piece is None and begun:
            begun = False
            yield None
