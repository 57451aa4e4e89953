"""Where a run's wall time went."""

from __future__ import annotations

from review.read import Run, number


def shares(run: Run) -> dict[str, float]:
    """Share of the wall time of all starts by cause, adding up to 1; empty where the run does not say.

    A run that keeps its time by cause (``time_by_cause``, seconds) is taken at its word; else useful training, which is
    goodput, and the rest. A run without a summary, or without goodput, spent its time on steps as long as their speed says.
    """
    causes = run.summary.get("time_by_cause")
    if isinstance(causes, dict):
        seconds = {str(cause): value for cause, v in causes.items() if (value := number(v)) is not None and value > 0}
        total = sum(seconds.values())
        return {cause: value / total for cause, value in seconds.items()}
    useful = number(run.summary.get("goodput"))
    wall = number(run.summary.get("wall_s")) or number(run.kept.get("wall_s"))
    if useful is None and wall and len(run.steps):
        useful = float(run.columns["seconds"][-1]) / wall
    if useful is None:
        return {}
    useful = min(max(useful, 0.0), 1.0)
    return {"steps that count": useful, "all else": 1 - useful}
