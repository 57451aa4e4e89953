"""Complete checkpoints, copied behind the run to any place that fsspec has a URL for, and fetched from there by a fresh machine.

Each rank copies its share of the files; when all have, rank 0 adds what else a resume needs and, last, the manifest: a checkpoint is
complete there or absent, and is verified by the same hashes. A place that fails is a note; no step ever waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from train import dist, manifest
from train.errors import UserError
from train.snapshot import NICENESS

RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl")
"""What a resume reads of a run's folder, beside its checkpoints."""
PAUSES_S = (0.5, 4.0)
"""Between the attempts at what fails."""
LOOK_S = 0.1

T = TypeVar("T")
Manifest = dict[str, Any]


class Mirror:
    """One rank's part in the copies of a run's checkpoints at ``url``/<run.name>. Made by all ranks together."""

    def __init__(self, url: str, run: Path, name: str, world: dist.World) -> None:
        self.url, self.run, self.world = f"{url.rstrip('/')}/{name}", run, world
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"save_mirror={url} cannot be opened: {error}") from error
        self.post = dist.Post("mirror")
        self.offered: str | None = None
        self.working: str | None = None
        """Rank 0: the checkpoints, by name, that wait to be copied and that are being copied."""
        self.given_up = threading.Event()

    # ------------------------------------------------------------------------------------------------------- to there

    def start(self, superfluous: Callable[[Sequence[tuple[int, float | None]]], set[int]], note: Callable[[str], None]) -> None:
        """Copy from now on what rank 0 offers. ``superfluous`` says which of (step, val_loss), oldest first, are not kept."""
        self.superfluous, self.note, self.failing = superfluous, note, False
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def offer(self, checkpoint: str) -> None:
        """Rank 0: copy this checkpoint next; one that was offered before, and not begun, is left out."""
        self.offered = checkpoint

    @property
    def busy(self) -> bool:
        """Whether there is anything left to copy, as far as this rank knows."""
        return (self.offered or self.working) is not None

    def close(self) -> None:
        """Begin nothing more."""
        self.given_up.set()

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        rank, given_up = self.world.rank, self.given_up.is_set
        with contextlib.suppress(dist.GivenUp, RuntimeError):  # the store may go first, with rank 0
            for turn in itertools.count():
                if self.world.first:
                    self.post.put(f"{turn}/copy", self._next())
                name = self.post.take(f"{turn}/copy", given_up)
                self.post.put(f"{turn}/{rank}", self._attempt(lambda name=name: self._put_share(name)))
                if self.world.first:
                    errors = [self.post.take(f"{turn}/{rank}", given_up) for rank in range(self.world.size)]
                    self._complete(name, [error for error in errors if error])
                    for key in [f"{turn - 1}/copy", *(f"{turn}/{rank}" for rank in range(self.world.size))]:
                        self.post.remove(key)
                    self.working = None

    def _next(self) -> str:
        while self.offered is None:
            if self.given_up.wait(LOOK_S):
                raise dist.GivenUp
        self.working, self.offered = self.offered, None
        return self.working

    def _put_share(self, name: str) -> None:
        local, there = self.run / "checkpoints" / name, f"{self.root}/{name}"
        self.fs.makedirs(there, exist_ok=True)
        for file in _share(manifest.read(local)["files"], self.world):
            self.fs.put_file(str(local / file), f"{there}/{file}")

    def _complete(self, name: str, errors: Sequence[str]) -> None:
        """Rank 0: what makes the copy a checkpoint, and the end of those that are not kept; or a note of what failed."""
        error = errors[0] if errors else self._attempt(lambda: self._put_last(name)) or self._attempt(self._prune)
        if error and not self.failing:
            self.note(f"{name} could not be copied to {self.url}: {error}. The run goes on; later checkpoints are tried again")
        elif self.failing and not error:
            self.note(f"{name} is copied to {self.url}: it works again")
        self.failing = bool(error)

    def _put_last(self, name: str) -> None:
        for file in RUN_FILES:
            if (self.run / file).exists():
                self.fs.put_file(str(self.run / file), f"{self.root}/{name}/{file}")
        self.fs.pipe_file(f"{self.root}/{name}/{manifest.MANIFEST}", (self.run / "checkpoints" / name / manifest.MANIFEST).read_bytes())

    def _prune(self) -> None:
        whole = self._whole()
        gone = self.superfluous([(step, whole[step]["val_loss"]) for step in sorted(whole)])
        torn = {step for step in self._steps() if step not in whole and step < max(whole, default=0)}
        for step in gone | torn:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/step_{step}/{manifest.MANIFEST}")
            self.fs.rm(f"{self.root}/step_{step}", recursive=True)

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
        try:
            return self._whole()
        except Exception as error:
            raise OSError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error

    def fetch_run(self) -> None:
        """Rank 0: what the newest copy holds of the run's folder, into one that is new. Raises OSError."""
        found = self.manifests()
        if not found:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        for file in RUN_FILES:
            there = f"{self.root}/step_{max(found)}/{file}"
            if self.fs.exists(there):
                self.fs.get_file(there, str(self.run / file))

    def fetch(self, name: str, values: Manifest, into: Path) -> str | None:
        """Copy this rank's share of a checkpoint's files into the folder ``into``: what is wrong, or None."""

        def get() -> None:
            for file in _share(values["files"], self.world):
                self.fs.get_file(f"{self.root}/{name}/{file}", str(into / file))

        return self._attempt(get)

    def _steps(self) -> list[int]:
        self.fs.invalidate_cache()
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return [int(found[1]) for name in names if (found := manifest.FOLDER.fullmatch(name))]

    def _whole(self) -> dict[int, Manifest]:
        found = {}
        for step in self._steps():
            with contextlib.suppress(FileNotFoundError, manifest.Damaged):
                content = self.fs.cat_file(f"{self.root}/step_{step}/{manifest.MANIFEST}")
                found[step] = manifest.from_bytes(content, f"step_{step}")
        return found


def _share(files: Sequence[str], world: dist.World) -> list[str]:
    return sorted(files)[world.rank :: world.size]
