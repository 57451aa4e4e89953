"""The process group of a run, and small collectives outside DeepSpeed.

The group made here becomes torch's default group, which DeepSpeed adopts. Its store listens on a socket that the caller
has bound already, so no port is chosen twice, and each attempt has its own prefix in the store, so nothing that an
earlier one left is read. Objects travel as JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from train.distributed import heartbeat
from train.errors import UserError
from train.util.format import plural

DIGEST_BYTES = 64
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
FIRST_POLL_S, MAX_POLL_S = 0.005, 0.25


@dataclass(frozen=True)
class DistContext:
    """This rank among ``size``: its global rank, its rank on its host, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0


@dataclass(frozen=True)
class Rendezvous:
    """Address of the store where the ranks of one attempt meet.

    ``listen_fd`` is the bound, listening socket behind ``host:port``; only rank 0 has it. ``attempt`` counts the starts
    of a job.
    """

    host: str
    port: int
    attempt: int = 0
    listen_fd: int | None = None
    timeout_s: float = 300.0


def init_group(rank: int, size: int, local_rank: int, device: str, rendezvous: Rendezvous) -> DistContext:
    """Make the default process group: returns once all ranks joined; raises torch's DistStoreError after the timeout.

    ``device``: "cpu" or "gpu". A GPU rank sees its own device only, as ``cuda:0``.
    """
    timeout = timedelta(seconds=rendezvous.timeout_s)
    options: dict[str, Any] = {} if rendezvous.listen_fd is None else {"master_listen_fd": rendezvous.listen_fd}
    store = dist.TCPStore(
        rendezvous.host, rendezvous.port, size, rank == 0, timeout=timeout, wait_for_workers=False, **options
    )
    world = DistContext(rank, size, local_rank, torch.device("cuda:0" if device == "gpu" else "cpu"))
    _initialise(world, dist.PrefixStore(f"world/{rendezvous.attempt}", store))
    return world


def init_from_env() -> DistContext:
    """Make the process group that torchrun, or a like launcher, describes in the environment; of one rank without any.

    One rank a device: on a machine with GPUs a rank takes the one of its local rank.
    """
    rank, size, local_rank = launcher_ranks(os.environ)
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise UserError(
            f"rank {rank} is number {local_rank} of its host, which has {plural(gpus, 'GPU')}: start no more here"
        )
    world = DistContext(rank, size, local_rank, torch.device(f"cuda:{local_rank}" if gpus else "cpu"))
    _initialise(world, None if "MASTER_ADDR" in os.environ else dist.HashStore())
    return world


def launcher_ranks(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """The rank, the world's size and the rank on this host in torchrun's variables. Raises UserError for nonsense."""
    words = [environ.get(name, given) for name, given in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    rank, size, local_rank = (
        int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else -1 for word in words
    )
    if 0 <= rank < size and local_rank >= 0:
        return rank, size, local_rank
    raise UserError(
        f"RANK={words[0]} WORLD_SIZE={words[1]} LOCAL_RANK={words[2]} name no rank: they are whole numbers, RANK "
        "below WORLD_SIZE. Start by torchrun, which sets all three, or unset them"
    )


def _initialise(world: DistContext, store: dist.Store | None) -> None:
    gpu = world.device.type == "cuda"
    if gpu:
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=bound_device(world),
    )


def bound_device(world: DistContext) -> torch.device | None:
    """The device that the group is bound to from the start, which lets NCCL connect at once and split groups cheaply.

    None on a CPU, and for a lone rank: it has nobody to connect to, and where DeepSpeed splits a bound group of one,
    some versions of NCCL fail with "device not ready".
    """
    return world.device if world.device.type == "cuda" and world.size > 1 else None


def destroy_group() -> None:
    """Destroy the process group, if this process has one, and end its threads.

    They end with the last reference to the group. A thread of Gloo that outlives it may release a tensor while the
    interpreter is being finalised, which aborts the process after its work is done (torch issue 190489). torch's
    ``nn.functional`` keeps whatever group exists when it is imported, as a default argument, for ever; so it is
    imported with this module, when there is none.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here; over the CPU, so that no device is synchronised."""
    all_reduce_sum([0.0])


@heartbeat.count_calls
def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sum ``values`` elementwise over all ranks, in float64; the same number of values on each rank."""
    if dist.get_world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@heartbeat.count_calls
def broadcast_object(value: Any, source: int = 0) -> Any:
    """The JSON-able ``value`` of rank ``source``, on every rank; the values of others are ignored."""
    mine = dist.get_rank() == source
    data = bytearray(json.dumps(value).encode()) if mine else bytearray()
    length = torch.tensor([len(data)])
    dist.broadcast(length, source)
    content = torch.frombuffer(data, dtype=torch.uint8) if mine else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, source)
    return json.loads(bytes(content.tolist()))


@heartbeat.count_calls
def all_to_all(parts: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """Send the flat tensors ``parts[r]``, at least one, to each rank r.

    Returns by rank what it has sent here, cut into tensors of ``sizes[r]`` elements.
    """
    sent = torch.cat([tensor for part in parts for tensor in part])
    lengths = [sum(part) for part in sizes]
    received = torch.empty(sum(lengths), dtype=sent.dtype, device=sent.device)
    dist.all_to_all_single(received, sent, lengths, [sum(map(len, part)) for part in parts])
    whole = received.split(lengths)
    return [list(tensor.split(list(cuts))) if cuts else [] for tensor, cuts in zip(whole, sizes, strict=True)]


@heartbeat.count_calls
def broadcast_(tensor: Tensor, rank: int) -> None:
    """Overwrite the tensor of every rank with that of ``rank``."""
    dist.broadcast(tensor, rank)


@heartbeat.count_calls
def gather_objects(value: Any) -> list[Any]:
    """The JSON-able values of all ranks, ordered by rank, on every rank."""
    data = json.dumps(value).encode()
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(n) for n in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(rows, mine)
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]


def run_on_rank0(act: Callable[[], None]) -> str | None:
    """Call ``act`` on rank 0 while the others wait; returns on every rank the text of its UserError or OSError, or
    None.
    """
    error = None
    if dist.get_rank() == 0:
        try:
            act()
        except (UserError, OSError) as failure:
            error = str(failure)
    return broadcast_object(error)


class WaitCancelled(Exception):  # noqa: N818  it is no error
    """The receiver of a message has stopped waiting for it."""


class StoreMailbox:
    """JSON-able messages between ranks outside the collectives: by name, from any thread, through the world's store.

    What is done behind the steps must not meet their collectives in another order on another rank.
    """

    def __init__(self, name: str) -> None:
        self.store = dist.PrefixStore(name, _get_default_store())

    def send(self, key: str, value: Any) -> None:
        """Leave ``value`` under ``key`` for whoever takes it."""
        self.store.set(key, json.dumps(value))

    def receive(self, key: str, given_up: Callable[[], bool]) -> Any:
        """The message sent under ``key``, waiting for it. Raises WaitCancelled once ``given_up()`` holds."""
        pause = FIRST_POLL_S
        while not self.store.check([key]):  # not ``wait``: it would hold the store's connection
            if given_up():
                raise WaitCancelled(key)
            time.sleep(pause)
            pause = min(1.2 * pause, MAX_POLL_S)
        return json.loads(self.store.get(key))

    def delete(self, key: str) -> None:
        """Delete a message that all have received."""
        self.store.delete_key(key)


def assert_equal_across_ranks(name: str, digest: str) -> None:
    """Raise UserError on every rank, naming those that differ, unless all have the same ``digest`` of the thing
    ``name``.
    """
    digests = gather_objects(digest[:DIGEST_BYTES])
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        who = ", ".join(f"rank {rank} has {digests[rank][:12]}" for rank in odd)
        raise UserError(
            f"the workers do not agree on the {name}: rank 0 has {digests[0][:12]}, {who}. "
            "Give every host the same code and files, then start again."
        )
