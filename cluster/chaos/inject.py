"""Injects each fault of a drill into a run that goes on by itself, and observes its recovery.

One run lives through all of them, one after another. Where a fault ends it, as it should, the same command is given
again.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.chaos.fault_injector import FaultInjector
from cluster.chaos.faults import Fault, Observation
from cluster.chaos.train_process import RankLocation, TrainProcess
from cluster.supervision.timeouts import HOST_CUT_S
from train.checkpoint import manifest
from train.config.load import Config
from train.data.corpus.shards import read_index
from train.errors import ExitCode, UserError
from train.util.run_layout import RunDir, checkpoint_steps, shard_name

FULL_S = 90.0
"""How long a run that has lost workers is waited for to have all again, before the next fault."""
SAVE_CHECK_S = 0.001
"""Between checks for a save under way."""
FAULT_SAVES = 10
"""Checkpoints that a run may make while it deals with one fault."""
STARTED = "seconds to the first step"
RESUMED = re.compile(r"resumes +at step ([\d,]+)")


@dataclass(frozen=True)
class Injection:
    """The moment of an injection (monotonic seconds), and how much the run had printed and restarted by then."""

    moment: float
    offset: int
    """Bytes of its output."""
    restarts: int


@dataclass(frozen=True)
class FaultReport:
    """The output of the job about a fault, and whether it names the fault correctly."""

    text: str
    right: bool
    seconds: float | None
    """Since the injection."""
    furthest_step: int
    """The last step made by then."""


class DisturbedRun:
    """The run that is disturbed, in a folder of its own below ``folder``; after a killed one comes another."""

    def __init__(self, folder: Path, settings: Sequence[str], config: Config, injector: FaultInjector) -> None:
        self.folder, self.settings, self.config, self.injector = folder, settings, config, injector
        self.run: TrainProcess | None = None
        self.number = 0

    def inject(self, fault: Fault) -> Observation:
        """Injects a fault and follows the run past the step where it was. UserError if the run does not go on."""
        return getattr(self, f"_{fault.name}")(fault)

    def stop(self) -> None:
        """Has the run save and end, so that it can go on later: its slots are needed, or the drill is over."""
        if self.run is not None:
            self.run.stop(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the run; the next fault gets a new one."""
        if self.run is not None:
            self.run.kill()
            self.run = None

    # ----------------------------------------------------------------------------------------------------------- steps

    def _ready_run(self) -> TrainProcess:
        """A run that trains with all its workers and has two checkpoints to resume from."""
        if self.run is not None and self.run.furthest_step + FAULT_SAVES * self.config.save_every > self.config.steps:
            self.kill()  # it would come to its last step
        if self.run is None:
            self.number += 1
            self.run = TrainProcess(self.folder / f"disturbed_{self.number}", self.settings)
        run, every = self.run, self.config.save_every
        self.injector.wait_for_hosts()
        if run.ended:
            self._start(run)
        run.wait_until(lambda: len(checkpoint_steps(RunDir(run.folder).checkpoints)) > 1, "its second checkpoint")
        saved, workers, give_up = run.saved_step, run.workers, time.monotonic() + FULL_S
        run.wait_until(lambda: run.step >= saved + every // 2, "the next steps")
        run.wait_until(
            lambda: run.world_size == workers or (run.world_size and time.monotonic() > give_up),
            "it had all its workers",
        )
        return run

    def _start(self, run: TrainProcess, *more: str) -> None:
        """Gives the command, and waits until it trains."""
        offset = run.log.stat().st_size if run.log.exists() else 0
        run.start(*more)
        run.wait_until(lambda: STARTED in run.read_output(offset), "the first step")

    def _inject(self, act: Callable[..., float | None], *arguments: Any) -> Injection:
        """Does ``act``, which returns the moment of the injection; without one, it is the moment before."""
        assert self.run is not None
        offset, restarts, now = self.run.log.stat().st_size, len(self.run.restarts), time.monotonic()
        return Injection(act(*arguments) or now, offset, restarts)

    def _wait_for_report(
        self, fault: Fault, injection: Injection, where: dict[str, Any], over: Callable[[], object]
    ) -> FaultReport:
        """Waits for the output that names the fault, or until ``over()`` or the end of the run.

        ``where``: rank, host, file, ... that the report must name (see ``Fault.pattern``).
        """
        assert self.run is not None
        run, pattern = self.run, fault.pattern(where)
        run.wait_until(
            lambda: pattern.search(run.read_output(injection.offset)) or over() or run.ended,
            f"it told of the fault: {fault.title}",
        )
        output = run.read_output(injection.offset)
        if match := pattern.search(output):
            return FaultReport(match[0], True, time.monotonic() - injection.moment, run.furthest_step)
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        text = next((line for line in lines if line.startswith(("FAILED", "error"))), lines[-1] if lines else "")
        return FaultReport(text, False, None, run.furthest_step)

    def _survive(self, fault: Fault, injection: Injection, where: dict[str, Any], attempts: int = 1) -> Observation:
        """Observes a fault that the job must survive: the first of ``attempts`` new attempts is its recovery."""
        assert self.run is not None
        run = self.run
        report = self._wait_for_report(fault, injection, where, lambda: len(run.restarts) > injection.restarts)
        run.wait_until(lambda: len(run.restarts) > injection.restarts, f"it went on after: {report.text}")
        recovered = time.monotonic() - injection.moment
        run.wait_until(lambda: len(run.restarts) >= injection.restarts + attempts, "it had grown again")
        return self._observe(injection, report, recovered)

    def _end_and_start(self, fault: Fault, injection: Injection, where: dict[str, Any], code: int) -> Observation:
        """Observes a fault that must end the job with exit code ``code``, after which the same command goes on."""
        assert self.run is not None
        run = self.run
        report = self._wait_for_report(fault, injection, where, lambda: False)
        run.wait_until(lambda: run.ended, "its end")
        if run.exit_code != code:
            report = replace(report, text=f"exit code {run.exit_code}, not {code}: {report.text}", right=False)
        self._start(run)
        return self._observe(injection, report, time.monotonic() - injection.moment)

    def _observe(self, injection: Injection, report: FaultReport, recovered: float) -> Observation:
        """Waits until the run has a checkpoint past all steps that it had ever made, and sums up what happened."""
        assert self.run is not None
        run, every = self.run, self.config.save_every
        resumed = RESUMED.findall(run.read_output(injection.offset))
        first = int(resumed[0].replace(",", "")) if resumed else 0
        step = (run.furthest_step // every + 1) * every
        run.wait_until(lambda: run.saved_step >= step, f"the checkpoint of step {step}")
        redone = max(0, report.furthest_step - first)
        return Observation(report.seconds, recovered, redone, report.text, report.right, step)

    # ---------------------------------------------------------------------------------------------------------- faults
    # One method a fault, by the name that ``faults.FAULTS`` has for it; see ``inject``.

    def _signal_last(self, fault: Fault, number: int, attempts: int = 1) -> Observation:
        last = self._ready_run().locations[-1]
        return self._survive(fault, self._inject(self.injector.signal_worker, last, number), vars(last), attempts)

    def _kill(self, fault: Fault) -> Observation:
        return self._signal_last(fault, signal.SIGKILL)

    def _save(self, fault: Fault) -> Observation:
        """Rank 0, which alone completes a checkpoint, is stopped; where one is then incomplete, it is killed."""
        run = self._ready_run()
        first = run.locations[0]

        def stopped_while_saving() -> bool:
            unfinished = list(RunDir(run.folder).checkpoints.glob(".step_*.saving"))
            if not unfinished:
                return False
            self.injector.signal_worker(first, signal.SIGSTOP)
            time.sleep(10 * SAVE_CHECK_S)
            if unfinished[0].exists():
                return True
            self.injector.signal_worker(first, signal.SIGCONT)
            return False

        run.wait_until(stopped_while_saving, "a save", SAVE_CHECK_S)
        return self._survive(fault, self._inject(self.injector.signal_worker, first, signal.SIGKILL), vars(first))

    def _stop(self, fault: Fault) -> Observation:
        return self._signal_last(fault, signal.SIGSTOP)

    def _checkpoint(self, fault: Fault) -> Observation:
        """Rank 0 is stopped, so that the newest checkpoint stays the newest; this is damaged, and rank 0 killed."""
        run = self._ready_run()
        first = run.locations[0]
        self.injector.signal_worker(first, signal.SIGSTOP)
        time.sleep(10 * SAVE_CHECK_S)
        file = RunDir(run.folder).checkpoint(run.saved_step) / shard_name(len(run.locations) - 1)
        flip_bit(file)
        where = {"step": file.parent.name, "file": file.name}
        return self._survive(fault, self._inject(self.injector.signal_worker, first, signal.SIGKILL), where)

    def _disk(self, fault: Fault) -> Observation:
        """Half of the last rank's file of a checkpoint can be written, and not a byte more."""
        run = self._ready_run()
        last = run.locations[-1]
        files = manifest.read(RunDir(run.folder).checkpoint(run.saved_step))["files"]
        size = max(1, files[shard_name(last.rank)]["size"] // 2)
        injection = self._inject(self.injector.limit_file_size, last, size)
        return self._end_and_start(fault, injection, vars(last), ExitCode.BAD_INPUT)

    def _term(self, fault: Fault) -> Observation:
        run = self._ready_run()
        injection = self._inject(self.injector.signal_everybody, run, signal.SIGTERM)
        return self._end_and_start(fault, injection, {}, ExitCode.STOPPED)

    def _shard(self, fault: Fault) -> Observation:
        """The command is given on a copy of the corpus with a damaged shard; then the shard is put right."""
        run = self._ready_run()
        self.stop()
        corpus = Path(json.loads(RunDir(run.folder).corpus.read_text("utf-8"))["folder"])
        shard, copy = copy_with_damaged_shard(corpus, self.folder / "corpus")
        injection = self._inject(run.start, f"data.dir={copy}")
        report = self._wait_for_report(fault, injection, {"file": shard}, lambda: False)
        run.wait_until(lambda: run.ended, "it refused the corpus")
        if run.exit_code != ExitCode.BAD_INPUT:
            text = f"exit code {run.exit_code}, not {ExitCode.BAD_INPUT:d}: {report.text}"
            report = replace(report, text=text, right=False)
        (copy / shard).unlink()
        (copy / shard).symlink_to(corpus.resolve() / shard)
        self._start(run, f"data.dir={copy}")
        return self._observe(injection, report, time.monotonic() - injection.moment)

    def _size(self, fault: Fault) -> Observation:
        """SIGTERM to one worker is a notice: all save, the others go on without it, and another takes its slot."""
        return self._signal_last(fault, signal.SIGTERM, attempts=2)

    def _host(self, fault: Fault) -> Observation:
        there = self._locations_elsewhere()
        return self._survive(fault, self._inject(self.injector.kill_host, there), vars(there[0]))

    def _cut(self, fault: Fault) -> Observation:
        there = self._locations_elsewhere()
        seconds = HOST_CUT_S + self.config.cluster.hang_timeout
        return self._survive(fault, self._inject(self.injector.cut_off_host, there, seconds), vars(there[0]))

    def _locations_elsewhere(self) -> list[RankLocation]:
        """The ranks of one host that is neither this one nor rank 0's."""
        locations = self._ready_run().locations
        here = (self.injector.local_node, locations[0].node)
        elsewhere = [location for location in locations if location.node not in here]
        if not elsewhere:
            raise UserError("no worker is on a host that is neither this one nor rank 0's")
        return [location for location in elsewhere if location.node == elsewhere[-1].node]


def flip_bit(file: Path) -> None:
    """Flips one bit in the middle of a file."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)[0]
        content.seek(-1, 1)
        content.write(bytes([byte ^ 1]))


def copy_with_damaged_shard(corpus: Path, copy: Path) -> tuple[str, Path]:
    """Makes a copy of a corpus with one bit flipped in its first shard; returns the shard's name and the copy.

    Only that shard is copied; the other files are links, and the corpus itself is not touched.
    """
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    shard = str(read_index(corpus)["splits"]["train"]["shards"][0]["name"])
    for file in corpus.resolve().iterdir():
        if file.name in (shard, "verified.txt"):
            shutil.copy(file, copy / file.name)
        else:
            (copy / file.name).symlink_to(file)
    flip_bit(copy / shard)
    return shard, copy
