"""The training loop of one rank, in the order in which things happen."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

from train.batch import SKIPPED_STEP, Batch, count_targets, count_tokens, to_device
from train.config.schema import Config
from train.data.loader import Loader
from train.data.sampling.batch_plan import Cursor
from train.distributed import process_group
from train.distributed.device import seed_device
from train.engine.engine import Engine
from train.engine.gradient_check import GradientCheck
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

GC_EVERY = 50
"""Steps between collections of garbage: Python's own come at another step on every rank, and each lets all wait."""


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
    gradient_check: GradientCheck | None = None
    """Proves the gradient of the run's first step before it is made, where that is asked for."""
    ahead: NextStep | None = None
    """The next step, once it is read and agreed on."""

    def due(self, every: int, step: int) -> bool:
        """Whether an action taken ``every`` so many steps is due at ``step``; all are due at the last step, 0 is else
        never.
        """
        return step == self.config.steps or (every > 0 and step % every == 0)


class NextStep(NamedTuple):
    """A step that is about to be made: this rank's data, and the sums over all ranks."""

    micro_batches: list[Batch]
    cursor: Cursor
    """Where the data go on after it."""
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
    with planned_garbage_collection():
        return _train(run)


def _train(run: Training) -> TrainState:
    config, state, record, pace = run.config, run.state, run.pending or {}, Pace(run)
    run.activity.charge("start")
    while record or (state.step < config.steps and not early_stopping.should_stop(config.stop, state)):
        if not record:  # else an earlier start made the step, and was stopped before its evaluation
            with run.profiler.step(state.step + 1):
                before, (state, record) = state, make_step(run, state, pace)
            if state.step <= before.step:
                continue  # the guard rejected the step
            if state.step % GC_EVERY == 0:
                gc.collect(1)
        if run.due(config.eval_every, state.step):
            state = evaluate(run, state, record)
        if state.step == config.steps:
            run.guard.refuse_worthless(state, run.services.evaluation)  # before it is logged and saved
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


@contextmanager
def planned_garbage_collection() -> Iterator[None]:
    """Inside, Python collects no garbage by itself, and never looks at the objects that are there already."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def make_step(run: Training, before: TrainState, pace: Pace) -> tuple[TrainState, Record]:
    """Make one optimizer step: the state after it, and its record, empty where the step is not logged.

    Where the guard rejects the step, the state is the one to go on from, at ``before.step`` or earlier.
    """
    config, activity, services = run.config, run.activity, run.services
    activity.begin_step(before.step + 1)
    step, run.ahead = run.ahead or sync_ranks(run, {})[1], None
    if step.save_failed:
        services.wait_for_save()  # raises what is wrong
    if step.stop:
        stop(run, before)
    seed_device(seed_of(config.seed, before.step, run.world.rank), run.world.device)
    stalled = services.stall_s
    lr = learning_rate(config.schedule, config.optimizer.lr, before.step, config.steps)
    result = SKIPPED_STEP
    if step.tokens:
        batches = [to_device(batch, run.world.device) for batch in step.micro_batches]
        if run.gradient_check and before.step == 0:
            run.gradient_check.check(batches, step.counts)
        result = run.engine.train_step(batches, step.counts, lr, services.wait_for_staging)
    seconds = activity.charge("train", save=services.stall_s - stalled)
    last = before.step + 1 == config.steps
    losses, ahead = sync_ranks(run, result.losses, last)
    run.ahead = None if last else ahead
    seconds += activity.charge("train")
    state = before.after(step.cursor, step.tokens, result.update_applied, seconds)
    if step.tokens:
        if target := run.guard.check(before, losses["loss"], result.update_applied):
            run.saved_step, run.ahead = min(run.saved_step or 0, target.step), None
            pace.restart(target)
            activity.charge("redo")
            return target, {}
        state = replace(state, history=before.history.after(losses["loss"], before.cursor, config.spikes))
    pace.count_step()
    record: Record = {}
    if run.due(config.log_every, state.step) or run.due(config.eval_every, state.step):
        measured = losses | {"lr": lr, "grad_norm": float(result.grad_norm)}
        record = step_record(run, state, before.cursor, measured) | pace.since_last(state)
    pace.show(run, state, record)
    activity.charge("other")
    return state, record


def sync_ranks(
    run: Training, losses: Mapping[str, tuple[float, float]], last: bool = False
) -> tuple[dict[str, float], NextStep]:
    """Read the next step, and sum over the ranks what it holds and what any rank wants; with it the step before.

    Returns the mean ``losses`` of the step before over the global batch, NaN where it has no target. The one collective
    of a step outside DeepSpeed: here, since the guard judges a step before the next forward pass, whose gradients are
    divided by the counts of the whole batch. On a GPU the update of the step before is still running meanwhile. After
    the ``last`` step there is none to read.
    """
    micro_batches: list[Batch] = []
    cursor = Cursor()
    if not last:
        with run.activity.phase("load batch"):
            micro_batches, cursor = next(run.loader)
    counts: Counter[str] = Counter()
    for batch in micro_batches:
        counts.update(count_targets(batch))
    tokens = sum(count_tokens(batch) for batch in micro_batches)
    wishes = [float(run.should_stop()), float(run.services.poll_save())]
    pairs = [number for pair in losses.values() for number in pair]
    sums = iter(process_group.all_reduce_sum([*pairs, *map(float, counts.values()), float(tokens), *wishes]))
    means = {}
    for name in losses:
        total, count = next(sums), next(sums)
        means[name] = total / count if count else math.nan
    whole = {name: int(next(sums)) for name in counts}
    tokens, stops, fails = int(next(sums)), next(sums), next(sums)
    return means, NextStep(micro_batches, cursor, whole, tokens if whole.get("loss") else 0, stops > 0, fails > 0)


def step_record(run: Training, state: TrainState, cursor: Cursor, measured: Record) -> Record:
    """The line of ``metrics.jsonl`` of the step whose data begin at ``cursor``, without speed and evaluation."""
    return {
        "step": state.step,
        **measured,
        "tokens": state.tokens,
        **run.loader.plan.progress(cursor, state.cursor),
        **({"data_hash": run.loader.data_hash(cursor)} if run.world.is_rank0 else {}),  # only rank 0 logs it
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
