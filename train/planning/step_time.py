"""Seconds of a step by a roofline: each operator at the rate of its products or of its memory, and the collectives.

Collectives hide behind the computation of their phase as far as that lasts; those of the update hide behind nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from train.planning import collectives
from train.planning.dry_run import DryRun
from train.planning.gpus import REACHED_MEMORY, REACHED_PRODUCTS, Gpu

KINDS: dict[str, collectives.Kind] = {
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_gather",
}
"""Kind of a collective by a part of torch's name of it; an all-to-all sends at most what a gather does."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step of a rank."""

    compute_s: float
    exposed_s: float
    """Of collectives that no computation hides."""

    @property
    def total_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.exposed_s


def step_time(run: DryRun, gpu: Gpu, world_size: int, fabric: collectives.Fabric) -> StepTime:
    """The time of a dry run's step on so many GPUs of a kind."""
    before_last = run.rows.micro_batches - 1
    computing: dict[str, float] = defaultdict(float)
    for work, calls in run.work.items():
        peak = gpu.flops("fp32" if work.dtype == torch.float32 else "bf16")
        seconds = max(work.flops / (REACHED_PRODUCTS * peak), work.nbytes / (REACHED_MEMORY * gpu.bandwidth))
        computing[work.phase] += seconds * calls * _times(work.phase, work.last, before_last)
    sending: dict[str, float] = defaultdict(float)
    for collective in run.collectives:
        kind = next((kind for part, kind in KINDS.items() if part in collective.name), None)
        if kind and world_size > 1:
            transfer = collectives.Transfer(kind, collective.nbytes, 1, 1, "update")
            times = _times(collective.phase, collective.last, before_last)
            sending[collective.phase] += times * collectives.seconds(transfer, world_size, fabric)
    hides = {"forward", "backward"}
    exposed = (max(0.0, s - (computing[phase] if phase in hides else 0.0)) for phase, s in sending.items())
    return StepTime(sum(computing.values()), sum(exposed))


def _times(phase: str, last: bool, before_last: int) -> int:
    """How often a step makes what a dry run made once: its first micro-batch stands for all before the last."""
    return before_last if not last and phase in ("forward", "backward") else 1
