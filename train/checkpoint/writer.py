"""Saving behind the steps: a checkpoint is begun between two steps and completed while later ones run.

Every rank's own thread copies its pieces (``train.checkpoint.staging``), writes them into a folder aside and forces them to the disk. When
all ranks have, rank 0 adds the manifest and renames the folder, so that one of that name is whole; then ``latest`` is moved. The
threads speak through the world's store, never by a collective. One save at a time: the next one waits for it.
"""

from __future__ import annotations

import secrets
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.reader import complete
from train.checkpoint.staging import StagingBuffer
from train.distributed import process_group
from train.distributed.param_shard import ParamShard, ShardedState
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.io import write_whole
from train.util.run_layout import checkpoint_name, shard_name

LOOK_S = 0.01
CLOSE_S = 10.0


@dataclass
class Save:
    """One save, from its beginning to its end."""

    number: int
    step: int
    content: dict[str, Any]
    """What the manifest will say, but for the files."""
    first: Callable[[], None]
    began: float
    thread: threading.Thread = field(init=False)
    seconds: float = 0.0
    error: str | None = None
    """What kept it from being completed: the same on every rank."""
    told: bool = False


class CheckpointWriter:
    """One rank's part in saving a run's checkpoints. Made by all ranks together."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_best: int,
        world: process_group.DistContext,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.keep_last, self.keep_best, self.world, self.mirror = (
            folder,
            keep_last,
            keep_best,
            world,
            mirror,
        )
        self.snapshot, self.post = StagingBuffer(world.device), process_group.StoreMailbox("saves")
        self.stall_s = 0.0
        """Seconds that steps have waited for saves."""
        self.current: Save | None = None
        self.number = 0
        self.given_up = threading.Event()
        if world.is_rank0:
            for stale in folder.glob(".step_*"):  # what earlier starts left, as they were killed
                shutil.rmtree(stale, ignore_errors=True)
        self.start: str = process_group.broadcast_object(secrets.token_hex(4))
        """Keeps what is written now apart from what a rank of an earlier start, not yet dead, may still write."""

    # ---------------------------------------------------------------------------------------- in the training thread

    def save(
        self,
        engine: ShardedState,
        progress: TrainState,
        val_loss: float | None,
        about: dict[str, Any],
        first: Callable[[], None],
    ) -> None:
        """Begin ``step_<n>``, complete or not at all; the one before it has been settled.

        ``about`` is what a resume must find unchanged; ``first`` is called in rank 0's writer before the checkpoint is one.
        """
        began = time.monotonic()
        states = {(kind, p.name, p.start): view for p in self._mine(engine) for kind, view in engine.states(p).items()}
        content = {
            "progress": progress.to_dict(),
            "val_loss": val_loss,
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
            "scalars": engine.scalars(),
            "world_size": self.world.size,
            **about,
        }
        self.snapshot.begin(states)
        self.current = save = Save(self.number, progress.step, content, first, began)
        self.number += 1
        save.thread = threading.Thread(target=self._behind, args=[save], name="save", daemon=True)
        save.thread.start()
        self.stall_s += time.monotonic() - began

    def wait_for_staging(self) -> None:
        """Wait until the weights and moments are copied: before each update."""
        self.stall_s += self.snapshot.wait_for_copy()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self.current is not None and self.current.thread.is_alive()

    def pop_finished(self) -> Save | None:
        """The last save, once, when it is over."""
        save = self.current
        if save is None or save.told or self.busy:
            return None
        save.told = True
        return save

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; another rank may know it a moment later."""
        return self.current is not None and self.current.error is not None

    def wait_for_save(self) -> None:
        """Wait for the save that is in flight. A collective; raises UserError on every rank when it could not be written.

        The ranks wait together, by small sums, so that the death of one ends the waiting of the others.
        """
        began, save = time.monotonic(), self.current
        if save is None:
            return
        while process_group.all_reduce_sum([float(self.busy)])[0]:
            save.thread.join(LOOK_S)
        self.stall_s += time.monotonic() - began
        if save.error:
            raise UserError(
                f"no checkpoint could be written to {self.folder}: {save.error}. Earlier checkpoints are untouched. "
                "Make room or mend the folder, then give the same command: the run goes on from the newest one."
            )

    def wait_for_mirror(self, limit_s: float) -> None:
        """Wait, but not for ever, until the newest checkpoint is copied to the mirror, if there is one. A collective."""
        if self.mirror:
            self.mirror.wait_for_copies(limit_s)

    def close(self) -> None:
        """Give up what is in flight: the run is over, one way or another."""
        self.given_up.set()
        if self.mirror:
            self.mirror.given_up.set()
        if self.current:
            self.current.thread.join(CLOSE_S)

    def _mine(self, engine: ShardedState) -> Sequence[ParamShard]:
        """The pieces this rank writes: its own, or, where every rank has all, its share of them."""
        mine = engine.param_shards[self.world.rank :: self.world.size] if engine.replicated else engine.param_shards
        return [*mine, *engine.carried]

    # ------------------------------------------------------------------------------------------ in the writer's thread

    def _behind(self, save: Save) -> None:
        try:
            save.error = self._tell(save, self._write(save))
        except process_group.WaitCancelled:
            save.error = "the run ended first"
        except Exception as error:  # the store is gone with rank 0, most likely
            save.error = f"rank {self.world.rank}: {error}"
        save.seconds = time.monotonic() - save.began

    def _write(self, save: Save) -> dict[str, Any]:
        """Write this rank's file: its entry in the manifest, or what went wrong."""
        aside = self._aside(save)
        try:
            self.snapshot.copy()
            aside.mkdir(parents=True, exist_ok=True)
            entry = self.snapshot.write(aside / shard_name(self.world.rank), self.given_up.is_set)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            return {
                "error": f"rank {self.world.rank}: {error if isinstance(error, OSError) else traceback.format_exc()}"
            }
        return {"entry": entry}

    def _tell(self, save: Save, report: dict[str, Any]) -> str | None:
        """Tell rank 0, which completes the checkpoint and tells everybody: what is wrong with it, or None."""
        post, given_up, ranks = self.post, self.given_up.is_set, range(self.world.size)
        post.send(f"{save.number}/{self.world.rank}", report)
        if not self.world.is_rank0:
            return post.receive(f"{save.number}/end", given_up)
        reports = [post.receive(f"{save.number}/{rank}", given_up) for rank in ranks]
        error = self._complete(save, reports)
        post.send(f"{save.number}/end", error)
        for rank in ranks:
            post.delete(f"{save.number}/{rank}")
        post.delete(f"{save.number - 1}/end")  # all have taken it: they have begun another
        return error

    def _complete(self, save: Save, reports: Sequence[dict[str, Any]]) -> str | None:
        """Rank 0: turn the folder written aside into a checkpoint, or remove it and say why."""
        aside, final = self._aside(save), self.folder / checkpoint_name(save.step)
        try:
            if errors := [r["error"] for r in reports if "error" in r]:
                raise OSError("; ".join(errors))
            entries = {shard_name(rank): report["entry"] for rank, report in enumerate(reports)}
            save.first()
            write_whole(aside / manifest.MANIFEST, manifest.to_bytes({**save.content, "files": entries}))
            if final.exists():  # written by an earlier start, and by then found damaged
                self._remove(final)
            aside.rename(final)
            write_whole(self.folder / "latest", final.name.encode())
            self._prune()
            if self.mirror:
                self.mirror.enqueue(final.name)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            return str(error)
        return None

    def _prune(self) -> None:
        for step in manifest.superfluous([c.manifest for c in complete(self.folder)], self.keep_last, self.keep_best):
            if self.mirror is None or self.mirror.working != checkpoint_name(
                step
            ):  # else it is dropped after the next save
                self._remove(self.folder / checkpoint_name(step))

    def _aside(self, save: Save) -> Path:
        return self.folder / f".{checkpoint_name(save.step)}.{self.start}.saving"

    def _remove(self, path: Path) -> None:
        """Take its name away first: a folder of that name is whole."""
        gone = self.folder / f".{path.name}.{self.start}.deleting"
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
