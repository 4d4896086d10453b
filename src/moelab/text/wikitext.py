"""WikiText (Merity et al. 2016): from the hub, or from local files in either of the layouts that it is given out in.

The hub's parquet files hold a row a line, in which an empty line is an empty row; in the original files it is a blank
and an end of line. Both give the same text here, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from moelab.config import RunFailed, UsageError
from moelab.text import hub
from moelab.text.detokenize import detokenized
from moelab.text.documents import (
    Advance,
    Pieces,
    articles,
    blocks_of,
    parquet_rows,
    read_blocks,
    unheard,
    without_empty_documents,
)
from moelab.text.splits import SPLITS

# Shards of the train split on the hub, by configuration.
_CONFIGURATIONS = {
    "wikitext-2": ("wikitext-2-v1", 1),
    "wikitext-2-raw": ("wikitext-2-raw-v1", 1),
    "wikitext-103": ("wikitext-103-v1", 2),
    "wikitext-103-raw": ("wikitext-103-raw-v1", 2),
}
NAMES = tuple(_CONFIGURATIONS)

_RAW_BYTES: dict[str, tuple[int | None, int | None]] = {"valid": (None, 1_146_846), "test": (None, 1_290_590)}
PUBLISHED: dict[str, dict[str, tuple[int | None, int | None]]] = {
    "wikitext-2": {"train": (2_088_628, 10_797_148), "valid": (217_646, 1_121_681), "test": (245_569, 1_256_449)},
    "wikitext-103": {"train": (103_227_021, None), "valid": (217_646, 1_142_309), "test": (245_569, 1_281_077)},
    "wikitext-2-raw": _RAW_BYTES,
    "wikitext-103-raw": _RAW_BYTES,
}
"""Words of the tokenised forms, with an end-of-line a line (Merity et al. 2016, table 1), and bytes: of the original
files, and of the raw forms as follows from the sizes that the hub states. WikiText-2 and -103 share their words."""

_SHARD = re.compile(r"(?P<split>train|valid|validation|test)(-(?P<number>\d+)-of-(?P<count>\d+))?\.parquet")


@dataclass(frozen=True)
class WikiText:
    """One of the WikiTexts, and where it is read from."""

    name: str
    source: str
    """Where from, for the record: the hub's repository and revision, or a folder or file."""
    shards: Mapping[str, Shards]
    """The text of each split that the source has."""
    natural: bool
    """Detokenized."""
    counts_words = True

    @property
    def form(self) -> str:
        """Which of the forms that WikiText is scored in."""
        published = "raw form" if "-raw" in self.name else "tokenised form"
        return f"{published}, {'detokenized as GPT-2 was evaluated' if self.natural else 'as published'}"

    def splits(self) -> tuple[str, ...]:
        """The splits that the source has."""
        return tuple(split for split in SPLITS if split in self.shards)

    def fetch(self, split: str) -> None:
        """Downloads a split, where it comes from the hub and is not there yet. Raises `RunFailed`."""
        self.shards[split].fetch()

    def size(self, split: str) -> int:
        """Bytes that are read for a split, which was fetched."""
        return self.shards[split].size()

    def signature(self, split: str) -> str:
        """Changes with the source: of paths, sizes and times, or the hub's revision; not of contents."""
        facts = [self.name, self.natural, self.shards[split].facts()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def pieces(self, split: str, advance: Advance = unheard) -> Pieces:
        """The text of a split as it was published, an article a document. Raises `UsageError` on a damaged source."""
        return without_empty_documents(articles(self.shards[split].blocks(advance)))

    def finished(self, pieces: Pieces) -> Pieces:
        """The text that is tokenised: detokenized where that was asked for."""
        return detokenized(pieces) if self.natural else pieces

    def published(self, split: str) -> tuple[int | None, int | None]:
        """Words and bytes of the split as published, where they are known."""
        return PUBLISHED[self.name.partition(",")[0]].get(split, (None, None))


class Shards(Protocol):
    """Where the text of one split comes from."""

    def fetch(self) -> None: ...
    def size(self) -> int: ...
    def facts(self) -> object: ...
    def blocks(self, advance: Advance) -> Iterator[str]: ...


@dataclass(frozen=True)
class Files:
    """One file in the original layout, or parquet files, in order."""

    paths: tuple[Path, ...]

    def fetch(self) -> None:
        pass

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def facts(self) -> object:
        stats = [(str(path.absolute()), path.stat()) for path in self.paths]
        return [(path, found.st_size, found.st_mtime_ns) for path, found in stats]

    def blocks(self, advance: Advance) -> Iterator[str]:
        for path in self.paths:
            try:
                yield from _lines(path, advance) if path.suffix == ".parquet" else read_blocks(path, advance)
            except OSError as problem:
                raise UsageError(f"{path}: cannot be read ({problem.strerror}); make it readable") from None


@dataclass(frozen=True)
class Member:
    """A file in the original layout inside a zip archive, which is read without unpacking it."""

    archive: Path
    name: str

    def fetch(self) -> None:
        pass

    def size(self) -> int:
        with zipfile.ZipFile(self.archive) as archive:
            return archive.getinfo(self.name).file_size

    def facts(self) -> object:
        return [*_as_list(Files((self.archive,)).facts()), self.name]

    def blocks(self, advance: Advance) -> Iterator[str]:
        try:
            with zipfile.ZipFile(self.archive) as archive, archive.open(self.name) as file:
                yield from blocks_of(file, f"{self.archive}: {self.name}", advance)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError) as problem:
            raise UsageError(
                f"{self.archive}: {self.name} cannot be read ({problem}); get it again, or give it unpacked"
            ) from None


@dataclass(frozen=True)
class Hub:
    """Parquet files on the Hugging Face hub."""

    names: tuple[str, ...]
    instead: str

    def fetch(self) -> None:
        hub.fetch(self.names, self.instead)

    def _paths(self) -> list[Path]:
        return [path for name in self.names for path in [hub.held(name)] if path is not None]

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._paths())

    def facts(self) -> object:
        return [hub.REPOSITORY, hub.REVISION, list(self.names)]

    def blocks(self, advance: Advance) -> Iterator[str]:
        for path in self._paths():
            try:
                yield from _lines(path, advance)
            except UsageError as problem:  # nothing that the user gave
                hub.forget(path)
                raise RunFailed(
                    f"{problem}; it was deleted from the hub's cache: try again, or {self.instead}"
                ) from None


def _lines(path: Path, advance: Advance) -> Iterator[str]:
    for rows in parquet_rows(path, advance):
        yield "".join(row or " \n" for row in rows)


def _as_list(facts: object) -> list[object]:
    assert isinstance(facts, list)
    return facts


def open_wikitext(name: str, source: Path | None, natural: bool) -> WikiText:
    """One of `NAMES` from the hub, or from a folder or zip archive.

    Raises:
        UsageError: a source that is not there, holds no split, or is an archive that is not safe to read.
    """
    configuration, train_shards = _CONFIGURATIONS[name]
    suffix = "raw" if name.endswith("-raw") else "tokens"
    wanted = ", ".join(f"wiki.{split}.{suffix}" for split in SPLITS)
    give = f"give --source with a folder or zip of {wanted}, or a folder of the hub's parquet files"
    called = f"{name}, detokenized" if natural else name
    if source is None:
        shards = {split: Hub(_on_hub(configuration, split, train_shards), give) for split in SPLITS}
        where = f"{hub.REPOSITORY} ({configuration}) at {hub.REVISION}"
        return WikiText(called, where, shards, natural)
    if source.is_dir():
        found = _in_folder(source, (configuration, configuration.removesuffix("-v1")), suffix)
    elif source.is_file():
        found = _in_archive(source, configuration, suffix)
    else:
        raise UsageError(f"source = {source}: there is no such folder or zip; {give}")
    if not found:
        raise UsageError(f"source = {source}: none of {wanted} is there, nor the hub's parquet files; {give}")
    return WikiText(called, str(source), found, natural)


def _on_hub(configuration: str, split: str, train_shards: int) -> tuple[str, ...]:
    count = train_shards if split == "train" else 1
    stem = "validation" if split == "valid" else split
    return tuple(f"{configuration}/{stem}-{number:05}-of-{count:05}.parquet" for number in range(count))


def _in_folder(source: Path, below: Iterable[str], suffix: str) -> dict[str, Shards]:
    """The splits in a folder, or in the one below it that has the data set's name."""
    for folder in (source, *(source / name for name in below)):
        original = {split: folder / f"wiki.{split}.{suffix}" for split in SPLITS}
        found: dict[str, Shards] = {split: Files((path,)) for split, path in original.items() if path.is_file()}
        if found := found or _parquet(folder):
            return found
    return {}


def _parquet(folder: Path) -> dict[str, Shards]:
    shards: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.parquet")):
        if shard := _SHARD.fullmatch(path.name):
            split = "valid" if shard["split"] == "validation" else shard["split"]
            number, count = int(shard["number"] or 0), int(shard["count"] or 1)
            found = shards.setdefault(split, {})
            if number in found or number >= count or counts.setdefault(split, count) != count:
                first = next(iter(found.values()), path).name
                raise UsageError(
                    f"source = {folder}: {path.name} does not go with {first}; leave one set of shards there"
                )
            found[number] = path
    for split, paths in shards.items():
        if len(paths) < counts[split]:
            missing = next(number for number in range(counts[split]) if number not in paths)
            raise UsageError(f"source = {folder}: shard {missing} of the {counts[split]} of {split} is missing")
    return {split: Files(tuple(paths[number] for number in sorted(paths))) for split, paths in shards.items()}


def _in_archive(source: Path, configuration: str, suffix: str) -> dict[str, Shards]:
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, RuntimeError, OSError) as problem:
        raise UsageError(f"source = {source}: not a zip archive that can be read ({problem})") from None
    for member in members:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
            raise UsageError(f"source = {source}: its member {member.filename!r} lies outside the archive's own folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UsageError(f"source = {source}: its member {member.filename!r} is a symbolic link")
    members = [m for m in members if not m.is_dir() and "__MACOSX" not in PurePosixPath(m.filename).parts]
    found: dict[str, Shards] = {}
    for split in SPLITS:
        names = [m.filename for m in members if PurePosixPath(m.filename).name == f"wiki.{split}.{suffix}"]
        own = [name for name in names if PurePosixPath(name).parent.name == configuration.removesuffix("-v1")]
        if len(chosen := own or names) > 1:
            raise UsageError(f"source = {source}: has {chosen[0]} and {chosen[1]}; give an archive with one of them")
        if chosen:
            found[split] = Member(source, chosen[0])
    return found
