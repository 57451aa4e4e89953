"""Assembly of one rank's run, from a configuration and a corpus to its summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import reader
from train.checkpoint.mirror import Mirror
from train.checkpoint.reader import Checkpoint
from train.checkpoint.writer import CheckpointWriter
from train.config import load as configuration
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import Loader, loaders
from train.data.mixing.mixture_corpus import open_corpus
from train.distributed import determinism, process_group
from train.distributed.device import describe
from train.engine.allocation import allocate_parameters
from train.engine.engine import Engine
from train.engine.gradient_check import GradientCheck
from train.engine.precision import resolve_precision
from train.errors import Stopped, UserError
from train.events import Emit, NoteEvent, PlanEvent
from train.generation.prompts import with_prompts
from train.kernel_setup import DTYPES, choose_kernels
from train.loop import Training, train
from train.models.initial_weights import InitialWeights
from train.objectives import describe_objective
from train.optim.factory import build_optimizer, parameter_groups
from train.optim.layerwise_lr import split_by_depth
from train.pretrained import init_from
from train.reporting.activity import RankActivity
from train.reporting.meter import DeviceRates, Meter
from train.reporting.profiler import StepProfiler
from train.reporting.run_outline import outline, precision_cost
from train.reporting.tracking import Record, Tracker
from train.run_dir import resume
from train.run_dir.environment import lineage
from train.services import RunServices
from train.stability.guard import Guard
from train.state.train_state import TrainState
from train.util.io import to_json, write_whole
from train.util.progress import SlowProgress
from train.util.redact import redact_tree
from train.util.run_layout import RunDir

MIRROR_WAIT_S, MIRROR_WAIT_STOPPED = 600.0, 1 / 3
"""How long the end of a run waits for its last checkpoint's copy in the mirror; and a stop, of its ``stop_grace``."""


def train_rank(
    config: Config, corpus_folder: str, world: process_group.DistContext, emit: Emit, should_stop: Callable[[], bool]
) -> None:
    """Run one rank of a job: train to the last step, evaluate, sample, summarise.

    Goes on from the newest whole checkpoint of ``run.dir`` if there is one. Raises Stopped once asked to stop and
    saved, and UserError for bad input. The default target of every worker.
    """
    run_dir, activity = RunDir(Path(config.run.dir or "")), RankActivity(emit)
    determinism.apply(config.cluster.deterministic)
    activity.enter("open corpus")
    process_group.assert_equal_across_ranks("configuration", configuration.digest(config))
    corpus = open_corpus(corpus_folder, config.model.special)
    process_group.assert_equal_across_ranks("corpus", corpus.fingerprint)
    note = partial(_note, world, emit)
    mirror = Mirror(config.save_mirror, run_dir.path, config, world, note) if config.save_mirror else None
    config, why = _open_run(config, corpus, world, emit, mirror)
    loader, held_out = loaders(corpus, config, world)
    checkpoint = _find_checkpoint(run_dir, corpus, world, note, mirror)
    activity.enter("build engine")
    kernels = choose_kernels(config, corpus.tokenizer.vocab_size, world, loader.peek(loader.plan.full_size)[0], note)
    first = None if checkpoint else init_from.first_weights(config, corpus.tokenizer, world)
    fill = partial(_fill_first, config, world, note, first) if first else partial(_leave_to_checkpoint, note)
    engine, objective = build_engine(config, corpus.tokenizer.vocab_size, world, loader, fill)
    config = with_prompts(config, corpus.tokenizer, note)
    state, pending = restore(checkpoint, engine, loader)
    saver = CheckpointWriter(run_dir.checkpoints, config.keep_last, config.keep_best, world, mirror)
    meter = _make_meter(objective, config, world)
    emit(PlanEvent(kernels, precision_why=why, **outline(config, world, corpus, objective, state, meter.rates)))
    last_logged = state.step - (pending is not None)
    tracker = Tracker(config, last_logged, activity.times, note) if world.is_rank0 else None
    services = RunServices(config, world, corpus, engine, held_out, saver, tracker, emit, activity, meter, should_stop)
    guard = Guard(config, world, corpus, engine, loader, services.wait_for_save, services.on_rollback, note)
    saved = state.step if checkpoint else None
    profiler = StepProfiler(config, world, activity, emit)
    run = Training(
        *(config, world, engine, loader, services, emit, should_stop, guard, activity, profiler, state, saved, pending),
        gradient_check=_make_check(config, world, corpus, engine, guard),
    )
    activity.enter("first step")
    try:
        services.finish(end := train(run), loader.plan.source_totals(end.cursor))
        saver.wait_for_mirror(MIRROR_WAIT_S)
    except Stopped:
        activity.charge("save")
        if tracker:
            tracker.close({})
        saver.wait_for_mirror(MIRROR_WAIT_STOPPED * config.cluster.stop_grace)
        raise
    finally:
        saver.close()
        loader.close()


def build_engine(
    config: Config,
    vocab_size: int,
    world: process_group.DistContext,
    loader: Loader,
    fill: Callable[[Engine], None] | None = None,
) -> tuple[Engine, Any]:
    """The objective and the engine that trains it, its weights drawn, unless ``fill`` gives it others.

    No rank has the whole model where ZeRO shards it: the objective is described, the engine allocates its share, and
    that is filled. The precision of ``config`` must be chosen: see ``resolve_precision``.
    """
    if config.precision.name == "auto":
        raise ValueError("an engine needs a precision of its own, not auto: resolve_precision chooses one")
    objective = describe_objective(config, vocab_size)
    drawn = InitialWeights(objective, config.seed)
    init_from.freeze_parameters(objective, config.init.freeze)
    allocate_parameters(objective, world.device, DTYPES[config.precision.name], config.zero.stage)
    groups = parameter_groups(objective, config.optimizer.weight_decay)
    if config.optimizer.layer_decay < 1:
        groups = split_by_depth(
            groups, [name for name, _ in objective.named_parameters()], config.optimizer.layer_decay
        )
    optimizer = build_optimizer(config.optimizer, groups)
    engine = Engine(objective, optimizer, config, world, loader.micro, loader.micro_batches)
    if fill:
        fill(engine)
    else:
        engine.fill(drawn.read)
    return engine, objective


def restore(checkpoint: Checkpoint | None, engine: Engine, loader: Loader) -> tuple[TrainState, Record | None]:
    """Fill engine and loader from a checkpoint, if given: the state, and the record that lacks its evaluation."""
    if checkpoint is None:
        return TrainState(), None
    reader.restore(checkpoint, engine)
    loader.seek(checkpoint.progress.cursor)
    return checkpoint.progress, checkpoint.manifest["pending"]


def _leave_to_checkpoint(note: Callable[[str], None], engine: Engine) -> None:
    """Fill nothing: ``restore`` does, and a draw takes minutes for billions of weights."""
    engine.on_progress = SlowProgress("reading the checkpoint", note)


def _fill_first(
    config: Config,
    world: process_group.DistContext,
    note: Callable[[str], None],
    first: init_from.FirstWeights,
    engine: Engine,
) -> None:
    """Fill a new run's engine, and write to ``init.json`` what ``init.from`` gave of its weights. A collective."""
    engine.on_progress = SlowProgress(f"weights from {config.init.from_}" if first.report else "weights", note)
    engine.fill(first.read)
    if first.report is None:
        return
    init_from.refuse_unusable(config, first.report, engine.param_shards)
    note(first.report.summary())
    file, content = RunDir(Path(config.run.dir or "")).init, to_json(asdict(first.report), indent=1).encode()
    if error := process_group.run_on_rank0(lambda: write_whole(file, content)):
        raise UserError(error)


def _find_checkpoint(
    run_dir: RunDir,
    corpus: Corpus,
    world: process_group.DistContext,
    note: Callable[[str], None],
    mirror: Mirror | None,
) -> Checkpoint | None:
    """The newest whole checkpoint of the run, if there is one; UserError where it was made on another corpus. A
    collective.
    """
    checkpoint = reader.find_newest(run_dir.checkpoints, world, note, mirror)
    if checkpoint:
        resume.require_same_corpus(run_dir.path, checkpoint.manifest["corpus"], corpus.fingerprint)
    return checkpoint


def _make_check(
    config: Config, world: process_group.DistContext, corpus: Corpus, engine: Engine, guard: Guard
) -> GradientCheck | None:
    """The proof of the first gradient, where it is asked for."""
    if config.verify.gradient == "off":
        return None
    return GradientCheck(config, world, corpus, engine, guard.loader.micro, guard.skipped.rows, guard.note)


def _make_meter(objective: Any, config: Config, world: process_group.DistContext) -> Meter:
    """The meter of this rank's speed; the rate of its device is measured here."""
    flops = objective.flops_per_token(config.batch.seq_len)
    return Meter(DeviceRates.measure(world, flops, config.precision.name), world.device)


def _open_run(
    config: Config, corpus: Corpus, world: process_group.DistContext, emit: Emit, mirror: Mirror | None
) -> tuple[Config, str]:
    """Open the run's folder: the configuration with its precision chosen, and the reason for that. A collective."""
    run_dir = RunDir(Path(config.run.dir or ""))
    if mirror and (error := process_group.run_on_rank0(lambda: _fetch_run(run_dir, mirror))):
        raise UserError(error)
    chosen, why = resolve_precision(config, world)
    if error := process_group.run_on_rank0(lambda: _open_folder(chosen, corpus, world, emit)):
        raise UserError(error)
    if cost := precision_cost(describe(world.device), chosen.precision.name):
        _note(world, emit, cost)
    return chosen, why


def _fetch_run(run_dir: RunDir, mirror: Mirror) -> None:
    """Rank 0: fetch what a resume reads into a new folder, from where its checkpoints are mirrored."""
    if not run_dir.config.exists():
        mirror.fetch_run()


def _open_folder(config: Config, corpus: Corpus, world: process_group.DistContext, emit: Emit) -> None:
    """Rank 0: refuse a folder of another run, note what changed, and write configuration, tokenizer and lineage."""
    run_dir = RunDir(Path(config.run.dir or ""))
    changes = resume.check_resumable(config, corpus.fingerprint)
    if changes:
        emit(NoteEvent("changed since the last start: " + "; ".join(changes)))
    run_dir.path.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(redact_tree(configuration.to_dict(config)), sort_keys=False, allow_unicode=True)
    write_whole(run_dir.config, content.encode())
    write_whole(run_dir.tokenizer, corpus.tokenizer.content.encode())
    if (template := corpus.folder / run_dir.chat_template.name).exists():
        write_whole(run_dir.chat_template, template.read_bytes())
    about = {"folder": str(corpus.folder.resolve()), "fingerprint": corpus.fingerprint}
    write_whole(run_dir.corpus, to_json(about).encode())
    write_whole(run_dir.environment, to_json(lineage(world.device, world.size), indent=1).encode())


def _note(world: process_group.DistContext, emit: Emit, text: str) -> None:
    if world.is_rank0:
        emit(NoteEvent(text))
