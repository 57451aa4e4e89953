"""Rows of training data that a run leaves out: ``skipped.jsonl``, a line for each bad step.

    {"step", "kind", "how", "back_to", "loss", "limit", "layers",
     "skipped": [{"epoch", "position", "rows"}], "documents": [...]}

A listed row is masked whenever its step is made, by any number of ranks. Every other row keeps its step and position,
so the global batch of a step does not depend on the world size and each other sample still comes exactly once. A step
without rows makes no update. A run that has these lines from its first step on ends with the very same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, StrictInt

from train.data.sampling.batch_plan import Cursor
from train.distributed import process_group
from train.errors import UserError
from train.util.io import append_line, read_records, to_json
from train.util.reading import reading
from train.util.run_layout import RunDir

SkipRecord = dict[str, Any]
How = Literal["in place", "rolled back"]
Rows = dict[Cursor, frozenset[int]]


class SkippedRows:
    """The records of ``skipped.jsonl``, equal on every rank: rank 0 reads and writes the file and broadcasts."""

    def __init__(self, run_dir: RunDir) -> None:
        """Read the file of ``run_dir``. A collective."""
        self.file = run_dir.skipped
        self.records: list[SkipRecord] = _read_on_rank0(self.file)

    def append(self, record: SkipRecord) -> None:
        """Append rank 0's ``record``; it is on the disk when this returns. A collective."""
        record = process_group.broadcast_object(record)
        if error := process_group.run_on_rank0(lambda: append_line(self.file, to_json(record))):
            raise UserError(f"{self.file} takes no more lines: {error}. Make room, then give the same command")
        self.records.append(record)

    def count_in_a_row(self, how: How, step: int, within: int) -> int:
        """Number of records of a kind that lead up to ``step``, each at most ``within`` steps from the next."""
        count = 0
        for record in reversed(self.records):
            if abs(step - record["step"]) > within:
                break
            count += record["how"] == how
            step = record["step"]
        return count

    @property
    def rows(self) -> Rows:
        """The rows left out, by the cursor of their step."""
        return rows_of(self.records)


class _PartForm(BaseModel):
    epoch: StrictInt
    position: StrictInt
    rows: list[StrictInt]


class _SkipForm(BaseModel):
    step: StrictInt
    how: str
    skipped: list[_PartForm]


def read_skipped(file: Path) -> list[SkipRecord]:
    """The records of a ``skipped.jsonl``. Raises UserError for one that is no record: the run would be another."""
    records = read_records(file)
    with reading(file, "Restore it: it lists the rows that the run leaves out"):
        for record in records:
            _SkipForm.model_validate(record)
    return records


def _read_on_rank0(file: Path) -> list[SkipRecord]:
    """The records that rank 0 reads, on every rank. A collective."""
    records: list[SkipRecord] = []
    if error := process_group.run_on_rank0(lambda: records.extend(read_skipped(file))):
        raise UserError(error)
    return list(process_group.broadcast_object(records))


def rows_of(records: list[SkipRecord]) -> Rows:
    """The rows that some records leave out, by the cursor of their step."""
    rows: dict[Cursor, frozenset[int]] = {}
    for record in records:
        for part in record["skipped"]:
            at = Cursor(part["epoch"], part["position"])
            rows[at] = rows.get(at, frozenset()) | frozenset(part["rows"])
    return rows
