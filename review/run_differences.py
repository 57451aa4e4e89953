"""Compares runs: keys that differ, the best run, and whether it is better by more than seed noise."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from review.run_reader import RunRecord
from review.sweep_reader import Goal
from train.config.sweep_dir import pareto_front
from train.util.format import some

INCIDENTAL = ("run.name", "run.dir", "data.dir", "data.workers", "tracking.", "cluster.address", "cluster.port")
"""Prefixes of keys that say where a run is stored or runs; they never affect results."""
NOT_TRAINING = (*INCIDENTAL, "log_every", "eval_every", "eval_tokens", "save_every", "keep_", "generation.", "kernels")
"""Prefixes of keys that do not affect training, only logging, evaluation, saving and speed."""
TRAINING_ONLY = ("objective.label_smoothing", "objective.z_loss", "objective.pool")
"""Keys of an objective that change training but not the definition of the held-out loss."""


def differing_keys(runs: Sequence[RunRecord], exclude: tuple[str, ...] = INCIDENTAL) -> list[str]:
    """Configuration keys whose values differ between the runs, without those that begin with a prefix in ``exclude``.

    For the trials of one sweep, only keys and groups that it varied: keys that a group sets add nothing.
    """
    configured = [run for run in runs if run.config or run.trial]
    if runs and (sweep := runs[0].sweep) and all(run.sweep is sweep for run in runs):
        keys = sweep.varied_keys
    else:
        keys = list(dict.fromkeys(itertools.chain.from_iterable(run.config for run in runs)))
    return [key for key in keys if not key.startswith(exclude) and _differs(key, configured)]


def _differs(key: str, runs: Sequence[RunRecord]) -> bool:
    return len({repr(run.config_value(key)) for run in runs}) > 1


def ranked_runs(runs: Sequence[RunRecord]) -> list[tuple[float, RunRecord]]:
    """(score, run) of the finished runs, best first. Unfinished runs have not seen all of the held-out text."""
    scored = [(score, run) for run in runs if run.state == "done" and (score := run.score) is not None]
    return sorted(scored, key=lambda pair: pair[0] if pair[1].goal.minimize else -pair[0])


def best_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The best finished run, or the Pareto front of several goals; empty if the runs are not comparable."""
    order = [run for _, run in ranked_runs(runs)]
    if not order or comparability_warnings(runs):
        return []
    goals = order[0].goals
    points = {i: _minimized_values(run, goals) for i, run in enumerate(order)}
    complete = {i: point for i, point in points.items() if len(point) == len(goals)}
    front = list(complete)[:1] if len(goals) == 1 else pareto_front(complete)
    return [order[i] for i in front]


def _minimized_values(run: RunRecord, goals: Sequence[Goal]) -> list[float]:
    """The run's values of ``goals``, those to be maximized negated; shorter than ``goals`` if one was not measured."""
    return [(v if goal.minimize else -v) for goal in goals if (v := run.goal_value(goal)) is not None]


def comparability_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Reasons, in sentences, why the losses of these runs are not comparable; empty if they are."""
    measured = [run for run in runs if run.val_loss is not None]
    reasons = []
    if len({run.corpus for run in measured if run.corpus}) > 1:
        reasons.append("The runs were trained on different corpora or tokenizers: their losses are not comparable.")
    if len({repr(_task(run)) for run in measured if run.config}) > 1:
        reasons.append("The runs have different tasks (objective): their losses are not comparable.")
    if len({repr(run.config.get("data.isolate")) for run in measured if run.config}) > 1:
        reasons.append(
            "Some runs let documents of a row see one another (data.isolate) and some do not: "
            "their losses differ by that alone."
        )
    return reasons


def _task(run: RunRecord) -> list[tuple[str, Any]]:
    return sorted((k, v) for k, v in run.config.items() if k.startswith("objective.") and k not in TRAINING_ONLY)


def seed_noise(runs: Sequence[RunRecord]) -> tuple[float, int] | None:
    """(pooled standard deviation between seeds, degrees of freedom); None if no configuration was repeated."""
    groups = [group for group in _groups(runs).values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    squares = 0.0
    for group in groups:
        mean = fmean(group)
        for score in group:
            squares += (score - mean) ** 2
    return (squares / freedom) ** 0.5, freedom


def verdict(runs: Sequence[RunRecord]) -> str:
    """A sentence or two: the best configuration, its distance to the next, and whether that is more than seed noise."""
    order = ranked_runs(runs)
    if order and comparability_warnings([run for _, run in order]):
        return "No verdict: the losses of these runs are not comparable."
    if not order:
        return "No run is finished: there is nothing to compare yet."
    first_run, front = order[0][1], best_runs(runs)
    goal = first_run.goal
    if len(order) == 1:
        return f"One finished run: {first_run.name}, {goal.label} {order[0][0]:.4f}."
    if len(front) > 1:
        metrics = " and ".join(other.metric for other in first_run.goals)
        return f"By {metrics} together, no other run is better than these: {some([run.name for run in front])}."
    groups = _groups(runs)
    means = sorted(
        ((fmean(values), key) for key, values in groups.items()), key=lambda p: p[0] if goal.minimize else -p[0]
    )
    spread = seed_noise(runs)
    if len(means) == 1:
        deviation = f" The standard deviation between them is {spread[0]:.4f}." if spread else ""
        return f"These runs differ in their seeds alone; the mean {goal.label} is {means[0][0]:.4f}.{deviation}"
    (first, key), (second, other) = means[:2]
    names = {_identity(run): run.name for _, run in reversed(order)}
    gap = abs(second - first)
    share = f" ({gap / abs(second):.2%})" if second else ""
    way = "below" if goal.minimize else "above"
    text = f"Best: {names[key]}, {goal.label} {first:.4f}, {gap:.4f} {goal.unit}{share} {way} {names[other]}."
    if spread is None:
        return f"{text} No configuration was run with a second seed, so how much of that is noise is unknown."
    error = spread[0] * (1 / len(groups[key]) + 1 / len(groups[other])) ** 0.5
    times = gap / error if error else float("inf")
    word = "more than noise" if times > 2.5 else "within noise"
    return (
        f"{text} That is {times:.1f} standard errors "
        f"({spread[0]:.4f} between seeds, {spread[1]} degrees of freedom): {word}."
    )


def _groups(runs: Sequence[RunRecord]) -> dict[tuple[Any, ...], list[float]]:
    """Scores of the finished runs by configuration: runs that differ only in their seed are in one group."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for score, run in ranked_runs(runs):
        groups[_identity(run)].append(score)
    return groups


def _identity(run: RunRecord) -> tuple[Any, ...]:
    identity = {k: v for k, v in run.config.items() if k != "seed" and not k.startswith(NOT_TRAINING)}
    return (run.corpus, *sorted((k, repr(v)) for k, v in identity.items()))
