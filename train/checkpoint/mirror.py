"""Complete checkpoints, copied behind the run to any place that fsspec has a URL for, and fetched from there by a fresh machine.

Each rank copies its share of the files; when all have, rank 0 adds what else a resume needs and, last, the manifest: a checkpoint
is complete there or absent, and is verified by the same hashes. A place that fails is a note; no step ever waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from train.checkpoint import manifest
from train.config.schema import Config
from train.distributed import process_group
from train.errors import UserError
from train.util.io import write_whole
from train.util.run_layout import RunDir, checkpoint_name, checkpoint_step

_RUN = RunDir(Path())
RUN_FILES = tuple(file.name for file in (_RUN.config, _RUN.starts, _RUN.metrics, _RUN.init))
"""What a resume reads of a run's folder, beside its checkpoints, and where its first weights came from."""
PAUSES_S = (0.5, 4.0)
"""Between the attempts at what fails."""
LOOK_S = 0.1

Manifest = dict[str, Any]


class Mirror:
    """One rank's part in the copies of a run's checkpoints at ``url``/<run.name>. Made by all ranks together."""

    def __init__(
        self, url: str, run: Path, config: Config, world: process_group.DistContext, note: Callable[[str], None]
    ) -> None:
        self.url, self.run, self.world, self.note = f"{url.rstrip('/')}/{config.run.name}", run, world, note
        self.keep_last, self.keep_best = config.keep_last, config.keep_best
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"save_mirror={url} cannot be opened: {error}") from error
        self.post = process_group.StoreMailbox("mirror")
        self.offered: str | None = None
        self.working: str | None = None
        """Rank 0: the checkpoints, by name, that wait to be copied and that are being copied."""
        self.void: set[str] = set()
        """Rank 0: checkpoints that the run has gone back from; copies of them must not stay."""
        self.failing, self.lock = False, threading.Lock()
        self.given_up = threading.Event()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    # ------------------------------------------------------------------------------------------------------- to there

    def enqueue(self, checkpoint: str) -> None:
        """Copy this checkpoint next (rank 0's word counts); one that was offered before, and not begun, is left out."""
        with self.lock:
            self.offered = checkpoint if self.world.is_rank0 else None
            self.void.discard(checkpoint)  # made anew

    def drop_after(self, step: int) -> None:
        """Rank 0: take away the copies of checkpoints later than ``step``, or a new machine would go on from them."""
        with self.lock:
            known = [name for name in (self.offered, self.working) if name]
            self.offered = None
        error = self._attempt(lambda: known.extend(checkpoint_name(n) for n in self._steps()))
        self.void |= {name for name in known if (checkpoint_step(name) or 0) > step}
        for name in sorted(self.void):
            error = error or self._attempt(partial(self._remove, checkpoint_step(name) or 0))
        if error:
            self.note(f"what lies at {self.url} of steps after {step} could not be taken away: {error}. Do it by hand")

    def wait_for_copies(self, limit_s: float) -> None:
        """Wait, at most so long, until what was offered is copied. A collective."""
        end = time.monotonic() + limit_s
        while process_group.all_reduce_sum([float(self.busy and time.monotonic() < end)])[0]:
            time.sleep(LOOK_S)
        if self.busy:
            self.note(
                f"{self.offered or self.working} was not yet copied to {self.url}: the next start of the run does it"
            )

    @property
    def busy(self) -> bool:
        """Rank 0: whether there is anything left to copy."""
        with self.lock:
            return (self.offered or self.working) is not None

    def _work(self) -> None:
        rank, given_up = self.world.rank, self.given_up.is_set
        with contextlib.suppress(process_group.WaitCancelled, RuntimeError):  # the store may go first, with rank 0
            for turn in itertools.count():
                if self.world.is_rank0:
                    self.post.send(f"{turn}/copy", self._next())
                name = self.post.receive(f"{turn}/copy", given_up)
                self.post.send(f"{turn}/{rank}", self._attempt(partial(self._put_share, name)))
                if self.world.is_rank0:
                    errors = [self.post.receive(f"{turn}/{rank}", given_up) for rank in range(self.world.size)]
                    self._complete(name, [error for error in errors if error])
                    for key in [f"{turn - 1}/copy", *(f"{turn}/{rank}" for rank in range(self.world.size))]:
                        self.post.delete(key)
                    self.working = None

    def _next(self) -> str:
        while not self.given_up.wait(LOOK_S):
            with self.lock:
                if self.offered:
                    self.working, self.offered = self.offered, None
                    return self.working
        raise process_group.WaitCancelled

    def _put_share(self, name: str) -> None:
        local, there = RunDir(self.run).checkpoints / name, f"{self.root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if self.fs.cat_file(f"{there}/{manifest.MANIFEST}") == (local / manifest.MANIFEST).read_bytes():
                return  # it is there already
        self.fs.makedirs(there, exist_ok=True)
        for file in _share(manifest.read(local)["files"], self.world):
            self.fs.put_file(str(local / file), f"{there}/{file}")

    def _complete(self, name: str, errors: Sequence[str]) -> None:
        """Rank 0: what makes the copy a checkpoint, and the end of those that are not kept; or a note of what failed."""
        error = errors[0] if errors else self._attempt(partial(self._put_last, name)) or self._attempt(self._prune)
        if error:
            with contextlib.suppress(Exception):  # what is torn takes room
                self._prune()
        if error and not self.failing:
            self.note(
                f"{name} could not be copied to {self.url}: {error}. The run goes on; later checkpoints are tried again"
            )
        elif self.failing and not error:
            self.note(f"{name} is copied to {self.url}: it works again")
        self.failing = bool(error)

    def _put_last(self, name: str) -> None:
        for file in RUN_FILES:
            if (self.run / file).exists():
                self.fs.put_file(str(self.run / file), f"{self.root}/{name}/{file}")
        self.fs.put_file(
            str(RunDir(self.run).checkpoints / name / manifest.MANIFEST), f"{self.root}/{name}/{manifest.MANIFEST}"
        )

    def _prune(self) -> None:
        whole = {step: values for step, values in self._whole().items() if checkpoint_name(step) not in self.void}
        torn = [
            step
            for step in self._steps()
            if checkpoint_name(step) in self.void or not self.fs.exists(self._manifest(step))
        ]
        for step in [*manifest.superfluous(list(whole.values()), self.keep_last, self.keep_best), *torn]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._manifest(step))
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{checkpoint_name(step)}", recursive=True)

    def _attempt(self, act: Callable[[], None]) -> str | None:
        """What is wrong with it, after some attempts, or None."""
        for pause in (*PAUSES_S, None):
            try:
                act()
            except Exception as failure:  # each file system has errors of its own
                error = f"{type(failure).__name__}: {failure}"
                if pause is None or self.given_up.wait(pause):
                    return error
            else:
                return None
        return None

    # ----------------------------------------------------------------------------------------------------- from there

    def manifests(self) -> dict[int, Manifest]:
        """The manifests of the complete copies, by step. Raises OSError where the place cannot be read."""
        return self._reading(self._whole)

    def fetch_run(self) -> None:
        """Rank 0: what the newest copy holds of the run's folder, into one that is new. Raises OSError."""
        newest = max(self.manifests(), default=None)
        if newest is None:
            return
        for file in RUN_FILES:
            there = f"{self.root}/{checkpoint_name(newest)}/{file}"
            if self._reading(partial(self.fs.exists, there)):
                content = self._reading(partial(self.fs.cat_file, there))
                self.run.mkdir(parents=True, exist_ok=True)
                write_whole(self.run / file, content)

    def fetch(self, name: str, values: Manifest, into: Path) -> str | None:
        """Copy this rank's share of a checkpoint's files into the folder ``into``: what is wrong, or None."""

        def get() -> None:
            for file in _share(values["files"], self.world):
                self.fs.get_file(f"{self.root}/{name}/{file}", str(into / file))

        return self._attempt(get)

    def _reading(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error

    def _steps(self) -> list[int]:
        self.fs.invalidate_cache()
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return [step for name in names if (step := checkpoint_step(name)) is not None]

    def _whole(self) -> dict[int, Manifest]:
        found = {}
        for step in self._steps():
            with contextlib.suppress(FileNotFoundError, manifest.DamagedCheckpoint):
                content = self.fs.cat_file(self._manifest(step))
                found[step] = manifest.from_bytes(content, checkpoint_name(step))
        return found

    def _manifest(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}/{manifest.MANIFEST}"


def _share(files: Sequence[str], world: process_group.DistContext) -> list[str]:
    return sorted(files)[world.rank :: world.size]
