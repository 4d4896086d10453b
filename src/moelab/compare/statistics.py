"""Differences between arms: read at a common budget, paired over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Curve:
    """Validation loss at the evaluations of one run, against what had been spent by then (ascending)."""

    spent: np.ndarray
    loss: np.ndarray

    def at(self, budget: float) -> float | None:
        """The loss at a budget, on the straight line between the evaluations around it; None outside of them."""
        if not len(self.spent) or not self.spent[0] <= budget <= self.spent[-1]:
            return None
        return float(np.interp(budget, self.spent, self.loss))

    def spent_to(self, loss: float) -> float | None:
        """What had been spent when the loss first was at or below `loss`; None if it never was.

        On the straight line from the evaluation before, which lies above a curve that flattens out: no less than was
        needed. A loss that was reached before the first evaluation is given what had been spent by then.
        """
        reached = np.flatnonzero(self.loss <= loss)
        if not len(reached):
            return None
        after = int(reached[0])
        before = max(0, after - 1)
        return float(np.interp(loss, self.loss[[after, before]], self.spent[[after, before]]))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its 95% interval where there are two or more."""

    mean: float
    ci95: tuple[float, float] | None
    runs: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95% interval by Student's t with n − 1 degrees of freedom; None of no values.

    Of differences paired over seeds this is the interval of the paired t-test: what seeds have in common (initial
    values, order of the data) cancels in each difference.
    """
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    error = deviation(values) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, (mean - reach, mean + reach), n)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n − 1 below)."""
    return float(np.std(values, ddof=1))
