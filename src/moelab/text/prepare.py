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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moelab.config import DataConfig, UsageError
from moelab.text.corpora import Corpus, Pieces, open_corpus
from moelab.text.tokenizer import (
    TRAINING_BYTES,
    Tokenizer,
    bytes_tokenizer,
    check_name,
    gpt2_tokenizer,
    train_bpe,
)

VERSION = 1  # of the token files; a new one makes every corpus be prepared again
CHUNK = 256 * 1024  # characters that are encoded at once
LONGEST_WORD = 4 << 20  # characters without a safe place to cut after which the text is cut all the same
_SAFE_CUT = re.compile(r"[!-~](?=[ \n])")  # before a blank that follows no blank: no token spans it


@dataclass(frozen=True)
class Split:
    """One split as tokens."""

    tokens: np.ndarray
    """(scored + 1,) memory-mapped ids: end-of-text, then every document with an end-of-text after it."""
    bytes: int
    """Of the original text in UTF-8; end-of-text counts none."""
    words: int | None
    """WikiText: whitespace-separated words, with one end-of-line a line."""
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
    fingerprint: str
    """SHA-256 over the text of the splits, the tokenizer, and the format's version."""
    tokenizer: Tokenizer
    splits: dict[str, Split]


def moelab_home() -> Path:
    """$MOELAB_HOME, or ~/.cache/moelab."""
    return Path(os.environ.get("MOELAB_HOME") or Path.home() / ".cache" / "moelab")


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
    """
    home = home or moelab_home()
    if tokenizer is None and data.tokenizer is not None:
        check_name(data.tokenizer)
    corpus = open_corpus(data)
    for split in splits:
        if split not in corpus.splits():
            raise UsageError(f"source = {data.source}: it has no {split} split of {corpus.name}")
    try:
        (home / "prepared").mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(f"MOELAB_HOME = {home}: cannot be written ({problem.strerror}); set another") from None
    if tokenizer is None:
        tokenizer = _tokenizer(data, corpus, home)
    folders = [_split_folder(corpus, split, tokenizer, home) for split in splits]
    loaded = {split: _load(folder) for split, folder in zip(splits, folders, strict=True)}
    contents = {split: meta["content_sha256"] for split, (_, meta) in loaded.items()}
    facts = [VERSION, tokenizer.fingerprint, sorted(contents.items())]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return PreparedText(corpus.name, home / "prepared", fingerprint, tokenizer, {s: x for s, (x, _) in loaded.items()})


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
        trained = train_bpe(name, _sample(corpus))
        if trained.vocabulary < int(name.partition(":")[2]):
            _say(f"tokenizer {name}: the text has merges for no more than {trained.vocabulary} tokens")
        trained.save(aside)

    with _lock(folder):
        with contextlib.suppress(UsageError):
            return Tokenizer.load(folder)
        _replace(folder, fill)
        return Tokenizer.load(folder)


def _sample(corpus: Corpus) -> Iterator[str]:
    """The train split, or `TRAINING_BYTES` of it spread evenly, in pieces."""
    size = 64 * 1024
    keep_one_in = max(1, -(-corpus.size("train") // TRAINING_BYTES))
    pieces = (p[i : i + size] for p in corpus.pieces("train") if p is not None for i in range(0, len(p), size))
    for number, piece in enumerate(pieces):
        if number % keep_one_in == 0:
            yield piece


# Token files


def _split_folder(corpus: Corpus, split: str, tokenizer: Tokenizer, home: Path) -> Path:
    """The folder of a prepared split, which is made if it is not there or not as it was written."""
    key = _key(str(VERSION), corpus.signature(split), tokenizer.fingerprint, split)
    folder = home / "prepared" / f"{_slug(corpus.name, tokenizer.name, split)}-{key}"
    with _lock(folder):
        problem = _problem(folder)
        if problem is None:
            return folder
        if folder.exists():
            _say(f"{folder} is damaged ({problem}); preparing {corpus.name} again")
        _replace(folder, lambda aside: _write(aside, corpus, split, tokenizer))
    return folder


def _problem(folder: Path) -> str | None:
    """What is wrong with a prepared split; None if it is as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        with (folder / "tokens.bin").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == meta["sha256"] else "tokens.bin fails its checksum"
    except (OSError, ValueError, KeyError) as problem:
        return str(problem)


def _load(folder: Path) -> tuple[Split, dict[str, str]]:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
    return Split(tokens, meta["bytes"], meta["words"], meta["documents"]), meta


@dataclass
class _Counts:
    """What is counted of the text while it streams past."""

    bytes: int = 0
    words: int = 0
    documents: int = 0


def _write(folder: Path, corpus: Corpus, split: str, tokenizer: Tokenizer) -> None:
    counts, content, checksum = _Counts(), hashlib.sha256(), hashlib.sha256()
    dtype = tokenizer.dtype.newbyteorder("<")
    end_of_text = np.array([tokenizer.end_of_text], dtype)
    total = 1
    with (folder / "tokens.bin").open("wb") as file, _progress(corpus, split) as advance:

        def put(ids: np.ndarray) -> None:
            raw = ids.astype(dtype, copy=False).tobytes()
            file.write(raw)
            checksum.update(raw)

        def counted(pieces: Pieces) -> Pieces:
            for piece in pieces:
                if piece is None:
                    counts.documents += 1
                    content.update(b"\xff")  # in no UTF-8 text: where documents end is part of the content
                else:
                    raw = piece.encode()
                    counts.bytes += len(raw)
                    content.update(raw)
                    if corpus.counts_words:
                        counts.words += len(piece.split()) + piece.count("\n")
                yield piece

        put(end_of_text)
        for ids in _encoded(counted(corpus.pieces(split, advance)), tokenizer):
            put(ids)
            total += len(ids)
        file.flush()
        os.fsync(file.fileno())
    if counts.documents == 0:
        raise UsageError(f"data = {corpus.name}: its {split} split is empty; give more text")
    meta = {
        "version": VERSION,
        "corpus": corpus.name,
        "split": split,
        "tokenizer": tokenizer.name,
        "dtype": dtype.str,
        "tokens": total - 1,
        "bytes": counts.bytes,
        "words": counts.words if corpus.counts_words else None,
        "documents": counts.documents,
        "content_sha256": content.hexdigest(),
        "sha256": checksum.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _encoded(pieces: Pieces, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of the stream, in order, encoded by several threads; no more than a few chunks are in memory at once."""
    threads = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    end = np.array([tokenizer.end_of_text], tokenizer.dtype)

    def encode(texts: list[str | None]) -> np.ndarray:
        return np.concatenate([end if text is None else tokenizer.encode(text) for text in texts])

    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(pieces):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(pieces: Pieces) -> Iterator[list[str | None]]:
    """The stream in lists of about `CHUNK` characters, cut only where encoding cannot tell."""
    batch: list[str | None] = []
    size, carry = 0, ""
    for piece in pieces:
        if piece is None:
            if carry:
                batch.append(carry)
                size, carry = size + len(carry), ""
            batch.append(None)
        else:
            carry += piece
            while len(carry) > CHUNK:
                cut = _safe_cut(carry)
                if cut is None:
                    break
                batch.append(carry[:cut])
                size, carry = size + cut, carry[cut:]
                if size >= CHUNK:
                    yield batch
                    batch, size = [], 0
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    assert not carry, "a document without its end"
    if batch:
        yield batch


def _safe_cut(text: str) -> int | None:
    """A place near `CHUNK` where cutting `text` changes no token; None to wait for more text.

    Pre-tokens begin with a blank or have none, so a blank after a character that is none always begins one.
    """
    found = _SAFE_CUT.search(text, CHUNK - 1)
    if found is not None:
        return found.end()
    return LONGEST_WORD if len(text) > LONGEST_WORD else None


# Files and messages


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def _replace(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder beside `folder` and renames it into its place. The caller holds the lock."""
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
def _progress(corpus: Corpus, split: str) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"preparing {corpus.name}, {split}", total=corpus.size(split))
        yield lambda read: bar.advance(task, read)


def _say(line: str) -> None:
    print(f"moelab: {line}", file=sys.stderr)
