"""Which runs a comparison is made of.

Every arm and seed gets a run of the same steps on the same tokens in the same order: the budget `tokens`. The budgets
`flops` and `seconds` add runs whose schedule ends where the cheapest arm's did, for every arm that costs more. A swept
comparison first tries every value for every arm (`sweep_runs`), and its runs then have the chosen ones (`tuned`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from moelab.compare.arms import Arm, Settings, check_names, known_arm
from moelab.compare.sweep import Sweep, check_sweeps, label, points
from moelab.config import DataConfig, ModelConfig, MoEConfig, RunConfig, TrainingConfig, UsageError, require
from moelab.presets import ARMS, Match, preset, solve_match

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
    folder: str
    """ARM-seedN, with the budget's name behind it unless that is tokens; of a swept arm, what was chosen behind ARM."""


# As many as are told apart by colour, line and marker.
MOST_ARMS = 24


@dataclass(frozen=True)
class Comparison:
    """Arms that are trained alike, and what they are given the same of.

    `model` is the dense model and `moe` the experts of the arms that have any. Raises `UsageError` on arms, seeds or
    budgets that cannot work, and on arms that these models cannot make.
    """

    preset: str = "smoke"
    arms: tuple[str, ...] = ("dense", "moe", "dense-wide")
    """Known arms. The first of all is the one that the others are compared against."""
    seeds: int = 1
    """Runs of each arm; their seeds are the training's seed and those that follow it."""
    budgets: tuple[str, ...] = ("tokens",)
    """What arms are given the same of; tokens is always among them, and comes first."""
    model: ModelConfig = field(default_factory=lambda: preset("smoke").model)
    moe: MoEConfig = field(default_factory=lambda: preset("smoke").moe)
    data: DataConfig = field(default_factory=lambda: preset("smoke").data)
    training: TrainingConfig = field(default_factory=lambda: preset("smoke").training)
    overridden: tuple[Arm, ...] = ()
    """Arms made by override; they come after the known ones."""
    sweeps: tuple[Sweep, ...] = ()
    """Settings that every arm is tuned in."""
    chosen: Mapping[str, Settings] = field(default_factory=dict)
    """By arm, what its tuning chose; filled by `tuned`."""

    def __post_init__(self) -> None:
        listed, known = ",".join(self.names), ", ".join(ARMS)
        for arm in self.arms:
            require(arm in ARMS, "arms", arm, f"give some of {known}")
        require(len(self.names) >= 2, "arms", listed or "(none)", f"give two or more of {known}, or more of --arm")
        require(len(self.names) <= MOST_ARMS, "arms", len(self.names), f"give at most {MOST_ARMS}")
        check_names(self._listed)
        require(self.seeds >= 1, "seeds", self.seeds, "give 1 or more")
        for budget in self.budgets:
            require(budget in BUDGETS, "budgets", budget, f"give some of {', '.join(BUDGETS)}")
        asked = tuple(budget for budget in BUDGETS if budget == "tokens" or budget in self.budgets)
        object.__setattr__(self, "budgets", asked)
        check_sweeps(self.sweeps, self._listed)
        for one in self._listed:
            for point in points(self.sweeps, one) or [()]:
                try:
                    one.at(point).model(self.model, self.moe)
                    one.at(point).training(self.training)
                except UsageError as problem:
                    raise UsageError(
                        f"{problem} (arm {one.name})" if one.at(point).overrides else str(problem)
                    ) from None

    @property
    def _listed(self) -> list[Arm]:
        return [*map(known_arm, self.arms), *self.overridden]

    @property
    def names(self) -> tuple[str, ...]:
        """Every arm, in the order of the report."""
        return tuple(arm.name for arm in self._listed)

    @property
    def by_name(self) -> dict[str, Arm]:
        """Every arm with its overrides and, once they are chosen, the values that its tuning chose."""
        return {arm.name: arm.at(self.chosen.get(arm.name, ())) for arm in self._listed}

    def model_of(self, arm: str) -> ModelConfig:
        return self.by_name[arm].model(self.model, self.moe)

    def training_of(self, arm: str) -> TrainingConfig:
        return self.by_name[arm].training(self.training)

    def match_of(self, arm: str) -> Match | None:
        """What `match` was solved to for an arm; None where it does not decide its size."""
        own = self.by_name[arm]
        return solve_match(own.base, *own.settings(self.model, self.moe))

    @property
    def seed_values(self) -> range:
        """A seed decides the initial values and the order of the data, the same for every arm."""
        return range(self.training.seed, self.training.seed + self.seeds)

    def runs(self) -> list[PlannedRun]:
        """The runs of the budget `tokens`: all arms of the first seed, then all of the next."""
        return [
            self._run(arm, seed, "tokens", self.training_of(arm)) for seed in self.seed_values for arm in self.names
        ]

    def sweep_runs(self, arm: str) -> dict[Settings, PlannedRun]:
        """The run that tries each value of the sweeps for an arm, at the first seed; none where it uses none."""
        tried = (replace(self, chosen={arm: point}) for point in points(self.sweeps, self.by_name[arm]))
        first = self.seed_values[0]
        return {one.chosen[arm]: one._run(arm, first, "tokens", one.training_of(arm)) for one in tried}

    def tuned(self, chosen: Mapping[str, Settings]) -> Comparison:
        """The comparison of the arms with the values that were chosen for them."""
        return replace(self, chosen=chosen)

    def budget_runs(self, budget: str, costs: Mapping[str, float]) -> list[PlannedRun]:
        """The further runs of another budget.

        Args:
            budget: flops or seconds.
            costs: by arm, what a run of the budget `tokens` spends of it, in any one unit.

        The budget B is the smallest of the costs. An arm that costs more is trained for floor(B / its cost of a step)
        steps, with a warm-up shortened in proportion, so that its cosine ends there. An arm that costs B has its run
        already. Raises `UsageError` where not one step fits.
        """
        least = min(costs[arm] for arm in self.names)
        schedules = {}
        for arm in self.names:
            if costs[arm] > least:
                # Exact: in floating point a quotient just below a whole number may round up to it, and past B.
                steps = math.floor(self.training.steps * Fraction(least) / Fraction(costs[arm]))
                if steps < 1:
                    raise UsageError(
                        f"steps = {self.training.steps}: not one step of {arm} fits into the {BUDGETS[budget]} of the "
                        f"cheapest arm; give more, or leave {budget} out of --budgets"
                    )
                schedules[arm] = _shortened(self.training_of(arm), steps)
        return [self._run(arm, seed, budget, schedules[arm]) for seed in self.seed_values for arm in schedules]

    def _run(self, arm: str, seed: int, budget: str, training: TrainingConfig) -> PlannedRun:
        config = RunConfig(self.preset, arm, self.model_of(arm), self.data, replace(training, seed=seed))
        point = self.chosen.get(arm, ())
        if point and seed == self.training.seed and budget == "tokens":
            return PlannedRun(budget, config, f"sweep/{arm}-{label(point)}")
        return PlannedRun(budget, config, run_folder(arm, seed, budget, point))


def run_folder(arm: str, seed: int, budget: str, point: Settings = ()) -> str:
    tuned = f"-{label(point)}" if point else ""
    return f"{arm}{tuned}-seed{seed}" + ("" if budget == "tokens" else f"-{budget}")


def _shortened(training: TrainingConfig, steps: int) -> TrainingConfig:
    return replace(training, steps=steps, warmup_steps=training.warmup_steps * steps // training.steps)
