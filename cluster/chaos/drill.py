"""The verb ``drill``: injects real faults on the user's own cluster and configuration."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live
from rich.table import Table

from cluster.chaos.fault_injector import FaultInjector
from cluster.chaos.faults import (
    COLUMNS,
    FAULTS,
    Fault,
    Losses,
    Row,
    judge_fault,
    markdown,
    parse_faults,
    to_dict,
    why_impossible,
)
from cluster.chaos.inject import DisturbedRun
from cluster.chaos.train_process import COMPARABLE_SETTINGS, TrainProcess, with_settings
from cluster.host import run_lock
from train.config import load as configuration
from train.config.schema import Config
from train.errors import ExitCode, UserError, guard_verb
from train.reporting.terminal import UserConsole
from train.run_dir.compare import compare_lines
from train.util.format import duration, plural
from train.util.io import read_records
from train.util.run_layout import RunDir

SAVE_EVERY = 5
"""Steps between checkpoints."""
SETTINGS = [
    f"save_every={SAVE_EVERY}",
    "keep_last=3",
    "cluster.min_workers=1",
    "cluster.max_failures=10",
    *COMPARABLE_SETTINGS,
]
SHORT_WAITS = ["cluster.hang_timeout=10", "cluster.grow_after=1", "cluster.stay_away=1"]
"""Waiting times, shortened where the user has not set them."""
FAULT_S = 1.0
"""Seconds of training that a fault takes at least: while it is on its way, a small model makes many steps."""
WIDTH = 120
"""Characters of the table's lines where it is not on a terminal."""
HELP = """usage: ./launch.sh drill [faults=kill,stop,...] [group=choice ...] [key=value ...]

Trains this configuration twice, for some hundred steps: once undisturbed, and once with real \
faults injected one after another.
Each must be named as what it is, the job must go on from it, and the run must then be the \
undisturbed one: the same samples in
every step, the same loss. Exit code 0 only if all that holds, 1 if not, 2 for bad input.

It has its own folder beside the run's, <run.dir>-drill, where drill.json and drill.md (for a pull \
request) are left; the run
itself and its corpus are not touched. Faults on hosts need a lasting cluster of two or more \
(cluster.address). None needs root.

The faults, in their order (./launch.sh drill --list):
"""


def run(words: Sequence[str]) -> int:
    """drill [faults=...] [group=choice] [key=value]: runs the drill and returns the exit code."""
    out = UserConsole(soft_wrap=False)
    if not out.is_terminal:
        out.width = WIDTH
    listed = "\n".join(f"  {fault.name:11}{fault.title}" for fault in FAULTS.values())
    if {"-h", "--help", "--list"} & set(words):
        out.print(listed if "--list" in words else HELP + listed, soft_wrap=True)
        return ExitCode.OK
    try:
        chosen = [word.partition("=")[2] for word in words if word.startswith("faults=")]
        try:
            faults = parse_faults(",".join(chosen)) if chosen else list(FAULTS.values())
        except KeyError as unknown:
            raise UserError(f"there is no fault {unknown}: {', '.join(FAULTS)}") from None
        with guard_verb(words):
            return _drill(out, faults, [word for word in words if not word.startswith("faults=")])
    except UserError as error:
        UserConsole(stderr=True).print(f"drill: {error}")
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        out.print("The drill was stopped, and its runs with it.")
        return ExitCode.INTERRUPTED


def _drill(out: UserConsole, faults: Sequence[Fault], overrides: Sequence[str]) -> int:
    users = configuration.load(overrides)
    given = {word.partition("=")[0] for word in overrides}
    waits = [setting for setting in SHORT_WAITS if setting.partition("=")[0] not in given]
    settings = with_settings(overrides, [*SETTINGS, *waits])
    config = configuration.load(settings)
    if config.steps < 20 * SAVE_EVERY:
        raise UserError(f"steps={config.steps} is too short for a drill, which needs {20 * SAVE_EVERY} at least")
    folder = Path(f"{Path(users.run.dir or '.').absolute()}-drill")
    with run_lock.lock_run_dir(folder):
        for old in [folder / "corpus", *folder.glob("*disturbed*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        drill = Drill(out, folder, settings, config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # here, since Ray sets its own
        try:
            return drill.run(faults)
        finally:
            drill.disturbed.kill()
            drill.undisturbed.kill()


class Drill:
    """One drill: the undisturbed run, the disturbed one, and the table of verdicts."""

    def __init__(self, out: UserConsole, folder: Path, settings: Sequence[str], config: Config) -> None:
        self.out, self.folder, self.config = out, folder, config
        self.undisturbed = TrainProcess(folder / "undisturbed", with_settings(settings, ["cluster.min_workers=null"]))
        self.disturbed = DisturbedRun(folder, settings, config, FaultInjector(config.cluster.address))
        self.rows: list[Row] = []

    def run(self, faults: Sequence[Fault]) -> int:
        """Injects the faults one after another, writes the verdicts and returns the exit code."""
        began, config = time.monotonic(), self.config
        about = f"{config.run.name}, ZeRO stage {config.zero.stage}, {config.precision.name}"
        self.out.print(f"Drill of {about}, in {self.folder}", soft_wrap=True)
        with Live(console=self.out, refresh_per_second=4, transient=True) as live:
            self._show_progress("the undisturbed run", live)
            self._run_undisturbed(SAVE_EVERY * (2 * len(faults) + 2), FAULT_S * (len(faults) + 3))
            workers, no_other_host = self.undisturbed.workers, self._why_no_other_host()
            about = f"{about}, {plural(workers, 'worker')}"
            for fault in faults:
                self._show_progress(fault.title, live)
                why = why_impossible(fault, workers, no_other_host)
                self.rows.append(Row(fault.name, fault.title, impossible=why) if why else self._try_fault(fault))
        self.disturbed.stop()
        self.disturbed.injector.wait_for_hosts()
        self.out.print(self._table())
        for row in self.rows:
            if row.remark:
                self.out.print(row.remark, style="dim" if row.impossible else "red", soft_wrap=True)
        tried = [row for row in self.rows if not row.impossible]
        holds = bool(tried) and all(row.holds for row in tried)
        self._write(about, holds)
        if holds:
            for large in [self.folder / "corpus", *self.folder.glob("*disturbed*/checkpoints")]:
                shutil.rmtree(large, ignore_errors=True)
        bad = sum(not row.holds for row in tried)
        words = f"{bad} of {len(tried)} do not hold" if bad else f"All hold: {plural(len(tried), 'fault')}"
        words = words if tried else "Nothing could be tried here"
        self.out.print(
            f"{words}, in {duration(time.monotonic() - began)}. {self.folder}/drill.json, drill.md", soft_wrap=True
        )
        return ExitCode.OK if holds else ExitCode.FAILURE

    def _try_fault(self, fault: Fault) -> Row:
        """Injects a fault and judges what is observed; the undisturbed run is extended where it is too short."""
        try:
            seen = self.disturbed.inject(fault)
            if self.undisturbed.furthest_step < seen.step:
                self.disturbed.stop()  # the undisturbed run needs its workers' slots
                self._run_undisturbed(2 * seen.step)
            assert self.disturbed.run is not None
            ours, theirs = self.disturbed.run.folder, self.undisturbed.folder
            losses = _losses(ours, seen.step), _losses(theirs, seen.step)
            comparisons = compare_lines(ours, theirs, seen.step)
            precision = configuration.read(RunDir(ours).config).precision.name  # as it was chosen
            row = judge_fault(fault, seen, comparisons, precision, losses)
        except UserError as error:
            row = Row(fault.name, fault.title, failed=str(error))
        if not row.holds:
            self.disturbed.kill()  # the next fault is judged by a new run
        return row

    def _run_undisturbed(self, step: int, seconds: float = 0.0) -> None:
        """Trains without faults from the beginning to ``step``, and for so many seconds, or to the last step."""
        run, last = self.undisturbed, self.config.steps
        shutil.rmtree(run.folder, ignore_errors=True)
        run.furthest_step = 0
        self.disturbed.injector.wait_for_hosts()
        run.start()
        run.wait_until(lambda: run.step, "the first step")
        enough = time.monotonic() + seconds
        run.wait_until(lambda: run.step >= last or (run.step >= step and time.monotonic() > enough), f"step {step}")
        run.stop(signal.SIGTERM)
        run.furthest_step = run.step

    def _why_no_other_host(self) -> str:
        """The reason why no fault can be injected into another host; empty where one can."""
        if self.config.cluster.address is None:
            return (
                "needs a lasting cluster of two hosts or more: ./launch.sh cluster up, join, then cluster.address=auto"
            )
        locations = self.undisturbed.locations
        others = {location.node for location in locations} - {self.disturbed.injector.local_node, locations[0].node}
        return "" if others else "the job's workers are on one host"

    def _show_progress(self, what: str, live: Live) -> None:
        if self.out.is_live:
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
        content = {"about": about, "holds": holds, "faults": [to_dict(row) for row in self.rows]}
        (self.folder / "drill.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.folder / "drill.md").write_text(markdown(self.rows, about), encoding="utf-8")


def _losses(folder: Path, step: int) -> Losses:
    return {record["step"]: record["loss"] for record in read_records(RunDir(folder).metrics) if record["step"] <= step}
