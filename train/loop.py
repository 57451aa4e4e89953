"""The loop of one rank, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

from train.batch import SKIPPED_STEP, Batch, StepResult, count_targets, count_tokens, to_device
from train.config.schema import Config
from train.data.loader import Loader
from train.distributed import heartbeat, process_group
from train.engine.engine import Engine
from train.errors import NotFinite, Stopped
from train.events import Emit, NoteEvent, PhaseEvent, StepEvent, StopAgreedEvent
from train.optim.schedule import learning_rate
from train.reporting.goodput import TimeByCause
from train.reporting.throughput import tokens_per_second
from train.stability.early_stopping import reason, should_stop, update
from train.stability.guard import Guard
from train.state.train_state import TrainState
from train.util.seeding import seed_of

Record = dict[str, Any]
EMIT_EVERY_S = 0.1


class Aside(Protocol):
    """What a run does beside its steps. ``evaluate``, ``save`` and ``settle`` are collectives."""

    def log(self, record: Record) -> None:
        """Keep the numbers of a step."""

    def evaluate(self, progress: TrainState) -> Record:
        """The held-out loss of the model as it is now."""

    def save(self, progress: TrainState, val_loss: float | None, pending: Record | None) -> None:
        """Begin a checkpoint of this moment; ``pending`` is a record that still lacks its evaluation."""

    def wait_for_staging(self) -> None:
        """Called before each update: returns when no save still needs the weights and moments as they are."""

    def poll_save(self) -> bool:
        """Whether the save that was begun last is known to have failed."""

    def wait_for_save(self) -> None:
        """Return when what was begun is saved; raise UserError on every rank if it could not be."""

    @property
    def stall_s(self) -> float:
        """Seconds, since the start, that steps have waited for saves."""


@dataclass
class Training:
    """One rank's run, assembled: what the loop needs, and nothing else."""

    config: Config
    world: process_group.DistContext
    engine: Engine
    loader: Loader
    aside: Aside
    emit: Emit
    should_stop: Callable[[], bool]
    guard: Guard
    times: TimeByCause
    progress: TrainState
    saved_step: int | None = None
    """The step of the newest checkpoint."""

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps happens at this one; all of it happens at the last."""
        return step == self.config.steps or (every > 0 and step % every == 0)


def train(run: Training) -> TrainState:
    """Train to the last step. Raises Stopped, saved, when any rank was asked to stop."""
    config, progress, pace = run.config, run.progress, Pace(run)
    run.times.lap("start")
    while progress.step < config.steps and not should_stop(config.stop, progress):
        heartbeat.set_step(progress.step + 1)
        heartbeat.enter_phase("data")
        torch.manual_seed(seed_of(config.seed, progress.step, run.world.rank))
        micro_batches, cursor = next(run.loader)
        counts, tokens, stop, failed = agree(micro_batches, run.should_stop(), run.aside.poll_save())
        run.times.lap("data")
        if failed:
            run.aside.wait_for_save()  # raises what is wrong
        if stop:
            _stop(run, progress)
        batches = [to_device(batch, run.world.device) for batch in micro_batches]
        lr = learning_rate(config.schedule, config.optimizer.lr, progress.step, config.steps)
        stalled = run.aside.stall_s
        result = run.engine.train_step(batches, counts, lr, run.aside.wait_for_staging) if tokens else SKIPPED_STEP
        losses = mean_losses(result)
        loss = losses["loss"]
        seconds = run.times.lap("train", save=run.aside.stall_s - stalled)
        before, progress = progress, progress.after(cursor, tokens, result.update_applied, seconds)
        if tokens and (back := run.guard.check(before, loss, result.update_applied)):
            progress, run.saved_step = back, min(run.saved_step or 0, back.step)
            pace.go_on_from(back)
            run.times.lap("redo")
            continue
        if tokens:
            progress = replace(progress, recent=before.recent.after(loss, before.cursor, config.spikes))
            _refuse_divergence(run, result, progress)
        record = {}
        if run.due(config.log_every, progress.step) or run.due(config.eval_every, progress.step):
            record = report(run, before, progress, losses | {"lr": lr, "grad_norm": result.grad_norm})
            record |= pace.since_last(progress)
        pace.show(run, progress, record)
        run.times.lap("other")
        progress = _aside(run, progress, record)
    run.aside.wait_for_save()
    run.times.lap("save")
    return progress


def agree(micro_batches: Sequence[Batch], stop: bool, failed: bool) -> tuple[dict[str, int], int, bool, bool]:
    """What the global batch holds, and what the ranks want.

    (places that each loss is trained on, tokens (0 where nothing is), whether any rank is asked to stop, whether a save failed).
    One sum over the ranks, before the first backward pass, since every gradient is divided by the count of the whole batch.
    """
    counted = [count_targets(batch) for batch in micro_batches]
    places = [float(sum(counts[name] for counts in counted)) for name in counted[0]]
    tokens = float(sum(count_tokens(batch) for batch in micro_batches))
    *whole, tokens, stops, fails = process_group.all_reduce_sum([*places, tokens, float(stop), float(failed)])
    counts = dict(zip(counted[0], map(int, whole), strict=True))
    return counts, int(tokens) if counts["loss"] else 0, stops > 0, fails > 0


def mean_losses(result: StepResult) -> dict[str, float]:
    """The losses of the global batch; not a number where no place of it was trained on. A small sum over the ranks."""
    sums = process_group.all_reduce_sum([float(value) for pair in result.losses.values() for value in pair])
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {
        name: total / places if places else math.nan for name, (total, places) in zip(result.losses, pairs, strict=True)
    }


def report(run: Training, before: TrainState, progress: TrainState, measured: Record) -> Record:
    """The line of ``metrics.jsonl`` of this step, without its times."""
    return {
        "step": progress.step,
        **measured,
        "tokens": progress.tokens,
        "epoch": before.cursor.epoch,
        "data_hash": run.loader.data_hash(before.cursor),
    }


def finish_pending(run: Training, record: Record) -> None:
    """Make the evaluation that a stop cut short, so that ``metrics.jsonl`` is what it would have been."""
    run.progress = _aside(run, run.progress, record)


def _aside(run: Training, progress: TrainState, record: Record) -> TrainState:
    val_loss = None
    if run.due(run.config.eval_every, progress.step):
        try:
            evaluated = run.aside.evaluate(progress)
        except Stopped:
            _stop(run, progress, record)
        run.times.lap("eval")
        record, val_loss = record | evaluated, evaluated.get("val_loss")
        progress = update(run.config.stop, progress, evaluated)
    if record:
        run.aside.log(record)
    over = should_stop(run.config.stop, progress)
    if over:
        run.emit(NoteEvent(reason(run.config.stop, progress)))
    best = run.config.keep_best > 0 and progress.best_step == progress.step
    if (over or best or run.due(run.config.save_every, progress.step)) and progress.step != run.saved_step:
        run.aside.save(progress, val_loss, None)
        run.times.lap("save")
        run.saved_step = progress.step
    return progress


def _stop(run: Training, progress: TrainState, pending: Record | None = None) -> NoReturn:
    run.emit(StopAgreedEvent())
    if progress.step not in (0, run.saved_step):
        run.aside.save(progress, None, pending)
    run.aside.wait_for_save()
    heartbeat.enter_phase("end")
    raise Stopped


def _refuse_divergence(run: Training, result: StepResult, progress: TrainState) -> None:
    if result.update_applied:
        return
    limit = run.config.optimizer.max_skipped
    run.emit(NoteEvent(f"step {progress.step}: the gradient is not finite, the update is skipped"))
    if progress.skipped_in_row >= limit:
        run.aside.wait_for_save()
        raise NotFinite(
            f"{limit} updates in a row had a gradient that is not finite, the last at step {progress.step} "
            f"(optimizer.max_skipped={limit}). The weights of step {progress.step - limit} are intact and the newest checkpoint "
            "holds good ones: lower optimizer.lr, set optimizer.clip, or look at the data of these steps"
        )


class Pace:
    """Times for people to look at: the speed since the last line, and a progress event now and then."""

    def __init__(self, run: Training) -> None:
        self.spent, self.shown = run.times.spent, -math.inf
        self.go_on_from(run.progress)

    def go_on_from(self, progress: TrainState) -> None:
        """Count from here."""
        self.tokens, self.seconds = progress.tokens, self.spent["data"] + self.spent["train"]
        self.stalled = self.spent["save"]

    def since_last(self, progress: TrainState) -> Record:
        """Tokens per second, waiting for data included, and the seconds waited for saves, since this was last asked."""
        tokens, seconds, stalled = self.tokens, self.seconds, self.stalled
        self.go_on_from(progress)
        speed = tokens_per_second(self.tokens - tokens, self.seconds - seconds)
        return {"tokens_per_s": round(speed, 1), "save_stall_s": round(self.stalled - stalled, 4)}

    def show(self, run: Training, progress: TrainState, record: Record) -> None:
        """Say where the run is; with the numbers of a logged step when there are any."""
        now = time.monotonic()
        if self.shown < 0:
            run.emit(PhaseEvent.now("train"))
        if record or now - self.shown > EMIT_EVERY_S:
            self.shown = now
            run.emit(StepEvent(run.config.steps, progress.step, record))
