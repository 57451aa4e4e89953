"""Asynchronous saves: a checkpoint is begun between two steps and completed while later steps run.

A thread of each rank copies its pieces of the training state (``train.checkpoint.staging``), writes them into a
temporary folder and forces them to the disk. When all ranks have, rank 0 adds the manifest and renames the folder, so a
folder of the final name is always complete; then it updates ``latest``. The threads exchange messages through the store
of the process group, never by a collective. One save is in flight at a time: the next one waits for it.
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

from torch import Tensor

from train.checkpoint import manifest
from train.checkpoint.mirror import Mirror
from train.checkpoint.pieces import Even, without_even
from train.checkpoint.reader import complete
from train.checkpoint.staging import StagingBuffer, StateKey
from train.distributed import process_group
from train.distributed.param_shard import ParamShard, ShardedState
from train.errors import UserError
from train.state.train_state import TrainState
from train.util.io import write_whole
from train.util.run_layout import checkpoint_name, shard_name

POLL_S = 0.01
CLOSE_S = 10.0
"""Seconds that a closing run waits for the thread of a cancelled save."""


@dataclass
class PendingSave:
    """One save, in flight or finished."""

    number: int
    step: int
    manifest_values: dict[str, Any]
    """The manifest without its files."""
    before_publish: Callable[[], None]
    """Called on rank 0 once all files are written, before the checkpoint appears."""
    started_at: float
    carried: frozenset[str] | None
    """Where all else is evenly sharded: the states that are not; None where nothing is."""
    thread: threading.Thread = field(init=False)
    seconds: float = 0.0
    error: str | None = None
    """Why it was not completed: the same on every rank; None if it was."""
    reported: bool = False
    """Whether ``pop_finished`` has returned it."""


class CheckpointWriter:
    """Writes one rank's part of a run's checkpoints. Constructed by all ranks together."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_best: int,
        world: process_group.DistContext,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder, self.world, self.mirror = folder, world, mirror
        self.keep_last, self.keep_best = keep_last, keep_best
        self.staging, self.mailbox = StagingBuffer(world.device), process_group.StoreMailbox("saves")
        self.stall_s = 0.0
        """Seconds that steps have waited for saves."""
        self.current: PendingSave | None = None
        self.next_number = 0
        self.closing = threading.Event()
        if world.is_rank0:
            for stale in folder.glob(".step_*"):  # left by earlier attempts that were killed
                shutil.rmtree(stale, ignore_errors=True)
        self.start_id: str = process_group.broadcast_object(secrets.token_hex(4))
        """In the names of temporary folders: a rank of an earlier attempt may still be alive and writing."""

    # -------------------------------------------------------------------------------------------- the training thread

    def save(
        self,
        engine: ShardedState,
        progress: TrainState,
        val_loss: float | None,
        run_values: dict[str, Any],
        before_publish: Callable[[], None],
    ) -> None:
        """Begin the checkpoint ``step_<n>``, once ``wait_for_save`` has returned for the one before.

        ``run_values`` go into the manifest; rank 0's thread calls ``before_publish`` before the checkpoint appears.
        """
        started_at = time.monotonic()
        states: dict[StateKey, Tensor] = {}
        for shard in self._own_shards(engine):
            states |= {(kind, shard.name, shard.start): view for kind, view in engine.states(shard).items()}
        manifest_values = {
            "progress": progress.to_dict(),
            "val_loss": val_loss,
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
            "scalars": engine.scalars(),
            "world_size": self.world.size,
            **run_values,
        }
        self.staging.begin_copy(states)
        carried = frozenset(shard.name for shard in engine.carried) if engine.evenly_sharded else None
        self.current = save = PendingSave(
            self.next_number, progress.step, manifest_values, before_publish, started_at, carried
        )
        self.next_number += 1
        save.thread = threading.Thread(target=self._run_save, args=[save], name="save", daemon=True)
        save.thread.start()
        self.stall_s += time.monotonic() - started_at

    def wait_for_staging(self) -> None:
        """Wait, before each update, until the save in flight has copied the weights and moments."""
        self.stall_s += self.staging.wait_for_copy()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self.current is not None and self.current.thread.is_alive()

    def pop_finished(self) -> PendingSave | None:
        """The last save, when it has finished, and only once; else None."""
        save = self.current
        if save is None or save.reported or self.busy:
            return None
        save.reported = True
        return save

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; other ranks may see it a moment later."""
        return self.current is not None and self.current.error is not None

    def wait_for_save(self) -> None:
        """Wait for the save in flight. A collective; raises UserError on every rank if it could not be written.

        The ranks wait together, by repeated small reductions, so that the death of one ends the wait of the others.
        """
        start, save = time.monotonic(), self.current
        if save is None:
            return
        while process_group.all_reduce_sum([float(self.busy)])[0]:
            save.thread.join(POLL_S)
        self.stall_s += time.monotonic() - start
        if save.error:
            raise UserError(
                f"no checkpoint could be written to {self.folder}: {save.error}. Earlier checkpoints are untouched. "
                "Make room or mend the folder, then give the same command: the run goes on from the newest one."
            )

    def wait_for_mirror(self, limit_s: float) -> None:
        """Wait at most ``limit_s`` seconds for the mirror's copy of the newest checkpoint, if any. A collective."""
        if self.mirror:
            self.mirror.wait_for_copies(limit_s)

    def close(self) -> None:
        """Cancel what is in flight, since the run ends."""
        self.closing.set()
        if self.mirror:
            self.mirror.closing.set()
        if self.current:
            self.current.thread.join(CLOSE_S)

    def _own_shards(self, engine: ShardedState) -> Sequence[ParamShard]:
        """The pieces that this rank writes: its own, or its share where every rank has all of them."""
        own = engine.param_shards[self.world.rank :: self.world.size] if engine.replicated else engine.param_shards
        return [*own, *engine.carried]

    # ---------------------------------------------------------------------------------------------- the writer's thread

    def _run_save(self, save: PendingSave) -> None:
        try:
            save.error = self._exchange_reports(save, self._write_rank_file(save))
        except process_group.WaitCancelled:
            save.error = "the run ended first"
        except Exception as error:  # most likely the store ended with rank 0
            save.error = f"rank {self.world.rank}: {error}"
        save.seconds = time.monotonic() - save.started_at

    def _write_rank_file(self, save: PendingSave) -> dict[str, Any]:
        """Write this rank's file: returns {"entry": its part of the manifest} or {"error": text}."""
        folder = self._temporary_folder(save)
        try:
            self.staging.copy()
            folder.mkdir(parents=True, exist_ok=True)
            entry = self.staging.write_file(folder / shard_name(self.world.rank), self.closing.is_set)
            even: Even = {}
            if save.carried is not None:
                place = (self.world.rank, self.world.size)
                shapes = save.manifest_values["shapes"]
                entry["pieces"], even = without_even(entry["pieces"], shapes, *place, save.carried)
        except Exception as error:  # any error: the other ranks must not wait for this one
            return {
                "error": f"rank {self.world.rank}: {error if isinstance(error, OSError) else traceback.format_exc()}"
            }
        # Rank 0's names are all: it has a share of every parameter, however small.
        return {"entry": entry, "even": even} if self.world.is_rank0 else {"entry": entry}

    def _exchange_reports(self, save: PendingSave, report: dict[str, Any]) -> str | None:
        """Report to rank 0, which publishes the checkpoint and answers all ranks: returns its error, or None."""
        mailbox, cancelled, ranks = self.mailbox, self.closing.is_set, range(self.world.size)
        mailbox.send(f"{save.number}/{self.world.rank}", report)
        if not self.world.is_rank0:
            return mailbox.receive(f"{save.number}/end", cancelled)
        reports = [mailbox.receive(f"{save.number}/{rank}", cancelled) for rank in ranks]
        error = self._publish(save, reports)
        mailbox.send(f"{save.number}/end", error)
        for rank in ranks:
            mailbox.delete(f"{save.number}/{rank}")
        mailbox.delete(f"{save.number - 1}/end")  # all ranks have read it, since they began this save
        return error

    def _publish(self, save: PendingSave, reports: Sequence[dict[str, Any]]) -> str | None:
        """Rank 0: turn the temporary folder into a checkpoint, or delete it and return the error."""
        temporary, final = self._temporary_folder(save), self.folder / checkpoint_name(save.step)
        try:
            if errors := [r["error"] for r in reports if "error" in r]:
                raise OSError("; ".join(errors))
            entries = {shard_name(rank): report["entry"] for rank, report in enumerate(reports)}
            save.before_publish()
            values = {**save.manifest_values, "files": entries, "even": reports[0]["even"]}
            write_whole(temporary / manifest.MANIFEST, manifest.to_bytes(values))
            if final.exists():  # of an earlier attempt, which has been found damaged
                self._delete(final)
            temporary.rename(final)
            write_whole(self.folder / "latest", final.name.encode())
            self._prune()
            if self.mirror:
                self.mirror.enqueue(final.name)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return str(error)
        return None

    def _prune(self) -> None:
        for step in manifest.surplus_steps([c.manifest for c in complete(self.folder)], self.keep_last, self.keep_best):
            name = checkpoint_name(step)
            being_copied = self.mirror is not None and self.mirror.copying == name
            if not being_copied:  # else it is deleted after the next save
                self._delete(self.folder / name)

    def _temporary_folder(self, save: PendingSave) -> Path:
        return self.folder / f".{checkpoint_name(save.step)}.{self.start_id}.saving"

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint; rename it first, since a folder of its name must be complete."""
        renamed = self.folder / f".{path.name}.{self.start_id}.deleting"
        path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
