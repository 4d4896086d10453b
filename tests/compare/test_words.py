"""What the words claim, and what they must not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.compare.words import FLOPS, amount, duration, headline, memory, notes, percent, quantity, signed

CLAIMS = ("win", "beat", "better", "worse", "best")


def results(*entries: dict[str, Any], seeds: int = 1) -> dict[str, Any]:
    """Just what words are made of."""
    model = {"width": 128, "hidden": None, "moe": None}
    experts = model | {"moe": {"experts": 8, "top_k": 2, "expert_hidden": 512}}
    return {
        "arms": {"dense": {"model": model, "runs": []}, "moe": {"model": experts, "runs": []}},
        "comparisons": list(entries),
        "seeds": list(range(seeds)),
        "environments": [{"environment": {"device": "a CPU"}, "runs": []}],
    }


def difference(mean: float | None, ci95: list[float] | None, runs: int, **more: Any) -> dict[str, Any]:
    found = {"arm": "moe", "against": "dense", "budget": "tokens", "interpolated": False, "spent": [9.0, 9.0]}
    return found | {"difference": mean, "ci95": ci95, "runs": runs} | more


def test_a_single_run_says_so_and_has_no_interval() -> None:
    (said,) = headline(results(difference(-0.123, None, 1)))
    assert said == (
        "In this single run, at equal tokens moe (8 experts, top-2, each hidden 512) reached a validation loss 0.123 "
        "nats per token lower than dense (hidden 512). One run has no interval: another seed may turn a difference "
        "around."
    )


def test_an_interval_beside_zero_is_said_with_its_ends() -> None:
    (said,) = headline(results(difference(-0.123, [-0.145, -0.101], 3), seeds=3))
    assert said.startswith("Over 3 seeds, at equal tokens moe (8 experts")
    assert "0.123 nats per token lower than dense (hidden 512), 95% interval −0.145 to −0.101." in said


@given(mean=st.floats(-0.5, 0.5), reach=st.floats(0.001, 1), place=st.integers(0, 2))
def test_an_interval_that_spans_zero_names_no_winner(mean: float, reach: float, place: int) -> None:
    entries = [difference(-0.2, [-0.3, -0.1], 3, budget=budget) for budget in ("tokens", "flops", "seconds")]
    half = abs(mean) + reach
    entries[place] |= {"difference": mean, "ci95": [mean - half, mean + half]}
    (said,) = headline(results(*entries, seeds=3))
    finding = said.split("; ")[place]
    assert "no difference" in finding
    assert "was shown" in finding
    assert "lower" not in finding
    assert "higher" not in finding


@given(mean=st.floats(-2, 2), runs=st.integers(1, 4))
def test_no_words_name_a_winner(mean: float, runs: int) -> None:
    interval = [mean - 0.1, mean + 0.1] if runs > 1 else None
    said = headline(results(difference(mean, interval, runs), seeds=runs))
    assert not any(claim in sentence.lower() for sentence in said for claim in CLAIMS)


def test_what_was_read_off_a_curve_is_marked_and_explained() -> None:
    read_off = results(difference(-0.1, None, 1), difference(0.05, None, 1, budget="flops", interpolated=True))
    assert "at equal training FLOPs 0.050 higher (read off)" in headline(read_off)[0]
    assert any(
        "before its schedule has ended is higher than that of a run that ends there" in n for n in notes(read_off)
    )


def test_what_was_not_measured_is_not_a_number() -> None:
    said = headline(results(difference(-0.1, None, 1), difference(None, None, 0, budget="seconds", interpolated=True)))
    assert "in equal training time there is no measurement" in said[0]


def test_times_that_came_out_unequal_are_said_to_be() -> None:
    entries = [difference(-0.1, None, 1, budget="seconds", spent=spent) for spent in ([20.0, 21.0], [20.0, 23.0])]
    assert [any("did not run at one speed" in note for note in notes(results(e))) for e in entries] == [False, True]
    assert ["came out as 20.0 s and 23.0 s" in headline(results(e))[0] for e in entries] == [False, True]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, None),
        ({"commit": "cd"}, "The runs were not all made by one commit of moelab (see"),
        ({"commit": None, "driver": "2"}, "The runs were not all made by one commit of moelab and driver (see"),
    ],
)
def test_runs_of_different_code_are_said_to_be(other: dict[str, Any], said: str | None) -> None:
    first = {"device": "a GPU", "commit": "ab", "driver": "1"}
    made = [{"environment": environment, "runs": []} for environment in (first, first | other)]
    told = [note for note in notes(results(difference(-0.1, None, 1)) | {"environments": made}) if "made by" in note]
    assert [note.startswith(said or "") for note in told] == ([True] if said else [])


def test_seeds_that_could_not_be_read_are_counted() -> None:
    (said,) = headline(results(difference(-0.1, None, 1, interpolated=True), seeds=3))
    assert "from one seed: no interval (read off)" in said


def test_a_difference_that_rounds_to_zero_has_no_direction() -> None:
    (said,) = headline(results(difference(0.0002, None, 1)))
    assert "the same validation loss to within 0.001 nats per token" in said


def test_arms_without_experts_are_compared_too() -> None:
    found = results(difference(-0.1, None, 1))
    found["arms"]["moe"]["model"]["moe"] = None
    assert "moe (hidden 512) reached" in headline(found)[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (7, "7"), (512, "512"), (999.6, "1.00 k"), (12_345, "12.3 k"), (1_330_000, "1.33 M"),
     (999_999, "1.00 M"), (3.3e9, "3.30 B"), (5e15, "5000 T")],
)  # fmt: skip
def test_quantities_have_three_digits_and_a_prefix(value: float | None, shown: str) -> None:
    assert quantity(value) == shown


@given(value=st.floats(1, 1e26))
def test_a_quantity_is_right_to_three_digits(value: float) -> None:
    number, _, prefix = quantity(value, FLOPS).partition(" ")
    assert float(number) * 1000 ** FLOPS.index(prefix) == pytest.approx(value, rel=5.1e-3)


def test_units_are_those_a_person_uses() -> None:
    assert [duration(s) for s in (None, 4.25, 119.0, 300.0, 7300.0)] == ["–", "4.2 s", "119.0 s", "5.0 min", "2.03 h"]
    assert [memory(b) for b in (None, 700 * 2**20, 3 * 2**30)] == ["–", "700 MiB", "3.00 GiB"]
    assert [percent(p) for p in (None, 0.4123)] == ["–", "41.2%"]
    assert [signed(d) for d in (None, -0.1234, 0.5)] == ["–", "−0.123", "+0.500"]
    assert [amount(614_400, "tokens"), amount(5.3e12, "flops"), amount(30.7, "seconds")] == [
        "614 k", "5.30 TFLOP", "30.7 s",
    ]  # fmt: skip
