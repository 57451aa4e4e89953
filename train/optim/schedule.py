"""Learning rate as a pure function of the step: nothing to save, so a resume cannot bend the schedule."""

from __future__ import annotations

import math

from train.config import schema


def learning_rate(schedule: schema.ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of the update made at ``step``, counted from 0, in a run of ``steps``.

    Warm-up is linear, peak/warmup at step 0 and ``peak`` at its last step. Then, until the last step (steps - 1):

        constant      peak
        linear        a straight line from peak down to final * peak
        cosine        half a cosine from peak down to final * peak (Loshchilov and Hutter 2017)
        inverse_sqrt  peak * sqrt(warmup / (step + 1)) (Vaswani et al. 2017)
        wsd           peak, and over the last decay * steps a straight line down to final * peak (Hu et al. 2024)
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    top = max(warmup - 1, 0)  # the step that the fall is measured from
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / (step + 1))
    if schedule.name == "wsd":
        top = max(top, steps - 1 - round(schedule.decay * steps))
    fallen = min(1.0, max(0, step - top) / max(1, steps - 1 - top))
    if schedule.name == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return peak * (1 - fallen * (1 - schedule.final))


def warmup_steps(schedule: schema.ScheduleConfig, steps: int) -> int:
    """Steps of warm-up in a run of ``steps``: as given, or a fraction of ``steps`` where it is a float."""
    return schedule.warmup if isinstance(schedule.warmup, int) else round(schedule.warmup * steps)
