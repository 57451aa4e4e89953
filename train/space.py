"""What a sweep varies: keys with their values, and the combinations of them. Pure; ``train.config`` makes it of Hydra's words."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from train.schema import Config, Sweep

Params = dict[str, str]
"""A trial's own choices: key (or group) -> value as on the command line."""


@dataclass(frozen=True)
class Axis:
    """A key, or a group, and its values: a list, the numbers of a range, or all numbers of an interval."""

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
        """A value of it."""
        return self.values[0] if self.values else repr(self.low)


@dataclass(frozen=True)
class Sweeping:
    """A sweep as it was asked for."""

    settings: Sweep
    """Complete: with its name and its folder."""
    base: Config
    """What is shared by all trials; the keys that vary have their first values."""
    fixed: tuple[str, ...]
    """The overrides of all trials."""
    axes: tuple[Axis, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is optimised."""
        found = self.settings.metric
        return (found,) if isinstance(found, str) else tuple(found)

    @property
    def directions(self) -> tuple[Literal["minimize", "maximize"], ...]:
        """Of each metric."""
        found = self.settings.direction
        return (found,) * len(self.metrics) if isinstance(found, str) else tuple(found)


def grid(axes: Sequence[Axis]) -> list[Params]:
    """Every combination, the last key's value changing first."""
    return [dict(zip([axis.key for axis in axes], values, strict=True)) for values in itertools.product(*(a.values for a in axes))]


def problems(settings: Sweep, axes: Sequence[Axis], base: Config) -> list[str]:
    """What makes no sense in a sweep, each with its cure."""
    found = []
    endless = [axis for axis in axes if not axis.values]
    several = not isinstance(settings.metric, str)
    if not axes:
        found.append("-m is for several runs, and no key has several values: give one some, such as optimizer.lr=1e-3,3e-3")
    if settings.sampler == "grid":
        found += [f"{a.key}={a.text} has no end of values: search it with sweep=tpe or sweep=random" for a in endless]
        if settings.pruner != "none":
            found.append(f"sweep.pruner={settings.pruner} is for a search: sweep=tpe or sweep=random")
    if settings.sampler == "cmaes" and (len(axes) < 2 or any(axis.low is None for axis in axes)):
        found.append("sweep=cmaes is for two keys or more that are all ranges or intervals of numbers: take sweep=tpe")
    if several and settings.pruner != "none":
        found.append(f"sweep.pruner={settings.pruner} knows one metric only, and sweep.metric names several: sweep.pruner=none")
    if several and settings.sampler == "cmaes":
        found.append("sweep=cmaes knows one metric only: take sweep=nsga2 or sweep=tpe")
    if isinstance(settings.direction, list) and len(settings.direction) != len(settings.metric if several else [settings.metric]):
        found.append("sweep.direction has to be as long as sweep.metric")
    measured = settings.metric not in ("val_loss", "bits_per_byte") or 0 < base.eval_every < base.steps
    if settings.pruner != "none" and not measured:
        found.append(
            f"sweep.pruner={settings.pruner} judges by {settings.metric}, measured at the end only (eval_every={base.eval_every}): "
            f"set eval_every={max(1, base.steps // 8)}, or sweep.pruner=none"
        )
    return found


def key_of(text: str) -> str:
    """The key, or the group, of an override."""
    return text.partition("=")[0].lstrip("+~")


def of_sweep(text: str) -> bool:
    """Whether an override says how to sweep, and nothing of the runs."""
    return key_of(text).partition(".")[0] == "sweep"


def named(overrides: Sequence[str]) -> list[str]:
    """The keys among the overrides that would give all runs one name."""
    return [key_of(text) for text in overrides if key_of(text) in ("run.name", "run.dir")]


def places(varied: Iterable[str]) -> list[str]:
    """The keys, among those that vary, that say where all of the sweep runs, or how it sweeps."""
    free = ("cluster.workers", "cluster.cpus_per_worker")
    return [key for key in varied if key not in free and key.partition(".")[0] in ("cluster", "sweep")]
