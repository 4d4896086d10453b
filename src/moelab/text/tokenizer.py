"""Tokenizers: GPT-2's, a byte-pair encoding trained on the corpus, and plain bytes. All are one engine, tiktoken's.

End-of-text is a token that no text encodes to: a text that spells `<|endoftext|>` is encoded as the characters it has.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from moelab.config import UsageError

END_OF_TEXT = "<|endoftext|>"
R50K_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # as tiktoken states it
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
RANKS_FILE = "ranks.tiktoken"


class Tokenizer:
    """Text to token ids and back, without loss.

    Args:
        name: "gpt2", "bpe:VOCAB" or "bytes".
        ranks: the bytes of each token, to its id, in the order of merging; ids from 0, all 256 single bytes among them.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name, self.ranks = name, ranks
        self.end_of_text = len(ranks)
        self.vocabulary = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.end_of_text}
        )

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest that holds every id."""
        return np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the name and the ranks."""
        return _fingerprint(self.name, self.ranks)

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids, without end-of-text. Runs beside other threads.

        Raises `UsageError` on a `str` that UTF-8 cannot spell, such as a prompt of broken bytes.
        """
        try:
            return self._ids(text)
        except UnicodeEncodeError as problem:
            raise UsageError(f"text: character {problem.start:,} is half of a surrogate pair; give UTF-8") from None

    def _ids(self, text: str) -> np.ndarray:
        if self.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; bytes that are not UTF-8, as half a character is not, become U+FFFD."""
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and the ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        _write_ranks(self.ranks, folder / RANKS_FILE)
        facts = {"name": self.name, "vocabulary": self.vocabulary, "fingerprint": self.fingerprint}
        (folder / "tokenizer.json").write_text(json.dumps(facts, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises `UsageError` if it is not there or not what was written."""
        try:
            facts = json.loads((folder / "tokenizer.json").read_text())
            name, fingerprint = facts["name"], facts["fingerprint"]
            ranks = _read_ranks(folder / RANKS_FILE)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"tokenizer = {folder}: cannot be read ({problem})") from None
        if _fingerprint(name, ranks) != fingerprint:
            raise UsageError(f"tokenizer = {folder}: {RANKS_FILE} fails its checksum")
        return Tokenizer(name, ranks)


def _fingerprint(name: str, ranks: dict[bytes, int]) -> str:
    digest = hashlib.sha256(name.encode())
    for token in sorted(ranks, key=lambda token: ranks[token]):
        digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is end-of-text."""
    return Tokenizer("bytes", {bytes([i]): i for i in range(256)})


def check_name(name: str) -> None:
    """Raises `UsageError` unless `name` is gpt2, bytes, or bpe: with a vocabulary that can be."""
    kind, _, vocabulary = name.partition(":")
    if name in ("gpt2", "bytes"):
        return
    if kind != "bpe" or not (vocabulary.isascii() and vocabulary.isdigit()):
        raise UsageError(f"tokenizer = {name}: give gpt2, bytes, or bpe:VOCAB such as bpe:4096")
    if not 258 <= int(vocabulary) <= 1_000_000:
        raise UsageError(
            f"tokenizer = {name}: give a vocabulary of 258 (256 bytes, end-of-text, one merge) to 1,000,000"
        )


def train_bpe(name: str, text: Iterable[str]) -> Tokenizer:
    """A byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) of the size that "bpe:VOCAB" says.

    Merges are learned by Hugging Face's `tokenizers`; a text with too few of them gives a smaller vocabulary.
    """
    from tokenizers import Tokenizer as HubTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    learner = HubTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=int(name.partition(":")[2]) - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(text, trainer)
    spelled = _spelled_bytes()
    ranks = {bytes(spelled[c] for c in token): rank for token, rank in learner.get_vocab().items()}
    return Tokenizer(name, dict(sorted(ranks.items(), key=lambda item: item[1])))


def _spelled_bytes() -> dict[str, int]:
    """The printable character that byte-level encodings spell each byte with, to the byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def gpt2_tokenizer(ranks: Path | None, source: Path | None, kept: Path) -> Tokenizer:
    """GPT-2's tokenizer.

    Its ranks are looked for in `ranks`, $MOELAB_GPT2_RANKS, `kept` (where they are put once found), `source`, and at
    last where tiktoken gets them: its own cache, or the network.

    Raises:
        UsageError: files that are not GPT-2's; none to be had.
    """
    named = ranks or (Path(os.environ["MOELAB_GPT2_RANKS"]) if os.environ.get("MOELAB_GPT2_RANKS") else None)
    at_hand = _kept_ranks(kept)
    if named is not None:
        found = _ranks_in(named)
        if found is None:
            raise UsageError(
                f"ranks = {named}: give r50k_base.tiktoken, or a folder with it or encoder.json and vocab.bpe"
            )
    else:
        found = (
            at_hand or (_ranks_in(source) if source is not None and source.is_dir() else None) or _downloaded_ranks()
        )
    if at_hand is None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        _write_ranks(found, aside)
        os.replace(aside, kept)
    return Tokenizer("gpt2", found)


def _kept_ranks(kept: Path) -> dict[bytes, int] | None:
    """A damaged copy of our own is as good as none."""
    try:
        return _ranks_in(kept)
    except UsageError:
        return None


def _ranks_in(path: Path) -> dict[bytes, int] | None:
    """GPT-2's ranks from a file or folder; None if there are none. Raises `UsageError` on other or damaged ones."""
    if path.is_dir():
        if (path / "r50k_base.tiktoken").is_file():
            path = path / "r50k_base.tiktoken"
        elif (path / "encoder.json").is_file() and (path / "vocab.bpe").is_file():
            _check_sha256(path / "encoder.json", ENCODER_JSON_SHA256)
            _check_sha256(path / "vocab.bpe", VOCAB_BPE_SHA256)
            return data_gym_to_mergeable_bpe_ranks(str(path / "vocab.bpe"), str(path / "encoder.json"))
    if not path.is_file():
        return None
    _check_sha256(path, R50K_SHA256)
    return _read_ranks(path)


def _check_sha256(path: Path, expected: str) -> None:
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise UsageError(f"ranks = {path}: its checksum is not that of GPT-2's published file; fetch it again")


def _read_ranks(path: Path) -> dict[bytes, int]:
    rows = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def _write_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """tiktoken's file format: a line a token, its bytes in base 64 and its rank, in the order of the ranks."""
    rows = sorted(ranks.items(), key=lambda item: item[1])
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in rows))


def _downloaded_ranks() -> dict[bytes, int]:
    from requests import RequestException

    try:
        ranks: dict[bytes, int] = tiktoken.get_encoding("r50k_base")._mergeable_ranks
    except (RequestException, OSError, ValueError) as problem:
        raise UsageError(
            f"tokenizer = gpt2: its ranks cannot be fetched ({type(problem).__name__}); give --ranks FILE "
            f"(r50k_base.tiktoken), or another --tokenizer such as bpe:4096"
        ) from None
    return ranks
