"""Which runs a comparison is made of.

Every arm and seed gets a run of the same steps on the same tokens in the same order: the budget `tokens`. The budgets
`flops` and `seconds` add runs whose schedule ends where the cheapest arm's did, for every arm that costs more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from moelab.config import DataConfig, ModelConfig, MoEConfig, RunConfig, TrainingConfig, UsageError, require
from moelab.presets import ARMS, arm_model, preset

BUDGETS = {
    "tokens": "tokens of training",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison, in a folder of its own below the comparison's."""

    budget: str
    config: RunConfig

    @property
    def folder(self) -> str:
        """ARM-seedN, with the budget's name behind it unless that is tokens."""
        return run_folder(self.config.arm, self.config.training.seed, self.budget)


def run_folder(arm: str, seed: int, budget: str) -> str:
    return f"{arm}-seed{seed}" + ("" if budget == "tokens" else f"-{budget}")


@dataclass(frozen=True)
class Comparison:
    """Arms that are trained alike, and what they are given the same of.

    `model` is the dense model and `moe` the experts of the arms that have any. Raises `UsageError` on arms, seeds or
    budgets that cannot work, and on arms that these models cannot make.
    """

    preset: str = "smoke"
    arms: tuple[str, ...] = ("dense", "moe", "dense-wide")
    """The first is the one that the others are compared against."""
    seeds: int = 1
    """Runs of each arm; their seeds are the training's seed and those that follow it."""
    budgets: tuple[str, ...] = ("tokens",)
    """What arms are given the same of; tokens is always among them, and comes first."""
    model: ModelConfig = field(default_factory=lambda: preset("smoke").model)
    moe: MoEConfig = field(default_factory=lambda: preset("smoke").moe)
    data: DataConfig = field(default_factory=lambda: preset("smoke").data)
    training: TrainingConfig = field(default_factory=lambda: preset("smoke").training)

    def __post_init__(self) -> None:
        listed, known = ",".join(self.arms), ", ".join(ARMS)
        require(len(self.arms) >= 2, "arms", listed or "(none)", f"give two or more of {known}")
        for arm in self.arms:
            require(arm in ARMS, "arms", arm, f"give some of {known}")
        require(len(set(self.arms)) == len(self.arms), "arms", listed, "give each arm once")
        require(self.seeds >= 1, "seeds", self.seeds, "give 1 or more")
        for budget in self.budgets:
            require(budget in BUDGETS, "budgets", budget, f"give some of {', '.join(BUDGETS)}")
        asked = tuple(budget for budget in BUDGETS if budget == "tokens" or budget in self.budgets)
        object.__setattr__(self, "budgets", asked)
        for arm in self.arms:
            arm_model(arm, self.model, self.moe)

    @property
    def seed_values(self) -> range:
        """A seed decides the initial values and the order of the data, the same for every arm."""
        return range(self.training.seed, self.training.seed + self.seeds)

    def runs(self) -> list[PlannedRun]:
        """The runs of the budget `tokens`: all arms of the first seed, then all of the next."""
        return [self._run(arm, seed, "tokens", self.training) for seed in self.seed_values for arm in self.arms]

    def budget_runs(self, budget: str, costs: Mapping[str, float]) -> list[PlannedRun]:
        """The further runs of another budget.

        Args:
            budget: flops or seconds.
            costs: by arm, what a run of the budget `tokens` spends of it, in any one unit.

        The budget B is the smallest of the costs. An arm that costs more is trained for floor(B / its cost of a step)
        steps, with a warm-up shortened in proportion, so that its cosine ends there. An arm that costs B has its run
        already. Raises `UsageError` where not one step fits.
        """
        least = min(costs[arm] for arm in self.arms)
        schedules = {}
        for arm in self.arms:
            if costs[arm] > least:
                # Exact: in floating point a quotient just below a whole number may round up to it, and past B.
                steps = math.floor(self.training.steps * Fraction(least) / Fraction(costs[arm]))
                if steps < 1:
                    raise UsageError(
                        f"steps = {self.training.steps}: not one step of {arm} fits into the {BUDGETS[budget]} of the "
                        f"cheapest arm; give more, or leave {budget} out of --budgets"
                    )
                schedules[arm] = self._shortened(steps)
        return [self._run(arm, seed, budget, schedules[arm]) for seed in self.seed_values for arm in schedules]

    def _shortened(self, steps: int) -> TrainingConfig:
        warmup = self.training.warmup_steps * steps // self.training.steps
        return replace(self.training, steps=steps, warmup_steps=warmup)

    def _run(self, arm: str, seed: int, budget: str, training: TrainingConfig) -> PlannedRun:
        model = arm_model(arm, self.model, self.moe)
        return PlannedRun(budget, RunConfig(self.preset, arm, model, self.data, replace(training, seed=seed)))
