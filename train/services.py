"""Services of a run beside its steps: logging, evaluation, sampling, checkpoints and the summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from train.checkpoint.writer import CheckpointWriter
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import HeldOut
from train.distributed import process_group
from train.engine.engine import Engine
from train.evaluate import Evaluation, evaluate
from train.events import DoneEvent, Emit, EvalEvent, NoteEvent, SampleEvent, SaveEvent
from train.generation.text_streamer import generate_text
from train.reporting.activity import RankActivity
from train.reporting.goodput import goodput
from train.reporting.meter import Meter
from train.reporting.tracking import Record, Tracker
from train.state.train_state import TrainState
from train.util.run_layout import checkpoint_name


@dataclass
class RunServices:
    """One rank's services. ``evaluate``, ``save`` and ``wait_for_save`` are collectives."""

    config: Config
    world: process_group.DistContext
    corpus: Corpus
    engine: Engine
    held_out: HeldOut
    saver: CheckpointWriter
    tracker: Tracker | None
    """Rank 0's; the others have none."""
    emit: Emit
    activity: RankActivity
    meter: Meter
    should_stop: Callable[[], bool]
    evaluation: Evaluation | None = None
    """The last evaluation of this start."""

    def note(self, text: str) -> None:
        """One line for the user, from rank 0."""
        if self.world.is_rank0:
            self.emit(NoteEvent(text))

    def log(self, record: Record) -> None:
        """Rank 0 writes the line of a step."""
        if self.tracker:
            self.tracker.log(record)

    def evaluate(self, state: TrainState, whole: bool = False) -> Record:
        """Metrics of the ``whole`` held-out split, or of ``eval_tokens`` of it before the last step; and samples.

        Raises Stopped on every rank where any was asked to stop meanwhile.
        """
        if not self.held_out.groups:
            return {}
        began = time.monotonic()
        with self.activity.phase("evaluate"):
            part = None if whole or state.step == self.config.steps else self.config.eval_tokens
            held_out = self.held_out if part is None else self.held_out.first_groups(part)
            whole_text = bool(self.engine.module.whole_text)
            self.evaluation = evaluate(self.engine.evaluate, held_out, self.world, self.should_stop, whole_text)
            metrics = self.evaluation.numbers()
            self.emit(EvalEvent(state.step, time.monotonic() - began, metrics))
            self._sample(state)
        return metrics

    def save(self, state: TrainState, val_loss: float | None, pending: Record | None) -> None:
        """Begin a checkpoint of now, after the one before. The metrics up to it are forced to the disk before it is
        complete.

        ``pending`` is the record of this step where it still lacks its evaluation, which the next start then makes.
        """
        with self.activity.phase("begin save"):
            self.wait_for_save()
            if self.tracker:
                self.tracker.run.save()  # before the checkpoint, so that the seconds of its steps are known where it is
            about = {"corpus": self.corpus.fingerprint, "pending": pending}
            sync = self.tracker.metrics.sync if self.tracker else lambda: None
            self.saver.save(self.engine, state, val_loss, about, sync)

    def wait_for_staging(self) -> None:
        """Before each update: return when no save in flight still reads the weights and moments."""
        self.saver.wait_for_staging()

    def poll_save(self) -> bool:
        """Whether the last save is known to have failed. Emits an event once a save is complete."""
        save = self.saver.pop_finished()
        if save and not save.error:
            path = str(self.saver.folder / checkpoint_name(save.step))
            self.emit(SaveEvent(save.step, path, save.seconds, self.stall_s))
        return self.saver.failed

    def wait_for_save(self) -> None:
        """Wait until the save in flight is complete; raise UserError on every rank if it could not be written."""
        if self.saver.busy:
            with self.activity.phase("wait for save"):
                self._finish_save()
        else:
            self._finish_save()

    def _finish_save(self) -> None:
        self.saver.wait_for_save()
        self.poll_save()

    @property
    def stall_s(self) -> float:
        """Seconds, since the start, that steps have waited for saves."""
        return self.saver.stall_s

    def on_rollback(self, state: TrainState, why: str) -> None:
        """The run goes on from ``state`` once more: drop what was logged and copied of the steps after it."""
        self.note(f"after step {state.step}: {why}")
        if self.world.is_rank0 and self.saver.mirror:
            self.saver.mirror.drop_after(state.step)
        if self.tracker:
            self.tracker.drop_after(state.step)

    def finish(self, state: TrainState, source_totals: Record) -> None:
        """Write the summary of a run that has made all its steps, or was ended early by its metric.

        ``source_totals``: what was read of each source of a mixture.
        """
        part = state.step < self.config.steps and self.config.eval_tokens  # all that the last evaluation has seen
        if self.held_out.groups and (self.evaluation is None or part):
            self.evaluate(state, whole=True)
        self.activity.enter("end")
        self.activity.charge("eval")
        if not self.tracker:
            return
        seconds = self.activity.times.by_cause(state.train_s)
        evaluation = self.evaluation
        summary = {
            "step": state.step,
            "val_loss": None,
            "perplexity": evaluation and evaluation.perplexity,
            "bits_per_byte": None,
            **(evaluation.numbers() if evaluation else {}),
            "params": sum(math.prod(self.engine.shapes[name]) for name in self.engine.names.values()),
            "tokens": state.tokens,
            **source_totals,
            **self.meter.summary(),
            "wall_s": round(sum(seconds.values()), 2),
            "save_stall_s": round(seconds["save"], 3),
            "goodput": round(goodput(seconds), 4),
            "time_by_cause": {cause: round(s, 3) for cause, s in seconds.items()},
            "starts": self.tracker.run.values["starts"],
            "stale": state.evals_since_best,
        }
        if evaluation:
            summary |= evaluation.details(getattr(self.config.objective, "classes", []))
        self.tracker.finish(summary)
        self.emit(DoneEvent(summary))

    def _sample(self, state: TrainState) -> None:
        """Rank 0 shows how the model goes on from the prompts, on its device and in the precision of training."""
        options = self.config.generation
        model = self.engine.generative()
        if not options.prompts or not options.max_tokens or model is None:
            return
        self.activity.enter("sample")
        texts = generate_text(model, self.corpus.tokenizer, options.prompts, options)
        rows = [(prompt, best.text) for prompt, (best, *_) in zip(options.prompts, texts, strict=True)]
        if not self.world.is_rank0:
            return
        for prompt, text in rows:
            self.emit(SampleEvent(state.step, prompt, text))
        if self.tracker:
            self.tracker.samples(state.step, rows)
