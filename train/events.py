"""Events: the messages of ranks, driver and sweeps, one dataclass for each kind.

A rank emits events; they travel as JSON lines to the driver, which shows them and acts on some. The keys of their JSON
are a contract: ``python -m train worker`` prints them, and ``ledger.jsonl`` and ``restarts.jsonl`` keep some of them.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

Json = dict[str, Any]
ENVELOPE = ("event", "t", "rank", "generation")
"""Keys that a worker's agent adds to what its rank says: when, who, and in which start of the job."""
KINDS: dict[str, type[Event]] = {}
"""Every kind of event, by the value of its key "event"."""


@dataclass(frozen=True)
class Event:
    """Base of all events. A field that is None by default is left out of the JSON while it is None."""

    event: ClassVar[str]
    """The kind: the value of the key "event"."""
    open_field: ClassVar[str] = ""
    """The field whose items stand in the JSON beside the others, where a kind has keys that are not known beforehand.
    """

    def __init_subclass__(cls, event: str, open_field: str = "") -> None:
        cls.event, cls.open_field = event, open_field
        KINDS[event] = cls

    def to_json(self) -> Json:
        """The event as plain values, "event" first, then the fields in their order."""
        record: Json = {"event": self.event}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == self.open_field:
                record |= value
            elif not (value is None and each.default is None):
                record[each.name] = value
        return record


def from_json(record: Json) -> Event | None:
    """The event of a record, with defaults for fields that it lacks; None for another kind, or where it lacks one that
    must be.
    """
    kind = KINDS.get(record.get("event", ""))
    if kind is None:
        return None
    names = [each.name for each in fields(kind) if each.name != kind.open_field]
    values = {name: record[name] for name in names if name in record}
    if kind.open_field:
        values[kind.open_field] = {k: v for k, v in record.items() if k not in names and k not in ENVELOPE}
    with contextlib.suppress(TypeError):
        return kind(**values)
    return None


# ------------------------------------------------------------------------------------------------- said by the ranks


@dataclass(frozen=True)
class PhaseEvent(Event, event="phase"):
    """A rank, or the driver, has come to another part of its work."""

    name: str = ""
    t: float | None = None
    """Time, in seconds since 1970."""

    @classmethod
    def now(cls, name: str) -> PhaseEvent:
        """The phase ``name`` begins at this moment."""
        return cls(name, time.time())


@dataclass(frozen=True)
class PlanEvent(Event, event="plan"):
    """Sizes of the model, of the work and of the corpus: said before the first step."""

    kernels: str | None = None
    """Which kernels run, and why, in words."""
    model: str | None = ""
    """Name of the run, which most name by its model."""
    params: int | None = None
    trained: int | None = None
    """Those of ``params`` that are not frozen."""
    steps: int | None = None
    start_step: int | None = None
    """Steps made by earlier starts; 0 for a new run."""
    tokens: int | None = None
    """Tokens of the whole run."""
    tokens_per_step: int | None = None
    corpus_tokens: int | None = None
    """Tokens of the training split."""
    epochs: float | None = None
    flops_per_token: float | None = None
    zero_stage: int | None = None
    precision: str | None = None
    precision_why: str | None = None
    """Why it is that, in words."""
    device: str | None = None
    """Name of rank 0's device."""
    peak_flops: float | None = None
    """FLOP/s of that device in that precision by its data sheet."""
    measured_flops: float | None = None
    """FLOP/s of matrix products, measured on it."""
    workers: int | None = None
    vocab_size: int | None = None
    estimate_s: float | None = None
    """Estimated seconds for the steps that are left."""


@dataclass(frozen=True)
class StepEvent(Event, event="step", open_field="metrics"):
    """The run has come to ``step`` of ``steps``; ``metrics`` has the numbers of a step that is logged."""

    steps: int | None = None
    step: int = 0
    metrics: Json = field(default_factory=dict)


@dataclass(frozen=True)
class EvalEvent(Event, event="eval", open_field="metrics"):
    """The held-out split was evaluated after ``step``, in ``seconds``."""

    step: int = 0
    seconds: float | None = None
    metrics: Json = field(default_factory=dict)
    """By the names that ``metrics.jsonl`` has."""


@dataclass(frozen=True)
class SaveEvent(Event, event="save"):
    """The checkpoint of ``step`` is complete."""

    step: int = 0
    path: str | None = None
    seconds: float | None = None
    """From its beginning to the manifest on the disk, most of it behind the steps."""
    stall_s: float | None = None
    """Seconds, since the start, that steps have waited for saves."""


@dataclass(frozen=True)
class SampleEvent(Event, event="sample"):
    """A continuation of ``prompt`` by the model of ``step``."""

    step: int = 0
    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class NoteEvent(Event, event="note"):
    """One line of text for the user."""

    text: str = ""


@dataclass(frozen=True)
class DoneEvent(Event, event="done"):
    """The run is complete; ``summary`` is the content of ``summary.json``."""

    summary: Json = field(default_factory=dict)


@dataclass(frozen=True)
class StopAskedEvent(Event, event="stop_asked"):
    """This rank was asked by a signal to save and end."""

    signal: int = 0


@dataclass(frozen=True)
class StopAgreedEvent(Event, event="stop_agreed"):
    """All ranks have seen that one was asked to stop: they save and end."""


@dataclass(frozen=True)
class ErrorEvent(Event, event="error"):
    """The reason why a rank ends early."""

    kind: Literal["user", "not_finite", "device", "exception"] = "exception"
    text: str = ""
    """The message; of an exception the traceback."""


# -------------------------------------------------------------------------------------- said by the agents of workers


@dataclass(frozen=True)
class BeatEvent(Event, event="beat"):
    """The state of a living worker: its heartbeat (``train.distributed.heartbeat.read``) and its process."""

    step: int
    phase: str
    micro: int
    collective: str
    count: int
    inside: bool
    still_s: float
    longest_s: float
    busy_s: float
    state: str
    """Of the process, as ``/proc`` has it."""
    rss_mib: int
    rank: int
    generation: int


@dataclass(frozen=True)
class ExitEvent(Event, event="exit"):
    """A worker's process has ended; the fields after ``generation`` are of failures alone, but for ``at``."""

    code: int
    """Exit status; negative: minus the signal that killed it."""
    pid: int
    t: float
    rank: int
    generation: int
    tail: list[str] | None = None
    """The last lines of its log."""
    peak_mib: int | None = None
    memory_mib: int | None = None
    """Memory of its host."""
    oom: int | None = None
    """Kills by the kernel's OOM killer on its host while it lived."""
    evidence: Json | None = None
    """Of its GPU: counters before and after, and the driver's messages."""
    orphaned: bool | None = None
    """It was killed since the fork server that it came from ended."""
    at: Json | None = None
    """Its last heartbeat; set for every exit."""


# ----------------------------------------------------------------------------------------------- said by the driver


@dataclass(frozen=True)
class JobEvent(Event, event="job"):
    """A job is about to start its workers."""

    config: Json = field(default_factory=dict)
    device: str = ""
    """Kind of device of each worker, "cpu" or "gpu"."""
    hosts: int = 1
    """Number of hosts of the cluster."""


@dataclass(frozen=True)
class PrepareEvent(Event, event="prepare", open_field="progress"):
    """Progress of preparing the corpus."""

    phase: str = ""
    progress: Json = field(default_factory=dict)
    """"done" of "total" units of the phase, and more."""


@dataclass(frozen=True)
class StartedEvent(Event, event="started"):
    """The workers of an attempt are forked; their process ids, by rank."""

    pids: list[int]
    generation: int


@dataclass(frozen=True)
class WorldEvent(Event, event="world"):
    """All ranks of an attempt have made a step."""

    generation: int
    size: int
    marks: dict[str, float]
    """When the attempt came to each of its phases, seconds since 1970."""


@dataclass(frozen=True)
class StoppingEvent(Event, event="stopping"):
    """The driver was asked by a signal to stop: it has the ranks save and end."""

    signal: int = 0


@dataclass(frozen=True)
class FailureEvent(Event, event="failure"):
    """An attempt has failed, and what the driver does next."""

    lines: list[str] = field(default_factory=list)
    """The cause and its evidence, the cause first."""
    next: str | None = ""
    """The driver's next action, in words."""
    again: bool = False
    """Whether the driver starts another attempt by itself."""


@dataclass(frozen=True)
class RecoveredEvent(Event, event="recovered", open_field="marks"):
    """All ranks train again after a failure; also a line of ``restarts.jsonl``."""

    generation: int = 0
    workers: int | None = None
    marks: Json = field(default_factory=dict)
    """When each phase was reached, seconds since 1970: "failed", "ended", then those of the new attempt; and "fault".
    """


# ------------------------------------------------------------------------------------------------------- of a sweep


@dataclass(frozen=True)
class JobEndedEvent(Event, event="ended"):
    """All processes of a trial's job have ended. Stays within the driver's process."""

    verdict: Any
    """A ``cluster.supervision.outcome.Verdict``."""
    why: str
    lost: bool
    """The sweep's own Ray cluster is gone."""


@dataclass(frozen=True)
class SweepBegunRecord(Event, event="sweep", open_field="identity"):
    """The first line of a sweep's ledger: what it searches."""

    identity: Json
    """"fixed", "axes" and "sweep": the values that make it this sweep."""
    grid: Sequence[dict[str, str]] | None
    """Its trials, where they are known beforehand."""


@dataclass(frozen=True)
class TrialAddedRecord(Event, event="trial"):
    """A line of the ledger: a search has decided on a trial."""

    trial: int
    params: dict[str, str]
    attrs: Json


@dataclass(frozen=True)
class TrialStartedRecord(Event, event="start"):
    """A line of the ledger: workers and hosts were given to a trial."""

    trial: int
    workers: int
    hosts: list[str]


@dataclass(frozen=True)
class TrialEndedRecord(Event, event="end"):
    """A line of the ledger: a trial has ended, and all its processes are gone."""

    trial: int
    state: str
    step: int
    values: list[float] | None
    why: str


Emit = Callable[[Event], None]
"""Sends an event on its way."""
