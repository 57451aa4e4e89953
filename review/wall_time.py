"""Shares of a run's wall time by cause, for the goodput charts."""

from __future__ import annotations

from review.lenient_io import finite_number
from review.run_reader import RunRecord


def time_shares(run: RunRecord) -> dict[str, float]:
    """Share of the wall time of all starts by cause, adding up to 1; empty if the run does not record it.

    A run that records its time by cause is used as it is. Otherwise there are two causes: goodput, and all else.
    """
    if seconds := run.seconds:
        total = sum(seconds.values())
        return {cause: value / total for cause, value in seconds.items()}
    goodput = finite_number(run.summary.get("goodput"))
    if goodput is None:
        return {}
    goodput = min(max(goodput, 0.0), 1.0)
    return {"steps that count": goodput, "all else": 1 - goodput}
