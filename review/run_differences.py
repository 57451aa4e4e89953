"""What differs between runs, which is best, and whether the difference is more than noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from review.run_reader import RunRecord
from train.util.format import some

INCIDENTAL = ("run.name", "run.dir", "data.dir", "data.workers", "tracking.", "cluster.address", "cluster.port")
"""Keys that say where a run lies, and nothing of what it did."""
NOT_TRAINING = (*INCIDENTAL, "log_every", "eval_every", "eval_tokens", "save_every", "keep_", "generation.", "kernels")
"""Keys that change nothing of what is trained, but what is done beside it."""
TRAINING_ONLY = ("objective.label_smoothing", "objective.z_loss", "objective.pool")
"""Keys of an objective that leave the held-out loss what it is: that of the same task."""


def differing_keys(runs: Sequence[RunRecord], but: tuple[str, ...] = INCIDENTAL) -> list[str]:
    """The keys of the configuration whose values are not the same in all runs that have one; those of ``but`` left out.

    Of one sweep, they are the keys and groups that it varied: what those bring with them differs too, and says nothing more.
    """
    configured = [run for run in runs if run.config or run.trial]
    if runs and (sweep := runs[0].sweep) and all(run.sweep is sweep for run in runs):
        keys = sweep.varied_keys
    else:
        keys = list(dict.fromkeys(key for run in runs for key in run.config))
    return [
        key for key in keys if not key.startswith(but) and len({repr(run.config_value(key)) for run in configured}) > 1
    ]


def ranked_runs(runs: Sequence[RunRecord]) -> list[tuple[float, RunRecord]]:
    """Finished runs by what they are compared by, the best first. Unfinished ones have not seen all the held-out text."""
    found = [(score, run) for run in runs if run.state == "done" and (score := run.score) is not None]
    return sorted(found, key=lambda pair: pair[0] if pair[1].goal.minimize else -pair[0])


def best_runs(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The best of the finished runs; of a sweep with several goals, those that no other is better than in each. None where the
    runs may not be compared.
    """
    order = [run for _, run in ranked_runs(runs)]
    if not order or comparability_warnings(runs):
        return []
    goals = order[0].goals
    points = {
        id(run): [(v if goal.minimize else -v) for goal in goals if (v := run.goal_value(goal)) is not None]
        for run in order
    }
    whole = [run for run in order if len(points[id(run)]) == len(goals)]
    return (
        whole[:1]
        if len(goals) == 1
        else [run for run in whole if not any(_beats(points[id(o)], points[id(run)]) for o in whole)]
    )


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better; less is better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)


def comparability_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Why the losses of these runs may not be compared."""
    measured = [run for run in runs if run.val_loss is not None]
    found = []
    if len({run.corpus for run in measured if run.corpus}) > 1:
        found.append("The runs were trained on different corpora or tokenizers: their losses are not comparable.")
    if len({repr(_task(run)) for run in measured if run.config}) > 1:
        found.append("The runs have different tasks (objective): their losses are not comparable.")
    if len({repr(run.config.get("data.isolate")) for run in measured if run.config}) > 1:
        found.append(
            "Some runs let documents of a row see one another (data.isolate) and some do not: their losses differ by that alone."
        )
    return found


def _task(run: RunRecord) -> list[tuple[str, Any]]:
    return sorted((k, v) for k, v in run.config.items() if k.startswith("objective.") and k not in TRAINING_ONLY)


def seed_noise(runs: Sequence[RunRecord]) -> tuple[float, int] | None:
    """(standard deviation of what they are compared by, between runs that differ in their seed alone; degrees of freedom)."""
    groups = [group for group in _groups(runs).values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    squares = sum((loss - fmean(group)) ** 2 for group in groups for loss in group)
    return (squares / freedom) ** 0.5, freedom


def verdict(runs: Sequence[RunRecord]) -> str:
    """One sentence or two: the best configuration, by how much, and whether that is more than seeds make."""
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
        said = f" The standard deviation between them is {spread[0]:.4f}." if spread else ""
        return f"These runs differ in their seeds alone; the mean {goal.label} is {means[0][0]:.4f}.{said}"
    (first, key), (second, other) = means[:2]
    names = {_identity(run): run.name for _, run in reversed(order)}
    gap = abs(second - first)
    share = f" ({gap / abs(second):.2%})" if second else ""
    way = "below" if goal.minimize else "above"
    said = f"Best: {names[key]}, {goal.label} {first:.4f}, {gap:.4f} {goal.unit}{share} {way} {names[other]}."
    if spread is None:
        return f"{said} No configuration was run with a second seed, so how much of that is noise is unknown."
    error = spread[0] * (1 / len(groups[key]) + 1 / len(groups[other])) ** 0.5
    times = gap / error if error else float("inf")
    word = "more than noise" if times > 2.5 else "within noise"
    return f"{said} That is {times:.1f} standard errors ({spread[0]:.4f} between seeds, {spread[1]} degrees of freedom): {word}."


def _groups(runs: Sequence[RunRecord]) -> dict[tuple[Any, ...], list[float]]:
    """What finished runs are compared by, those together that differ in their seed alone."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for loss, run in ranked_runs(runs):
        groups[_identity(run)].append(loss)
    return groups


def _identity(run: RunRecord) -> tuple[Any, ...]:
    same = {k: v for k, v in run.config.items() if k != "seed" and not k.startswith(NOT_TRAINING)}
    return (run.corpus, *sorted((k, repr(v)) for k, v in same.items()))
