"""Copies of complete checkpoints at any URL of fsspec, from which a new machine can resume.

Each rank uploads its share of the files; when all have, rank 0 adds the other files that a resume needs and, last, the
manifest. So a copy too is complete or absent, and is verified by the same hashes. A failing mirror is reported in a
note; no step ever waits for it.
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
RUN_FILES = tuple(file.name for file in (_RUN.config, _RUN.starts, _RUN.metrics, _RUN.init, _RUN.kernels))
"""Files of a run's folder that go with a copy: what a resume reads, and where the first weights came from."""
PAUSES_S = (0.5, 4.0)
"""Seconds between attempts at an operation that fails."""
POLL_S = 0.1

Manifest = dict[str, Any]


class Mirror:
    """Copies one rank's share of a run's checkpoints to ``url``/<run.name>. Constructed by all ranks together."""

    def __init__(
        self, url: str, run: Path, config: Config, world: process_group.DistContext, note: Callable[[str], None]
    ) -> None:
        self.url, self.run, self.world, self.note = f"{url.rstrip('/')}/{config.run.name}", run, world, note
        self.keep_last, self.keep_best = config.keep_last, config.keep_best
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"save_mirror={url} cannot be opened: {error}") from error
        self.mailbox = process_group.StoreMailbox("mirror")
        self.waiting: str | None = None
        self.copying: str | None = None
        """Rank 0: name of the checkpoint that waits to be copied, and of the one that is being copied."""
        self.dropped: set[str] = set()
        """Rank 0: names of checkpoints later than a rollback; no copy of them may stay."""
        self.failing, self.lock = False, threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self._copy_checkpoints, name="mirror", daemon=True).start()

    # --------------------------------------------------------------------------------------------------------- upload

    def enqueue(self, checkpoint: str) -> None:
        """Copy this checkpoint next (rank 0 decides); one that waits and is not yet begun is left out."""
        with self.lock:
            self.waiting = checkpoint if self.world.is_rank0 else None
            self.dropped.discard(checkpoint)  # written again after a rollback

    def drop_after(self, step: int) -> None:
        """Rank 0: delete copies of checkpoints later than ``step``, or a new machine would resume from them."""
        with self.lock:
            known = [name for name in (self.waiting, self.copying) if name]
            self.waiting = None
        error = self._try_repeatedly(lambda: known.extend(checkpoint_name(n) for n in self._list_steps()))
        self.dropped |= {name for name in known if (checkpoint_step(name) or 0) > step}
        for name in sorted(self.dropped):
            error = error or self._try_repeatedly(partial(self._delete_step, checkpoint_step(name) or 0))
        if error:
            self.note(f"what lies at {self.url} of steps after {step} could not be taken away: {error}. Do it by hand")

    def wait_for_copies(self, limit_s: float) -> None:
        """Wait at most ``limit_s`` seconds until all enqueued checkpoints are copied. A collective."""
        deadline = time.monotonic() + limit_s
        while process_group.all_reduce_sum([float(self.busy and time.monotonic() < deadline)])[0]:
            time.sleep(POLL_S)
        if self.busy:
            self.note(
                f"{self.waiting or self.copying} was not yet copied to {self.url}: the next start of the run does it"
            )

    @property
    def busy(self) -> bool:
        """Rank 0: whether a checkpoint waits or is being copied."""
        with self.lock:
            return (self.waiting or self.copying) is not None

    def _copy_checkpoints(self) -> None:
        rank, cancelled = self.world.rank, self.closing.is_set
        with contextlib.suppress(process_group.WaitCancelled, RuntimeError):  # the store may end first, with rank 0
            for turn in itertools.count():
                if self.world.is_rank0:
                    self.mailbox.send(f"{turn}/copy", self._wait_for_checkpoint())
                name = self.mailbox.receive(f"{turn}/copy", cancelled)
                self.mailbox.send(f"{turn}/{rank}", self._try_repeatedly(partial(self._upload_share, name)))
                if self.world.is_rank0:
                    errors = [self.mailbox.receive(f"{turn}/{rank}", cancelled) for rank in range(self.world.size)]
                    self._finish_copy(name, [error for error in errors if error])
                    for key in [f"{turn - 1}/copy", *(f"{turn}/{rank}" for rank in range(self.world.size))]:
                        self.mailbox.delete(key)
                    self.copying = None

    def _wait_for_checkpoint(self) -> str:
        while not self.closing.wait(POLL_S):
            with self.lock:
                if self.waiting:
                    self.copying, self.waiting = self.waiting, None
                    return self.copying
        raise process_group.WaitCancelled

    def _upload_share(self, name: str) -> None:
        local, remote = RunDir(self.run).checkpoints / name, f"{self.root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if self.fs.cat_file(f"{remote}/{manifest.MANIFEST}") == (local / manifest.MANIFEST).read_bytes():
                return  # copied already
        self.fs.makedirs(remote, exist_ok=True)
        for file in _rank_share(manifest.read(local)["files"], self.world):
            self.fs.put_file(str(local / file), f"{remote}/{file}")

    def _finish_copy(self, name: str, errors: Sequence[str]) -> None:
        """Rank 0: upload the manifest, which completes the copy, and prune old copies; or note what failed."""
        error = errors[0] if errors else self._try_repeatedly(partial(self._upload_manifest, name))
        error = error or self._try_repeatedly(self._prune)
        if error:
            with contextlib.suppress(Exception):  # an incomplete copy takes space
                self._prune()
        if error and not self.failing:
            self.note(
                f"{name} could not be copied to {self.url}: {error}. The run goes on; later checkpoints are tried again"
            )
        elif self.failing and not error:
            self.note(f"{name} is copied to {self.url}: it works again")
        self.failing = bool(error)

    def _upload_manifest(self, name: str) -> None:
        for file in RUN_FILES:
            if (self.run / file).exists():
                self.fs.put_file(str(self.run / file), f"{self.root}/{name}/{file}")
        self.fs.put_file(
            str(RunDir(self.run).checkpoints / name / manifest.MANIFEST), f"{self.root}/{name}/{manifest.MANIFEST}"
        )

    def _prune(self) -> None:
        """Rank 0: delete copies that are not kept, that a rollback dropped, or that are incomplete."""
        manifests = self._read_manifests()
        for step in [step for step in manifests if checkpoint_name(step) in self.dropped]:
            del manifests[step]
        surplus = manifest.surplus_steps(list(manifests.values()), self.keep_last, self.keep_best)
        for step in self._list_steps():
            dropped = checkpoint_name(step) in self.dropped
            if step in surplus or dropped or not self.fs.exists(self._manifest_path(step)):
                self._delete_step(step)

    def _delete_step(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._manifest_path(step))
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(f"{self.root}/{checkpoint_name(step)}", recursive=True)

    def _try_repeatedly(self, act: Callable[[], None]) -> str | None:
        """Call ``act``, and again after pauses while it fails; returns the last error, or None."""
        for pause in (*PAUSES_S, None):
            try:
                act()
            except Exception as failure:  # each file system has errors of its own
                error = f"{type(failure).__name__}: {failure}"
                if pause is None or self.closing.wait(pause):
                    return error
            else:
                return None
        return None

    # ------------------------------------------------------------------------------------------------------- download

    def manifests(self) -> dict[int, Manifest]:
        """The manifests of the complete copies, by step. Raises OSError if the mirror cannot be read."""
        return self._reading_remote(self._read_manifests)

    def fetch_run(self) -> None:
        """Rank 0: fetch the files of the run's folder that go with the newest copy. Raises OSError."""
        newest = max(self.manifests(), default=None)
        if newest is None:
            return
        for file in RUN_FILES:
            remote = f"{self.root}/{checkpoint_name(newest)}/{file}"
            if self._reading_remote(partial(self.fs.exists, remote)):
                content = self._reading_remote(partial(self.fs.cat_file, remote))
                self.run.mkdir(parents=True, exist_ok=True)
                write_whole(self.run / file, content)

    def fetch(self, name: str, values: Manifest, into: Path) -> str | None:
        """Fetch this rank's share of a checkpoint's files into the folder ``into``; returns the error, or None."""

        def download() -> None:
            for file in _rank_share(values["files"], self.world):
                self.fs.get_file(f"{self.root}/{name}/{file}", str(into / file))

        return self._try_repeatedly(download)

    def _reading_remote(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"{self.url} cannot be read: {type(error).__name__}: {error}") from error

    def _list_steps(self) -> list[int]:
        self.fs.invalidate_cache()
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return [step for name in names if (step := checkpoint_step(name)) is not None]

    def _read_manifests(self) -> dict[int, Manifest]:
        manifests = {}
        for step in self._list_steps():
            with contextlib.suppress(FileNotFoundError, manifest.DamagedCheckpoint):
                content = self.fs.cat_file(self._manifest_path(step))
                manifests[step] = manifest.from_bytes(content, checkpoint_name(step))
        return manifests

    def _manifest_path(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}/{manifest.MANIFEST}"


def _rank_share(files: Sequence[str], world: process_group.DistContext) -> list[str]:
    return sorted(files)[world.rank :: world.size]
