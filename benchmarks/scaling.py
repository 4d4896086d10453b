"""How dense loss falls with compute, and so how much dense compute the loss of another model is worth.

L(C) = floor + drop · (C / C₀)^−b, as in Kaplan et al. 2020 (2001.08361) and, with a floor, Hoffmann et al. 2022
(2203.15556). A floor takes four amounts of compute or more; of three a power law without one is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

FEWEST = 3  # amounts of compute that a power law is fitted to
FEWEST_FOR_A_FLOOR = 4
LEAST_FALL = 1e-6  # nats per token for each factor e of compute; what falls less does not fall
EXPONENTS = np.geomspace(1e-3, 4, 400)  # where the best exponent is looked for


@dataclass(frozen=True)
class Point:
    """A finished dense run: its training FLOPs, and the loss that it reached."""

    name: str
    compute: float
    loss: float


@dataclass(frozen=True)
class PowerLaw:
    """The least-squares fit to some dense runs."""

    floor: float
    """Loss that no compute gets under, in nats per token; 0 where the runs are too few to tell."""
    drop: float
    """Loss above the floor at the compute `unit`, in nats per token."""
    unit: float
    """C₀ in FLOPs: the geometric mean of the runs' compute."""
    exponent: float
    points: tuple[Point, ...]

    def loss(self, compute: float) -> float:
        """Nats per token of a dense run of so many training FLOPs."""
        return float(self.floor + self.drop * (compute / self.unit) ** -self.exponent)

    def compute(self, loss: float) -> float | None:
        """Training FLOPs at which a dense run reaches a loss; None at the floor and below it."""
        above = (loss - self.floor) / self.drop
        if above <= 0:
            return None
        power = -math.log(above) / self.exponent
        return self.unit * math.exp(power) if power < 600 else None

    @property
    def residuals(self) -> list[float]:
        """What each run's loss is above the fit, in nats per token."""
        return [point.loss - self.loss(point.compute) for point in self.points]

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most compute that it was fitted to, in FLOPs."""
        spent = [point.compute for point in self.points]
        return min(spent), max(spent)


def fit(points: Sequence[Point]) -> PowerLaw | None:
    """The least-squares power law of some runs; None of less than `FEWEST` computes, or a loss that does not fall."""
    compute, loss = np.array([[point.compute, point.loss] for point in points], np.float64).reshape(-1, 2).T
    amounts = len(set(compute.tolist()))
    if amounts < FEWEST or np.polyfit(np.log(compute), loss, 1)[0] > -LEAST_FALL:
        return None
    with_floor = amounts >= FEWEST_FOR_A_FLOOR
    unit = float(np.exp(np.log(compute).mean()))

    def solved(exponent: float) -> tuple[float, float, float]:
        """Squared error, floor and drop: linear in these two once the exponent is known."""
        shape = (compute / unit) ** -exponent
        floor = drop = 0.0
        if with_floor:
            varied = shape - shape.mean()
            drop = float(varied @ loss / (varied @ varied))
            floor = float(loss.mean() - drop * shape.mean())
        if floor <= 0:
            floor, drop = 0.0, float(shape @ loss / (shape @ shape))
        return float(np.square(loss - floor - drop * shape).sum()), floor, drop

    best = int(np.argmin([solved(exponent)[0] for exponent in EXPONENTS]))
    low, high = (math.log(EXPONENTS[np.clip(i, 0, len(EXPONENTS) - 1)]) for i in (best - 1, best + 1))
    found = minimize_scalar(
        lambda power: solved(math.exp(power))[0], bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    )
    exponent = math.exp(found.x)
    _, floor, drop = solved(exponent)
    return PowerLaw(floor, drop, unit, exponent, tuple(points)) if drop > 0 else None
