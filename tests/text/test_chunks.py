"""Chunks: what they encode to, laid end to end, is what the whole text encodes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moelab.text import chunks
from moelab.text.chunks import CHUNK, LONGEST_WORD, batches, encoded
from moelab.text.tokenizer import Tokenizer, bytes_tokenizer, gpt2_tokenizer, train_bpe

SAMPLE = [f"def function_{i % 7}(argument):\n    return argument + {i}  # naïve 汉字 测试\n" for i in range(300)]
BPE = train_bpe("bpe:400", SAMPLE)
ATOMS = "word, ,\n,  ,\n\n,\t,\r\n,'s,'ll,',é,…,汉字,。,1,.,\u3000,\xa0,\x1f,\x85,\u2028,😀,\0".split(",")


def parts(text: str, piece: int) -> list[str]:
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    return [part for batch in batches(iter([*pieces, None])) for part in batch if part is not None]


@given(st.lists(st.sampled_from(ATOMS), max_size=60), st.integers(1, 12), st.integers(1, 40))
@example(["汉字", "\n"] * 30, 3, 7)
def test_cutting_a_text_into_chunks_changes_no_token(atoms: list[str], chunk: int, piece: int) -> None:
    text = "".join(atoms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        cut = parts(text, piece)
    assert "".join(cut) == text
    together = [i for part in cut for i in BPE.encode(part).tolist()]
    assert together == BPE.encode(text).tolist()


def test_text_without_a_latin_letter_is_cut_too() -> None:
    text = "汉字测试。\n" * 100_000
    assert max(map(len, parts(text, 1 << 20))) < 1.1 * CHUNK


@given(st.lists(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=20), max_size=8), st.integers(1, 30))
def test_documents_keep_their_order_and_their_ends(texts: list[list[str]], chunk: int) -> None:
    whole = ["".join(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        found = list(encoded(iter([p for text in whole for p in (text, None)]), BPE))
    ids = np.concatenate(found).tolist() if found else []
    assert ids == [i for text in whole for i in (*BPE.encode(text).tolist(), BPE.end_of_text)]


@pytest.mark.parametrize("text", ["x" * 3_000_000, " " * 3_000_000 + "x", "\n" * 3_000_000 + "x"], ids=["x", " ", "n"])
def test_a_word_or_a_row_of_blanks_without_end_is_encoded_without_loss(text: str) -> None:
    assert max(map(len, parts(text, len(text)))) <= LONGEST_WORD
    ids = np.concatenate(list(encoded(iter([text, None]), BPE)))
    assert BPE.decode(ids[:-1]) == text


def test_a_line_of_fifty_megabytes_is_cut_into_chunks() -> None:
    cut = parts("word " * 10_000_000, 50_000_000)
    assert sum(map(len, cut)) == 50_000_000
    assert max(map(len, cut)) < 1.1 * CHUNK


def test_no_more_than_a_few_chunks_are_read_ahead() -> None:
    read = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal read
        while True:
            read += 1
            yield "word " * (CHUNK // 5)

    stream = encoded(endless(), bytes_tokenizer())
    next(stream)
    next(stream)
    assert read < 50 * 3
    stream.close()


def test_gpt2s_chunks_are_the_whole(shared_data, tmp_path) -> None:  # type: ignore[no-untyped-def]
    gpt2: Tokenizer = gpt2_tokenizer(shared_data / "gpt2-bpe", None, tmp_path / "kept")
    text = (shared_data / "wikitext-103" / "wiki.valid.tokens").read_text()
    whole = gpt2.encode(text)
    assert len(whole) == 249_735
    found = np.concatenate(list(encoded(iter([text, None]), gpt2)))
    assert np.array_equal(found[:-1], whole)
