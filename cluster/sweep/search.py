"""A search among the runs of a sweep: Optuna says what to try next and which trials are no good. Only the driver asks it.

Its study lives in memory and is made again of the ledger and the runs' own metrics, so there is one truth on the disk. What a
sampler draws depends on the seed, the trial's number and what was known then, and on nothing that a restart would lose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import distributions, pruners, samplers
from optuna.trial import TrialState

from train.schema import Config
from train.space import Axis, Params, Sweeping

STATES = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}
"""A trial that diverged tells a sampler as much as one that was no good."""


class Search:
    """The study of one sweep. Trials are known by their numbers, 0, 1, 2 and so on."""

    def __init__(self, sweep: Sweeping) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.settings, self.axes = sweep.settings, sweep.axes
        self.space = {axis.key: distribution(axis) for axis in sweep.axes}
        self.study = optuna.create_study(directions=list(sweep.directions), pruner=pruner(sweep.settings.pruner, sweep.base))
        self.open: dict[int, optuna.Trial] = {}

    def suggest(self) -> tuple[int, Params, dict[str, Any]]:
        """The next trial: its number, its values as on the command line, and what the sampler wants to know of it again."""
        number = len(self.study.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that may change with the next version: ours is pinned
            self.study.sampler = sampler(self.settings.sampler, self.settings.seed * 1_000_003 + number, self.settings.startup)
        trial = self.study.ask(self.space)
        self.open[number] = trial
        params = {key: str(value) for key, value in trial.params.items()}
        return number, params, self.study.trials[number].system_attrs

    def know(self, params: Params, attrs: dict[str, Any], reports: Sequence[tuple[int, float]]) -> None:
        """Takes over the next trial of an earlier driver, with the metric that it has reported so far."""
        number = len(self.study.trials)
        values = {axis.key: value_of(axis, params[axis.key]) for axis in self.axes}
        frozen = optuna.trial.create_trial(state=TrialState.RUNNING, params=values, distributions=self.space, system_attrs=attrs)
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


def distribution(axis: Axis) -> distributions.BaseDistribution:
    """Optuna's word for an axis: numbers where it is a range or an interval, else a choice among texts."""
    if axis.low is None or axis.high is None:
        return distributions.CategoricalDistribution(axis.values)
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
    return distributions.FloatDistribution(axis.low, axis.high, axis.log, axis.step)


def value_of(axis: Axis, text: str) -> str | int | float:
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


def pruner(name: str, base: Config) -> pruners.BasePruner:
    """Optuna's pruner of that name. Its first look is at the first value that there is."""
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=base.eval_every or base.log_every, reduction_factor=3)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4)
    return pruners.NopPruner()
