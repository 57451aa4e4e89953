"""The training loop of one rank, in the order in which things happen."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch

from train.batch import SKIPPED_STEP, Batch, StepResult, count_targets, count_tokens, to_device
from train.config.schema import Config
from train.data.loader import Loader
from train.data.sampling.batch_plan import Cursor
from train.distributed import process_group
from train.engine.engine import Engine
from train.errors import Stopped
from train.events import Emit, NoteEvent, StepEvent, StopAgreedEvent
from train.optim.schedule import learning_rate
from train.reporting.activity import RankActivity
from train.reporting.profiler import StepProfiler
from train.reporting.tracking import Record
from train.services import RunServices
from train.stability import early_stopping
from train.stability.guard import Guard
from train.state.train_state import TrainState
from train.util.seeding import seed_of

EMIT_EVERY_S = 0.1
"""Least time between two step events of steps that are not logged."""


@dataclass
class Training:
    """One rank's run, assembled: all that the loop needs."""

    config: Config
    world: process_group.DistContext
    engine: Engine
    loader: Loader
    services: RunServices
    emit: Emit
    should_stop: Callable[[], bool]
    guard: Guard
    activity: RankActivity
    profiler: StepProfiler
    state: TrainState
    saved_step: int | None = None
    """The step of the newest checkpoint."""
    pending: Record | None = None
    """The record of ``state.step`` where a stop came before its evaluation: to be completed first."""

    def due(self, every: int, step: int) -> bool:
        """Whether an action taken ``every`` so many steps is due at ``step``; all are due at the last step, 0 is else
        never.
        """
        return step == self.config.steps or (every > 0 and step % every == 0)


class StepSync(NamedTuple):
    """Sums over all ranks before a step: the size of the global batch, and whether any rank wants to stop."""

    counts: dict[str, int]
    """Trained targets of the global batch, by loss."""
    tokens: int
    """Tokens of the global batch; 0 where nothing of it is trained on."""
    stop: bool
    """Any rank was asked to stop."""
    save_failed: bool
    """The last save is known to have failed on any rank."""


def train(run: Training) -> TrainState:
    """Train to the last step. Raises Stopped, with a checkpoint saved, when any rank was asked to stop."""
    config, state, record, pace = run.config, run.state, run.pending or {}, Pace(run)
    run.activity.charge("start")
    while record or (state.step < config.steps and not early_stopping.should_stop(config.stop, state)):
        if not record:  # else an earlier start made the step, and was stopped before its evaluation
            with run.profiler.step(state.step + 1):
                before, (state, record) = state, make_step(run, state, pace)
            if state.step <= before.step:
                continue  # the guard rejected the step
        if run.due(config.eval_every, state.step):
            state = evaluate(run, state, record)
        if record:
            run.services.log(record)
        if end_early := early_stopping.should_stop(config.stop, state):
            run.emit(NoteEvent(early_stopping.reason(config.stop, state)))
        if (
            end_early or is_best(run, state) or run.due(config.save_every, state.step)
        ) and state.step != run.saved_step:
            run.services.save(state, record.get("val_loss"), pending=None)
            run.saved_step = state.step
        record = {}
    run.services.wait_for_save()
    run.activity.charge("save")
    return state


def make_step(run: Training, before: TrainState, pace: Pace) -> tuple[TrainState, Record]:
    """Make one optimizer step: the state after it, and its record, empty where the step is not logged.

    Where the guard rejects the step, the state is the one to go on from, at ``before.step`` or earlier.
    """
    config, activity, services = run.config, run.activity, run.services
    activity.begin_step(before.step + 1)
    with activity.phase("load batch"):
        torch.manual_seed(seed_of(config.seed, before.step, run.world.rank))
        micro_batches, cursor = next(run.loader)
        sync = sync_step(micro_batches, run.should_stop(), services.poll_save())
    if sync.save_failed:
        services.wait_for_save()  # raises what is wrong
    if sync.stop:
        stop(run, before)
    stalled = services.stall_s
    lr = learning_rate(config.schedule, config.optimizer.lr, before.step, config.steps)
    result = SKIPPED_STEP
    if sync.tokens:
        batches = [to_device(batch, run.world.device) for batch in micro_batches]
        result = run.engine.train_step(batches, sync.counts, lr, services.wait_for_staging)
    losses = mean_losses(result)
    seconds = activity.charge("train", save=services.stall_s - stalled)
    state = before.after(cursor, sync.tokens, result.update_applied, seconds)
    if sync.tokens:
        if target := run.guard.check(before, losses["loss"], result.update_applied):
            run.saved_step = min(run.saved_step or 0, target.step)
            pace.restart(target)
            activity.charge("redo")
            return target, {}
        state = replace(state, history=before.history.after(losses["loss"], before.cursor, config.spikes))
    pace.count_step()
    record: Record = {}
    if run.due(config.log_every, state.step) or run.due(config.eval_every, state.step):
        measured = losses | {"lr": lr, "grad_norm": result.grad_norm}
        record = step_record(run, state, before.cursor, measured) | pace.since_last(state)
    pace.show(run, state, record)
    activity.charge("other")
    return state, record


def sync_step(micro_batches: Sequence[Batch], stop: bool, save_failed: bool) -> StepSync:
    """Sum over the ranks what the global batch holds, and what any rank wants.

    One all-reduce, before the first backward pass, since every gradient is divided by the count of the whole batch.
    """
    counts: Counter[str] = Counter()
    for batch in micro_batches:
        counts.update(count_targets(batch))
    tokens = float(sum(count_tokens(batch) for batch in micro_batches))
    mine = [*map(float, counts.values()), tokens, float(stop), float(save_failed)]
    *sums, tokens, stops, fails = process_group.all_reduce_sum(mine)
    whole = dict(zip(counts, map(int, sums), strict=True))
    return StepSync(whole, int(tokens) if whole["loss"] else 0, stops > 0, fails > 0)


def mean_losses(result: StepResult) -> dict[str, float]:
    """The losses of the global batch, each per trained target; NaN where it has no target. One small all-reduce."""
    pairs = torch.stack([torch.stack([total.double(), count.double()]) for total, count in result.losses.values()])
    sums = process_group.all_reduce_sum(pairs.flatten().tolist())
    totals, counts = sums[::2], sums[1::2]
    means = [total / count if count else math.nan for total, count in zip(totals, counts, strict=True)]
    return dict(zip(result.losses, means, strict=True))


def step_record(run: Training, state: TrainState, cursor: Cursor, measured: Record) -> Record:
    """The line of ``metrics.jsonl`` of the step whose data begin at ``cursor``, without speed and evaluation."""
    return {
        "step": state.step,
        **measured,
        "tokens": state.tokens,
        "epoch": cursor.epoch,
        "data_hash": run.loader.data_hash(cursor),
    }


def evaluate(run: Training, state: TrainState, record: Record) -> TrainState:
    """Evaluate the model and add its metrics to ``record``; the state then has its score."""
    try:
        metrics = run.services.evaluate(state)
    except Stopped:
        stop(run, state, pending=record)
    record |= metrics
    return early_stopping.update(run.config.stop, state, metrics)


def is_best(run: Training, state: TrainState) -> bool:
    """Whether the model of this very step is the best so far, and the best are kept."""
    return run.config.keep_best > 0 and state.best_step == state.step


def stop(run: Training, state: TrainState, pending: Record | None = None) -> NoReturn:
    """All ranks have seen the request to stop: save, unless this step is saved already, and raise Stopped."""
    run.emit(StopAgreedEvent())
    if state.step not in (0, run.saved_step):
        run.services.save(state, None, pending)
    run.services.wait_for_save()
    run.activity.enter("end")
    raise Stopped


class Pace:
    """Times for people to look at: the speed since the last record, and a step event now and then."""

    def __init__(self, run: Training) -> None:
        self.spent, self.meter, self.shown = run.activity.times.spent, run.services.meter, -math.inf
        self.restart(run.state)

    def restart(self, state: TrainState) -> None:
        """Count tokens and seconds from this state on."""
        self.tokens, self.stalled = state.tokens, self.spent["save"]
        self.seconds, self.steps = self.spent["data"] + self.spent["train"], list[float]()

    def count_step(self) -> None:
        """A step was made: its seconds, waiting for data included, are those since the one before."""
        seconds = self.spent["data"] + self.spent["train"]
        self.steps.append(seconds - self.seconds)
        self.seconds = seconds

    def since_last(self, state: TrainState) -> Record:
        """Speed, waiting for data included, GPU memory, and the seconds waited for saves, since the last record."""
        measured = self.meter.record(state.tokens - self.tokens, self.steps)
        stalled = self.stalled
        self.restart(state)
        return {**measured, "save_stall_s": round(self.stalled - stalled, 4)}

    def show(self, run: Training, state: TrainState, record: Record) -> None:
        """Emit where the run is, with the numbers of a logged step; other steps at most every EMIT_EVERY_S."""
        now = time.monotonic()
        if self.shown < 0:
            run.activity.enter("train")
        if record or now - self.shown > EMIT_EVERY_S:
            self.shown = now
            run.emit(StepEvent(run.config.steps, state.step, record))
