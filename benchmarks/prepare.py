"""How fast, and in how much memory, text becomes tokens.

    python benchmarks/prepare.py --megabytes 500 --ranks r50k_base.tiktoken
    python benchmarks/prepare.py --text FILE --tokenizer bpe:4096

Without --text it makes a synthetic corpus of the size asked for: documents of lines drawn at random, from a fixed
seed, out of this Python's standard library (or of --lines FILE), so words are as frequent as in real text and no two
documents are equal. Prints tokens a second of the first preparation, the time of the second, and the peak of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from moelab.config import DataConfig
from moelab.text import prepare
from moelab.text.corpora import open_corpus

LINES_A_DOCUMENT = (20, 400)
READ = 32 << 20  # characters of text that lines are drawn from


@dataclass(frozen=True)
class Benchmark:
    """Time the preparation of a text."""

    megabytes: int = 500
    """Size of the synthetic corpus (10^6 bytes)."""
    lines: Path | None = None
    """File that its lines are drawn from; the standard library when not given."""
    text: Path | None = None
    """A file or folder to prepare, instead of a synthetic corpus."""
    tokenizer: str = "gpt2"
    """gpt2, bpe:VOCAB or bytes."""
    ranks: Path | None = None
    """GPT-2's ranks, offline."""


def drawn_from(path: Path | None) -> list[str]:
    """Lines, with their ends, of the first `READ` characters or a little more."""
    corpus = open_corpus(DataConfig(data="stdlib" if path is None else f"text:{path}"))
    pieces: list[str] = []
    read = 0
    for piece in corpus.pieces("train"):
        if piece is not None:
            pieces.append(piece)
            read += len(piece)
        if read >= READ:
            break
    return "".join(pieces).splitlines(keepends=True)


def write_synthetic(path: Path, lines_from: Path | None, size: int) -> None:
    """A text file of `size` bytes or a little more, documents separated by `<|endoftext|>`."""
    lines, draw, written = drawn_from(lines_from), random.Random(0), 0
    with path.open("wb") as file:
        while written < size:
            document = "".join(draw.choices(lines, k=draw.randint(*LINES_A_DOCUMENT)))
            written += file.write(f"{document}\n<|endoftext|>\n".encode())


def peak_megabytes() -> float:
    """Of this process so far; `ru_maxrss` is in bytes on macOS and in KiB elsewhere."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def measure(data: DataConfig, home: Path) -> None:
    before = peak_megabytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    text = prepare(data, splits=("train", "valid", "test"), home=home)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    start = time.perf_counter()
    prepare(data, splits=("train", "valid", "test"), home=home)
    again = time.perf_counter() - start
    tokens = sum(split.scored for split in text.splits.values())
    megabytes = sum(split.bytes for split in text.splits.values()) / 1e6
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}; tokenizer {text.tokenizer.name}")
    print(f"{megabytes:,.0f} MB of text, {sum(s.documents for s in text.splits.values()):,} documents")
    print(f"prepared in {seconds:.1f} s: {tokens:,} tokens, {tokens / seconds / 1e6:.2f} M tokens/s")
    print(f"{cpu:.1f} s of CPU time, {cpu / seconds:.2f} cores busy, {tokens / cpu / 1e6:.2f} M tokens a CPU-second")
    print(f"opened again in {again:.2f} s")
    print(f"peak memory {peak_megabytes():,.0f} MB, of which {before:,.0f} MB before it began")


def main() -> None:
    settings = tyro.cli(Benchmark)
    with tempfile.TemporaryDirectory() as folder:
        path = settings.text
        if path is None:
            path = Path(folder) / "synthetic.txt"
            size = settings.megabytes * 1_000_000
            # In a process of its own, so that its memory is not counted.
            making = multiprocessing.get_context("spawn").Process(
                target=write_synthetic, args=(path, settings.lines, size)
            )
            making.start()
            making.join()
            if making.exitcode:
                sys.exit(making.exitcode)
        data = DataConfig(data=f"text:{path}", tokenizer=settings.tokenizer, ranks=settings.ranks)
        measure(data, Path(folder) / "home")


if __name__ == "__main__":
    main()
