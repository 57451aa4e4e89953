"""Which collective hangs and who has not joined it, from the flight recorders of torch's process groups; pure.

torch keeps the last collectives of every process group in memory and gives them out as JSON. Their numbers
(``collective_seq_id``) are the same on every rank of a group, so ranks that have not enqueued the one that others wait
in show by their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.util.reading import UNREADABLE

PENDING_SHOWN = 8
"""Collectives of a group that are kept of a record at most: the first ones that have not ended."""
MOST_SIZES = 2


@dataclass(frozen=True)
class PendingCollective:
    """A collective that a rank has enqueued and that has not ended."""

    number: int
    """Its number in the group, the same on all ranks."""
    name: str
    sizes: str
    """Of its inputs, for people."""
    started: bool
    """Its kernel runs on the device; always False on the CPU, where torch does not record it."""


@dataclass(frozen=True)
class GroupRecord:
    """One rank's share in one process group, by its recorder."""

    group: str
    backend: str
    members: tuple[int, ...]
    """Global ranks of the group; empty where the record does not tell."""
    last: int
    """Number of the last collective that the rank has enqueued."""
    pending: tuple[PendingCollective, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, for Ray to carry."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GroupRecord:
        """The record that ``to_json`` wrote."""
        pending = tuple(PendingCollective(**each) for each in record["pending"])
        return cls(record["group"], record["backend"], tuple(record["members"]), record["last"], pending)


def read_dump(dump: str | bytes) -> list[GroupRecord]:
    """The groups in a rank's dump, in torch's JSON; none where that cannot be read."""
    try:
        return _read_groups(json.loads(dump))
    except UNREADABLE:
        return []


def _read_groups(content: Mapping[str, Any]) -> list[GroupRecord]:
    configured = {name: config.get("ranks", "") for name, config in content.get("pg_config", {}).items()}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in content.get("entries", []):
        if type(entry["collective_seq_id"]) is not int:
            raise TypeError("a collective without a number")
        if not entry["is_p2p"]:
            # A group for tensors of CPU and GPU counts the collectives of each of its backends by itself.
            backend = entry["profiling_name"].partition(":")[0]
            groups.setdefault((*entry["process_group"], backend), []).append(entry)
    records = []
    for (name, description, backend), entries in groups.items():
        ranks = configured.get(name, configured.get("", "") if description == "default_pg" else "")
        members = tuple(int(rank) for rank in ranks.strip("[]").split(",") if rank.strip().isdigit())
        open_entries = [entry for entry in entries if entry["state"] != "completed" and not entry["retired"]]
        pending = tuple(_pending(entry) for entry in open_entries[:PENDING_SHOWN])
        last = max(entry["collective_seq_id"] for entry in entries)
        group = "the default group" if description == "default_pg" else f"group {description or name}"
        records.append(GroupRecord(group, backend, members, last, pending))
    return records


def _pending(entry: Mapping[str, Any]) -> PendingCollective:
    shapes = ["x".join(map(str, size)) or "scalar" for size in entry["input_sizes"]]
    more = f" and {len(shapes) - MOST_SIZES} more" if len(shapes) > MOST_SIZES else ""
    sizes = ", ".join(shapes[:MOST_SIZES]) + more
    return PendingCollective(entry["collective_seq_id"], entry["profiling_name"], sizes, entry["state"] == "started")


@dataclass(frozen=True)
class StuckCollective:
    """A collective that does not end, and the ranks to blame for it; none where all are in it alike."""

    text: str
    culprits: tuple[int, ...]


def find_stuck(records: Mapping[int, Sequence[GroupRecord]]) -> StuckCollective | None:
    """The first collective that does not end, from the records of the ranks that gave theirs.

    Where several groups stand still, that with a rank to blame: the others wait behind it.
    """
    groups: dict[tuple[str, str], dict[int, GroupRecord]] = {}
    for rank, theirs in records.items():
        for record in theirs:
            groups.setdefault((record.group, record.backend), {})[rank] = record
    candidates = [_stuck_in(group, by_rank, set(records)) for (group, _), by_rank in groups.items()]
    found = [stuck for stuck in candidates if stuck is not None]
    return min(found, key=lambda stuck: not stuck.culprits, default=None)


def _stuck_in(group: str, by_rank: Mapping[int, GroupRecord], heard: set[int]) -> StuckCollective | None:
    first = {rank: record.pending[0] for rank, record in by_rank.items() if record.pending}
    if not first:
        return None
    number = min(pending.number for pending in first.values())
    inside = {rank: pending for rank, pending in first.items() if pending.number == number}
    members = next((record.members for record in by_rank.values() if record.members), tuple(sorted(by_rank)))
    absent = [rank for rank in members if rank in heard and (rank not in by_rank or by_rank[rank].last < number)]
    names = {pending.name for pending in inside.values()}
    sample = next(iter(inside.values()))
    what = f"{sample.name} #{number} of {group}" + (f" ({sample.sizes})" if sample.sizes else "")
    if absent:
        wait = "wait" if len(inside) > 1 else "waits"
        return StuckCollective(f"{_ranks(inside)} {wait} in {what}, which {_ranks(absent)} did not join", tuple(absent))
    calls = {rank: f"{pending.name} of {pending.sizes}" for rank, pending in inside.items()}
    if len(names) > 1:
        different = "; ".join(f"rank {rank} called {calls[rank]}" for rank in sorted(calls)[:PENDING_SHOWN])
        return StuckCollective(f"the ranks called different collectives as #{number} of {group}: {different}", ())
    waiting = [rank for rank, pending in inside.items() if not pending.started]
    if 0 < len(waiting) < len(inside):
        text = f"{what} runs on the other ranks, and has not started on the device of {_ranks(waiting)}"
        return StuckCollective(text, tuple(sorted(waiting)))
    are = "are" if len(inside) > 1 else "is"
    return StuckCollective(f"{_ranks(inside)} {are} in {what}, which does not end: look at the network", ())


def _ranks(ranks: Sequence[int] | Mapping[int, Any]) -> str:
    numbers = sorted(ranks)
    shown = ", ".join(map(str, numbers[:PENDING_SHOWN])) + (", ..." if len(numbers) > PENDING_SHOWN else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
