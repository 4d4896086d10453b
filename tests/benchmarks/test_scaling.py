"""The fit of dense loss over compute, on curves whose law is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling import Point, fit


def points(computes: list[float], floor: float, drop: float, exponent: float) -> list[Point]:
    return [Point(f"run {c:g}", c, floor + drop * (c / 1e16) ** -exponent) for c in computes]


LAWS = {"drop": st.floats(0.3, 4), "exponent": st.floats(0.05, 0.9)}


@given(floor=st.floats(0.2, 3), **LAWS)
def test_the_law_of_four_amounts_of_compute_is_found_with_its_floor(floor: float, drop: float, exponent: float) -> None:
    found = fit(points([1e15, 5e15, 2e16, 1e17], floor, drop, exponent))
    assert found is not None
    assert found.floor == pytest.approx(floor, abs=2e-3)
    assert found.exponent == pytest.approx(exponent, rel=2e-3)
    assert max(map(abs, found.residuals)) < 1e-6


@given(**LAWS)
def test_the_law_of_three_amounts_of_compute_has_no_floor(drop: float, exponent: float) -> None:
    found = fit(points([1e15, 8e15, 1e17], 0.0, drop, exponent))
    assert found is not None
    assert (found.floor, found.exponent) == (0.0, pytest.approx(exponent, rel=1e-5))


@given(floor=st.floats(0.2, 3), place=st.floats(0.0, 1.0), **LAWS)
def test_the_compute_of_a_loss_is_that_of_the_law_it_was_drawn_from(
    floor: float, place: float, drop: float, exponent: float
) -> None:
    computes = [1e15, 4e15, 2e16, 6e16, 2e17]
    found = fit(points(computes, floor, drop, exponent))
    compute = math.exp(math.log(1e15) + place * math.log(200))
    assert found is not None
    assert found.range == (1e15, 2e17)
    assert found.compute(floor + drop * (compute / 1e16) ** -exponent) == pytest.approx(compute, rel=1e-3)


@given(noise=st.lists(st.floats(-0.02, 0.02), min_size=6, max_size=6), floor=st.floats(0.5, 3), **LAWS)
def test_no_other_law_near_by_fits_noisy_runs_better(
    noise: list[float], floor: float, drop: float, exponent: float
) -> None:
    clean = points([1e15, 3e15, 1e16, 3e16, 1e17, 3e17], floor, drop, exponent)
    noisy = [Point(p.name, p.compute, p.loss + n) for p, n in zip(clean, noise, strict=True)]
    found = fit(noisy)
    if found is None:
        return
    error = np.square(found.residuals).sum()
    x = np.array([p.compute for p in noisy]) / found.unit
    y = np.array([p.loss for p in noisy])
    for factor in (0.98, 1.02):
        for floor_, drop_, exponent_ in (
            (found.floor * factor, found.drop, found.exponent),
            (found.floor, found.drop * factor, found.exponent),
            (found.floor, found.drop, found.exponent * factor),
        ):
            assert error <= np.square(y - floor_ - drop_ * x**-exponent_).sum() + 1e-12


def test_no_dense_compute_reaches_the_floor() -> None:
    found = fit(points([1e15, 5e15, 2e16, 1e17], 2.0, 1.0, 0.4))
    assert found is not None
    assert found.compute(1.99) is None


@pytest.mark.parametrize("computes", [[], [1e15], [1e15, 1e16], [1e15, 1e16, 1e16, 1e15]])
def test_less_than_three_amounts_of_compute_have_no_law(computes: list[float]) -> None:
    assert fit(points(computes, 2.0, 1.0, 0.4)) is None


@pytest.mark.parametrize("losses", [[3.0, 3.1, 3.2], [3.0, 3.1, 3.2, 3.3], [3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]])
def test_a_loss_that_does_not_fall_has_no_law(losses: list[float]) -> None:
    computes = [1e15, 1e16, 1e17, 1e18]
    assert fit([Point("run", c, loss) for c, loss in zip(computes, losses, strict=False)]) is None
