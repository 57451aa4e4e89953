"""Search space of a sweep: keys with several values, and their combinations.

``train.config.load`` builds it from Hydra's syntax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.config.schema import Config, SweepConfig
from train.errors import UserError
from train.util.reading import read_yaml

NAMING_KEYS = ("run.name", "run.dir")
"""Keys of which each run of a sweep needs its own value, which the sweep gives it."""
MOST_TRIED = 32
"""Values of an axis, and trials with one of them, that are looked at before a search begins."""
MOST_TRIALS = 100_000
"""Values of a key, and runs of a grid: more is a slip of the pen, and would fill the memory before it is refused."""
Params = dict[str, str]
"""A trial's own choices: key (or group) -> value as on the command line."""


@dataclass(frozen=True)
class SweepAxis:
    """A key or group with its values: a list, a numeric range, or a continuous interval."""

    key: str
    text: str
    """The values as they stand on the command line."""
    values: tuple[str, ...] = ()
    """All values of a list or a range; empty for an interval."""
    low: float | None = None
    high: float | None = None
    """Ends of a range or an interval, both included."""
    step: float | None = None
    """Distance of a range's values."""
    whole: bool = False
    """Whether the values are integers."""
    log: bool = False
    """Whether an interval is sampled on a logarithmic scale."""

    @property
    def first(self) -> str:
        """One valid value of the axis, to check the configuration with."""
        return self.values[0] if self.values else repr(self.low)


@dataclass(frozen=True)
class SweepSpace:
    """A sweep as given on the command line: settings, fixed overrides, axes and points."""

    settings: SweepConfig
    """Settings with name and folder filled in."""
    base: Config
    """Configuration shared by all trials, with the first values of the keys that vary."""
    fixed: tuple[str, ...]
    """Overrides that all trials share."""
    axes: tuple[SweepAxis, ...]
    points: tuple[Params, ...] = ({},)
    """Trials listed in ``sweep.points``, each of them combined with all values of the axes."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that vary in the sweep."""
        point_keys = itertools.chain.from_iterable(self.points)
        return tuple(dict.fromkeys([*point_keys, *(axis.key for axis in self.axes)]))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the sweep optimises."""
        metric = self.settings.metric
        return (metric,) if isinstance(metric, str) else tuple(metric)

    @property
    def directions(self) -> tuple[Literal["minimize", "maximize"], ...]:
        """Direction of each metric, minimize or maximize."""
        direction = self.settings.direction
        return (direction,) * len(self.metrics) if isinstance(direction, str) else tuple(direction)


def bounded(given: str, values: Iterable[str]) -> tuple[str, ...]:
    """The ``values`` of a key as it was ``given``. UserError where there are more than any sweep tries."""
    first = tuple(itertools.islice(values, MOST_TRIALS + 1))
    if len(first) > MOST_TRIALS:
        raise UserError(f"{given} has more than {MOST_TRIALS:,} values: give fewer, or an interval to search")
    return first


def grid(sweep: SweepSpace) -> list[Params]:
    """All combinations of the axes' values with each of the points, the last key changing fastest."""
    keys = [axis.key for axis in sweep.axes]
    combinations = list(itertools.product(*(axis.values for axis in sweep.axes)))
    params = []
    for point in sweep.points:
        params += [{**point, **dict(zip(keys, values, strict=True))} for values in combinations]
    return params


def trials_with(sweep: SweepSpace, key: str, value: str) -> Iterator[Params]:
    """Trials of a search in which ``key`` has ``value``: with the first values of the other axes, then with others."""
    others = [axis for axis in sweep.axes if axis.key != key]
    choices = [axis.values or (axis.first,) for axis in others]
    for values in itertools.islice(itertools.product(*choices), MOST_TRIED):
        yield {key: value, **{axis.key: other for axis, other in zip(others, values, strict=True)}}


def read_points(overrides: Sequence[str]) -> tuple[Params, ...]:
    """The trials listed in the file that ``sweep.points`` names; without it, one trial that sets nothing."""
    files = [text.partition("=")[2] for text in overrides if key_of(text) == "sweep.points"]
    if not files:
        return ({},)
    points = read_yaml(Path(files[-1]), "It is the file of trials that sweep.points=... names")
    if not points or not isinstance(points, list) or not all(map(_is_point, points)):
        raise UserError(
            f"sweep.points={files[-1]} has to be a list of lists of key=value, such as\n- [model.width=64, steps=400]"
        )
    return tuple(dict(map(_key_and_value, point)) for point in points)


def _is_point(point: Any) -> bool:
    """Whether a value from YAML is a list of overrides, not empty."""
    if not isinstance(point, list) or not point:
        return False
    return all(isinstance(text, str) and "=" in text for text in point)


def _key_and_value(text: str) -> tuple[str, str]:
    return key_of(text), text.partition("=")[2]


def sweep_problems(sweep: SweepSpace) -> list[str]:
    """Problems of a sweep's settings, each with its cure."""
    problems, settings, axes, base = [], sweep.settings, sweep.axes, sweep.base
    endless = [axis for axis in axes if not axis.values]
    several = not isinstance(settings.metric, str)
    if not sweep.keys:
        problems.append(
            "-m is for several runs, and no key has several values: give one some, such as optimizer.lr=1e-3,3e-3"
        )
    if settings.sampler == "grid":
        for axis in endless:
            problems.append(f"{axis.key}={axis.text} has no end of values: search it with sweep=tpe or sweep=random")
        number = len(sweep.points) * math.prod(len(axis.values) for axis in axes)
        if number > MOST_TRIALS:
            problems.append(f"a grid of {number:,} runs: at most {MOST_TRIALS:,}, or search them with sweep=tpe")
        if settings.pruner != "none":
            problems.append(f"sweep.pruner={settings.pruner} is for a search: sweep=tpe or sweep=random")
    elif settings.points:
        problems.append(
            f"sweep={settings.sampler} chooses its own trials, and sweep.points lists them: leave one of them out"
        )
    if twice := {axis.key for axis in axes}.intersection(itertools.chain.from_iterable(sweep.points)):
        problems.append(
            f"{', '.join(sorted(twice))}: given in sweep.points, and several values beside it: leave one of them out"
        )
    if settings.sampler == "cmaes" and (len(axes) < 2 or any(axis.low is None for axis in axes)):
        problems.append(
            "sweep=cmaes is for two keys or more that are all ranges or intervals of numbers: take sweep=tpe"
        )
    if several and settings.pruner != "none":
        problems.append(
            f"sweep.pruner={settings.pruner} knows one metric only, and sweep.metric names several: sweep.pruner=none"
        )
    if several and settings.sampler == "cmaes":
        problems.append("sweep=cmaes knows one metric only: take sweep=nsga2 or sweep=tpe")
    if isinstance(settings.direction, list) and len(settings.direction) != len(
        settings.metric if several else [settings.metric]
    ):
        problems.append("sweep.direction has to be as long as sweep.metric")
    measured = settings.metric not in ("val_loss", "bits_per_byte") or 0 < base.eval_every < base.steps
    if settings.pruner != "none" and not measured:
        problems.append(
            f"sweep.pruner={settings.pruner} judges by {settings.metric}, "
            f"measured at the end only (eval_every={base.eval_every}): "
            f"set eval_every={max(1, base.steps // 8)}, or sweep.pruner=none"
        )
    return problems


def key_of(text: str) -> str:
    """The key, or the group, that an override sets."""
    return text.partition("=")[0].lstrip("+~")


def is_sweep_override(text: str) -> bool:
    """Whether an override concerns the sweep itself, not its runs."""
    return key_of(text).partition(".")[0] == "sweep"


def naming_keys(overrides: Sequence[str]) -> list[str]:
    """Keys among ``overrides`` that would give all runs of a sweep the same name or folder."""
    return [key_of(text) for text in overrides if key_of(text) in NAMING_KEYS]


def shared_keys(varied: Iterable[str]) -> list[str]:
    """Varied keys that must be the same for all runs: the cluster they share, and the settings of the sweep."""
    may_vary = ("cluster.workers", "cluster.cpus_per_worker")
    return [key for key in varied if key not in may_vary and key.partition(".")[0] in ("cluster", "sweep")]
