"""Tokenizers: lossless, repeatable, and GPT-2's own where it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.config import UsageError
from moelab.text.tokenizer import Tokenizer, bytes_tokenizer, check_name, gpt2_tokenizer, train_bpe

TEXT = [f"def function_{i % 7}(argument):\n    return argument + {i}  # naïve\n" for i in range(300)]
TOKENIZERS = {"bytes": bytes_tokenizer(), "bpe:400": train_bpe("bpe:400", TEXT)}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(st.characters(codec="utf-8")))
def test_decode_undoes_encode(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == 0 or ids.max() < tokenizer.end_of_text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_that_spells_end_of_text_is_ordinary_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_of_a_surrogate_pair_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError, match="text: character 2 is half of a surrogate pair"):
        TOKENIZERS[name].encode("ab\udcff")


def test_half_a_character_is_decoded_as_the_replacement_character() -> None:
    assert TOKENIZERS["bytes"].decode([104, 0xC3]) == "h\ufffd"


def test_a_trained_encoding_has_the_size_it_was_asked_for_and_compresses() -> None:
    tokenizer = TOKENIZERS["bpe:400"]
    assert tokenizer.vocabulary == 400
    assert len(tokenizer.encode("".join(TEXT))) < len("".join(TEXT).encode()) / 3


def test_training_gives_the_same_encoding_in_another_process() -> None:
    code = (
        "from moelab.text.tokenizer import train_bpe\n"
        "T = [f'def function_{i % 7}(argument):\\n    return argument + {i}  # na\\u00efve\\n' for i in range(300)]\n"
        "print(train_bpe('bpe:400', T).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == TOKENIZERS["bpe:400"].fingerprint


def test_a_text_with_few_merges_gives_a_smaller_vocabulary() -> None:
    assert train_bpe("bpe:5000", ["abab"]).vocabulary < 300


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    TOKENIZERS[name].save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.name, loaded.vocabulary, loaded.fingerprint) == (
        name, TOKENIZERS[name].vocabulary, TOKENIZERS[name].fingerprint,
    )  # fmt: skip
    assert np.array_equal(loaded.encode("def x"), TOKENIZERS[name].encode("def x"))


@pytest.mark.parametrize("how", ["line gone", "line twice", "half a line", "no facts", "other facts", "gone"])
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    TOKENIZERS["bpe:400"].save(tmp_path)
    ranks, facts = tmp_path / "ranks.tiktoken", tmp_path / "tokenizer.json"
    lines = ranks.read_text().splitlines(keepends=True)
    match how:
        case "line gone":
            ranks.write_text("".join(lines[:-1]))
        case "line twice":
            ranks.write_text("".join([*lines[:-1], lines[5].split()[0] + " 398\n"]))
        case "half a line":
            ranks.write_text("".join(lines)[:-5])
        case "no facts":
            facts.write_text("{}")
        case "other facts":
            facts.write_text("[]")
        case "gone":
            ranks.unlink()
    with pytest.raises(UsageError, match="tokenizer = ") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["words", "bpe", "bpe:", "bpe:x", "bpe:257", "bpe:-5", "gpt3", ""])
def test_an_unknown_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"tokenizer = {name}: give"):
        check_name(name)


@pytest.mark.parametrize("form", ["file", "folder of ranks", "folder of merges", "environment", "source", "kept"])
def test_gpt2s_ranks_are_found_offline(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder, kept = shared_data / "gpt2-bpe", tmp_path / "kept" / "gpt2.tiktoken"
    merges = tmp_path / "merges"
    merges.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        (merges / name).symlink_to(folder / name)
    ranks = {"file": folder / "r50k_base.tiktoken", "folder of ranks": folder, "folder of merges": merges}.get(form)
    if form == "environment":
        monkeypatch.setenv("MOELAB_GPT2_RANKS", str(folder))
    if form == "kept":
        gpt2_tokenizer(folder, None, kept)
    found = gpt2_tokenizer(ranks, folder if form == "source" else None, kept)
    assert found.encode("Hello world").tolist() == [15496, 995]
    assert (found.vocabulary, found.end_of_text) == (50_257, 50_256)
    assert kept.exists()


def test_other_ranks_under_gpt2s_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r50k_base.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(UsageError, match="its checksum is not that of GPT-2's published file"):
        gpt2_tokenizer(tmp_path, None, tmp_path / "kept")


def test_a_folder_without_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ranks = .*: give r50k_base.tiktoken"):
        gpt2_tokenizer(tmp_path, None, tmp_path / "kept")


def test_a_damaged_copy_of_gpt2s_ranks_is_replaced(shared_data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    gpt2_tokenizer(shared_data / "gpt2-bpe", None, kept)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])
    gpt2_tokenizer(None, shared_data / "gpt2-bpe", kept)
    assert kept.read_bytes() == whole


def test_without_a_network_the_way_out_is_said(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom moelab.config import UsageError\n"
        "from moelab.text.tokenizer import gpt2_tokenizer\n"
        f"try: gpt2_tokenizer(None, None, Path({str(tmp_path / 'kept')!r}))\n"
        "except UsageError as problem: print(problem)"
    )
    nowhere = "http://127.0.0.1:9"  # the discard port, where nobody listens
    environment = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "moelab_gpt2_ranks")}
    environment |= {"HTTPS_PROXY": nowhere, "https_proxy": nowhere, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.startswith("tokenizer = gpt2: its ranks cannot be fetched (ProxyError); give --ranks FILE")
    assert said.stdout.count("\n") == 1
