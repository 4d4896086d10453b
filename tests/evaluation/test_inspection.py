"""What `moelab inspect` shows of a text, and which types of tokens experts get."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moelab.config import ModelConfig, MoEConfig, UsageError
from moelab.evaluation.inspection import SUPERSCRIPT, inspect_text, print_inspection
from moelab.evaluation.token_types import TYPES, token_types, type_of, types_of
from moelab.model import GPT
from moelab.presets import arm_model
from moelab.text.tokenizer import Tokenizer, bytes_tokenizer, train_bpe

WORDS = train_bpe("bpe:300", ["the cat sat on the mat\n" * 50 + "The 123 cats, 45 mats!\n" * 50])


def gpt(tokenizer: Tokenizer, experts: int = 4, top_k: int = 2, context: int = 16, layers: str = "every") -> GPT:
    model = ModelConfig(layers=3, heads=2, width=16, context=context, vocabulary=tokenizer.vocabulary)
    return GPT(arm_model("moe", model, MoEConfig(experts, top_k, moe_layers=layers)))


def printed(text: str, tokenizer: Tokenizer = WORDS, width: int = 80, colour: bool = False, experts: int = 4) -> str:
    found = inspect_text(gpt(tokenizer, experts), tokenizer, text)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    print_inspection(found, [0], console)
    return out.getvalue()


def test_the_experts_are_those_of_the_routers_after_an_end_of_text() -> None:
    text = "the cat sat on the mat"
    model = gpt(WORDS, layers="0,2")
    found = inspect_text(model.train(), WORDS, text)
    assert model.training
    assert found.layers == [0, 2]
    ids = torch.tensor([[WORDS.end_of_text, *WORDS.encode(text).tolist()]])
    for place, routed in enumerate(model.eval()(ids, keep_routing=True).routed):
        assert torch.equal(found.indices[place], routed.indices[1:])
        torch.testing.assert_close(found.weights[place], routed.weights[1:])
    assert found.as_json()["layers"][1]["indices"] == found.indices[1].tolist()


def test_a_text_longer_than_the_context_is_cut_and_none_of_it_lost() -> None:
    text = "the cat sat on the mat\n" * 6
    found = inspect_text(gpt(WORDS), WORDS, text)
    assert found.contexts == -(-len(found.ids) // 15)
    assert "".join(found.pieces) == text
    assert found.indices.shape == (3, len(found.ids), 2)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_pieces_laid_end_to_end_are_the_text(text: str) -> None:
    found = inspect_text(gpt(bytes_tokenizer(), context=64), bytes_tokenizer(), text)
    whole = "".join(piece for piece in found.pieces if not re.fullmatch(r"<[0-9a-f]{2}>", piece) or piece in text)
    assert whole == text
    assert len(found.pieces) == len(text.encode())


def test_without_colours_every_token_has_its_number_and_no_escape() -> None:
    text = "the cat\nsat on"
    out = printed(text)
    found = inspect_text(gpt(WORDS), WORDS, text)
    expected = ""
    for piece, expert in zip(found.pieces, found.indices[0, :, 0].tolist(), strict=True):
        number = str(expert).translate(SUPERSCRIPT)
        expected += piece.replace("\n", f"⏎{number}\n") if "\n" in piece else piece + number
    assert out.endswith(expected + "\n")
    assert "\x1b" not in out


def test_with_colours_numbers_are_left_out_until_experts_share_a_colour() -> None:
    assert "\x1b[" in printed("the cat", colour=True)
    assert not re.search("[⁰¹²³⁴-⁹]", printed("the cat", colour=True))
    assert re.search("[⁰¹²³⁴-⁹]", printed("the cat", colour=True, experts=64))


def test_lines_fit_a_narrow_terminal() -> None:
    out = printed("the cat sat on the mat " * 8, width=40)
    assert max(len(line) for line in out.splitlines()) <= 40


def test_a_dense_model_and_no_text_are_refused() -> None:
    dense = GPT(ModelConfig(layers=1, heads=1, width=8, context=8, vocabulary=WORDS.vocabulary))
    with pytest.raises(UsageError, match="it is dense"):
        inspect_text(dense, WORDS, "the cat")
    with pytest.raises(UsageError, match="give some text"):
        inspect_text(gpt(WORDS), WORDS, "")


# Types


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (b" cat", "word start"), (b"cat", "word inside"), (b" Cat", "capitalised word"), (b"Cat", "capitalised word"),
        (b" 12", "number"), (b"7", "number"), (b",", "punctuation"), (b' "', "punctuation"), (b"   ", "blank"),
        (b"\n", "line end"), (b"\n\n  ", "line end"), (b"\xc3", "broken character"), (" über".encode(), "word start"),
        ("日本".encode(), "word inside"),
    ],
)  # fmt: skip
def test_a_token_has_the_type_of_its_bytes(token: bytes, kind: str) -> None:
    assert type_of(token) == kind


def test_every_id_of_a_vocabulary_has_one_type() -> None:
    table = types_of(WORDS)
    assert len(table) == WORDS.vocabulary
    assert TYPES[table[WORDS.end_of_text]] == "end of text"
    assert all(TYPES[table[rank]] == type_of(token) for token, rank in WORDS.ranks.items())


@dataclass
class Tokens:
    tokens: np.ndarray

    @property
    def scored(self) -> int:
        return len(self.tokens) - 1


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_experts_of_each_type_are_counted(top_k: int) -> None:
    ids = WORDS.encode("The 123 cats, 45 mats!\nthe cat sat on the mat\n" * 9)
    model = gpt(WORDS, top_k=top_k)
    found = token_types(model.train(), Tokens(ids), WORDS, contexts=5)  # type: ignore[arg-type]
    assert model.training
    starts = np.linspace(0, len(ids) - 1 - 16, 5).astype(int)
    counts = np.zeros((3, len(TYPES), 4))
    tokens = np.zeros(len(TYPES))
    for start in starts:
        part = ids[start : start + 16].astype(int)
        decided = model.eval()(torch.tensor([part.tolist()]), keep_routing=True).routed
        for t, i in enumerate(part):
            tokens[types_of(WORDS)[i]] += 1
            for layer, routed in enumerate(decided):
                for expert in routed.indices[t].tolist():
                    counts[layer, types_of(WORDS)[i], expert] += 1
    present = [place for place in range(len(TYPES)) if tokens[place]]
    assert found["types"] == [TYPES[place] for place in present]
    assert found["share_of_tokens"] == pytest.approx((tokens / tokens.sum())[present].tolist(), abs=1e-5)
    for layer in range(3):
        for row, place in zip(found["layers"][layer], present, strict=True):
            expected = counts[layer, place] / counts[layer, place].sum()
            assert row == pytest.approx(expected.tolist(), abs=1e-5)
