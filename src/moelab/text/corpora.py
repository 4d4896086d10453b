"""Corpora: where text comes from.

The order of documents is fixed: files in the order of their relative paths, documents in the order of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moelab.config import DataConfig, UsageError
from moelab.text.documents import Advance, Pieces, read_any, read_articles, read_plain, unheard, without_empty_documents
from moelab.text.splits import SPLITS, dealt

CORPORA: dict[str, str] = {
    "stdlib": "the source of this Python's standard library, without its tests; always there (the default)",
    "wikitext-2": "WikiText-2, tokenised form; --source FOLDER with wiki.{train,valid,test}.tokens",
    "wikitext-103": "WikiText-103, tokenised form; --source FOLDER, likewise",
    "wikitext-2-raw": "WikiText-2, raw form; --source FOLDER with wiki.{train,valid,test}.raw",
    "wikitext-103-raw": "WikiText-103, raw form; --source FOLDER, likewise",
    "text:PATH": "your own text: a file, or a folder walked with --glob; .jsonl and .parquet by their column `text`",
}

File = tuple[str, Path]  # name relative to the corpus, and where it is


@dataclass(frozen=True)
class Corpus:
    """Some text and its splits."""

    name: str
    files: tuple[File, ...]
    """Every source file, in order."""
    split_files: Mapping[str, tuple[File, ...]] | None
    """The files of each split, where the corpus comes split; None where documents are dealt out to the splits."""
    reader: Callable[[Path, Advance], Pieces]
    counts_words: bool = False

    def splits(self) -> tuple[str, ...]:
        """The splits that the source has."""
        return SPLITS if self.split_files is None else tuple(s for s in SPLITS if s in self.split_files)

    def sources(self, split: str) -> tuple[File, ...]:
        """The files that a split is made from."""
        return self.files if self.split_files is None else self.split_files[split]

    def size(self, split: str) -> int:
        """Bytes of those files."""
        return sum(path.stat().st_size for _, path in self.sources(split))

    def signature(self, split: str) -> str:
        """Changes when a source file is added, removed, or written to: of paths, sizes and times, not contents."""
        stats = [(os.path.abspath(path), path.stat()) for _, path in self.sources(split)]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(json.dumps([self.name, facts]).encode()).hexdigest()

    def pieces(self, split: str, advance: Advance = unheard) -> Pieces:
        """The text of a split. Raises `UsageError` on text that cannot be read, and on none at all."""
        if self.split_files is not None:
            return self._read(self.sources(split), advance)
        return dealt(lambda heard: self._read(self.files, heard), split, self.name, advance)

    def _read(self, files: Iterable[File], advance: Advance) -> Pieces:
        for _, path in files:
            try:
                yield from without_empty_documents(self.reader(path, advance))
            except OSError as problem:
                raise UsageError(f"{path}: cannot be read ({problem.strerror}); make it readable") from None


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
    files: list[File] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in left_out]
        here = Path(folder)
        files += [((here / n).relative_to(root).as_posix(), here / n) for n in names if n.endswith(".py")]
    if not files:
        raise UsageError(f"data = stdlib: there is no .py file in {root}; give --source, or --data text:PATH")
    return Corpus("stdlib", tuple(sorted(files)), None, read_plain)


def _text(path: Path, glob: str) -> Corpus:
    """Hidden files, and those of hidden folders (`.git`, `.DS_Store`), are no part of a folder's text."""
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        try:
            found = [(p.relative_to(path), p) for p in path.glob(glob) if p.is_file()]
        except (ValueError, NotImplementedError, IndexError):
            raise UsageError(f"glob = {glob}: give a pattern relative to the folder, such as **/*.md") from None
        hidden = [any(part.startswith(".") for part in relative.parts) for relative, _ in found]
        files = sorted((r.as_posix(), p) for (r, p), hide in zip(found, hidden, strict=True) if not hide)
        if not files:
            raise UsageError(f"data = text:{path}: no file there matches --glob {glob!r}")
    else:
        raise UsageError(f"data = text:{path}: there is no such file or folder")
    return Corpus(f"text:{path}", tuple(files), None, read_any)


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
