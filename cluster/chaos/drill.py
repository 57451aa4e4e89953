"""The verb ``drill``: real faults, one after another, on the user's own cluster and configuration."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.chaos import faults as drill
from cluster.chaos.fault_injector import FaultInjector
from cluster.chaos.faults import COLUMNS, FAULTS, Fault, Row
from cluster.chaos.inject import DisturbedRun
from cluster.chaos.train_process import BESIDE, TrainProcess, with_settings
from cluster.host import run_lock
from train.config import load as configuration
from train.config.schema import Config
from train.errors import ExitCode, UserError
from train.run_dir.compare import compare_lines
from train.util.format import duration, plural
from train.util.io import read_records
from train.util.run_layout import RunDir

EVERY = 5
"""Steps between checkpoints."""
OURS = [f"save_every={EVERY}", "keep_last=3", "cluster.min_workers=1", "cluster.max_failures=10", *BESIDE]
SOON = ["cluster.hang_timeout=10", "cluster.grow_after=1", "cluster.stay_away=1"]
"""Waiting times, shortened where the user has not set them."""
SECONDS = 1.0
"""Of training that a fault takes at least: while it is on its way, a small model makes many steps."""
WIDTH = 120
"""Of the table where it is not on a terminal."""
HELP = """usage: ./launch.sh drill [faults=kill,stop,...] [group=choice ...] [key=value ...]

Trains this configuration twice, for some hundred steps: once undisturbed, and once with real faults injected one after another.
Each must be named as what it is, the job must go on from it, and the run must then be the undisturbed one: the same samples in
every step, the same loss. Exit code 0 only if all that holds, 1 if not, 2 for bad input.

It has its own folder beside the run's, <run.dir>-drill, where drill.json and drill.md (for a pull request) are left; the run
itself and its corpus are not touched. Faults on hosts need a lasting cluster of two or more (cluster.address). None needs root.

The faults, in their order (./launch.sh drill --list):
"""


def run(words: Sequence[str]) -> int:
    """drill [faults=...] [group=choice] [key=value]: the exit code."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = WIDTH
    listed = "\n".join(f"  {fault.name:11}{fault.title}" for fault in FAULTS.values())
    if {"-h", "--help", "--list"} & set(words):
        out.print(listed if "--list" in words else HELP + listed, markup=False, soft_wrap=True)
        return ExitCode.OK
    try:
        chosen = [word.partition("=")[2] for word in words if word.startswith("faults=")]
        try:
            faults = drill.choose(",".join(chosen)) if chosen else list(FAULTS.values())
        except KeyError as unknown:
            raise UserError(f"there is no fault {unknown}: {', '.join(FAULTS)}") from None
        return _drill(out, faults, [word for word in words if not word.startswith("faults=")])
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"drill: {error}", markup=False)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        out.print("The drill was stopped, and its runs with it.")
        return ExitCode.INTERRUPTED


def _drill(out: Console, faults: Sequence[Fault], overrides: Sequence[str]) -> int:
    users = configuration.load(overrides)
    given = {word.partition("=")[0] for word in overrides}
    settings = with_settings(overrides, [*OURS, *(word for word in SOON if word.partition("=")[0] not in given)])
    config = configuration.load(settings)
    if config.steps < 20 * EVERY:
        raise UserError(f"steps={config.steps} is too short for a drill: it makes {20 * EVERY} at least")
    folder = Path(f"{Path(users.run.dir or '.').absolute()}-drill")
    with run_lock.lock_run_dir(folder):
        for old in [folder / "corpus", *folder.glob("*disturbed*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        show = Drill(out, folder, settings, config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # here, since Ray sets its own
        try:
            return show.run(faults)
        finally:
            show.stage.drop()
            show.undisturbed.kill()


class Drill:
    """One drill, its table growing as it goes."""

    def __init__(self, out: Console, folder: Path, settings: Sequence[str], config: Config) -> None:
        self.out, self.folder, self.config = out, folder, config
        self.undisturbed = TrainProcess(folder / "undisturbed", with_settings(settings, ["cluster.min_workers=null"]))
        self.stage = DisturbedRun(folder, settings, config, FaultInjector(config.cluster.address))
        self.rows: list[Row] = []

    def run(self, faults: Sequence[Fault]) -> int:
        """Injects them all; the exit code."""
        began, config = time.monotonic(), self.config
        workers = plural(config.cluster.workers, "worker")
        about = f"{config.run.name}, {workers}, ZeRO stage {config.zero.stage}, {config.precision.name}"
        self.out.print(f"Drill of {about}, in {self.folder}", soft_wrap=True)
        with Live(console=self.out, refresh_per_second=4, transient=True) as live:
            self._now("the undisturbed run", live)
            self._make_undisturbed(EVERY * (2 * len(faults) + 2), SECONDS * (len(faults) + 3))
            alone = self._alone()
            for fault in faults:
                self._now(fault.title, live)
                why = drill.impossible(fault, config.cluster.workers, alone)
                self.rows.append(Row(fault.name, fault.title, impossible=why) if why else self._try(fault))
        self.stage.pause()
        self.stage.hands.wait_for_hosts()
        self.out.print(self._table())
        for row in self.rows:
            if row.remark:
                self.out.print(row.remark, style="dim" if row.impossible else "red", markup=False, soft_wrap=True)
        tried = [row for row in self.rows if not row.impossible]
        holds = bool(tried) and all(row.holds for row in tried)
        self._write(about, holds)
        if holds:
            for left in [self.folder / "corpus", *self.folder.glob("*disturbed*/checkpoints")]:
                shutil.rmtree(left, ignore_errors=True)
        bad = sum(not row.holds for row in tried)
        words = f"{bad} of {len(tried)} do not hold" if bad else f"All hold: {plural(len(tried), 'fault')}"
        words = words if tried else "Nothing could be tried here"
        self.out.print(
            f"{words}, in {duration(time.monotonic() - began)}. {self.folder}/drill.json, drill.md", soft_wrap=True
        )
        return ExitCode.OK if holds else ExitCode.FAILURE

    def _try(self, fault: Fault) -> Row:
        try:
            seen = self.stage.inject(fault)
            if self.undisturbed.furthest < seen.step:
                self.stage.pause()  # for its workers' places
                self._make_undisturbed(2 * seen.step)
            assert self.stage.run is not None
            ours, theirs = self.stage.run.folder, self.undisturbed.folder
            ours_by_step, theirs_by_step = (_losses(folder, seen.step) for folder in (ours, theirs))
            findings = compare_lines(ours, theirs, seen.step)
            row = drill.judge(fault, seen, findings, self.config.precision.name, (ours_by_step, theirs_by_step))
        except UserError as error:
            row = Row(fault.name, fault.title, failed=str(error))
        if not row.holds:
            self.stage.drop()  # what follows is judged by a run of its own
        return row

    def _make_undisturbed(self, step: int, seconds: float = 0.0) -> None:
        """Runs the configuration from its beginning to a step, and for so many seconds of training, or to its end."""
        made, last = self.undisturbed, self.config.steps
        shutil.rmtree(made.folder, ignore_errors=True)
        made.furthest = 0
        self.stage.hands.wait_for_hosts()
        made.start()
        made.until(lambda: made.step, "the first step")
        enough = time.monotonic() + seconds
        made.until(lambda: made.step >= last or (made.step >= step and time.monotonic() > enough), f"step {step}")
        made.end(signal.SIGTERM)
        made.furthest = made.step

    def _alone(self) -> str:
        """Why no fault can be injected into another host; empty where one can."""
        if self.config.cluster.address is None:
            return (
                "needs a lasting cluster of two hosts or more: ./launch.sh cluster up, join, then cluster.address=auto"
            )
        nodes = {place.node for place in self.undisturbed.places} - {self.stage.hands.here}
        return "" if nodes - {self.undisturbed.places[0].node} else "the job's workers are on one host"

    def _now(self, what: str, live: Live) -> None:
        if self.out.is_terminal:
            live.update(self._table(f"now: {what}"))
        else:
            self.out.print(f"  now: {what}")

    def _table(self, now: str | None = None) -> Table:
        table = Table(caption=now, caption_justify="left")
        for column in COLUMNS:
            table.add_column(
                column, justify="right" if " in s" in column or "steps" in column else "left", no_wrap=column == "fault"
            )
        for row in self.rows:
            table.add_row(*row.cells, style="dim" if row.impossible else None if row.holds else "red")
        return table

    def _write(self, about: str, holds: bool) -> None:
        content = {"about": about, "holds": holds, "faults": [drill.to_dict(row) for row in self.rows]}
        (self.folder / "drill.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / "drill.md").write_text(drill.markdown(self.rows, about))


def _losses(folder: Path, step: int) -> drill.Losses:
    return {record["step"]: record["loss"] for record in read_records(RunDir(folder).metrics) if record["step"] <= step}
