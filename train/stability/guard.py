"""Guard against bad steps: re-evaluate, roll back, mask the bad rows and retry, at most N times.

    non-finite step, sound model    bad data: the update was skipped, so the step is made again in place, without the
    bad rows
    non-finite step, broken model   roll back to the newest checkpoint with a normal loss on its own data
    high loss, sound model          hard text: nothing is done
    high loss, broken model         a spike: roll back to such a checkpoint

A model is sound while its loss on the reference, a recent step with a normal loss, is not high. The rows masked are
those whose loss is an outlier under the restored weights; where none is, all rows of the step. All ranks take part in
each of these.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.batch import count_targets, to_device
from train.checkpoint.reader import Checkpoint, complete, restore
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import Loader
from train.data.sampling.batch_plan import Cursor
from train.distributed import process_group
from train.distributed.param_shard import nonfinite_parameters
from train.engine.engine import Engine
from train.errors import NotFinite, UserError
from train.evaluate import Evaluation
from train.pretrained import init_from
from train.stability.find_documents import documents_of_step
from train.stability.nonfinite import first_nonfinite
from train.stability.skipped_rows import How, SkippedRows, SkipRecord
from train.state import loss_history
from train.state.train_state import TrainState
from train.util.format import plural, some
from train.util.run_layout import RunDir

ROLLBACK_STEPS = 8
"""Steps before the bad one whose rows are evaluated after a rollback: the cause may lie before its effect."""

MAX_ROWS = 4096
"""Rows masked at once, about; bad rows beyond them are found when their step is made."""

NEW_RUN = (
    "Start anew under another run.name: with a lower optimizer.lr, or with other weights to begin with "
    "(init.from, model.init_std)"
)

StepRow = tuple[Cursor, int]
"""A row of the global batch: the cursor of its step, and its number there."""


@dataclass
class Guard:
    """Detects non-finite or spiking steps, rolls back and masks the rows to blame."""

    config: Config
    world: process_group.DistContext
    corpus: Corpus
    engine: Engine
    loader: Loader
    wait_for_save: Callable[[], None]
    """Waits for the save in flight."""
    on_rollback: Callable[[TrainState, str], None]
    """Called with the state that the run goes on from, and why."""
    note: Callable[[str], None]
    """Shows the user a line of text."""

    def __post_init__(self) -> None:
        """Mask the rows that earlier starts of the run found bad. A collective."""
        self.skipped = SkippedRows(RunDir(Path(self.config.run.dir or "")))
        self.loader.skip_rows(self.skipped.rows)

    def check(self, before: TrainState, loss: float, applied: bool) -> TrainState | None:
        """None where the step made from ``before`` is kept; else the state to go on from, to which engine and loader
        are reset.

        ``loss`` is that of the global batch, ``applied`` whether the update was made. A collective for a bad step.
        Raises UserError where bad steps exceed the limits of the configuration.
        """
        watched = self.config.spikes
        limit = before.history.limit(watched)
        trouble = loss_history.diagnose_step(loss, applied, limit)
        searching = self.config.precision.name == "fp16" and math.isfinite(loss) and not applied  # for the loss scale
        if watched.watch == "off" or trouble is None or searching:
            if not applied:
                self._accept_skipped_update(before)
            return None
        sound = self._loss_is_normal(before.history.reference or self.loader.plan.after(before.cursor), limit)
        if trouble == "spike" and sound:
            return None
        how: How = "in place" if sound and not applied else "rolled back"
        target = before if how == "in place" else self._roll_back(before)
        skipped, layers = self._find_bad_rows(before, target, how)
        record = self._make_record(before, trouble, skipped) | {
            "how": how,
            "back_to": target.step,
            "loss": loss if math.isfinite(loss) else None,
            "limit": limit if math.isfinite(limit) else None,
            "layers": layers,
        }
        self.skipped.append(record)
        self._enforce_limits(record)
        self.loader.skip_rows(self.skipped.rows)
        self.loader.seek(target.cursor)
        self.on_rollback(target, describe(record))
        return target

    def refuse_worthless(self, state: TrainState, evaluation: Evaluation | None) -> None:
        """Raise NotFinite where ``state``, the last of a run, was reached without any update, or by one that broke the
        model: no later step judges it.
        """
        if state.updates and evaluation and not math.isfinite(evaluation.sums["loss"][0]):
            raise NotFinite(
                f"after step {state.step}, the last, the held-out loss is not finite: its update broke the model, and "
                "it is not saved. Lower optimizer.lr or set optimizer.clip, and give the same command"
            )
        if state.updates:
            return
        why = "no token of its batches is a target of the objective" if not state.tokens else "no gradient was finite"
        if self.skipped.records:
            first = self.skipped.records[0]
            why = f"the numbers were not finite, first at step {first['step']}, and the rows it read were left out"
        raise NotFinite(
            f"nothing was trained: none of the {plural(state.step, 'step')} made an update, since {why}. {NEW_RUN}"
        )

    def _accept_skipped_update(self, before: TrainState) -> None:
        """Note a step without update; raise NotFinite at the ``optimizer.max_skipped``-th in a row."""
        step, limit = before.step + 1, self.config.optimizer.max_skipped
        self.note(f"step {step}: the gradient is not finite, the update is skipped")
        if before.skipped_in_row + 1 >= limit:
            self.wait_for_save()
            raise NotFinite(
                f"{limit} updates in a row had a gradient that is not finite, the last at step {step} "
                f"(optimizer.max_skipped={limit}). The weights of step {step - limit} are intact and the newest "
                "checkpoint holds good ones: lower optimizer.lr, set optimizer.clip, or look at the data of these steps"
            )

    def _loss_is_normal(self, reference: Cursor, limit: float) -> bool:
        """Whether the loss of the step at ``reference`` is below ``limit`` under the current weights. A collective."""
        losses = [self.engine.evaluate(to_device(b, self.world.device))["loss"] for b in self.loader.peek(reference)]
        totals, counts = zip(*losses, strict=True)
        total, count = process_group.all_reduce_sum([sum(map(float, totals)), sum(map(float, counts))])
        return count > 0 and math.isfinite(total) and total / count <= limit

    def _roll_back(self, before: TrainState) -> TrainState:
        """Restore the newest checkpoint that is whole and sound, or the initial weights where the run has no checkpoint
        yet.

        Newer checkpoints are removed, so that the next start does not resume from them. Raises NotFinite where none is
        sound.
        """
        self.wait_for_save()  # it reads the weights that are about to be overwritten, and may be newer than the target
        checkpoints = complete(RunDir(Path(self.config.run.dir or "")).checkpoints)
        good = next((c for c in reversed(checkpoints) if self._restore_if_sound(c)), None)
        if checkpoints and good is None:
            raise NotFinite(
                f"after step {before.step} the model is broken, and so is every checkpoint of the run: "
                "Start anew under another run.name, with a lower optimizer.lr, and keep more of them (keep_last)"
            )
        if good is None:
            self.engine.fill(init_from.first_weights(self.config, self.corpus.tokenizer, self.world).read)
            if broken := nonfinite_parameters(self.engine.param_shards):
                raise NotFinite(f"the run begins with weights that are not finite, in {some(broken, 3)}. {NEW_RUN}")
        target = good.progress if good else TrainState()
        process_group.run_on_rank0(
            lambda: _remove_checkpoints(c.path for c in checkpoints if c.progress.step > target.step)
        )
        return target

    def _restore_if_sound(self, checkpoint: Checkpoint) -> bool:
        mine = checkpoint.damage(slice(self.world.rank, None, self.world.size))
        if any(process_group.gather_objects(mine)):
            return False
        restore(checkpoint, self.engine)
        recent = checkpoint.progress.history
        reference = recent.reference or checkpoint.progress.cursor
        return self._loss_is_normal(reference, recent.limit(self.config.spikes))

    def _find_bad_rows(self, before: TrainState, target: TrainState, how: How) -> tuple[list[StepRow], list[str]]:
        """The rows to mask, and the first layers with non-finite output, by name. A collective."""
        plan, redone = self.loader.plan, before.step - target.step
        cursors = [plan.after(target.cursor, n) for n in range(max(0, redone - ROLLBACK_STEPS), redone + 1)]
        with first_nonfinite(self.engine.module) as first:
            losses: dict[StepRow, float] = {}
            for cursor in cursors:
                losses |= self._row_losses(cursor)
            limit = loss_history.row_limit(list(losses.values()), self.config.spikes.deviations)
            blamed = bad = [row for row, loss in losses.items() if loss_history.is_outlier(loss, limit)]
            any_good, ahead = len(bad) < len(losses), before.cursor
            while bad and len(blamed) < MAX_ROWS:  # a long bad document continues in the next steps
                ahead = plan.after(ahead)
                further = self._row_losses(ahead)
                bad = [row for row, loss in further.items() if loss_history.is_outlier(loss, limit)]
                any_good |= len(bad) < len(further)
                blamed = blamed + bad
        if how == "rolled back" and len(blamed) >= MAX_ROWS and not any_good:
            raise NotFinite(
                f"under the weights of step {target.step} not one of {len(blamed):,} rows has a finite loss, so the "
                f"weights are at fault and not the text. {NEW_RUN}"
            )
        if not blamed:
            # A loss is measured before its update: after a rollback, the step before may be to blame, too.
            last = cursors[-1:] if how == "in place" else cursors[-2:]
            blamed = [row for row in losses if row[0] in last]
        layers = process_group.gather_objects(sorted(set(first)))
        return blamed, sorted(set().union(*layers))

    def _row_losses(self, cursor: Cursor) -> dict[StepRow, float]:
        """The loss of each row of the step at a cursor, evaluated alone; rows without targets are left out. A
        collective.
        """
        rows = self.config.batch.global_
        sums, counts = [0.0] * rows, [0.0] * rows
        mine = iter(self.loader.row_numbers(cursor))
        for batch in (to_device(b, self.world.device) for b in self.loader.peek(cursor)):
            for index in range(len(batch["tokens"])):
                row = {key: value[index : index + 1] for key, value in batch.items()}
                total, _ = self.engine.evaluate(row)["loss"]  # padding too: under ZeRO-3 all ranks gather together
                if (number := next(mine, None)) is not None:
                    sums[number], counts[number] = float(total), count_targets(row)["loss"]
        table = process_group.all_reduce_sum([*sums, *counts])
        return {(cursor, n): table[n] / table[rows + n] for n in range(rows) if table[rows + n]}

    def _make_record(self, before: TrainState, trouble: str, skipped: Sequence[StepRow]) -> SkipRecord:
        groups: dict[Cursor, list[int]] = {}
        for cursor, row in skipped:
            groups.setdefault(cursor, []).append(row)
        documents: dict[str, str] = {}
        if self.world.is_rank0:
            standing = (
                p
                for c, rows in groups.items()
                for p in documents_of_step(self.corpus, self.loader.plan, c)
                if p.row in rows
            )
            documents = {part.document: part.source for part in standing}
        return {
            "step": before.step + 1,
            "kind": trouble,
            "time": round(time.time(), 3),
            "skipped": [{"epoch": c.epoch, "position": c.position, "rows": rows} for c, rows in groups.items()],
            "documents": [{"document": document, "source": source} for document, source in documents.items()],
        }

    def _enforce_limits(self, record: SkipRecord) -> None:
        watched, limit = self.config.spikes, self.config.optimizer.max_skipped
        if record["how"] == "in place":
            if self.skipped.count_in_a_row("in place", record["step"], 1) > limit:
                # Before the loss history is full, a learning rate that is far too high looks like bad data.
                if record["limit"] is None:
                    raise NotFinite(
                        f"{plural(limit, 'step')} in a row had numbers that are not finite, each on other data "
                        f"(optimizer.max_skipped={limit}), the last at step {record['step']}: lower optimizer.lr, "
                        "lengthen schedule.warmup or set optimizer.clip. If the loss had been falling, "
                        f"look at {source_files(record)}"
                    )
                raise UserError(
                    f"{plural(limit, 'step')} in a row held data that make the numbers infinite "
                    f"(optimizer.max_skipped={limit}), the last from {source_files(record)}: look at these files, "
                    "and take them out of the corpus"
                )
        elif self.skipped.count_in_a_row("rolled back", record["step"], watched.window) > watched.max_rollbacks:
            raise NotFinite(
                f"step {record['step']}: {describe(record)}. It has come {watched.max_rollbacks + 1} times in a row, "
                f"on other data each time (spikes.max_rollbacks={watched.max_rollbacks}), so the model is at fault and "
                f"not the text. The run stands at step {record['back_to']}, which is good: lower optimizer.lr, "
                "lengthen schedule.warmup or set optimizer.clip "
                "and give the same command; spikes.watch=nonfinite lets a spike of the loss pass"
            )


def _remove_checkpoints(folders: Iterable[Path]) -> None:
    for folder in folders:
        # Renamed first, since a folder of that name is complete.
        gone = folder.rename(folder.with_name(f".{folder.name}.deleting"))
        shutil.rmtree(gone, ignore_errors=True)


def source_files(record: SkipRecord) -> str:
    """The files of a record's documents, in words."""
    names = list(dict.fromkeys(document["source"] for document in record["documents"]))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def describe(record: SkipRecord) -> str:
    """A record of ``skipped.jsonl`` in words, for the user."""
    what = "the numbers were not finite"
    if record["kind"] == "spike":
        what = f"the loss was {record['loss']:.3f}, where {record['limit']:.3f} is high, and the model damaged"
    layers = f", first in {', '.join(record['layers'][:2])}" if record["layers"] else ""
    rows = sum(len(part["rows"]) for part in record["skipped"])
    how = "made again" if record["how"] == "in place" else f"back to step {record['back_to']}"
    return f"{what}{layers}; {how} without {plural(rows, 'row')} of {source_files(record)}"
