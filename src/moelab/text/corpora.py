"""Corpora: where text comes from, as documents, and which split a document belongs to.

Text is a stream of pieces (`str`) in which `None` ends a document, so that no document has to fit in memory. The order
of documents is fixed: files in the order of their relative paths, documents in the order of the file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moelab.config import DataConfig, UsageError

Pieces = Iterator[str | None]
Advance = Callable[[int], None]  # called with the bytes of the source that were read

CORPORA: dict[str, str] = {
    "stdlib": "the source of this Python's standard library, without its tests; always there (the default)",
    "wikitext-2": "WikiText-2, tokenised form; --source FOLDER with wiki.{train,valid,test}.tokens",
    "wikitext-103": "WikiText-103, tokenised form; --source FOLDER, likewise",
    "wikitext-2-raw": "WikiText-2, raw form; --source FOLDER with wiki.{train,valid,test}.raw",
    "wikitext-103-raw": "WikiText-103, raw form; --source FOLDER, likewise",
    "text:PATH": "your own text: a file, or a folder walked with --glob; .jsonl and .parquet by their column `text`",
}

SPLITS = ("train", "valid", "test")
SEPARATOR = "<|endoftext|>"
_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)
_BLOCK = 1 << 20  # bytes read at once

HELD_OUT = 0.04  # share of documents, by hash, of the validation split, and again of the test split
HEAD = 16_384  # characters that a document is told apart by
FEWEST_DOCUMENTS = 20  # under this a corpus is split at lines
LINE_SHARES = (0.90, 0.95)  # where the validation and the test split then begin


@dataclass(frozen=True)
class Corpus:
    """Some text and its splits."""

    name: str
    files: tuple[tuple[str, Path], ...]
    """Relative name and path of every source file, in order."""
    split_files: Mapping[str, tuple[tuple[str, Path], ...]] | None
    """The files of each split, where the corpus comes split; None where documents are dealt out to the splits."""
    reader: Callable[[Path], Pieces]
    counts_words: bool = False

    def splits(self) -> tuple[str, ...]:
        """The splits that the source has."""
        return SPLITS if self.split_files is None else tuple(s for s in SPLITS if s in self.split_files)

    def sources(self, split: str) -> tuple[tuple[str, Path], ...]:
        """The files that a split is made from."""
        return self.files if self.split_files is None else self.split_files[split]

    def size(self, split: str) -> int:
        """Bytes of those files."""
        return sum(path.stat().st_size for _, path in self.sources(split))

    def signature(self, split: str) -> str:
        """Changes when a source file is added, removed, or written to: of names, sizes and times, not contents."""
        facts = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self.sources(split)]
        return hashlib.sha256(json.dumps([self.name, facts]).encode()).hexdigest()

    def pieces(self, split: str, advance: Advance = lambda _: None) -> Pieces:
        """The text of a split. Raises `UsageError` on text that cannot be read, and on none at all."""
        if self.split_files is not None:
            return self._read(self.sources(split), advance)
        return _dealt(lambda report: self._read(self.files, report), split, self.name, advance)

    def _read(self, files: Iterable[tuple[str, Path]], advance: Advance) -> Pieces:
        for _, path in files:
            yield from without_empty_documents(self.reader(path))
            advance(path.stat().st_size)


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that the settings name.

    Raises:
        UsageError: unknown name; no file; a source that is needed and not given.
    """
    kind, _, path = data.data.partition(":")
    if kind == "text" and path:
        return _text(Path(path).expanduser(), data.glob)
    if data.data == "stdlib":
        return _stdlib(data.source)
    if data.data in CORPORA and data.data.startswith("wikitext-"):
        return _wikitext(data.data, data.source)
    raise UsageError(f"data = {data.data}: give one of {', '.join(CORPORA)}")


def _stdlib(source: Path | None) -> Corpus:
    root = source or Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts)
    ]
    if not files:
        raise UsageError(f"data = stdlib: there is no .py file in {root}; give --source, or --data text:PATH")
    return Corpus("stdlib", tuple(sorted(files)), None, read_plain)


def _text(path: Path, glob: str) -> Corpus:
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        files = sorted((p.relative_to(path).as_posix(), p) for p in path.glob(glob) if p.is_file())
        if not files:
            raise UsageError(f"data = text:{path}: no file there matches --glob {glob!r}")
    else:
        raise UsageError(f"data = text:{path}: there is no such file or folder")
    return Corpus(f"text:{path}", tuple(files), None, _reader_of)


def _wikitext(name: str, source: Path | None) -> Corpus:
    suffix = "raw" if name.endswith("-raw") else "tokens"
    wanted = ", ".join(f"wiki.{split}.{suffix}" for split in SPLITS)
    if source is None:
        raise UsageError(f"source: {name} is read from local files; give --source FOLDER with {wanted}")
    if not source.is_dir():
        raise UsageError(f"source = {source}: there is no such folder; give one with {wanted}")
    found = {split: source / f"wiki.{split}.{suffix}" for split in SPLITS}
    split_files = {split: ((path.name, path),) for split, path in found.items() if path.is_file()}
    if not split_files:
        raise UsageError(f"source = {source}: none of {wanted} is there")
    files = tuple(file for files in split_files.values() for file in files)
    return Corpus(name, files, split_files, read_articles, counts_words=True)


# Reading files


def _reader_of(path: Path) -> Pieces:
    match path.suffix:
        case ".jsonl":
            return read_jsonl(path)
        case ".parquet":
            return read_parquet(path)
    return read_plain(path)


def read_blocks(path: Path) -> Iterator[str]:
    """A UTF-8 file in blocks, newlines as they are. Raises `UsageError` naming the byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as problem:
                raise UsageError(
                    f"{path}: byte {done - held + problem.start:,} is not UTF-8; convert the file, "
                    f"for example with iconv"
                ) from None
            if text:
                yield text
            if not block:
                return
            done += len(block)


def read_plain(path: Path) -> Pieces:
    """A text file; a line that is only `<|endoftext|>` separates documents."""
    carry, at_line_start = "", True
    for block in read_blocks(path):
        text = carry + block
        cut = text.rfind("\n") + 1
        may_separate = len(text) - cut <= len(SEPARATOR) + 1  # the last line could still become a separator
        text, carry = (text[:cut], text[cut:]) if may_separate else (text, "")
        yield from _at_separators(text, at_line_start)
        if text:
            at_line_start = text.endswith("\n")
    yield from _at_separators(carry, at_line_start)
    yield None


def _at_separators(text: str, at_line_start: bool) -> Pieces:
    start = 0
    if SEPARATOR in text:
        for found in _SEPARATOR_LINE.finditer(text):
            if found.start() or at_line_start:
                yield text[start : found.start()]
                yield None
                start = found.end()
    yield text[start:]


def read_jsonl(path: Path) -> Pieces:
    """One JSON object a line, one document an object, in its field `text`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can spell half of a surrogate pair, UTF-8 cannot
            except UnicodeError:
                raise UsageError(f"{path}: line {number:,} is not UTF-8; convert the file") from None
            except ValueError:
                raise UsageError(f"{path}: line {number:,} is not JSON; give one object a line") from None
            except (KeyError, TypeError, AttributeError):
                raise UsageError(f"{path}: line {number:,} has no string in a field `text`") from None
            yield text
            yield None


def read_parquet(path: Path) -> Pieces:
    """One row a document, in the column `text`, read in batches of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as problem:
        raise UsageError(f"{path}: not a parquet file that can be read ({str(problem).splitlines()[0]})") from None
    with file:
        if "text" not in file.schema_arrow.names:
            raise UsageError(f"{path}: has no column `text`; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise UsageError(f"{path}: the column `text` holds {type(text).__name__}, not strings")
                yield text or ""
                yield None


def read_articles(path: Path) -> Pieces:
    """A WikiText file: each ` = Title = ` heading, after an empty line, begins an article.

    Sections have two or more `=` on each side. The articles laid end to end are the file, byte for byte.
    """
    lines: list[str] = []
    carry, blank, begun = "", True, False
    for block in read_blocks(path):
        *complete, carry = (carry + block).split("\n")
        for line in complete:
            if blank and _is_title(line):
                if begun:
                    yield "".join(lines)
                    yield None
                    lines = []
                begun = True
            blank = not line.strip()
            lines.append(line + "\n")
    yield "".join(lines) + carry
    yield None


def _is_title(line: str) -> bool:
    words = line.split()
    return (
        len(words) >= 3
        and words[0] == words[-1] == "="
        and words[1] != "="
        and words[-2] != "="
        and line.startswith(" = ")
    )


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


# Dealing documents out to the splits


@dataclass(frozen=True)
class _Deal:
    """Which documents the splits get; by lines where `line_cuts` (in characters) is set."""

    promoted: Mapping[int, str]
    """Documents, by hash, that fill a split which would be empty."""
    line_cuts: tuple[int, int] | None

    def split_of(self, key: int) -> str:
        if key in self.promoted:
            return self.promoted[key]
        place = key / 2**64
        return "valid" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"


def _key(head: str) -> int:
    """64 bits of a document's first characters: its place does not depend on the documents around it."""
    return int.from_bytes(hashlib.blake2b(head.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _survey(read: Callable[[Advance], Pieces], name: str) -> _Deal:
    """Reads as much as it takes to know that every split will have a document, or that there are too few."""
    keys: set[int] = set()
    characters = 0
    for head, rest in _documents(read(lambda _: None)):
        keys.add(_key(head))
        characters += len(head) + sum(map(len, rest))
        filled = {_Deal({}, None).split_of(key) for key in keys} if len(keys) % 50 == 0 else set()
        if len(filled) == len(SPLITS) and len(keys) >= FEWEST_DOCUMENTS:
            return _Deal({}, None)
    if not keys:
        raise UsageError(f"data = {name}: the text is empty; give some text")
    if len(keys) < FEWEST_DOCUMENTS:
        return _Deal({}, (int(characters * LINE_SHARES[0]), int(characters * LINE_SHARES[1])))
    by_split = {split: sorted(k for k in keys if _Deal({}, None).split_of(k) == split) for split in SPLITS}
    promoted: dict[int, str] = {}
    for split in ("valid", "test"):
        if not by_split[split]:
            promoted[by_split["train"].pop(0)] = split
    return _Deal(promoted, None)


def _documents(pieces: Pieces) -> Iterator[tuple[str, Iterator[str]]]:
    """Each document as its head (the first `HEAD` characters, or all) and the rest, which is to be read first."""
    ended = False

    def rest_of_document() -> Iterator[str]:
        nonlocal ended
        if overflow:
            yield overflow
        while not ended:
            piece = next(pieces)
            if piece is None:
                ended = True
            else:
                yield piece

    for first in pieces:
        assert first is not None, "an empty document"
        head, ended = first, False
        while len(head) < HEAD and not ended:
            piece = next(pieces)
            if piece is None:
                ended = True
            else:
                head += piece
        head, overflow = head[:HEAD], head[HEAD:]
        rest = rest_of_document()
        yield head, rest
        for _ in rest:
            pass


def _dealt(read: Callable[[Advance], Pieces], split: str, name: str, advance: Advance) -> Pieces:
    deal = _survey(read, name)
    if deal.line_cuts is not None:
        yield from without_empty_documents(_between(read(advance), deal.line_cuts, split))
        return
    for head, rest in _documents(read(advance)):
        if deal.split_of(_key(head)) == split:
            yield head
            yield from rest
            yield None


def _between(pieces: Pieces, cuts: tuple[int, int], split: str) -> Pieces:
    """The part of the stream that belongs to a split, cut after the first line end at or past each place."""
    patience = (cuts[1] - cuts[0]) // 2  # characters to wait for a line end before cutting where we are
    current, place = 0, 0
    for piece in pieces:
        if piece is None:
            if SPLITS[current] == split:
                yield None
            continue
        while current < len(cuts) and place + len(piece) > cuts[current]:
            at = max(0, cuts[current] - place)
            line_end = piece.find("\n", at, at + patience)
            at = line_end + 1 if line_end >= 0 else at
            if SPLITS[current] == split:
                yield piece[:at]
                yield None
            piece, place, current = piece[at:], place + at, current + 1
        if SPLITS[current] == split:
            yield piece
        place += len(piece)
