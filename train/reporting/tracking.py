"""Tracking of a run: a local append-only file first, then W&B, which may be absent, offline or down.

``metrics.jsonl`` is the source of truth. W&B is fed by a thread of its own, so that it can neither delay nor stop a
step. Its run id is kept in the run's folder, so a restarted job continues the same W&B run; an offline run is written
anew from ``metrics.jsonl``, so that it has each step once, whatever was killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import netrc
import os
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from train.config.schema import Config, TrackingConfig
from train.reporting.goodput import TimeByCause
from train.util.io import null_nonfinite, read_records, steps_of, to_json, write_whole
from train.util.reading import UNREADABLE
from train.util.redact import redact_tree
from train.util.run_layout import RunDir

FINISH_TIMEOUT_S = 60.0
SAVE_EVERY_S = 5.0
Record = dict[str, Any]


class MetricsFile:
    """Writer of ``metrics.jsonl``: one line for each logged step, each step once."""

    def __init__(self, file: Path, last_step: int) -> None:
        """Drop the lines after ``last_step``, from which the run resumes: these steps are made again."""
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.earlier = [r for step, r in steps_of(read_records(file)).items() if step <= last_step]
        write_whole(file, "".join(_line(r) for r in self.earlier).encode())
        self.out = file.open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Append a line; it survives a kill of the process when this returns."""
        self.out.write(_line(record))
        self.out.flush()

    def sync(self) -> None:
        """fsync: before a checkpoint, so that a resume finds every line up to it."""
        os.fsync(self.out.fileno())


class _RunFileForm(BaseModel):
    model_config = ConfigDict(extra="allow")
    wandb_id: str = ""
    starts: int = 0
    seen: float | None = None
    seconds: dict[str, float] = {}


class RunFile:
    """``run.json``: state kept over the starts of a run, the W&B id and the seconds by cause until it was last
    ``seen``.
    """

    def __init__(self, folder: Path, times: TimeByCause) -> None:
        """``times`` is this start's; the seconds of earlier starts are added to it."""
        self.file, self.times = RunDir(folder).starts, times
        self.values: dict[str, Any] = {"wandb_id": secrets.token_hex(4), "starts": 0, "seen": None, "seconds": {}}
        with contextlib.suppress(*UNREADABLE):
            self.values |= _RunFileForm.model_validate_json(self.file.read_bytes()).model_dump(exclude_unset=True)
        self.values["starts"] += 1
        command = os.environ.get("TRIREME_T0")
        times.add_earlier_starts(self.values["seconds"], self.values["seen"], float(command) if command else None)
        self.saved = 0.0
        self.save()

    def save_if_due(self) -> None:
        """Write the file every SAVE_EVERY_S: a kill loses little, and steps seldom wait for the disk."""
        if time.monotonic() - self.saved > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file now, atomically."""
        self.saved = time.monotonic()
        self.values |= {"seen": self.times.last, "seconds": self.times.spent}
        write_whole(self.file, to_json(self.values).encode())


class WandbRun:
    """One W&B run, fed by a thread from a queue; every call returns at once."""

    def __init__(self, config: Config, run_id: str, history: Sequence[Record], note: Callable[[str], None]) -> None:
        """``history`` has the records of metrics.jsonl so far, from which an offline run is written anew."""
        self.config, self.run_id, self.history, self.note = config, run_id, history, note
        self.run_dir = RunDir(Path(config.run.dir or ""))
        self.mode = _mode(config.tracking)
        self.queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self.thread.start()

    def log(self, record: Record) -> None:
        """Queue the metrics of one step."""
        self.queue.put(("log", record))

    def samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        """Queue the (prompt, text) pairs of a step, for the table of samples."""
        self.queue.put(("samples", [(step, *row) for row in rows]))

    def finish(self, summary: Record) -> None:
        """Queue the summary and wait, at most FINISH_TIMEOUT_S, until all is sent."""
        self.queue.put(("summary", summary))
        self.queue.put(None)
        self.thread.join(FINISH_TIMEOUT_S)
        if self.thread.is_alive():
            self.note(
                f"W&B did not answer within {FINISH_TIMEOUT_S:.0f} s and was left behind; metrics.jsonl has it all"
            )

    def _run(self) -> None:
        try:
            self._feed()
        except Exception as error:  # W&B must never stop a run, whatever it raises
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            self.note(
                "W&B failed and was left behind; metrics.jsonl has it all, "
                f"and tracking.wandb=offline keeps a copy to sync ({why})"
            )

    def _lineage(self) -> dict[str, Any]:
        """The content of ``environment.json``: versions, commit and machine."""
        with contextlib.suppress(*UNREADABLE):
            return dict(json.loads(self.run_dir.environment.read_bytes()))
        return {}

    def _feed(self) -> None:
        _keep_out_of_home()
        import wandb  # not at the top: its import takes a second, which the first step need not wait for

        if self.mode == "offline":
            for stale in self.run_dir.wandb.glob(f"offline-run-*-{self.run_id}"):
                shutil.rmtree(stale)
        tracking = self.config.tracking
        run = wandb.init(
            mode=self.mode,
            id=self.run_id,
            resume="allow" if self.mode == "online" else None,
            dir=str(self.run_dir.path),
            name=self.config.run.name,
            project=tracking.project or os.environ.get("WANDB_PROJECT") or "trireme",
            entity=tracking.entity,
            group=tracking.group,
            tags=tracking.tags or None,  # None leaves WANDB_TAGS, as with group and entity
            job_type="train",
            config=redact_tree(self.config.model_dump(by_alias=True, mode="json")) | {"lineage": self._lineage()},
            settings=wandb.Settings(silent=True, console="off", init_timeout=30, save_code=False, disable_git=True),
        )
        rows: list[tuple[int, str, str]] = []
        if self.mode == "offline":
            for record in self.history:
                run.log(_without_step(record), step=record["step"])
        while (item := self.queue.get()) is not None:
            what, value = item
            if what == "log":
                run.log(_without_step(value), step=value["step"])
            elif what == "samples":
                rows += value
                run.log({"samples": wandb.Table(["step", "prompt", "text"], [list(r) for r in rows])}, step=rows[-1][0])
            elif what == "summary":
                run.summary.update(value)
        run.finish()


class Tracker:
    """Rank 0's tracking of a run: metrics, samples and summary, to files and to W&B."""

    def __init__(self, config: Config, last_step: int, times: TimeByCause, note: Callable[[str], None]) -> None:
        self.config, self.note = config, note
        self.run_dir = RunDir(Path(config.run.dir or ""))
        self.run = RunFile(self.run_dir.path, times)
        self._open(last_step)

    def _open(self, last_step: int) -> None:
        self.metrics = MetricsFile(self.run_dir.metrics, last_step)
        off = self.config.tracking.wandb == "off"
        self.wandb = (
            None if off else WandbRun(self.config, self.run.values["wandb_id"], self.metrics.earlier, self.note)
        )

    def drop_after(self, step: int) -> None:
        """Drop what was logged of the steps after ``step``, which are made again."""
        if max(steps_of(read_records(self.metrics.file)), default=0) <= step:
            return
        self.close({})
        self._open(step)

    def sync(self) -> None:
        """Force all that was logged so far, and the seconds spent, to the disk."""
        self.metrics.sync()
        self.run.save()

    def log(self, record: Record) -> None:
        """Log a step's record, to the file, then to W&B; numbers that are not finite become null."""
        record = null_nonfinite(record)
        self.metrics.append(record)
        self.run.save_if_due()
        if self.wandb:
            self.wandb.log(record)

    def samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        """Log (prompt, text) pairs, to ``samples.jsonl``, then to W&B."""
        with self.run_dir.samples.open("a", encoding="utf-8") as out:
            out.writelines(_line({"step": step, "prompt": prompt, "text": text}) for prompt, text in rows)
        if self.wandb:
            self.wandb.samples(step, rows)

    def finish(self, summary: Record) -> None:
        """Write ``summary.json`` of a complete run, and close W&B."""
        summary = null_nonfinite(summary)
        write_whole(self.run_dir.summary, (to_json(summary, indent=1) + "\n").encode())
        self.close(summary)

    def close(self, summary: Record) -> None:
        """Close W&B; a later start may continue the run."""
        self.sync()
        if self.wandb:
            self.wandb.finish(summary)


@functools.cache
def _keep_out_of_home() -> tempfile.TemporaryDirectory[str]:
    """Have W&B keep its staged files and debug logs in a folder that ends with this process, not in the home folder."""
    folder = tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, folder.name)
    return folder


def _mode(tracking: TrackingConfig) -> Literal["online", "offline"]:
    """The mode of W&B; "auto" never prompts: online where this host has a key of W&B's server, offline elsewhere."""
    if tracking.wandb in ("online", "offline"):
        return tracking.wandb
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
        if netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(server):
            return "online"
    return "offline"


def _line(record: Record) -> str:
    return to_json(record) + "\n"


def _without_step(record: Record) -> Record:
    return {k: v for k, v in record.items() if k != "step"}
