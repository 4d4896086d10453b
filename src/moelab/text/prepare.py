"""Text into token files, once.

    MOELAB_HOME/prepared/NAME-SPLIT-KEY/
        tokens.bin    [EOT] document [EOT] document … [EOT], uint16 or uint32, little-endian; no padding anywhere
        meta.json     counts, fingerprint, and the SHA-256 of tokens.bin

The key is made of the corpus, its files' names, sizes and times, the tokenizer, and the format's version, so a source
that has changed is prepared anew. A split is written beside its place and renamed into it when it is complete, under a
lock: what is half written is never used, and a second process waits and then uses what the first has made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moelab.config import DataConfig, UsageError, moelab_home
from moelab.text.chunks import encoded
from moelab.text.corpora import Corpus, open_corpus
from moelab.text.documents import Advance, Pieces
from moelab.text.tokenizer import Tokenizer, bytes_tokenizer, check_name, gpt2_tokenizer, train_bpe

VERSION = 3  # of the token files; a new one makes every corpus be prepared again
TRAINING_BYTES = 64 << 20  # of the train split that a byte-pair encoding is trained on, at most


@dataclass(frozen=True)
class Split:
    """One split as tokens."""

    tokens: np.ndarray
    """(scored + 1,) memory-mapped ids: end-of-text, then every document with an end-of-text after it."""
    bytes: int
    """Of the text that was tokenised, in UTF-8; end-of-text counts none."""
    words: int | None
    """WikiText: whitespace-separated words of the text as published, with one end-of-line a line."""
    documents: int

    @property
    def scored(self) -> int:
        """Tokens that are predicted: all but the first."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class PreparedText:
    """A corpus as token files."""

    name: str
    folder: Path
    source: str
    """Where the text is from: a folder, a file, or the hub's repository and revision."""
    form: str | None
    """WikiText: tokenised or raw, as published or detokenized."""
    fingerprint: str
    """SHA-256 over the text of the splits, the tokenizer, and the format's version."""
    tokenizer: Tokenizer
    splits: dict[str, Split]


def prepare(
    data: DataConfig,
    *,
    splits: Sequence[str] = ("train", "valid"),
    tokenizer: Tokenizer | None = None,
    home: Path | None = None,
) -> PreparedText:
    """The splits of a corpus as token files, made now if they are not there.

    Args:
        data: which corpus, from where, and which tokenizer.
        splits: any of "train", "valid" and "test".
        tokenizer: to use instead of the one that `data` names; a run on another corpus keeps its own.
        home: where prepared data is kept; `moelab_home()` when not given.

    Raises:
        UsageError: an unknown corpus, tokenizer or split; text that is missing, empty or not UTF-8; a folder that
            cannot be written.
        RunFailed: text that the hub has and that could not be fetched whole.

    Safe to call from several processes at once. Memory does not grow with the corpus; with `detokenize` an article is
    in memory as a whole.
    """
    home = home or moelab_home()
    if tokenizer is None and data.tokenizer is not None:
        check_name(data.tokenizer)
    try:
        corpus = open_corpus(data)
    except OSError as problem:
        raise UsageError(f"{problem.filename}: cannot be read ({problem.strerror}); give another path") from None
    for split in splits:
        if split not in corpus.splits():
            raise UsageError(
                f"source = {corpus.source}: it has no {split} split of {corpus.name}, only {', '.join(corpus.splits())}"
            )
    try:
        if tokenizer is None:
            tokenizer = _tokenizer(data, corpus, home)
        folders = [_split_folder(corpus, split, tokenizer, home) for split in splits]
    except OSError as problem:
        if problem.filename is not None and not Path(problem.filename).is_relative_to(home):
            raise UsageError(f"{problem.filename}: cannot be read ({problem.strerror}); make it readable") from None
        raise UsageError(f"MOELAB_HOME = {home}: cannot be written ({problem.strerror}); set another") from None
    loaded = {split: _load(folder) for split, folder in zip(splits, folders, strict=True)}
    contents = {split: meta["content_sha256"] for split, (_, meta) in loaded.items()}
    facts = [VERSION, tokenizer.fingerprint, sorted(contents.items())]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    found = {name: split for name, (split, _) in loaded.items()}
    return PreparedText(corpus.name, home / "prepared", corpus.source, corpus.form, fingerprint, tokenizer, found)


def _slug(*words: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-")[-60:]


def _key(*facts: str) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


# Tokenizers


def _tokenizer(data: DataConfig, corpus: Corpus, home: Path) -> Tokenizer:
    name = data.tokenizer or ("gpt2" if corpus.name.startswith("wikitext") else "bpe:4096")
    if name == "bytes":
        return bytes_tokenizer()
    if name == "gpt2":
        return gpt2_tokenizer(data.ranks, data.source, home / "tokenizers" / "gpt2.tiktoken")
    if "train" not in corpus.splits():
        raise UsageError(f"tokenizer = {name}: is trained on the train split, and {data.source} has none")
    folder = home / "tokenizers" / f"{_slug(corpus.name, name)}-{_key(str(VERSION), corpus.signature('train'), name)}"

    def fill(aside: Path) -> None:
        corpus.fetch("train")
        with _progress(f"reading {corpus.name} for {name}", corpus.size("train")) as advance:
            sample = _sample(corpus.finished(corpus.pieces("train", advance)), TRAINING_BYTES)
        trained = train_bpe(name, sample)
        if trained.vocabulary < int(name.partition(":")[2]):
            _say(f"tokenizer {name}: the text has merges for no more than {trained.vocabulary} tokens")
        trained.save(aside)

    with contextlib.suppress(UsageError):
        return Tokenizer.load(folder)
    with _lock(folder):
        try:
            return Tokenizer.load(folder)  # another process may have made it by now
        except UsageError as problem:
            if folder.exists():
                _say(f"{problem}; training it again")
        _replace(folder, fill)
    return Tokenizer.load(folder)


def _sample(pieces: Pieces, limit: int) -> list[str]:
    """All of a text, or parts of it spread evenly, at most `limit` bytes and at least about half of that."""
    size = 1 << 16
    parts = (piece[i : i + size] for piece in pieces if piece is not None for i in range(0, len(piece), size))
    kept: list[str] = []
    held, one_in = 0, 1
    for number, part in enumerate(parts):
        if number % one_in == 0:
            kept.append(part)
            held += len(part.encode())
        while held > limit and len(kept) > 1:
            kept, one_in = kept[::2], 2 * one_in
            held = sum(len(part.encode()) for part in kept)
    return kept


# Token files


def _split_folder(corpus: Corpus, split: str, tokenizer: Tokenizer, home: Path) -> Path:
    """The folder of a prepared split, which is made if it is not there or not as it was written."""
    key = _key(str(VERSION), corpus.signature(split), tokenizer.fingerprint, split)
    folder = home / "prepared" / f"{_slug(corpus.name, tokenizer.name, split)}-{key}"
    if _problem(folder) is None:  # asked without the lock first: a folder that may only be read is as good
        return folder
    with _lock(folder):
        problem = _problem(folder)  # another process may have made it by now
        if problem is None:
            return folder
        if folder.exists():
            _say(f"{folder} is damaged ({problem}); preparing {corpus.name} again")
        corpus.fetch(split)
        _replace(folder, lambda aside: _write(aside, corpus, split, tokenizer))
    return folder


def _problem(folder: Path) -> str | None:
    """What is wrong with a prepared split; None if it is as it was written.

    The checksum is taken when the file was written to since, or copied: reading a large one takes seconds.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        with (folder / "tokens.bin").open("rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns == meta["written_ns"]:
                return None
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == meta["sha256"] else "tokens.bin fails its checksum"
    except (OSError, ValueError, KeyError) as problem:
        return str(problem)


def _load(folder: Path) -> tuple[Split, dict[str, str]]:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
    return Split(tokens, meta["bytes"], meta["words"], meta["documents"]), meta


@dataclass
class WordCount:
    """Whitespace-separated words, and one more for each end of line, of a text that comes in pieces."""

    words: int = 0
    bytes: int = 0
    in_word: bool = False  # where the last piece ended

    def add(self, piece: str) -> None:
        self.words += len(piece.split()) + piece.count("\n") - (self.in_word and not piece[0].isspace())
        self.in_word = not piece[-1].isspace()
        self.bytes += len(piece.encode())


def _write(folder: Path, corpus: Corpus, split: str, tokenizer: Tokenizer) -> None:
    content, checksum = hashlib.sha256(), hashlib.sha256()
    words = WordCount() if corpus.counts_words else None
    documents = size = 0
    dtype = tokenizer.dtype.newbyteorder("<")
    end_of_text = np.array([tokenizer.end_of_text], dtype)
    total = 1
    what = f"preparing {corpus.name}, {split}"
    with (folder / "tokens.bin").open("wb") as file, _progress(what, corpus.size(split)) as advance:

        def put(ids: np.ndarray) -> None:
            raw = ids.astype(dtype, copy=False).tobytes()
            file.write(raw)
            checksum.update(raw)

        def published(pieces: Pieces) -> Pieces:
            for piece in pieces:
                if words is not None and piece is not None:
                    words.add(piece)
                yield piece

        def counted(pieces: Pieces) -> Pieces:
            nonlocal documents, size
            for piece in pieces:
                if piece is None:
                    documents += 1
                    content.update(b"\xff")  # in no UTF-8 text: where documents end is part of the content
                else:
                    raw = piece.encode()
                    size += len(raw)
                    content.update(raw)
                yield piece

        put(end_of_text)
        for ids in encoded(counted(corpus.finished(published(corpus.pieces(split, advance)))), tokenizer):
            put(ids)
            total += len(ids)
        _to_disk(file)
    if documents == 0:
        raise UsageError(f"data = {corpus.name}: its {split} split is empty; give more text")
    if words is not None:
        for found, known, what in zip(
            (words.words, words.bytes), corpus.published(split), ("words", "bytes"), strict=True
        ):
            if known not in (None, found):
                _say(
                    f"{corpus.name}, {split}: {found:,} {what} where the published split has {known:,}; figures on it "
                    "cannot be set beside published ones"
                )
    meta = {
        "version": VERSION,
        "corpus": corpus.name,
        "split": split,
        "tokenizer": tokenizer.name,
        "dtype": dtype.str,
        "tokens": total - 1,
        "bytes": size,
        "words": words.words if words is not None else None,
        "documents": documents,
        "source": corpus.source,
        "content_sha256": content.hexdigest(),
        "written_ns": (folder / "tokens.bin").stat().st_mtime_ns,
        "sha256": checksum.hexdigest(),
    }
    with (folder / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")
        _to_disk(file)


# Files and messages


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(folder)):
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _replace(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder beside `folder` and renames it into its place. The caller holds the lock.

    What a killed process left half written of any folder here is deleted.
    """
    for left in folder.parent.glob(".*.writing"):
        lock = _lock_of(folder.with_name(left.name[1 : -len(".writing")]))
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    aside, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        fill(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _progress(what: str, size: int) -> Iterator[Advance]:
    """A bar of bytes read, where there is a terminal to show it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=size)
        yield lambda read: bar.advance(task, read)


def _say(line: str) -> None:
    print(f"moelab: {line}", file=sys.stderr)
