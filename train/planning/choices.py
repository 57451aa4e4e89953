"""A run as it can be planned: its memory and time on a kind of GPU, and the other ways to make the same steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.config.keys.base import Transformer
from train.config.schema import Config
from train.planning import collectives
from train.planning.allocations import Peak
from train.planning.dry_run import DryRun, dry_run
from train.planning.gpus import FRAGMENTATION, OUTSIDE_TORCH, Gpu
from train.planning.step_time import StepTime, step_time
from train.reporting.throughput import utilization

DEPTHS = (4, 8)
"""Layers of the dry runs of a deeper model: its layers are equal, so what it takes grows by as much with each."""
RECOMPUTED: tuple[bool | str, ...] = (False, "attention", "mlp", True)
"""What of each block is recomputed in the backward pass: nothing, a part, all."""
STATE_BYTES = 4 + 8
"""Of a parameter: its fp32 master weight and two moments."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run is planned for."""

    gpu: Gpu
    nodes: int
    gpus_a_node: int = 8

    @property
    def size(self) -> int:
        """Number of all GPUs: a rank each."""
        return self.nodes * self.gpus_a_node


@dataclass(frozen=True)
class Choice:
    """A configuration with its dry run and its time on a cluster."""

    config: Config
    cluster: Cluster
    run: DryRun
    time: StepTime

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of a GPU by part, with what tensors do not account for."""
        parts: dict[str, float] = dict(self.run.step.parts)
        parts["fragmentation"] = FRAGMENTATION * self.run.step.nbytes
        return parts | {"CUDA, NCCL": OUTSIDE_TORCH}

    @property
    def total(self) -> float:
        """Bytes of a GPU, all parts together."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much memory."""
        return self.total <= self.cluster.gpu.memory

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the global batch, of all GPUs, per second."""
        return self.config.batch.global_ * self.config.batch.seq_len / self.time.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, of the data sheet's rate."""
        peak = self.cluster.gpu.flops(self.config.precision.name)
        return utilization(self.tokens_per_s, self.run.flops_per_token, self.cluster.size, peak) or 0.0

    @property
    def run_s(self) -> float:
        """Seconds of all steps of the run; a smaller one of a ramp takes as much less as it has fewer sequences."""
        batch = self.config.batch
        return batch.sequences(self.config.steps) / batch.global_ * self.time.total_s

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps of the run."""
        return self.run_s * self.cluster.size / 3600


def choose(config: Config, cluster: Cluster) -> Choice:
    """The configuration on a cluster, by a dry run of one of its ranks."""
    fabric = collectives.Fabric(gpus=cluster.gpus_a_node, cards=cluster.gpus_a_node)

    def of_depth(layers: int) -> tuple[DryRun, StepTime]:
        model = config.model.model_copy(update={"layers": layers})
        run = dry_run(config.model_copy(update={"model": model}), cluster.size, "cuda")
        return run, step_time(run, cluster.gpu, cluster.size, fabric)

    layers = config.model.layers
    if layers <= DEPTHS[1]:
        return Choice(config, cluster, *of_depth(layers))
    model = config.model
    if (
        isinstance(model, Transformer) and model.checkpoint_blocks is not None
    ):  # two kinds of block: all of one, or none
        ways = (choose(recomputing(config, kind), cluster) for kind in (False, model.checkpoint_activations))
        none, every = ((way.run, way.time) for way in ways)
        return Choice(config, cluster, *between(none, every, model.recomputed_share))
    deep = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return Choice(config, cluster, *between(of_depth(DEPTHS[0]), of_depth(DEPTHS[1]), deep))


def recomputing(config: Config, kind: bool | str) -> Config:
    """The configuration with ``kind`` recomputed in all blocks."""
    keys = {"checkpoint_activations": kind, "checkpoint_blocks": None}
    return config.model_copy(update={"model": config.model.model_copy(update=keys)})


def between(less: tuple[DryRun, StepTime], more: tuple[DryRun, StepTime], share: float) -> tuple[DryRun, StepTime]:
    """The dry run and time at a ``share`` of the way from one to the other, or beyond it, on the line through both."""

    def at(low: float, high: float) -> float:
        return max(0.0, low + share * (high - low))

    (a, a_time), (b, b_time) = less, more
    parts = {}
    for part in {**a.step.parts, **b.step.parts}:
        parts[part] = int(at(a.step.parts.get(part, 0), b.step.parts.get(part, 0)))
    run = replace(
        b,
        step=Peak(sum(parts.values()), parts),
        start=Peak(int(at(a.start.nbytes, b.start.nbytes)), {}),
        resting=int(at(a.resting, b.resting)),
        params=int(at(a.params, b.params)),
        flops_per_token=at(a.flops_per_token, b.flops_per_token),
        work={},
        collectives=[],
    )
    time = StepTime(at(a_time.compute_s, b_time.compute_s), at(a_time.exposed_s, b_time.exposed_s))
    return run, time


def alternatives(config: Config, cluster: Cluster) -> Iterator[Config]:
    """Every ZeRO stage, recomputation and micro-batch, doubling from 1, that makes steps of the same global batch."""
    share = -(-config.batch.global_ // cluster.size)
    micros = [2**n for n in range(share.bit_length()) if share % 2**n == 0]
    recomputes = RECOMPUTED if hasattr(config.model, "checkpoint_activations") else (None,)
    for stage, recompute, micro in itertools.product((0, 1, 2, 3), recomputes, micros):
        way = config if recompute is None else recomputing(config, recompute)
        hpz = config.zero.hpz if stage == 3 else 1
        yield way.model_copy(
            update={
                "zero": config.zero.model_copy(update={"stage": stage, "hpz": hpz}),
                "batch": config.batch.model_copy(update={"micro": micro}),
            }
        )


def least_state(config: Config, params: int, world_size: int) -> float:
    """Bytes of a rank for weights, gradients, masters and moments alone: what no micro-batch can be smaller than."""
    stage, weight = config.zero.stage, 4 if config.precision.name == "fp32" else 2
    states = STATE_BYTES - (4 if stage == 0 and weight == 4 else 0)
    share = 1 / world_size
    each = weight * (share if stage == 3 else 1) + weight * (share if stage >= 2 else 1)
    return params * (each + states * (share if stage else 1))


def missing(choice: Choice) -> str:
    """Say what is missing where a choice does not fit, in words, with what would change it."""
    gpu, run, size = choice.cluster.gpu, choice.run, choice.cluster.size
    lacks = (choice.total - gpu.memory) / 1e9
    stage, sharded = choice.config.zero.stage, ["master weights", "moments"]
    if stage >= 2:
        sharded.append("gradients")
    if stage == 3:
        sharded.append("weights")
    shared = sum(run.step.parts.get(part, 0) for part in sharded)
    largest = max(run.step.parts, key=run.step.parts.__getitem__)
    said = f"{lacks:,.1f} GB a GPU are missing: {choice.total / 1e9:,.1f} of {gpu.memory / 1e9:,.0f} GB, most of it"
    said += f" {largest} ({run.step.parts[largest] / 1e9:,.1f} GB)."
    cures = []
    if choice.config.zero.stage < 3:
        cures.append("zero=3 shards weights and gradients too")
    if choice.config.zero.stage and shared / 1e9 > lacks:
        # Only what the ranks share shrinks with their number.
        enough = size * shared / (shared - lacks * 1e9)
        nodes = -(-enough // choice.cluster.gpus_a_node)
        cures.append(f"about {nodes:,.0f} nodes, among which the same states are {lacks:,.1f} GB a GPU smaller")
    if choice.run.rows.micro > 1:
        cures.append(f"batch.micro={choice.run.rows.micro // 2}")
    if not getattr(choice.config.model, "checkpoint_activations", True):
        cures.append("model.checkpoint_activations=true")
    if not choice.config.zero.offload and choice.config.zero.stage:
        cures.append("zero.offload=true, with the optimizer's states in the hosts' memory")
    return f"{said} What would change it: {'; '.join(cures) or 'a GPU with more memory, or a smaller model'}."
