"""Searches: Optuna suggests the next trial's values and decides which trials to prune.

Only the driver asks it. The study lives in memory and is rebuilt from the ledger and the runs' own metrics, so the disk
holds each fact once. What a sampler draws depends on the seed, the trial's number and what was known then, and on
nothing that a restart would lose.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna import distributions, pruners, samplers
from optuna.trial import TrialState

from train.config import load as configuration
from train.config import sweep_space
from train.config.schema import Config
from train.config.sweep_space import Params, SweepAxis, SweepSpace

STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""Optuna's state for each of ours: to a sampler a trial that diverged is as bad as a pruned one."""
RUNGS = ((1 / 8, 1 / 3), (1 / 2, 1 / 2))
"""Successive halving: (share of the steps, share of the trials that goes on from there).

Early, a loss tells which trials are hopeless, and most are; among the rest it does not tell which will be best before
the learning rate falls. docs/log.md has the curves, and what else was tried."""


class TrialSearch:
    """The Optuna study of one sweep. Trials are identified by their numbers: 0, 1, 2 and so on."""

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
        """The next trial: number, values as on the command line, and attributes for ``restore`` after a restart."""
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

    def restore(self, params: Params, attrs: dict[str, Any], reports: Sequence[tuple[int, float]]) -> None:
        """Adds the next trial of an earlier driver to the study, with its metric so far as (step, value)."""
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
        """Records a running trial's metric at a step. Returns whether the trial should be pruned."""
        trial = self.open.get(number)
        if trial is None or len(self.study.directions) > 1 or step in self.study.trials[number].intermediate_values:
            return False
        trial.report(value, step)
        return trial.should_prune()

    def record_end(self, number: int, state: str, values: Sequence[float] | None) -> None:
        """Records how a trial has ended; ``state`` is a key of ``STATES``, ``values`` its metrics where it has them."""
        optuna_state = STATES[state] if values is not None or state != "done" else TrialState.FAIL
        if optuna_state is TrialState.PRUNED and len(self.study.directions) > 1:
            optuna_state = TrialState.FAIL
        self.study.tell(self.open.pop(number), values if optuna_state is TrialState.COMPLETE else None, optuna_state)


def distribution(axis: SweepAxis) -> distributions.BaseDistribution:
    """The Optuna distribution of an axis: numbers for a range or an interval, else a choice among texts."""
    if axis.low is None or axis.high is None:
        return distributions.CategoricalDistribution(axis.values)
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), axis.log, int(axis.step or 1))
    return distributions.FloatDistribution(axis.low, axis.high, axis.log, axis.step)


def value_of(axis: SweepAxis, text: str) -> str | int | float:
    """Parses a value of an axis from its text on the command line."""
    return text if axis.low is None else int(text) if axis.whole else float(text)


def sampler(name: str, seed: int, startup: int) -> samplers.BaseSampler:
    """A new Optuna sampler by the name that ``sweep.sampler`` has for it."""
    if name == "tpe":
        return samplers.TPESampler(n_startup_trials=startup, seed=seed, multivariate=True, constant_liar=True)
    if name == "cmaes":
        return samplers.CmaEsSampler(n_startup_trials=1, seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=max(4, startup), seed=seed)
    return samplers.RandomSampler(seed=seed)


def spread(axes: Sequence[SweepAxis], seed: int, number: int) -> dict[str, str | int | float]:
    """Point ``number`` of a low-discrepancy sequence over the axes, which covers them evenly however long it is.

    It is the additive recurrence R_d (Roberts 2018), shifted by ``seed``.
    """
    ratio = 2.0
    for _ in range(50):  # the root of x ** (d + 1) = x + 1; the golden ratio for one key
        ratio = (1 + ratio) ** (1 / (len(axes) + 1))
    shift = random.Random(seed)
    return {axis.key: _at(axis, (shift.random() + (number + 1) / ratio**n) % 1) for n, axis in enumerate(axes, 1)}


def _at(axis: SweepAxis, share: float) -> str | int | float:
    """The value of an axis at the fraction 0 <= ``share`` < 1 of its length."""
    if axis.low is None or axis.high is None:
        return axis.values[int(share * len(axis.values))]
    step = axis.step or float(axis.whole)
    high = axis.high + step  # so that the last number of a range has its share too
    value = axis.low * (high / axis.low) ** share if axis.log else axis.low + (high - axis.low) * share
    if step:
        value = axis.low + (value - axis.low) // step * step
    return int(value) if axis.whole else value


def pruner(name: str, steps: int) -> pruners.BasePruner:
    """A new Optuna pruner by the name that ``sweep.pruner`` has for it."""
    if name == "asha":
        return Halving(steps)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4)
    return pruners.NopPruner()


class Halving(pruners.BasePruner):
    """Asynchronous successive halving (ASHA; Li et al. 2020).

    A trial is judged when it comes to a rung, among all trials that came there before.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial's newest value is its first on a rung, and too many other trials were better there."""
        sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        known = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        for share, keep in RUNGS:
            step, mine = _first_report(trial, share * self.steps)
            if step != trial.last_step:
                continue
            reports = [_first_report(other, share * self.steps) for other in known]
            others = [value for reached, value in reports if reached is not None]
            # written so that a value that is not a number is worse than all others
            better = sum(not sign * mine <= sign * value for value in others)
            if better >= max(1, int((len(others) + 1) * keep)):
                return True
        return False


def _first_report(trial: optuna.trial.FrozenTrial, least: float) -> tuple[int | None, float]:
    """The first report of a trial at step ``least`` or later: (step, value), or (None, 0.0) where there is none."""
    step = min((step for step in trial.intermediate_values if step >= least), default=None)
    return step, 0.0 if step is None else trial.intermediate_values[step]


def refuse_useless_values(sweep: SweepSpace, complete: Callable[[Config], Config]) -> None:
    """Raise ConfigError for values of a search's axes that make sense in no trial; ``complete`` fills in what is left.

    A search would find them one by one, hours after its start.
    """
    problems: list[str] = []
    for axis in sweep.axes:
        for value in axis.values[: sweep_space.MOST_TRIED]:
            found: list[str] = []
            for params in sweep_space.trials_with(sweep, axis.key, value):
                try:
                    complete(configuration.load_trial(sweep, 0, params))
                except configuration.ConfigError as error:
                    found = found or [f"{axis.key}={value}, one of its values: {problem}" for problem in error.problems]
                else:
                    found = []
                    break
            problems += found
    if problems:
        raise configuration.ConfigError(problems)
