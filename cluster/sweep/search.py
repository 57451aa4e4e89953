"""A search among the runs of a sweep: Optuna says what to try next and which trials are no good. Only the driver asks it.

Its study lives in memory and is made again of the ledger and the runs' own metrics, so there is one truth on the disk. What a
sampler draws depends on the seed, the trial's number and what was known then, and on nothing that a restart would lose.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import distributions, pruners, samplers
from optuna.trial import TrialState

from train.config.sweep_space import Params, SweepAxis, SweepSpace

STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""A trial that diverged tells a sampler as much as one that was no good."""
RUNGS = ((1 / 8, 1 / 3), (1 / 2, 1 / 2))
"""After this share of the steps, this share of the trials goes on. Early, a loss tells who is hopeless, which most are; among the
rest it does not tell who will be best before the learning rate falls. docs/log.md has the curves, and what else was tried."""


class TrialSearch:
    """The study of one sweep. Trials are known by their numbers, 0, 1, 2 and so on."""

    def __init__(self, sweep: SweepSpace) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.settings, self.axes = sweep.settings, sweep.axes
        self.space = {axis.key: distribution(axis) for axis in sweep.axes}
        self.study = optuna.create_study(
            directions=list(sweep.directions), pruner=pruner(sweep.settings.pruner, sweep.base.steps)
        )
        self.startup = sweep.settings.startup or min(10, max(4, sweep.settings.trials // 5))
        self.open: dict[int, optuna.Trial] = {}

    def suggest(self) -> tuple[int, Params, dict[str, Any]]:
        """The next trial: its number, its values as on the command line, and what the sampler wants to know of it again."""
        number = len(self.study.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that may change with the next version: ours is pinned
            self.study.sampler = sampler(self.settings.sampler, self.settings.seed * 1_000_003 + number, self.startup)
        if self.settings.sampler == "tpe" and number < self.startup:
            self.study.enqueue_trial(spread(self.axes, self.settings.seed, number))
        trial = self.study.ask(self.space)
        self.open[number] = trial
        params = {key: str(value) for key, value in trial.params.items()}
        return number, params, self.study.trials[number].system_attrs

    def know(self, params: Params, attrs: dict[str, Any], reports: Sequence[tuple[int, float]]) -> None:
        """Takes over the next trial of an earlier driver, with the metric that it has reported so far."""
        number = len(self.study.trials)
        values = {axis.key: value_of(axis, params[axis.key]) for axis in self.axes}
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING, params=values, distributions=self.space, system_attrs=attrs
        )
        self.study.add_trial(frozen)
        self.open[number] = optuna.Trial(self.study, self.study.trials[number]._trial_id)
        for step, value in reports:
            self.report(number, step, value)  # also puts it on its rungs again

    def report(self, number: int, step: int, value: float) -> bool:
        """Takes a trial's metric at a step; whether the trial should end."""
        trial = self.open.get(number)
        if trial is None or len(self.study.directions) > 1 or step in self.study.trials[number].intermediate_values:
            return False
        trial.report(value, step)
        return trial.should_prune()

    def tell(self, number: int, state: str, values: Sequence[float] | None) -> None:
        """How a trial has ended."""
        told = STATES[state] if values is not None or state != "done" else TrialState.FAIL
        if told is TrialState.PRUNED and len(self.study.directions) > 1:
            told = TrialState.FAIL
        self.study.tell(self.open.pop(number), values if told is TrialState.COMPLETE else None, told)

    def front(self) -> list[int]:
        """The trials that no other is better than in every metric."""
        return sorted(trial.number for trial in self.study.best_trials)


def distribution(axis: SweepAxis) -> distributions.BaseDistribution:
    """Optuna's word for an axis: numbers where it is a range or an interval, else a choice among texts."""
    if axis.low is None or axis.high is None:
        return distributions.CategoricalDistribution(axis.values)
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
    return distributions.FloatDistribution(axis.low, axis.high, axis.log, axis.step)


def value_of(axis: SweepAxis, text: str) -> str | int | float:
    """A value of an axis from its text on the command line."""
    return text if axis.low is None else int(text) if axis.whole else float(text)


def sampler(name: str, seed: int, startup: int) -> samplers.BaseSampler:
    """Optuna's sampler of that name, as if it had just been made."""
    if name == "tpe":
        return samplers.TPESampler(n_startup_trials=startup, seed=seed, multivariate=True, constant_liar=True)
    if name == "cmaes":
        return samplers.CmaEsSampler(n_startup_trials=1, seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=max(4, startup), seed=seed)
    return samplers.RandomSampler(seed=seed)


def spread(axes: Sequence[SweepAxis], seed: int, number: int) -> dict[str, str | int | float]:
    """The point of that number in a sequence that covers the space evenly however long it is: the additive recurrence R_d
    (Roberts 2018), shifted by ``seed``.
    """
    ratio = 2.0
    for _ in range(50):  # the root of x ** (d + 1) = x + 1; the golden ratio for one key
        ratio = (1 + ratio) ** (1 / (len(axes) + 1))
    shift = random.Random(seed)
    return {axis.key: _at(axis, (shift.random() + (number + 1) / ratio**n) % 1) for n, axis in enumerate(axes, 1)}


def _at(axis: SweepAxis, share: float) -> str | int | float:
    """The value of an axis so far along it, 0 <= ``share`` < 1."""
    if axis.low is None or axis.high is None:
        return axis.values[int(share * len(axis.values))]
    step = axis.step or float(axis.whole)
    high = axis.high + step  # so that the last number of a range has its share too
    value = axis.low * (high / axis.low) ** share if axis.log else axis.low + (high - axis.low) * share
    if step:
        value = axis.low + (value - axis.low) // step * step
    return int(value) if axis.whole else value


def pruner(name: str, steps: int) -> pruners.BasePruner:
    """The pruner of that name."""
    if name == "asha":
        return Halving(steps)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4)
    return pruners.NopPruner()


class Halving(pruners.BasePruner):
    """Successive halving that judges a trial when it comes to a rung, among all that came there before (ASHA; Li et al. 2020)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial's newest value is its first on a rung, and too many had a better one there."""
        sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        known = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        for share, keep in RUNGS:
            step, mine = _first(trial, share * self.steps)
            if step != trial.last_step:
                continue
            others = [
                value
                for reached, value in (_first(other, share * self.steps) for other in known)
                if reached is not None
            ]
            better = sum(
                not sign * mine <= sign * value for value in others
            )  # one that is not a number is worse than all
            if better >= max(1, int((len(others) + 1) * keep)):
                return True
        return False


def _first(trial: optuna.trial.FrozenTrial, least: float) -> tuple[int | None, float]:
    """A trial's first value from a step on: (the step or None, the value)."""
    step = min((step for step in trial.intermediate_values if step >= least), default=None)
    return step, 0.0 if step is None else trial.intermediate_values[step]
