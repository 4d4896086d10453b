"""Intervals against scipy's own tests, readings against numpy's interpolation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moelab.compare.statistics import Curve, deviation, estimate

LOSSES = st.lists(st.floats(0.5, 9), min_size=2, max_size=8)


@given(values=LOSSES.filter(lambda values: np.ptp(values) > 1e-6), others=LOSSES.filter(lambda v: np.ptp(v) > 1e-6))
def test_the_interval_is_that_of_scipys_paired_t_test(values: list[float], others: list[float]) -> None:
    n = min(len(values), len(others))
    left, right = np.array(values[:n]), np.array(others[:n])
    if n < 2 or np.ptp(left - right) < 1e-6:
        return
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    found = estimate(list(left - right))
    assert found is not None
    assert found.ci95 is not None
    assert found.mean == pytest.approx(np.mean(left) - np.mean(right), abs=1e-9)
    assert found.ci95 == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


def test_two_values_have_the_closed_form_of_one_degree_of_freedom() -> None:
    found = estimate([1.0, 3.0])  # t(1) at 0.975 is tan(0.475 π); the standard error is 1
    assert found is not None
    assert found.ci95 == pytest.approx((2 - math.tan(0.475 * math.pi), 2 + math.tan(0.475 * math.pi)))


def test_a_single_value_has_no_interval() -> None:
    found = estimate([0.25])
    assert found is not None
    assert (found.mean, found.ci95, found.runs) == (0.25, None, 1)


def test_no_values_have_no_estimate() -> None:
    assert estimate([]) is None


def test_equal_differences_have_an_interval_without_width() -> None:
    found = estimate([0.5, 0.5, 0.5])
    assert found is not None
    assert found.ci95 == (0.5, 0.5)


def test_the_deviation_is_that_of_a_sample() -> None:
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))


@given(
    gaps=st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    losses=st.lists(st.floats(0.5, 9), min_size=9, max_size=9),
    share=st.floats(0, 1),
)
def test_a_reading_inside_of_the_curve_is_numpys_interpolation(
    gaps: list[float], losses: list[float], share: float
) -> None:
    spent, loss = np.cumsum(gaps), np.array(losses[: len(gaps)])
    place = min(spent[0] + share * (spent[-1] - spent[0]), spent[-1])
    assert Curve(spent, loss).at(place) == np.interp(place, spent, loss)


@pytest.mark.parametrize("place", [0.0, 0.999, 3.001, 1e9])
def test_nothing_is_read_outside_of_the_curve(place: float) -> None:
    assert Curve(np.array([1.0, 3.0]), np.array([5.0, 4.0])).at(place) is None


def test_nothing_is_read_off_a_curve_without_points() -> None:
    assert Curve(np.empty(0), np.empty(0)).at(1.0) is None


@given(
    gaps=st.lists(st.floats(0.1, 10), min_size=2, max_size=9),
    falls=st.lists(st.floats(0.01, 1), min_size=9, max_size=9),
    share=st.floats(0, 1),
)
def test_what_had_been_spent_to_a_loss_is_where_a_falling_curve_is_at_it(
    gaps: list[float], falls: list[float], share: float
) -> None:
    curve = Curve(np.cumsum(gaps), 20 - np.cumsum(falls[: len(gaps)]))
    loss = max(curve.loss[0] + share * (curve.loss[-1] - curve.loss[0]), curve.loss[-1])
    spent = curve.spent_to(loss)
    assert spent is not None
    assert curve.at(spent) == pytest.approx(loss)


def test_a_loss_is_reached_the_first_time_that_the_curve_is_there() -> None:
    curve = Curve(np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.0, 4.0, 2.0]))
    assert curve.spent_to(3.5) == 1.75


def test_a_loss_that_is_never_reached_has_no_cost() -> None:
    assert Curve(np.array([1.0, 3.0]), np.array([5.0, 4.0])).spent_to(3.999) is None
    assert Curve(np.empty(0), np.empty(0)).spent_to(1.0) is None


def test_a_loss_reached_before_the_first_evaluation_costs_what_was_spent_by_then() -> None:
    assert Curve(np.array([1.0, 3.0]), np.array([5.0, 4.0])).spent_to(6.0) == 1.0
