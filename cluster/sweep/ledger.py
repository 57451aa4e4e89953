"""``ledger.jsonl``: what became of each trial of a sweep, for the next start of the same command.

Lines are only added, and each is on the disk before anything follows from it:

    {"event": "sweep", "fixed": {key: value}, "axes": {key: values}, "sweep": {...}, "grid": [{key: value}] or null}
    {"event": "trial", "trial": 7, "params": {key: value}, "attrs": {...}}                 a search has decided on it
    {"event": "start", "trial": 7, "workers": 2, "hosts": [...], "t": ...}                its workers have their slots
    {"event": "end", "trial": 7, "state": "done", "step": 800, "values": [2.41], "why": "", "t": ...}

A trial that has started and not ended was cut off with its driver; its own checkpoints say from where it goes on. A
last line that a crash cut short is ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from train.config.sweep_dir import LEDGER
from train.config.sweep_space import Params, SweepSpace
from train.errors import UserError
from train.events import SweepBegunRecord, TrialAddedRecord, TrialEndedRecord, TrialStartedRecord
from train.util.io import append_line, read_records, to_json
from train.util.reading import reading
from train.util.redact import redact_tree

FREE = ("sweep.trials", "sweep.budget", "sweep.retries", "sweep.parallel", "sweep.dir")
MAY_CHANGE = ("cluster.", "tracking.", "log_every", "keep_", *FREE)
"""Prefixes of keys that may differ when the same sweep is started again."""


@dataclass
class TrialRecord:
    """One trial as the ledger knows it: its choices, its state and its results."""

    params: Params
    attrs: dict[str, Any] = field(default_factory=dict)
    """Attributes that the sampler stored with its suggestion and needs after a restart."""
    state: str = "queued"
    """By its last line: queued, cut off, stopped, failed, or one of FINAL."""
    step: int = 0
    values: list[float] | None = None
    why: str = ""


_TRIAL = TypeAdapter(TrialRecord)
"""Checks the types of a record's fields."""


class SweepLedger:
    """Reads and writes a sweep's ledger, for the one driver that runs the sweep."""

    def __init__(self, folder: Path, sweep: SweepSpace, grid: Sequence[Params] | None) -> None:
        """Reads the ledger in ``folder`` where there is one. UserError names the differences if it is another sweep's.

        ``grid``: the trials of a sweep that is not a search, of which a new ledger is made.
        """
        self.file = folder / LEDGER
        self.trials: dict[int, TrialRecord] = {}
        """By number, as they were when the ledger was opened."""
        records = read_records(self.file)
        head = SweepBegunRecord(identity(sweep), grid).to_json()
        self.head = None if records else head
        """The first line, while it is still to be written, before any other."""
        with reading(self.file, "Restore it, or begin anew with another sweep.name"):
            if records:
                _refuse_other(records[0], head, folder)
                grid = records[0]["grid"]  # a shuffled one comes in another order each time
            for number, params in enumerate(grid or []):
                self._apply(number, {"params": params})
            for record in records[1:]:
                if record["event"] in ("trial", "start", "end"):
                    self._apply(record["trial"], {"state": "cut off"} if record["event"] == "start" else record)

    def _apply(self, number: int, changes: dict[str, Any]) -> None:
        """Takes over what a record says about a trial. Raises an error of UNREADABLE for one that no ledger has."""
        known = asdict(self.trials[number]) if number in self.trials and "params" not in changes else {}
        fields = {key: changes[key] for key in TrialRecord.__dataclass_fields__ if key in changes}
        if type(number) is not int or number < 0:
            raise ValueError(f"there is no trial {str(number)[:20]}")
        self.trials[number] = _TRIAL.validate_python(known | fields)

    def _write(self, record: dict[str, Any]) -> None:
        head, self.head = self.head, None
        if head is not None:
            self._write(head)
        append_line(self.file, to_json({**record, "t": round(time.time(), 3)}))

    def record_trial(self, number: int, params: Params, attrs: dict[str, Any]) -> None:
        """Records that a search has decided on a trial."""
        self._write(TrialAddedRecord(number, params, attrs).to_json())

    def record_start(self, number: int, workers: int, hosts: Sequence[str]) -> None:
        """Records that a trial starts: its workers have their slots, on ``hosts``."""
        self._write(TrialStartedRecord(number, workers, list(hosts)).to_json())

    def record_end(self, number: int, facts: dict[str, Any]) -> None:
        """Records that all processes of a trial have ended; ``facts``: "state", "step", "values" and "why"."""
        self._write(TrialEndedRecord(number, **facts).to_json())


def identity(sweep: SweepSpace) -> dict[str, Any]:
    """The settings by which a sweep is recognised, as plain values without secrets: "fixed", "axes" and "sweep"."""
    fixed = dict(text.partition("=")[::2] for text in sweep.fixed)
    axes = {axis.key: axis.text for axis in sweep.axes}
    settings = sweep.settings.model_dump(mode="json")
    settings |= {"points": list(sweep.points)}  # the points themselves, not the file that lists them
    return dict(redact_tree({"fixed": fixed, "axes": axes, "sweep": settings}))


def _refuse_other(there: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raises UserError that names every difference between the sweep in ``folder`` and this one."""
    lines = []
    old, new = _flatten(there), _flatten(here)
    for key in sorted({*old, *new}):
        was, now = old.get(key, "nothing"), new.get(key, "nothing")
        if was != now and not key.startswith(MAY_CHANGE):
            lines.append(f"  - {key}: {was} there, {now} here")
    if lines:
        raise UserError(
            f"{folder} holds another sweep:\n"
            + "\n".join(lines)
            + "\nGive the old values to go on with it, or another sweep.name"
        )


def _flatten(head: dict[str, Any]) -> dict[str, Any]:
    """All settings of a ledger's first line by the keys of the command line."""
    return {**head["fixed"], **head["axes"], **{f"sweep.{key}": value for key, value in head["sweep"].items()}}
