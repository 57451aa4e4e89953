"""A model of what ranks exchange in a training step, and of how long it takes; pure.

Bytes follow from the calls that DeepSpeed makes at each stage, and ``bench collectives check=true`` compares them with
those that the kernel counts. Seconds follow from bytes and a fabric by NCCL's rings and trees: they are an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
BUCKET_BYTES = 200 << 20
"""Of gradients that are reduced at a time between GPUs: ``zero.bucket_mb``."""
GATHER_ELEMENTS = 500_000_000
"""Of weights that stages 1 and 2 gather at a time; DeepSpeed's own."""
KEPT_ELEMENTS = 1_000_000_000
"""Of weights: a model of no more stays gathered at stage 3 from the forward pass on; DeepSpeed's own
(``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``).
"""
MASTER_BYTES = 12
"""Of optimizer state a parameter: fp32 master weight and two moments."""


@dataclass(frozen=True)
class Model:
    """The model that is trained, as far as its communication depends on it."""

    name: str
    params: float
    layers: int
    weight_bytes: int = 2
    gradient_bytes: int = 4
    """Of an element on its way: fp32, in which bf16 gradients are summed by default."""
    flops_a_token: float = 8.0
    """Times parameters: 6, and 2 more where blocks are recomputed in the backward pass."""


@dataclass(frozen=True)
class Fabric:
    """Hosts of GPUs, and the network between them."""

    gpus: int = 8
    """Of a host."""
    cards: int = 8
    """Network cards of a host."""
    card: float = 42e9
    """Bytes/s of a card of 400 Gb/s, measured by NCCL users: 84 % of its line."""
    inside: float = 360e9
    """Bytes/s of bus bandwidth inside a host."""
    hop_between: float = 8e-6
    """Seconds from GPU to GPU through the network, and inside a host."""
    hop_inside: float = 2e-6
    flops: float = 0.45 * 989e12
    """Of a GPU while it computes: 45 % of an H100's bf16 peak."""
    memory: float = 70e9
    """Bytes of a GPU for weights, gradients and optimizer state."""


@dataclass(frozen=True)
class Transfer:
    """A collective on a tensor of ``total`` bytes, made of ``pieces`` calls, ``times`` a step."""

    kind: Kind
    total: float
    times: int
    pieces: int
    during: Literal["forward", "backward", "update"]
    """The work that hides it; nothing hides what follows the update."""
    inside: bool = False
    """Among the ranks of a host alone."""


def transfers(model: Model, stage: int, accumulation: int, hpz: bool = False) -> list[Transfer]:
    """The collectives of one optimizer step of ``accumulation`` micro-batches, as DeepSpeed makes them.

    Stages 0 and 1 reduce once a step, stages 2 and 3 once a micro-batch. Stages 1 and 2 reduce whole buckets to all
    ranks, which is twice the bytes of a reduce-scatter. Stage 3 gathers each layer's weights for the forward pass and,
    where they are more than KEPT_ELEMENTS, again for the backward pass; with ``hpz`` the second time inside the host.
    """
    weights, gradients = model.params * model.weight_bytes, model.params * model.gradient_bytes
    if stage == 3:
        again = Transfer("all_gather", weights, accumulation, model.layers, "backward", inside=hpz)
        return [
            Transfer("all_gather", weights, accumulation, model.layers, "forward"),
            *([again] if model.params > KEPT_ELEMENTS else []),
            Transfer("reduce_scatter", gradients, accumulation, model.layers, "backward"),
        ]
    buckets = math.ceil(gradients / BUCKET_BYTES)
    found = [Transfer("all_reduce", gradients, accumulation if stage == 2 else 1, buckets, "backward")]
    if stage > 0:
        found.append(Transfer("all_gather", weights, 1, math.ceil(model.params / GATHER_ELEMENTS), "update"))
    return found


def bytes_sent(transfer: Transfer, ranks: int, gloo: bool = False) -> float:
    """Bytes that a rank sends for it in one step, by a ring; gloo makes a reduce-scatter by an all-reduce."""
    twice = transfer.kind == "all_reduce" or (gloo and transfer.kind == "reduce_scatter")
    return (2 if twice else 1) * transfer.times * transfer.total * (ranks - 1) / ranks


def seconds(transfer: Transfer, ranks: int, fabric: Fabric) -> float:
    """Seconds of one of its ``times``: the slower of NVLink and network, and the hops of its pieces.

    A ring passes each byte once into each host, on all cards at once. An all-reduce may take a tree instead, whose hops
    grow with the logarithm; NCCL has none for the other two.
    """
    size = min(ranks, fabric.gpus) if transfer.inside else ranks
    hosts = -(-size // fabric.gpus)
    twice = 2 if transfer.kind == "all_reduce" else 1
    wire = transfer.total * (size - 1) / size / fabric.inside
    if hosts > 1:
        wire = max(wire, transfer.total * (hosts - 1) / hosts / (fabric.cards * fabric.card))
    hops = (hosts if hosts > 1 else 0) * fabric.hop_between + (size - hosts) * fabric.hop_inside
    if transfer.kind == "all_reduce":
        tree = math.log2(hosts) * fabric.hop_between + (size // hosts) * fabric.hop_inside
        hops = min(hops, tree)
    return twice * (wire + transfer.pieces * hops)


def fits(model: Model, stage: int, ranks: int, fabric: Fabric, hpz: bool = False) -> bool:
    """Whether weights, gradients and optimizer state have room on a GPU."""
    share = 1 / ranks
    weights = model.weight_bytes * (share if stage == 3 else 1) + (model.weight_bytes / fabric.gpus if hpz else 0)
    gradients = model.gradient_bytes * (share if stage >= 2 else 1)
    return model.params * (weights + gradients + MASTER_BYTES * (share if stage else 1)) <= fabric.memory


@dataclass(frozen=True)
class Step:
    """One optimizer step of a rank."""

    compute_s: float
    exposed_s: float
    """Of communication that no computation hides."""
    sent: float
    """Bytes."""

    @property
    def efficiency(self) -> float:
        """The part of the step in which the GPU computes."""
        return self.compute_s / (self.compute_s + self.exposed_s)


def step(model: Model, stage: int, ranks: int, tokens: tuple[float, float], fabric: Fabric) -> Step:
    """The step of a rank that has so many ``tokens`` of it, and of a micro-batch; stage 4 is 3 with hpz."""
    hpz, (whole, micro_tokens) = stage == 4, tokens
    accumulation = max(1, round(whole / micro_tokens))
    micro_s = model.flops_a_token * model.params * micro_tokens / fabric.flops
    parts = {"forward": 2 / model.flops_a_token * micro_s, "update": 0.0}
    parts["backward"] = micro_s - parts["forward"]
    moved = transfers(model, min(stage, 3), accumulation, hpz)
    exposed = 0.0
    for during, hidden in parts.items():
        here = [transfer for transfer in moved if transfer.during == during]
        times = max((transfer.times for transfer in here), default=0)
        exposed += times * max(0.0, sum(seconds(transfer, ranks, fabric) for transfer in here) - hidden)
    sent = sum(bytes_sent(transfer, ranks) for transfer in moved if not transfer.inside)
    return Step(accumulation * micro_s, exposed, sent)


LLAMA_7B = Model("7B", 6.74e9, 32)
LLAMA_70B = Model("70B", 69.0e9, 80)
FABRICS = {"a card of 400 Gb/s a GPU": Fabric(), "a card of 400 Gb/s a host": replace(Fabric(), cards=1)}
