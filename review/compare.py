"""What differs between runs, which is best, and whether the difference is more than noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from review.read import Run

INCIDENTAL = ("run.name", "run.dir", "data.dir", "data.workers", "tracking.", "cluster.address", "cluster.port")
"""Keys that say where a run lies, and nothing of what it did."""
ASIDE = (*INCIDENTAL, "log_every", "eval_every", "eval_tokens", "save_every", "keep_", "generation.", "kernels")
"""Keys that change nothing of what is trained, but what is done beside it."""


def differing(runs: Sequence[Run], but: tuple[str, ...] = INCIDENTAL) -> list[str]:
    """The keys of the configuration whose values are not the same in all runs that have one; those of ``but`` left out."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(but))
    return [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]


def ranked(runs: Sequence[Run]) -> list[tuple[float, Run]]:
    """Finished runs by held-out loss, the best first. Unfinished ones have not seen all the held-out text."""
    found = [(loss, run) for run in runs if run.state == "done" and (loss := run.val_loss) is not None]
    return sorted(found, key=lambda pair: pair[0])


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why the losses of these runs may not be compared."""
    measured = [run for run in runs if run.val_loss is not None]
    found = []
    if len({run.corpus for run in measured if run.corpus}) > 1:
        found.append("The runs were trained on different corpora or tokenizers: their losses are not comparable.")
    if len({repr(run.config.get("data.isolate")) for run in measured if run.config}) > 1:
        found.append(
            "Some runs let documents of a row see one another (data.isolate) and some do not: their losses differ by that alone."
        )
    return found


def noise(runs: Sequence[Run]) -> tuple[float, int] | None:
    """(standard deviation of the held-out loss between runs that differ in their seed alone; degrees of freedom)."""
    groups = [group for group in _groups(runs).values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    squares = sum((loss - fmean(group)) ** 2 for group in groups for loss in group)
    return (squares / freedom) ** 0.5, freedom


def verdict(runs: Sequence[Run]) -> str:
    """One sentence or two: the best configuration, by how much, and whether that is more than seeds make."""
    order = ranked(runs)
    if order and warnings([run for _, run in order]):
        return "No verdict: the losses of these runs are not comparable."
    if not order:
        return "No run is finished: there is nothing to compare yet."
    best = order[0][1]
    if len(order) == 1:
        return f"One finished run: {best.name}, held-out loss {order[0][0]:.4f}."
    groups = _groups(runs)
    means = sorted(((fmean(losses), key) for key, losses in groups.items()), key=lambda pair: pair[0])
    spread = noise(runs)
    if len(means) == 1:
        said = f" The standard deviation between them is {spread[0]:.4f}." if spread else ""
        return f"These runs differ in their seeds alone; the mean held-out loss is {means[0][0]:.4f}.{said}"
    (first, key), (second, other) = means[:2]
    names = {_identity(run): run.name for _, run in reversed(order)}
    gap = second - first
    said = f"Best: {names[key]}, held-out loss {first:.4f}, {gap:.4f} nats per token ({gap / second:.2%}) below {names[other]}."
    if spread is None:
        return f"{said} No configuration was run with a second seed, so how much of that is noise is unknown."
    error = spread[0] * (1 / len(groups[key]) + 1 / len(groups[other])) ** 0.5
    times = gap / error if error else float("inf")
    word = "more than noise" if times > 2.5 else "within noise"
    return f"{said} That is {times:.1f} standard errors ({spread[0]:.4f} between seeds, {spread[1]} degrees of freedom): {word}."


def _groups(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[float]]:
    """Held-out losses of finished runs, those together that differ in their seed alone."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for loss, run in ranked(runs):
        groups[_identity(run)].append(loss)
    return groups


def _identity(run: Run) -> tuple[Any, ...]:
    same = {k: v for k, v in run.config.items() if k != "seed" and not k.startswith(ASIDE)}
    return (run.corpus, *sorted((k, repr(v)) for k, v in same.items()))
