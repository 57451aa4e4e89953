"""What a drill injects, what must be said of it, and whether what was seen is right. Pure.

A row holds where the fault was named as it is, the job went on from it, and the run is then the undisturbed one: the same samples
in every step, and the same loss; bit for bit at the same number of workers, within ``TOLERANCE`` where it changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.run_dir.compare import Comparison

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""By precision: how far a loss may be off, relatively, where another number of workers adds in another order."""
JUDGED = 50
"""Steps, from the first that differs, in which that can be nothing but rounding."""
COLUMNS = ("fault", "detected in s", "named right", "recovered in s", "steps redone", "data_hash equal", "loss equal")
Losses = Mapping[int, float]
"""By step."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. ``says``: a pattern of the words that name it, with {places} that are known once it was injected."""

    name: str
    title: str
    says: str
    resizes: bool = False
    """Whether the job goes on with another number of workers."""

    def pattern(self, where: Mapping[str, Any]) -> re.Pattern[str]:
        """What the job must say of it."""
        return re.compile(self.says.format(**{key: re.escape(str(value)) for key, value in where.items()}))


_RANK = r"rank {rank} on {host} \(pid {pid}\) "
_DAMAGED = "{step} is damaged and is not used: {file} does not have the hash"
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill", "a worker killed", _RANK + "killed by SIGKILL"),
        Fault("save", "killed while it saves", _RANK + "killed by SIGKILL"),
        Fault("stop", "a worker stopped", _RANK + r"hung: .*\n(?: .*\n)*?  it is stopped by a signal"),
        Fault("checkpoint", "a checkpoint damaged", _DAMAGED),
        Fault("disk", "the disk full", "no checkpoint could be written to .*: rank {rank}: .*File too large"),
        Fault("term", "SIGTERM to all", "Stopped and saved"),
        Fault("shard", "a shard poisoned", "{file}: damaged: its sha256 is"),
        Fault("size", "one worker less, and again", "rank {rank} on {host} was told to end: saving", True),
        Fault("host", "a host killed", r"rank \d+ on {host} \(pid \d+\) was lost with its host", True),
        Fault("cut", "a host cut off", r"rank \d+ on {host} \(pid \d+\) was cut off", True),
    )
}
"""In the order in which they are injected: at the end, those after which the losses are no longer equal bit for bit."""


@dataclass(frozen=True)
class Observation:
    """What was seen of one fault. Seconds since it was injected; None: never."""

    detected_s: float | None
    recovered_s: float | None
    steps_redone: int
    words: str
    """The words that named it, or what was said instead."""
    named: bool
    step: int
    """Up to which the run is compared with the undisturbed one."""


@dataclass(frozen=True)
class Row:
    """The verdict on one fault. ``impossible``: why it could not be injected here; then nothing else is set."""

    fault: str
    title: str
    impossible: str = ""
    seen: Observation | None = None
    data: str = ""
    """What of the samples differs; empty: nothing."""
    loss: str = ""
    how: str = ""
    """How equal the losses had to be."""
    failed: str = ""
    """What the run did instead of going on."""

    @property
    def holds(self) -> bool:
        """Whether all is as it must be."""
        seen = self.seen
        return bool(
            not self.failed and seen and seen.named and seen.recovered_s is not None and not (self.data or self.loss)
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """As ``COLUMNS`` has them."""
        if self.seen is None:
            return (self.title, "", "not possible here" if self.impossible else "FAILED", *[""] * 4)
        seen = self.seen
        named, same = ("yes" if right else "NO" for right in (seen.named, not self.data))
        detected, recovered = ("never" if s is None else f"{s:.1f}" for s in (seen.detected_s, seen.recovered_s))
        return (self.title, detected, named, recovered, str(seen.steps_redone), same, "NO" if self.loss else self.how)

    @property
    def remark(self) -> str:
        """What does not hold, or why nothing was tried, in words; empty if all holds."""
        if self.impossible:
            return f"{self.title}: not possible here: {self.impossible}"
        if self.holds:
            return ""
        if self.failed or self.seen is None:
            return f"{self.title}: {self.failed}"
        found = [] if self.seen.named else [f"not named right, but: {self.seen.words or 'nothing'}"]
        return f"{self.title}: " + "; ".join([*found, *filter(None, (self.data, self.loss))])


def judge(
    fault: Fault, seen: Observation, findings: Sequence[Comparison], precision: str, losses: tuple[Losses, Losses]
) -> Row:
    """``findings``: the lines of both runs up to ``seen.step``, compared; ``losses``: theirs, by step."""
    by_name = {finding.subject: finding.difference for finding in findings}
    data = by_name.pop("data_hash")
    if fault.resizes:
        tolerance = TOLERANCE[precision]
        loss, how = apart(*losses, tolerance), f"within {tolerance:g}"
    else:
        loss, how = next((f"{what}: {d}" for what, d in by_name.items() if d), ""), "bit for bit"
    return Row(fault.name, fault.title, seen=seen, data=f"data_hash: {data}" if data else "", loss=loss, how=how)


def apart(ours: Losses, theirs: Losses, tolerance: float) -> str:
    """The first step whose losses are more apart than ``tolerance``, relatively; empty if none is.

    Sums in another order differ in their last bits, and training makes more of any difference, so only ``JUDGED`` steps from the
    first one on are compared.
    """
    first = min((step for step in {*ours, *theirs} if ours.get(step) != theirs.get(step)), default=0)
    for step in sorted(step for step in {*ours, *theirs} if first <= step < first + JUDGED):
        a, b = ours.get(step), theirs.get(step)
        if a is None or b is None or not abs(a - b) <= tolerance * abs(b):  # NaN too
            return f"loss: step {step}: {a} and {b}"
    return ""


def impossible(fault: Fault, workers: int, alone: str) -> str:
    """Why a fault cannot be injected into a job of so many workers; ``alone``: why there is no other host, or nothing."""
    if fault.name in ("host", "cut"):
        return alone
    if fault.name == "size" and workers == 1:
        return "the job has one worker (cluster.workers=1)"
    return ""


def choose(names: str) -> list[Fault]:
    """The faults of a list like "kill,stop", in their own order. KeyError for one that is not known."""
    wanted = {FAULTS[name.strip()].name for name in names.strip("[]").split(",") if name.strip()}
    return [fault for fault in FAULTS.values() if fault.name in wanted]


def to_dict(row: Row) -> dict[str, Any]:
    """A row for drill.json."""
    return {"holds": row.holds, **asdict(row)}


def markdown(rows: Sequence[Row], about: str) -> str:
    """The table for a pull request."""
    lines = [f"**Drill**: {about}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    said = [f"- {' '.join(row.remark.split())}" for row in rows if row.remark]
    return "\n".join([*lines, *(["", *said] if said else [])]) + "\n"
