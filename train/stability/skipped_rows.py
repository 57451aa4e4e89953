"""``skipped.jsonl``: the rows of training data that a run leaves out, why, and the documents in them. Lines are only added.

    {"step", "kind", "how", "back_to", "loss", "limit", "layers", "skipped": [{"epoch", "position", "rows"}], "documents": [...]}

The rule: a row that stands here weighs nothing, whenever and by however many ranks its step is made. Every other row keeps its step
and its place, so the global batch of a step is the same in any world and each other sample still comes exactly once. A step
that has no row left makes no update. A run that has these lines from its first step on ends with the very same weights.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from train.data.sampling.batch_plan import Cursor
from train.distributed import process_group
from train.errors import UserError
from train.util.io import append_line, read_records
from train.util.run_layout import RunDir

SkipRecord = dict[str, Any]
How = Literal["in place", "rolled back"]
Rows = dict[Cursor, frozenset[int]]


class SkippedRows:
    """A run's ledger, equal on every rank: rank 0 reads and writes it, the others are told."""

    def __init__(self, run_dir: RunDir) -> None:
        """A collective."""
        self.file = run_dir.skipped
        self.records: list[SkipRecord] = process_group.broadcast_object(read_records(self.file))

    def append(self, entry: SkipRecord) -> None:
        """Write down rank 0's ``entry``; it is on the disk when this returns. A collective."""
        entry = process_group.broadcast_object(entry)
        if error := process_group.run_on_rank0(lambda: append_line(self.file, json.dumps(entry, ensure_ascii=False))):
            raise UserError(f"{self.file} takes no more lines: {error}. Make room, then give the same command")
        self.records.append(entry)

    def count_in_a_row(self, how: How, step: int, within: int) -> int:
        """Lines of a kind that lead up to ``step``, none more than ``within`` steps from the next."""
        count = 0
        for entry in reversed(self.records):
            if abs(step - entry["step"]) > within:
                break
            count += entry["how"] == how
            step = entry["step"]
        return count

    @property
    def rows(self) -> Rows:
        """The rows left out, by where their step begins in the data."""
        return rows_of(self.records)


def rows_of(entries: list[SkipRecord]) -> Rows:
    """The rows that some lines leave out, by where their step begins in the data."""
    found: dict[Cursor, frozenset[int]] = {}
    for part in (part for entry in entries for part in entry["skipped"]):
        at = Cursor(part["epoch"], part["position"])
        found[at] = found.get(at, frozenset()) | frozenset(part["rows"])
    return found
