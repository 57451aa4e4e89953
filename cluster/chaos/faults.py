"""The faults of a drill, what the job must print about each, and the verdict on what it did. Pure.

A row of the table holds where the job named the fault correctly, went on from it, and the run is then the undisturbed
one: the same samples in every step and the same loss, bit for bit at the same number of workers, within ``TOLERANCE``
where their number changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.run_dir.compare import Comparison

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference of a loss by precision, where another number of workers adds in another order."""
JUDGED_STEPS = 50
"""Steps from the first that differs in which losses are compared: later, training has amplified the rounding."""
COLUMNS = ("fault", "detected in s", "named right", "recovered in s", "steps redone", "data_hash equal", "loss equal")
Losses = Mapping[int, float]
"""Step -> loss of a run."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    ``says``: a regular expression of the output that names it, with fields such as {rank}, which are known once it was
    injected.
    """

    name: str
    title: str
    says: str
    resizes: bool = False
    """Whether the job goes on with another number of workers."""

    def pattern(self, where: Mapping[str, Any]) -> re.Pattern[str]:
        """The regular expression of what the job must print; ``where``: values of the fields of ``says``."""
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
"""In the order of injection: those after which losses are no longer equal bit for bit come last."""


@dataclass(frozen=True)
class Observation:
    """How a run dealt with one fault: seconds from its injection (None: never), and what the job printed."""

    detected_s: float | None
    recovered_s: float | None
    steps_redone: int
    words: str
    """The output that named the fault, or what was printed instead."""
    named: bool
    step: int
    """The step up to which the run is compared with the undisturbed one."""


@dataclass(frozen=True)
class Row:
    """The verdict on one fault, as a row of the table and of drill.json."""

    fault: str
    title: str
    impossible: str = ""
    """Why it could not be injected here; then nothing else is set."""
    seen: Observation | None = None
    data: str = ""
    """The first difference between the samples; empty: none."""
    loss: str = ""
    """The first difference between the losses; empty: none."""
    how: str = ""
    """How equal the losses had to be, in words."""
    failed: str = ""
    """Why the run did not go on after the fault, in words."""

    @property
    def holds(self) -> bool:
        """Whether the fault was named, the job went on, and the run is the undisturbed one."""
        seen = self.seen
        if self.failed or seen is None:
            return False
        return seen.named and seen.recovered_s is not None and not (self.data or self.loss)

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the row, in the order of ``COLUMNS``."""
        if self.seen is None:
            return (self.title, "", "not possible here" if self.impossible else "FAILED", *[""] * 4)
        seen = self.seen
        named, same = ("yes" if right else "NO" for right in (seen.named, not self.data))
        detected, recovered = ("never" if s is None else f"{s:.1f}" for s in (seen.detected_s, seen.recovered_s))
        return (self.title, detected, named, recovered, str(seen.steps_redone), same, "NO" if self.loss else self.how)

    @property
    def remark(self) -> str:
        """The reasons why the row does not hold or was not tried, in words; empty where it holds."""
        if self.impossible:
            return f"{self.title}: not possible here: {self.impossible}"
        if self.holds:
            return ""
        if self.failed or self.seen is None:
            return f"{self.title}: {self.failed}"
        problems = [] if self.seen.named else [f"not named right, but: {self.seen.words or 'nothing'}"]
        return f"{self.title}: " + "; ".join([*problems, *filter(None, (self.data, self.loss))])


def judge_fault(
    fault: Fault, seen: Observation, comparisons: Sequence[Comparison], precision: str, losses: tuple[Losses, Losses]
) -> Row:
    """The verdict on an observed fault.

    ``comparisons``: of the metrics of both runs up to ``seen.step``; ``losses``: of the disturbed run and the other.
    """
    by_name = {comparison.subject: comparison.difference for comparison in comparisons}
    data = by_name.pop("data_hash")
    if fault.resizes:
        tolerance = TOLERANCE[precision]
        loss, how = compare_losses(*losses, tolerance), f"within {tolerance:g}"
    else:
        loss, how = next((f"{what}: {d}" for what, d in by_name.items() if d), ""), "bit for bit"
    return Row(fault.name, fault.title, seen=seen, data=f"data_hash: {data}" if data else "", loss=loss, how=how)


def compare_losses(ours: Losses, theirs: Losses, tolerance: float) -> str:
    """The first step whose losses differ by more than ``tolerance``, relatively, in words; empty where there is none.

    Sums in another order differ in their last bits, and training amplifies any difference, so only ``JUDGED_STEPS``
    steps from the first different one on are compared.
    """
    first = min((step for step in {*ours, *theirs} if ours.get(step) != theirs.get(step)), default=0)
    for step in sorted(step for step in {*ours, *theirs} if first <= step < first + JUDGED_STEPS):
        a, b = ours.get(step), theirs.get(step)
        if a is None or b is None or not abs(a - b) <= tolerance * abs(b):  # NaN too
            return f"loss: step {step}: {a} and {b}"
    return ""


def why_impossible(fault: Fault, workers: int, no_other_host: str) -> str:
    """The reason why a fault cannot be injected into a job of so many workers; empty where it can.

    ``no_other_host``: why there is no other host; empty where there is one.
    """
    if fault.name in ("host", "cut"):
        return no_other_host
    if fault.name == "size" and workers == 1:
        return "the job has one worker (cluster.workers=1)"
    return ""


def parse_faults(names: str) -> list[Fault]:
    """The faults that a list like "kill,stop" names, in the order of ``FAULTS``. KeyError for an unknown name."""
    wanted = {FAULTS[name.strip()].name for name in names.strip("[]").split(",") if name.strip()}
    return [fault for fault in FAULTS.values() if fault.name in wanted]


def to_dict(row: Row) -> dict[str, Any]:
    """A row as plain values, for drill.json."""
    return {"holds": row.holds, **asdict(row)}


def markdown(rows: Sequence[Row], about: str) -> str:
    """The table and the remarks in Markdown, for a pull request."""
    lines = [f"**Drill**: {about}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    remarks = [f"- {' '.join(row.remark.split())}" for row in rows if row.remark]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"
