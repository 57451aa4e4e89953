"""How each fault of a drill is injected into a run that goes on by itself, and what is seen then.

One run lives through all of them, one after another. Where a fault ends it, as it should, the same command is given again.
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
CATCH_S = 0.001
"""Between looks whether a save is under way."""
ENOUGH = 10
"""Times the steps between two checkpoints that a fault may take."""
STARTED = "seconds to the first step"
RESUMED = re.compile(r"resumes +at step ([\d,]+)")


@dataclass(frozen=True)
class Injection:
    """The moment of an injection: seconds (monotonic), and how much the run had said and how often it had restarted by then."""

    at: float
    offset: int
    restarts: int


@dataclass(frozen=True)
class FaultReport:
    """What was said of a fault: whether it is what should be, after how many seconds, and the last step made by then."""

    text: str
    right: bool
    seconds: float | None
    made: int


class DisturbedRun:
    """The run that is disturbed, in a folder of its own below ``folder``, and the way to disturb it."""

    def __init__(self, folder: Path, settings: Sequence[str], config: Config, hands: FaultInjector) -> None:
        self.folder, self.settings, self.config, self.hands = folder, settings, config, hands
        self.run: TrainProcess | None = None
        self.number = 0

    def inject(self, fault: Fault) -> Observation:
        """Inject a fault, and follow the run past the step where it was. UserError where the run does not go on."""
        return getattr(self, f"_{fault.name}")(fault)

    def pause(self) -> None:
        """End the run so that it can go on: for its workers' places, or because the drill is over."""
        if self.run is not None:
            self.run.end(signal.SIGTERM)

    def drop(self) -> None:
        """End the run, now; the next fault gets a new one."""
        if self.run is not None:
            self.run.kill()
            self.run = None

    # ----------------------------------------------------------------------------------------------------------- steps

    def _living(self) -> TrainProcess:
        """A run that trains with all its workers, and has two checkpoints to go back to."""
        if self.run is not None and self.run.furthest + ENOUGH * self.config.save_every > self.config.steps:
            self.drop()  # it would come to its end
        if self.run is None:
            self.number += 1
            self.run = TrainProcess(self.folder / f"disturbed_{self.number}", self.settings)
        run, every = self.run, self.config.save_every
        self.hands.wait_for_hosts()
        if run.over:
            self._start(run)
        run.until(lambda: len(checkpoint_steps(RunDir(run.folder).checkpoints)) > 1, "its second checkpoint")
        saved, workers, give_up = run.saved, self.config.cluster.workers, time.monotonic() + FULL_S
        run.until(lambda: run.step >= saved + every // 2, "the next steps")
        run.until(lambda: run.size == workers or (run.size and time.monotonic() > give_up), "have all its workers")
        return run

    def _start(self, run: TrainProcess, *more: str) -> None:
        """Give the command, and wait until it trains."""
        offset = run.log.stat().st_size if run.log.exists() else 0
        run.start(*more)
        run.until(lambda: STARTED in run.said(offset), "the first step")

    def _hit(self, act: Callable[..., float | None], *given: Any) -> Injection:
        assert self.run is not None
        offset, restarts, now = self.run.log.stat().st_size, len(self.run.restarts), time.monotonic()
        return Injection(act(*given) or now, offset, restarts)

    def _named(self, fault: Fault, hit: Injection, where: dict[str, Any], over: Callable[[], object]) -> FaultReport:
        """Waits for the words that name the fault, or until ``over``."""
        assert self.run is not None
        run, pattern = self.run, fault.pattern(where)
        run.until(lambda: pattern.search(run.said(hit.offset)) or over() or run.over, fault.title)
        said = run.said(hit.offset)
        if found := pattern.search(said):
            return FaultReport(found[0], True, time.monotonic() - hit.at, run.furthest)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        text = next((line for line in lines if line.startswith(("FAILED", "error"))), lines[-1] if lines else "")
        return FaultReport(text, False, None, run.furthest)

    def _in_life(self, fault: Fault, hit: Injection, where: dict[str, Any], worlds: int = 1) -> Observation:
        """What a run makes of a fault that it must survive: the first of ``worlds`` new worlds is its recovery."""
        assert self.run is not None
        run = self.run
        words = self._named(fault, hit, where, lambda: len(run.restarts) > hit.restarts)
        run.until(lambda: len(run.restarts) > hit.restarts, f"go on after: {words.text}")
        recovered = time.monotonic() - hit.at
        run.until(lambda: len(run.restarts) >= hit.restarts + worlds, "grow again")
        return self._settled(hit, words, recovered)

    def _again(self, fault: Fault, hit: Injection, where: dict[str, Any], code: int) -> Observation:
        """What a run makes of a fault that must end it with exit code ``code``: then the same command goes on."""
        assert self.run is not None
        run = self.run
        words = self._named(fault, hit, where, lambda: False)
        run.until(lambda: run.over, "an end")
        if run.code != code:
            words = replace(words, text=f"exit code {run.code}, not {code}: {words.text}", right=False)
        self._start(run)
        return self._settled(hit, words, time.monotonic() - hit.at)

    def _settled(self, hit: Injection, words: FaultReport, recovered: float) -> Observation:
        """Once the run has a checkpoint past all steps that it had ever made."""
        assert self.run is not None
        run, every = self.run, self.config.save_every
        found = RESUMED.findall(run.said(hit.offset))
        first = int(found[0].replace(",", "")) if found else 0
        step = (run.furthest // every + 1) * every
        run.until(lambda: run.saved >= step, f"the checkpoint of step {step}")
        return Observation(words.seconds, recovered, max(0, words.made - first), words.text, words.right, step)

    # ---------------------------------------------------------------------------------------------------------- faults

    def _signal_last(self, fault: Fault, number: int, worlds: int = 1) -> Observation:
        last = self._living().places[-1]
        return self._in_life(fault, self._hit(self.hands.signal, last, number), vars(last), worlds)

    def _kill(self, fault: Fault) -> Observation:
        return self._signal_last(fault, signal.SIGKILL)

    def _save(self, fault: Fault) -> Observation:
        """Rank 0, which alone completes a checkpoint, is stopped; where one is then torn, it is killed."""
        run = self._living()
        first = run.places[0]

        def torn() -> bool:
            aside = list(RunDir(run.folder).checkpoints.glob(".step_*.saving"))
            if not aside:
                return False
            self.hands.signal(first, signal.SIGSTOP)
            time.sleep(10 * CATCH_S)
            if aside[0].exists():
                return True
            self.hands.signal(first, signal.SIGCONT)
            return False

        run.until(torn, "a save", CATCH_S)
        return self._in_life(fault, self._hit(self.hands.signal, first, signal.SIGKILL), vars(first))

    def _stop(self, fault: Fault) -> Observation:
        return self._signal_last(fault, signal.SIGSTOP)

    def _checkpoint(self, fault: Fault) -> Observation:
        """The worker that would complete a newer one is stopped, so that the newest stays it; then it is killed."""
        run = self._living()
        first = run.places[0]
        self.hands.signal(first, signal.SIGSTOP)
        time.sleep(10 * CATCH_S)
        file = RunDir(run.folder).checkpoint(run.saved) / shard_name(len(run.places) - 1)
        flip(file)
        where = {"step": file.parent.name, "file": file.name}
        return self._in_life(fault, self._hit(self.hands.signal, first, signal.SIGKILL), where)

    def _disk(self, fault: Fault) -> Observation:
        """Half of the last rank's file of a checkpoint goes onto the disk, and not a byte more."""
        run = self._living()
        last = run.places[-1]
        files = manifest.read(RunDir(run.folder).checkpoint(run.saved))["files"]
        size = max(1, files[shard_name(last.rank)]["size"] // 2)
        return self._again(fault, self._hit(self.hands.limit_files, last, size), vars(last), ExitCode.BAD_INPUT)

    def _term(self, fault: Fault) -> Observation:
        run = self._living()
        return self._again(fault, self._hit(self.hands.signal_everybody, run, signal.SIGTERM), {}, ExitCode.STOPPED)

    def _shard(self, fault: Fault) -> Observation:
        """The command is given on a copy of the corpus in which bytes of one shard are flipped; then the shard is put right."""
        run = self._living()
        self.pause()
        corpus = Path(json.loads(RunDir(run.folder).corpus.read_text())["folder"])
        shard, copy = poisoned(corpus, self.folder / "corpus")
        hit = self._hit(run.start, f"data.dir={copy}")
        words = self._named(fault, hit, {"file": shard}, lambda: False)
        run.until(lambda: run.over, "refuse the corpus")
        if run.code != ExitCode.BAD_INPUT:
            words = replace(words, text=f"exit code {run.code}, not {ExitCode.BAD_INPUT:d}: {words.text}", right=False)
        (copy / shard).unlink()
        (copy / shard).symlink_to(corpus.resolve() / shard)
        self._start(run, f"data.dir={copy}")
        return self._settled(hit, words, time.monotonic() - hit.at)

    def _size(self, fault: Fault) -> Observation:
        """SIGTERM to one worker alone is a notice: all save, the others go on, and another takes its place."""
        return self._signal_last(fault, signal.SIGTERM, worlds=2)

    def _host(self, fault: Fault) -> Observation:
        there = self._elsewhere()
        return self._in_life(fault, self._hit(self.hands.end_host, there), vars(there[0]))

    def _cut(self, fault: Fault) -> Observation:
        there = self._elsewhere()
        seconds = HOST_CUT_S + self.config.cluster.hang_timeout
        return self._in_life(fault, self._hit(self.hands.cut_off, there, seconds), vars(there[0]))

    def _elsewhere(self) -> list[RankLocation]:
        """The ranks of a host that is not this one, nor rank 0's."""
        places = self._living().places
        found = [place for place in places if place.node not in (self.hands.here, places[0].node)]
        if not found:
            raise UserError("no worker is on a host that is neither this one nor rank 0's")
        return [place for place in found if place.node == found[-1].node]


def flip(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)[0]
        content.seek(-1, 1)
        content.write(bytes([byte ^ 1]))


def poisoned(corpus: Path, copy: Path) -> tuple[str, Path]:
    """A copy of a corpus with a bit flipped in one shard: the shard's name, and the copy. The corpus itself is not touched.

    Only that shard is copied; the other files are links.
    """
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    shard = str(read_index(corpus)["splits"]["train"]["shards"][0]["name"])
    for file in corpus.resolve().iterdir():
        if file.name in (shard, "verified.txt"):
            shutil.copy(file, copy / file.name)
        else:
            (copy / file.name).symlink_to(file)
    flip(copy / shard)
    return shard, copy
