"""Token files: the layout that is promised, made once, never half, and made again when the source has changed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.config import DataConfig, UsageError
from moelab.text import PreparedText, prepare
from moelab.text.prepare import WordCount, _sample
from moelab.text.tokenizer import bytes_tokenizer, train_bpe


def corpus(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("<|endoftext|>\n".join(f"{text}\n" for text in texts))
    return DataConfig(data=f"text:{path}", tokenizer="bytes")


TEXTS = [f"document {i} says {i * 7}" for i in range(200)]


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("tokens.bin")}


def test_documents_are_joined_by_end_of_text_and_nothing_is_padded(tmp_path: Path) -> None:
    text = prepare(corpus(tmp_path / "x.txt", TEXTS), splits=("train", "valid", "test"))
    found = []
    for split in text.splits.values():
        tokens = split.tokens.tolist()
        assert tokens[0] == tokens[-1] == 256
        inside = bytes_of(tokens)
        assert len(inside) == split.documents
        assert all(inside), "an empty document is padding"
        assert split.bytes == sum(map(len, inside))
        assert split.scored == split.bytes + split.documents
        found += inside
    assert sorted(found) == sorted(f"{text}\n".encode() for text in TEXTS)


def bytes_of(tokens: list[int]) -> list[bytes]:
    """The documents of a byte-tokenised split."""
    documents, current = [], bytearray()
    for token in tokens[1:]:
        if token == 256:
            documents.append(bytes(current))
            current = bytearray()
        else:
            current.append(token)
    assert not current
    return documents


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1), min_size=1, max_size=30))
def test_what_is_prepared_decodes_to_the_text(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts) + json.dumps({"text": "z" * 400}))
        data = DataConfig(data=f"text:{path}", tokenizer="bytes")
        text = prepare(data, splits=("train", "valid", "test"), home=Path(folder) / "home")
        inside = b"".join(b"".join(bytes_of(s.tokens.tolist())) for s in text.splits.values())
    assert sorted(inside) == sorted("".join([*texts, "z" * 400]).encode())


def test_a_second_call_uses_what_the_first_has_made(tmp_path: Path, home: Path) -> None:
    data = corpus(tmp_path / "x.txt", TEXTS)
    first = prepare(data)
    made = files(home)
    assert prepare(data).fingerprint == first.fingerprint
    assert files(home) == made


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    first = prepare(corpus(tmp_path / "x.txt", TEXTS))
    second = prepare(corpus(tmp_path / "x.txt", [*TEXTS[:-1], "document 199 says 1394"]))  # of the same length
    assert second.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_where_it_lies(tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a.txt", TEXTS), corpus(tmp_path / "b.txt", TEXTS)
    assert prepare(a).fingerprint == prepare(b).fingerprint


def test_the_fingerprint_tells_tokenizers_and_document_ends_apart(tmp_path: Path) -> None:
    data = corpus(tmp_path / "a.txt", TEXTS)
    joined = corpus(tmp_path / "b.txt", [TEXTS[0] + "\n" + TEXTS[1], *TEXTS[2:]])
    prints = [prepare(d).fingerprint for d in (data, replace(data, tokenizer="bpe:300"), joined)]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("how", ["truncated", "one bit", "meta gone"])
def test_a_damaged_token_file_is_noticed_and_made_again(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    data = corpus(tmp_path / "x.txt", TEXTS)
    before = prepare(data).splits["train"].tokens.tolist()
    (path,) = home.rglob("*train*/tokens.bin")
    content = bytearray(path.read_bytes())
    if how == "meta gone":
        path.with_name("meta.json").unlink()
    else:
        content[100] ^= 1
        path.write_bytes(content if how == "one bit" else content[:-2])
    assert prepare(data).splits["train"].tokens.tolist() == before
    assert "is damaged" in capsys.readouterr().err


def test_a_half_written_preparation_is_never_used(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(tmp_path / "x.txt", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["moelab.text.prepare"], "encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(data)
    assert not files(home)
    whole = prepare(data).splits["train"].tokens.tolist()
    (path,) = home.rglob("*train*/tokens.bin")
    killed = path.parent.with_name(f".{path.parent.name}.writing")  # what a killed process leaves
    path.parent.rename(killed)
    (killed / "tokens.bin").write_bytes(b"half")
    assert prepare(data).splits["train"].tokens.tolist() == whole
    assert not killed.exists()


def test_what_was_left_half_written_goes_with_the_next_preparation_unless_it_is_being_written(
    tmp_path: Path, home: Path
) -> None:
    left, written = (home / "prepared" / f".{name}.writing" for name in ("left", "written"))
    left.mkdir(parents=True)
    written.mkdir()
    with FileLock(home / "prepared" / "written.lock"):
        prepare(corpus(tmp_path / "x.txt", TEXTS))
    assert (left.exists(), written.exists()) == (False, True)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_processes_that_prepare_at_once_do_not_collide(tmp_path: Path) -> None:
    data = corpus(tmp_path / "x.txt", TEXTS * 20)
    code = (
        "from moelab.config import DataConfig\nfrom moelab.text import prepare\n"
        f"t = prepare(DataConfig(data={data.data!r}, tokenizer='bpe:300'))\n"
        "print(t.fingerprint, t.splits['train'].scored)"
    )
    environment = os.environ | {"MOELAB_HOME": str(tmp_path / "home")}
    run = [sys.executable, "-c", code]
    running = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(said)) == 1
    assert not list((tmp_path / "home").rglob(".*.writing"))


def test_another_tokenizer_can_be_put_in_the_place_of_the_named_one(tmp_path: Path) -> None:
    data = replace(corpus(tmp_path / "x.txt", TEXTS), tokenizer="gpt2")
    text = prepare(data, splits=("test",), tokenizer=bytes_tokenizer())
    assert text.tokenizer.name == "bytes"
    assert list(text.splits) == ["test"]


def test_ids_are_as_small_as_the_vocabulary_allows(tmp_path: Path) -> None:
    assert prepare(corpus(tmp_path / "x.txt", TEXTS)).splits["train"].tokens.dtype == np.uint16


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"MOELAB_HOME = .*: cannot be written \(.+\); set another"):
        prepare(corpus(tmp_path / "x.txt", TEXTS), home=tmp_path / "file" / "home")


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r50k_base.tiktoken").write_text("")
    monkeypatch.setenv("MOELAB_GPT2_RANKS", str(tmp_path))
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UsageError, match=r"r50k_base.tiktoken: cannot be read \(Permission denied\); make it readable"):
        prepare(replace(corpus(tmp_path / "x.txt", TEXTS), tokenizer="gpt2"))


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    code = (
        "import resource, signal\nfrom moelab.config import DataConfig, UsageError\nfrom moelab.text import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        f"try: prepare(DataConfig(data={corpus(tmp_path / 'x.txt', TEXTS * 20).data!r}, tokenizer='bytes'))\n"
        "except UsageError as problem: print(problem)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == f"MOELAB_HOME = {home}: cannot be written (File too large); set another\n"
    assert not files(home)


def test_what_is_prepared_can_be_used_where_nothing_can_be_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(corpus(tmp_path / "x.txt", TEXTS), tokenizer="bpe:300")
    before = prepare(data).fingerprint
    for lock in home.rglob("*.lock"):
        lock.unlink()
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(os, "open", refused)
    assert prepare(data).fingerprint == before


def refused(path: object, *_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", path)


def test_a_damaged_tokenizer_is_said_and_trained_again(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = replace(corpus(tmp_path / "x.txt", TEXTS), tokenizer="bpe:300")
    before = prepare(data).fingerprint
    (path,) = home.rglob("ranks.tiktoken")
    path.write_bytes(path.read_bytes()[:-20])
    assert prepare(data).fingerprint == before
    assert "training it again" in capsys.readouterr().err


def test_a_vocabulary_the_text_has_no_merges_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = prepare(replace(corpus(tmp_path / "x.txt", TEXTS), tokenizer="bpe:9000"))
    assert f"no more than {text.tokenizer.vocabulary} tokens" in capsys.readouterr().err


def test_the_encoding_is_trained_on_the_train_split_alone(tmp_path: Path) -> None:
    data = corpus(tmp_path / "x.txt", TEXTS)
    train = [text.decode() for text in bytes_of(prepare(data, splits=("train",)).splits["train"].tokens.tolist())]
    trained = prepare(replace(data, tokenizer="bpe:300"), splits=("valid",)).tokenizer
    assert trained.fingerprint == train_bpe("bpe:300", train).fingerprint
    assert trained.fingerprint != train_bpe("bpe:300", [f"{text}\n" for text in TEXTS]).fingerprint


@pytest.mark.parametrize("count", [10, 1000, 5000])
def test_the_sample_of_a_long_text_is_bounded_and_spread_evenly(count: int) -> None:
    limit = 1 << 20
    pieces = [f"{i:06}" + "é" * 600 for i in range(count)]
    kept = _sample(iter([p for piece in pieces for p in (piece, None)]), limit)
    assert min(limit // 2, count * 1206) <= sum(len(p.encode()) for p in kept) <= limit
    numbers = [int(p[:6]) for p in kept]
    assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1


def test_no_progress_is_shown_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(corpus(tmp_path / "x.txt", TEXTS))
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal_while_preparing_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    data = corpus(tmp_path / "x.txt", TEXTS)
    prepare(data)
    assert "preparing text:" in capsys.readouterr().err
    prepare(data)
    assert capsys.readouterr().err == ""


def test_words_are_counted_across_the_pieces_they_come_in() -> None:
    text = "one two\n  three \n\nfour"
    for size in range(1, len(text)):
        count = WordCount()
        for start in range(0, len(text), size):
            count.add(text[start : start + size])
        assert count.words == 4 + 3


def test_a_source_without_the_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text(" \n = Title = \n \n Text . \n")
    data = DataConfig(data="wikitext-2", source=tmp_path, tokenizer="bytes")
    with pytest.raises(UsageError, match="has no train split of wikitext-2, only test"):
        prepare(data)
    assert prepare(data, splits=("test",)).splits["test"].words == 5 + 4


def wikitext(shared_data: Path, name: str, *splits: str) -> PreparedText:
    return prepare(
        DataConfig(data=name, source=shared_data / name, ranks=shared_data / "gpt2-bpe"), splits=splits
    )  # fmt: skip


def test_wikitext_103_has_its_published_counts(shared_data: Path) -> None:
    text = wikitext(shared_data, "wikitext-103", "valid", "test")
    assert [s.words for s in text.splits.values()] == [217_646, 245_569]
    assert [s.documents for s in text.splits.values()] == [60, 60]
    assert [s.bytes for s in text.splits.values()] == [1_142_309, 1_281_077]
    # Encoded whole, the files have 249,735 and 285,234 GPT-2 tokens; here each article has an end-of-text besides.
    assert [s.scored - s.documents for s in text.splits.values()] == pytest.approx([249_735, 285_234], rel=0.002)


def test_wikitext_decodes_to_its_file_byte_for_byte(shared_data: Path) -> None:
    text = wikitext(shared_data, "wikitext-103", "test")
    tokens = text.splits["test"].tokens
    whole = text.tokenizer.decode(tokens[tokens != text.tokenizer.end_of_text])
    assert whole.encode() == (shared_data / "wikitext-103" / "wiki.test.tokens").read_bytes()
