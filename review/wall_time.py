"""Where a run's wall time went."""

from __future__ import annotations

from review.lenient_io import finite_number
from review.run_reader import RunRecord


def time_shares(run: RunRecord) -> dict[str, float]:
    """Share of the wall time of all starts by cause, adding up to 1; empty where the run does not say.

    A run that keeps its time by cause is taken at its word; else useful training, which is goodput, and the rest.
    """
    if seconds := run.seconds:
        total = sum(seconds.values())
        return {cause: value / total for cause, value in seconds.items()}
    useful = finite_number(run.summary.get("goodput"))
    if useful is None:
        return {}
    useful = min(max(useful, 0.0), 1.0)
    return {"steps that count": useful, "all else": 1 - useful}
