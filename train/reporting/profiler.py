"""Profiler of named steps: a trace of each rank named, for Perfetto, and on request its memory.

The ranges of a trace are the phases that the heartbeat marks: loading the batch, then forward, backward and step of
every micro-batch, within one range a step. A trace is written whole once its last step is made; a run that ends before
leaves none.
"""

from __future__ import annotations

import contextlib
import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from train.config.schema import Config
from train.distributed import heartbeat, process_group
from train.events import Emit, NoteEvent
from train.reporting.activity import RankActivity
from train.util.io import publish, temporary_path, write_whole
from train.util.run_layout import RunDir

MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory snapshot has at most, the newest."""


class StepProfiler:
    """Profiles ``profile.steps`` on this rank, where it is one of ``profile.ranks``."""

    def __init__(self, config: Config, world: process_group.DistContext, activity: RankActivity, emit: Emit) -> None:
        self.settings, self.world, self.activity, self.emit = config.profile, world, activity, emit
        self.folder = RunDir(Path(config.run.dir or "")).profile
        self.first, self.last = config.profile.steps or (-1, -1)
        self.begun = False
        """Whether this start of the run has come to the first of the steps: one that goes on amid them traces none."""
        self.trace: profile | None = None
        self.phase: record_function | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Inside, the optimizer step ``number`` is made; an exception that leaves it discards the trace."""
        if not self.first < number <= self.last:
            yield
            return
        if number == self.first + 1:
            self.begun = True
            self._discard()  # of the same steps, before a rollback
            if self.world.rank in self.settings.ranks:
                self._start()
        try:
            with record_function(f"optimizer step {number}") if self.trace else contextlib.nullcontext():
                yield
                self._end_phase()
        except BaseException:
            self._discard()
            raise
        if number == self.last and self.begun:
            self._finish()

    def _start(self) -> None:
        gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        memory = self.settings.memory
        self.trace = profile(activities=activities, profile_memory=memory, record_shapes=memory, with_stack=memory)
        self.trace.start()
        if memory and gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        heartbeat.on_phase(self._begin_phase)

    def _begin_phase(self, phase: str, micro: int) -> None:
        self._end_phase()
        self.phase = record_function(f"{phase} {micro}" if phase in ("forward", "backward", "step") else phase)
        self.phase.__enter__()

    def _end_phase(self) -> None:
        if self.phase:
            self.phase.__exit__(None, None, None)
            self.phase = None

    def _stop(self) -> profile | None:
        """End the recording: the trace, where there was one."""
        trace, self.trace = self.trace, None
        if trace:
            heartbeat.on_phase(None)
            self._end_phase()
            trace.stop()
        return trace

    def _discard(self) -> None:
        if self._stop() and self.world.device.type == "cuda" and self.settings.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _finish(self) -> None:
        heartbeat.on_phase(None)  # what follows is no part of the step
        with self.activity.phase("write profile"):
            if trace := self._stop():
                self.folder.mkdir(exist_ok=True)
                self._write(trace)
        if self.world.is_rank0:
            self.emit(NoteEvent(self._where()))

    def _write(self, trace: profile) -> None:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            trace.export_chrome_trace(file.name)
            write_whole(self._file(self.world.rank, "json.gz"), gzip.compress(Path(file.name).read_bytes(), 6))
        if self.world.device.type == "cuda" and self.settings.memory:
            snapshot = self._file(self.world.rank, "memory.pickle")
            torch.cuda.memory._dump_snapshot(str(temporary_path(snapshot)))
            torch.cuda.memory._record_memory_history(enabled=None)
            publish(temporary_path(snapshot), snapshot)

    def _file(self, rank: int, ending: str) -> Path:
        return self.folder / f"rank{rank}_steps{self.first}-{self.last}.{ending}"

    def _where(self) -> str:
        """Where the traces of all ranks are, and how to open them."""
        ranks = [rank for rank in self.settings.ranks if rank < self.world.size]
        names = ", ".join(self._file(rank, "json.gz").name for rank in ranks)
        text = (
            f"profiled steps {self.first + 1} to {self.last}: {self.folder}: {names}; open at https://ui.perfetto.dev"
        )
        if self.settings.memory and self.world.device.type == "cuda":
            text += "; memory: *.memory.pickle, open at https://pytorch.org/memory_viz"
        return text
