"""``ledger.jsonl``: what became of a sweep so far. Lines are only added, each is on the disk before anything follows from it.

    {"event": "sweep", "fixed": {key: value}, "axes": {key: values}, "sweep": {...}, "grid": [{key: value}, ...] or null}
    {"event": "trial", "trial": 7, "params": {key: value}, "attrs": {...}}                 a search has decided on it
    {"event": "start", "trial": 7, "workers": 2, "hosts": [...], "t": ...}                its places are taken
    {"event": "end", "trial": 7, "state": "done", "step": 800, "values": [2.41], "why": "", "t": ...}

A trial that has started and not ended was cut off with its driver; its own checkpoints say from where it goes on. A last line that
a crash cut short counts for nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config.sweep_dir import LEDGER
from train.config.sweep_space import Params, SweepSpace
from train.errors import UserError
from train.events import SweepBegunRecord, TrialAddedRecord, TrialEndedRecord, TrialStartedRecord
from train.util.io import append_line, read_records
from train.util.redact import redact_tree

FREE = ("sweep.trials", "sweep.budget", "sweep.retries", "sweep.parallel", "sweep.dir")
MAY_CHANGE = ("cluster.", "tracking.", "log_every", "keep_", *FREE)
"""What another start of the same sweep may have otherwise."""


@dataclass
class TrialRecord:
    """What the ledger knows of a trial."""

    params: Params
    attrs: dict[str, Any] = field(default_factory=dict)
    """What the sampler wants to know of it again."""
    state: str = "queued"
    """Of the last line: queued, cut off, stopped, failed, or one of FINAL."""
    step: int = 0
    values: list[float] | None = None
    why: str = ""


class SweepLedger:
    """A sweep's ledger, in the hands of the one driver that runs it."""

    def __init__(self, folder: Path, sweep: SweepSpace, grid: Sequence[Params] | None) -> None:
        """Reads it, where it is begun; UserError, in words, where it is another sweep's."""
        self.file = folder / LEDGER
        self.trials: dict[int, TrialRecord] = {}
        """As it was when it was opened."""
        records = read_records(self.file)
        head = SweepBegunRecord(identity(sweep), grid).to_json()
        self.head = None if records else head
        """Still to be written, before the first other line."""
        if records:
            _refuse_other(records[0], head, folder)
            grid = records[0]["grid"]  # a shuffled one comes in another order each time
        for number, params in enumerate(grid or []):
            self.trials[number] = TrialRecord(params)
        for record in records[1:]:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if record["event"] == "trial":
            self.trials[record["trial"]] = TrialRecord(record["params"], record["attrs"])
        elif record["event"] == "start":
            self.trials[record["trial"]].state = "cut off"
        elif record["event"] == "end":
            entry = self.trials[record["trial"]]
            entry.state, entry.step, entry.values, entry.why = (
                record[key] for key in ("state", "step", "values", "why")
            )

    def _write(self, record: dict[str, Any]) -> None:
        head, self.head = self.head, None
        if head is not None:
            self._write(head)
        append_line(self.file, json.dumps({**record, "t": round(time.time(), 3)}, ensure_ascii=False))

    def add(self, number: int, params: Params, attrs: dict[str, Any]) -> None:
        """A search has decided on a trial."""
        self._write(TrialAddedRecord(number, params, attrs).to_json())

    def start(self, number: int, workers: int, hosts: Sequence[str]) -> None:
        """A trial's places are taken."""
        self._write(TrialStartedRecord(number, workers, list(hosts)).to_json())

    def end(self, number: int, facts: dict[str, Any]) -> None:
        """A trial has ended, all its processes are gone; ``facts``: its state, step, values, and why."""
        self._write(TrialEndedRecord(number, **facts).to_json())


def identity(sweep: SweepSpace) -> dict[str, Any]:
    """What makes a sweep what it is, as plain values without secrets."""
    fixed = dict(text.partition("=")[::2] for text in sweep.fixed)
    axes = {axis.key: axis.text for axis in sweep.axes}
    settings = sweep.settings.model_dump(mode="json") | {"points": list(sweep.points)}  # not where they are listed
    return dict(redact_tree({"fixed": fixed, "axes": axes, "sweep": settings}))


def _refuse_other(there: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raises UserError that names every difference between the sweep in ``folder`` and this one."""
    lines = []
    both = [{**s["fixed"], **s["axes"], **{f"sweep.{k}": v for k, v in s["sweep"].items()}} for s in (there, here)]
    for key in sorted({*both[0], *both[1]}):
        was, now = (values.get(key, "nothing") for values in both)
        if was != now and not key.startswith(MAY_CHANGE):
            lines.append(f"  - {key}: {was} there, {now} here")
    if lines:
        raise UserError(
            f"{folder} holds another sweep:\n"
            + "\n".join(lines)
            + "\nGive the old values to go on with it, or another sweep.name"
        )
