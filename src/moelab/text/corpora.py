"""Corpora: where text comes from.

A corpus has a `name`, says where it is from (`source`), and gives the text of its `splits` as `pieces`. `fetch` gets a
split that is not on this machine; `finished` turns the pieces, as they were published, into the text that is tokenised.

The order of documents is fixed: files in the order of their relative paths, documents in the order of the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from moelab.config import DataConfig, UsageError, moelab_home, require
from moelab.text.documents import Advance, Pieces, read_any, read_plain, unheard, without_empty_documents
from moelab.text.splits import SPLITS, dealt
from moelab.text.wikitext import NAMES, WikiText, open_wikitext

CORPORA: dict[str, str] = {
    "stdlib": "the source of this Python's standard library, without its tests; always there (the default)",
    "wikitext-2": "WikiText-2, tokenised form, from the hub or --source PATH; --detokenize for natural text",
    "wikitext-103": "WikiText-103, likewise",
    "wikitext-2-raw": "WikiText-2, raw form, likewise: no <unk>",
    "wikitext-103-raw": "WikiText-103, raw form, likewise",
    "text:PATH": "your own text: a file, or a folder walked with --glob; .jsonl and .parquet by their column `text`",
}

File = tuple[str, Path]  # name relative to the corpus, and where it is


@dataclass(frozen=True)
class LocalFiles:
    """Files whose documents are dealt out to the splits, unless they come with splits of their own."""

    name: str
    source: str
    files: tuple[File, ...]
    """Every file, in order."""
    reader: Callable[[Path, Advance], Pieces]
    own_splits: Mapping[str, tuple[File, ...]] = field(default_factory=dict)
    """The files of each split, where the source says which they are."""
    counts_words = False
    form = None  # there is but one

    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split in self.own_splits) or SPLITS

    def fetch(self, split: str) -> None:
        """They are there."""

    def size(self, split: str) -> int:
        """Bytes that are read for a split: all, where its documents have to be found among them."""
        return sum(path.stat().st_size for _, path in self.own_splits.get(split, self.files))

    def signature(self, split: str) -> str:
        """Changes when a source file is added, removed, or written to: of paths, sizes and times, not contents."""
        return self._signature

    @functools.cached_property
    def _signature(self) -> str:
        stats = [
            (os.path.abspath(path), path.stat()) for _, path in self.files
        ]  # of 100,000 files: once for all splits
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        given = [{split: [name for name, _ in files] for split, files in self.own_splits.items()}]
        return hashlib.sha256(json.dumps([self.name, facts, *filter(None, given)]).encode()).hexdigest()

    def pieces(self, split: str, advance: Advance = unheard) -> Pieces:
        """The text of a split. Raises `UsageError` on text that cannot be read, and on none at all."""
        if self.own_splits:
            return self._read(self.own_splits[split], advance)
        return dealt(functools.partial(self._read, self.files), split, self.name, advance)

    def finished(self, pieces: Pieces) -> Pieces:
        """The text is tokenised as it is."""
        return pieces

    def published(self, split: str) -> tuple[int | None, int | None]:
        """Nobody has published this."""
        return None, None

    def _read(self, files: Sequence[File], advance: Advance) -> Pieces:
        for _, path in files:
            try:
                yield from without_empty_documents(self.reader(path, advance))
            except OSError as problem:
                raise UsageError(f"{path}: cannot be read ({problem.strerror}); make it readable") from None


Corpus: TypeAlias = LocalFiles | WikiText


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that the settings name.

    Raises:
        UsageError: unknown name; no file; a source that is not as it must be; `detokenize` of text that is natural.
    """
    kind, _, path = data.data.partition(":")
    every = DataConfig().glob
    if kind != "text":
        require(data.glob == every, "glob", data.glob, f"{data.data} has files of its own; leave --glob out")
    if data.data in NAMES:
        return open_wikitext(data.data, data.source, data.detokenize)
    require(not data.detokenize, "detokenize", True, f"{data.data} is natural text already; leave --detokenize out")
    if kind == "text" and path:
        require(data.source is None, "source", data.source, "text:PATH names its files itself; leave --source out")
        return _text(Path(path).expanduser(), data.glob)
    if data.data == "stdlib":
        return _stdlib(data.source)
    raise UsageError(f"data = {data.data}: give one of {', '.join(CORPORA)}")


def _stdlib(source: Path | None) -> LocalFiles:
    root = source or Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files: list[File] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in left_out]
        here = Path(folder)
        files += [((here / n).relative_to(root).as_posix(), here / n) for n in names if n.endswith(".py")]
    if not files:
        raise UsageError(f"data = stdlib: there is no .py file in {root}; give --source, or --data text:PATH")
    return LocalFiles("stdlib", str(root), tuple(sorted(files)), read_plain)


def _text(path: Path, glob: str) -> LocalFiles:
    """Hidden files, those of hidden folders (`.git`, `.DS_Store`), and what moelab wrote are no part of its text."""
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        try:
            found = [(p.relative_to(path), p) for p in path.glob(glob) if p.is_file()]
        except (ValueError, NotImplementedError, IndexError):
            raise UsageError(f"glob = {glob}: give a pattern relative to the folder, such as **/*.md") from None
        below = {folder for relative, _ in found for folder in relative.parents if folder.parts}
        ours = {folder for folder in below if _is_ours(path / folder)}
        files = sorted(
            (relative.as_posix(), place)
            for relative, place in found
            if not any(part.startswith(".") for part in relative.parts) and ours.isdisjoint(relative.parents)
        )
        if not files:
            raise UsageError(f"data = text:{path}: no file there matches --glob {glob!r}")
    else:
        raise UsageError(f"data = text:{path}: there is no such file or folder")
    return LocalFiles(f"text:{path}", str(path), tuple(files), read_any, _own_splits(files) if path.is_dir() else {})


def _own_splits(files: Sequence[File]) -> dict[str, tuple[File, ...]]:
    """The splits of a folder that has a file named valid or validation (and test) at its top, the rest to train on.

    Empty where there is no such file, or nothing else: documents are then dealt out.
    """
    found: dict[str, list[File]] = {}
    for name, place in files:
        named = {"valid": "valid", "validation": "valid", "test": "test"}
        split = named.get(name.partition(".")[0], "train") if "/" not in name else "train"
        found.setdefault(split, []).append((name, place))
    return {split: tuple(own) for split, own in found.items()} if {"train", "valid"} <= found.keys() else {}


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a run's, a comparison's, or MOELAB_HOME."""
    pairs = (("config.json", "metrics.jsonl"), ("results.json", "report.html"))
    written = any(all((folder / name).is_file() for name in pair) for pair in pairs)
    return written or folder.resolve() == moelab_home().resolve()
