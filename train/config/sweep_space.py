"""The search space of a sweep: keys with several values, and their combinations.

``train.config.load`` builds it from Hydra's syntax.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from train.config.schema import Config, Sweep
from train.errors import UserError

Params = dict[str, str]
"""A trial's own choices: key (or group) -> value as on the command line."""


@dataclass(frozen=True)
class Axis:
    """A key or group with its values: a list, a numeric range, or a continuous interval."""

    key: str
    text: str
    """As it was given."""
    values: tuple[str, ...] = ()
    """None where it is an interval."""
    low: float | None = None
    high: float | None = None
    """Ends of a range or an interval, both included."""
    step: float | None = None
    """Of a range."""
    whole: bool = False
    log: bool = False

    @property
    def first(self) -> str:
        """One valid value of the axis, to check the configuration with."""
        return self.values[0] if self.values else repr(self.low)


@dataclass(frozen=True)
class Sweeping:
    """A sweep as given on the command line: settings, fixed overrides, axes and points."""

    settings: Sweep
    """Complete: with its name and its folder."""
    base: Config
    """What is shared by all trials; the keys that vary have their first values."""
    fixed: tuple[str, ...]
    """The overrides of all trials."""
    axes: tuple[Axis, ...]
    points: tuple[Params, ...] = ({},)
    """Trials that were listed one by one, each of them combined with all values of the axes."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that vary in the sweep."""
        return tuple(
            dict.fromkeys([*(key for point in self.points for key in point), *(axis.key for axis in self.axes)])
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the sweep optimises."""
        found = self.settings.metric
        return (found,) if isinstance(found, str) else tuple(found)

    @property
    def directions(self) -> tuple[Literal["minimize", "maximize"], ...]:
        """Direction of each metric, minimize or maximize."""
        found = self.settings.direction
        return (found,) * len(self.metrics) if isinstance(found, str) else tuple(found)


def grid(sweep: Sweeping) -> list[Params]:
    """All combinations of the values, the last key changing fastest; for each of the points where there are any."""
    keys, values = [axis.key for axis in sweep.axes], itertools.product(*(axis.values for axis in sweep.axes))
    return [
        {**point, **dict(zip(keys, found, strict=True))} for point, found in itertools.product(sweep.points, values)
    ]


def read_points(overrides: Sequence[str]) -> tuple[Params, ...]:
    """The trials listed in the file that ``sweep.points`` names; without it, one trial that sets nothing."""
    given = [text.partition("=")[2] for text in overrides if key_of(text) == "sweep.points"]
    if not given:
        return ({},)
    try:
        found = yaml.safe_load(Path(given[-1]).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"sweep.points={given[-1]}: {error}") from error
    lists = isinstance(found, list) and all(isinstance(point, list) and point for point in found)
    if not found or not lists or not all(isinstance(text, str) and "=" in text for point in found for text in point):
        raise UserError(
            f"sweep.points={given[-1]} has to be a list of lists of key=value, such as\n- [model.width=64, steps=400]"
        )
    return tuple({key_of(text): text.partition("=")[2] for text in point} for point in found)


def problems(sweep: Sweeping) -> list[str]:
    """Problems of a sweep's settings, each with its cure."""
    found, settings, axes, base = [], sweep.settings, sweep.axes, sweep.base
    endless = [axis for axis in axes if not axis.values]
    several = not isinstance(settings.metric, str)
    if not sweep.keys:
        found.append(
            "-m is for several runs, and no key has several values: give one some, such as optimizer.lr=1e-3,3e-3"
        )
    if settings.sampler == "grid":
        found += [f"{a.key}={a.text} has no end of values: search it with sweep=tpe or sweep=random" for a in endless]
        if settings.pruner != "none":
            found.append(f"sweep.pruner={settings.pruner} is for a search: sweep=tpe or sweep=random")
    elif settings.points:
        found.append(
            f"sweep={settings.sampler} chooses its own trials, and sweep.points lists them: leave one of them out"
        )
    if twice := {axis.key for axis in axes} & {key for point in sweep.points for key in point}:
        found.append(
            f"{', '.join(sorted(twice))}: given in sweep.points, and several values beside it: leave one of them out"
        )
    if settings.sampler == "cmaes" and (len(axes) < 2 or any(axis.low is None for axis in axes)):
        found.append("sweep=cmaes is for two keys or more that are all ranges or intervals of numbers: take sweep=tpe")
    if several and settings.pruner != "none":
        found.append(
            f"sweep.pruner={settings.pruner} knows one metric only, and sweep.metric names several: sweep.pruner=none"
        )
    if several and settings.sampler == "cmaes":
        found.append("sweep=cmaes knows one metric only: take sweep=nsga2 or sweep=tpe")
    if isinstance(settings.direction, list) and len(settings.direction) != len(
        settings.metric if several else [settings.metric]
    ):
        found.append("sweep.direction has to be as long as sweep.metric")
    measured = settings.metric not in ("val_loss", "bits_per_byte") or 0 < base.eval_every < base.steps
    if settings.pruner != "none" and not measured:
        found.append(
            f"sweep.pruner={settings.pruner} judges by {settings.metric}, measured at the end only (eval_every={base.eval_every}): "
            f"set eval_every={max(1, base.steps // 8)}, or sweep.pruner=none"
        )
    return found


def key_of(text: str) -> str:
    """The key, or the group, that an override sets."""
    return text.partition("=")[0].lstrip("+~")


def of_sweep(text: str) -> bool:
    """Whether an override concerns the sweep itself, not its runs."""
    return key_of(text).partition(".")[0] == "sweep"


def named(overrides: Sequence[str]) -> list[str]:
    """Overrides that would give all runs one name or folder."""
    return [key_of(text) for text in overrides if key_of(text) in ("run.name", "run.dir")]


def places(varied: Iterable[str]) -> list[str]:
    """Varied keys that must not vary: where the sweep runs, or how it sweeps."""
    free = ("cluster.workers", "cluster.cpus_per_worker")
    return [key for key in varied if key not in free and key.partition(".")[0] in ("cluster", "sweep")]
