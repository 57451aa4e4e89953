"""The one place where a rank's run is put together, from a configuration and a corpus to its summary."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from train.data.loader import EvalLoader, Loader, loaders
from train.data.sampling.batch_plan import Cursor
from train.distributed import heartbeat, process_group
from train.engine.engine import Engine
from train.errors import Stopped, UserError
from train.evaluate import Evaluation, evaluate
from train.generation.text_streamer import encode_prompts, generate_text
from train.kernel_setup import choose_kernels
from train.loop import Record, Training, finish_pending, phase, train
from train.models.generation_api import Generative
from train.objectives import build_objective
from train.optim.factory import build_optimizer, parameter_groups
from train.optim.layerwise_lr import split_by_depth
from train.pretrained import init_from
from train.reporting.goodput import TimeByCause, goodput
from train.reporting.run_outline import outline
from train.reporting.tracking import Tracker
from train.run_dir import resume
from train.run_dir.environment import lineage
from train.stability.guard import Guard
from train.state.train_state import TrainState
from train.util.io import write_whole
from train.util.redact import redact_tree

Emit = Callable[[Record], None]
MIRROR_WAIT_S, MIRROR_WAIT_STOPPED_S = 600.0, 20.0
"""How long the end of a run, and a stop, wait for the last copy to be complete elsewhere."""


def train_rank(
    config: Config, corpus_folder: str, world: process_group.DistContext, emit: Emit, should_stop: Callable[[], bool]
) -> None:
    """What one rank of a world runs: train to the last step, evaluate, sample, summarise.

    Goes on from the newest whole checkpoint of ``run.dir`` if there is one. Raises Stopped once asked to stop and saved, and
    UserError for what the user can mend.
    """
    folder, times = Path(config.run.dir or ""), TimeByCause()
    emit(phase("data"))
    process_group.assert_equal_across_ranks("configuration", configuration.digest(config))
    corpus = Corpus(corpus_folder, config.model.special)
    process_group.assert_equal_across_ranks("corpus", corpus.fingerprint)
    note = partial(_note, world, emit)
    mirror = Mirror(config.save_mirror, folder, config, world, note) if config.save_mirror else None
    if error := process_group.run_on_rank0(lambda: _open_folder(config, corpus, world, emit, mirror)):
        raise UserError(error)
    loader, held_out = loaders(corpus, config, world)
    found = _newest(folder, corpus, world, note, mirror)
    emit(phase("engine"))
    chosen = choose_kernels(config, corpus.tokenizer.vocab_size, world, loader.peek(Cursor())[0])
    start = partial(_begin_from, config, corpus, world, note) if config.init.from_ and not found else None
    engine, objective = build_engine(config, corpus.tokenizer.vocab_size, world, loader, start)
    _check_prompts(objective, corpus, config)
    progress, pending = restore(found, engine, loader)
    saver = CheckpointWriter(folder / "checkpoints", config.keep_last, config.keep_best, world, mirror)
    emit({"event": "plan", "kernels": chosen} | outline(config, world, corpus, objective, progress))
    tracker = Tracker(config, progress.step - (pending is not None), times, note) if world.is_rank0 else None
    work = RunServices(config, world, corpus, engine, held_out, saver, tracker, emit, should_stop)
    guard = Guard(config, world, corpus, engine, loader, work.wait_for_save, work.on_rollback)
    saved = progress.step if found else None
    training = Training(config, world, engine, loader, work, emit, should_stop, guard, times, progress, saved)
    emit(phase("first_step"))
    try:
        if pending is not None:
            finish_pending(training, pending)
        progress = train(training)
        work.finish(progress, times)
        saver.wait_for_mirror(MIRROR_WAIT_S)
    except Stopped:
        times.lap("save")
        if tracker:
            tracker.close({})
        saver.wait_for_mirror(MIRROR_WAIT_STOPPED_S)
        raise
    finally:
        saver.close()
        loader.close()


def build_engine(
    config: Config,
    vocab_size: int,
    world: process_group.DistContext,
    loader: Loader,
    start: Callable[[Any], None] | None = None,
) -> tuple[Engine, Any]:
    """The objective and the engine that trains it. Every rank draws the same weights; ``start`` puts others in their place."""
    objective = build_objective(config, vocab_size).to(world.device)
    if start:
        start(objective)
    init_from.freeze_parameters(objective, config.init.freeze)
    groups = parameter_groups(objective, config.optimizer.weight_decay)
    if config.optimizer.layer_decay < 1:
        groups = split_by_depth(
            groups, [name for name, _ in objective.named_parameters()], config.optimizer.layer_decay
        )
    optimizer = build_optimizer(config.optimizer, groups)
    return Engine(objective, optimizer, config, world, loader.micro, loader.micro_batches), objective


def restore(found: Checkpoint | None, engine: Engine, loader: Loader) -> tuple[TrainState, Record | None]:
    """Fill engine and loader from a checkpoint, or start at the beginning: the progress, and a record still to be finished."""
    if found is None:
        return TrainState(), None
    reader.restore(found, engine)
    loader.seek(found.progress.cursor)
    return found.progress, found.manifest["pending"]


def _begin_from(
    config: Config, corpus: Corpus, world: process_group.DistContext, note: Callable[[str], None], objective: Any
) -> None:
    """Fill a new run's objective from ``init.from``, say so, and write down where its weights come from: ``init.json``."""
    taken = init_from.load_weights(objective, config, corpus.tokenizer, world)
    note(taken.summary())
    file = Path(config.run.dir or "") / "init.json"
    if error := process_group.run_on_rank0(lambda: write_whole(file, json.dumps(asdict(taken), indent=1).encode())):
        raise UserError(error)


@dataclass
class RunServices:
    """What a rank does beside its steps: log, evaluate, sample, save, summarise."""

    config: Config
    world: process_group.DistContext
    corpus: Corpus
    engine: Engine
    held_out: EvalLoader
    saver: CheckpointWriter
    tracker: Tracker | None
    """Rank 0's; the others have none."""
    emit: Emit
    should_stop: Callable[[], bool]
    last: Evaluation | None = None
    plain: Any = None
    """A copy of the objective outside DeepSpeed, to sample from."""

    def log(self, record: Record) -> None:
        """Rank 0 writes the line of a step; numbers that are not finite become null, since JSON has none."""
        if self.tracker:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            self.tracker.log(finite)

    def evaluate(self, progress: TrainState, whole: bool = False) -> Record:
        """The numbers of the ``whole`` held-out split, or of ``eval_tokens`` of it before the last step; and samples."""
        if not self.held_out.groups:
            return {}
        began = time.monotonic()
        self.emit(phase("eval"))
        heartbeat.enter_phase("eval")
        part = None if whole or progress.step == self.config.steps else self.config.eval_tokens
        held_out = self.held_out if part is None else self.held_out.first(part)
        sums = evaluate(self.engine.evaluate, held_out, self.world, self.should_stop)
        self.last = Evaluation(sums, held_out.bytes if self.engine.module.whole_text else None)
        found = self.last.numbers()
        self.emit({"event": "eval", "step": progress.step, "seconds": time.monotonic() - began} | found)
        self._sample(progress)
        self.emit(phase("train"))
        return found

    def save(self, progress: TrainState, val_loss: float | None, pending: Record | None) -> None:
        """Begin a checkpoint of now, after the one before. The metrics up to it are forced to the disk before it is complete."""
        heartbeat.enter_phase("save")
        self.wait_for_save()
        if self.tracker:
            self.tracker.run.save()  # before the checkpoint, so that the seconds of its steps are known where it is
        about = {"corpus": self.corpus.fingerprint, "pending": pending}
        self.saver.save(
            self.engine, progress, val_loss, about, self.tracker.metrics.sync if self.tracker else lambda: None
        )

    def wait_for_staging(self) -> None:
        """Before each update: until the save in flight has its copy."""
        self.saver.wait_for_staging()

    def poll_save(self) -> bool:
        """Whether the last save is known to have failed; one that has come to its end is said."""
        save = self.saver.pop_finished()
        if save and not save.error:
            path = str(self.saver.folder / f"step_{save.step}")
            self.emit(
                {"event": "save", "step": save.step, "path": path, "seconds": save.seconds, "stall_s": self.stall_s}
            )
        return self.saver.failed

    def wait_for_save(self) -> None:
        """Wait for the save in flight."""
        waits = self.saver.busy
        if waits:
            heartbeat.enter_phase("save")
            self.emit(phase("save"))
        self.saver.wait_for_save()
        self.poll_save()
        if waits:
            self.emit(phase("train"))

    @property
    def stall_s(self) -> float:
        """Seconds, since the start, that steps have waited for saves."""
        return self.saver.stall_s

    def on_rollback(self, progress: TrainState, why: str) -> None:
        """The run goes on from ``progress`` once more."""
        _note(self.world, self.emit, f"after step {progress.step}: {why}")
        if self.world.is_rank0 and self.saver.mirror:
            self.saver.mirror.drop_after(progress.step)
        if self.tracker:
            self.tracker.go_back(progress.step)

    def finish(self, progress: TrainState, times: TimeByCause) -> None:
        """The summary of a run that made all its steps, or enough of them."""
        part = progress.step < self.config.steps and self.config.eval_tokens  # all that the last evaluation has seen
        if self.held_out.groups and (self.last is None or part):
            self.evaluate(progress, whole=True)
        heartbeat.enter_phase("end")
        times.lap("eval")
        if not self.tracker:
            return
        seconds = times.by_cause(progress.train_s)
        summary = {
            "step": progress.step,
            "val_loss": None,
            "perplexity": self.last and self.last.perplexity,
            "bits_per_byte": None,
            **(self.last.numbers() if self.last else {}),
            "params": sum(math.prod(self.engine.shapes[name]) for name in self.engine.names.values()),
            "tokens": progress.tokens,
            "wall_s": round(sum(seconds.values()), 2),
            "save_stall_s": round(seconds["save"], 3),
            "goodput": round(goodput(seconds), 4),
            "time_by_cause": {cause: round(s, 3) for cause, s in seconds.items()},
            "starts": self.tracker.run.values["starts"],
            "stale": progress.stale,
        }
        if self.last:
            summary |= self.last.details(getattr(self.config.objective, "classes", []))
        self.tracker.finish(summary)
        self.emit({"event": "done", "summary": summary})

    def _sample(self, progress: TrainState) -> None:
        """Rank 0 writes on from the prompts, with a plain copy of the weights; the others help to gather them."""
        options = self.config.generation
        if not options.prompts or not options.max_tokens or not isinstance(self.engine.module, Generative):
            return
        heartbeat.enter_phase("sample")
        weights = dict(self.engine.whole_weights())
        if not self.world.is_rank0:
            return
        self.plain = self.plain or build_objective(self.config, self.corpus.tokenizer.vocab_size)
        self.plain.load_state_dict(weights, strict=False)
        texts = generate_text(self.plain.eval(), self.corpus.tokenizer, options.prompts, options)
        rows = [(prompt, best.text) for prompt, (best, *_) in zip(options.prompts, texts, strict=True)]
        for prompt, text in rows:
            self.emit({"event": "sample", "step": progress.step, "prompt": prompt, "text": text})
        if self.tracker:
            self.tracker.samples(progress.step, rows)


def _newest(
    folder: Path, corpus: Corpus, world: process_group.DistContext, note: Callable[[str], None], mirror: Mirror | None
) -> Checkpoint | None:
    """The newest whole checkpoint of the run, made on this corpus; UserError for another."""
    found = reader.find_newest(folder / "checkpoints", world, note, mirror)
    if found:
        resume.same_corpus(folder, found.manifest["corpus"], corpus.fingerprint)
    return found


def _check_prompts(objective: Any, corpus: Corpus, config: Config) -> None:
    """Refuse prompts that cannot be written on from: now, and not at the first evaluation."""
    if isinstance(objective, Generative):
        encode_prompts(objective, corpus.tokenizer, config.generation.prompts, config.generation)


def _open_folder(
    config: Config, corpus: Corpus, world: process_group.DistContext, emit: Emit, mirror: Mirror | None
) -> None:
    """Rank 0: refuse a folder of another run, say what changed, and write down what a reader of the run needs."""
    folder = Path(config.run.dir or "")
    if mirror and not (folder / "config.yaml").exists():
        mirror.fetch_run()
    changes = resume.check(config, corpus.fingerprint)
    if changes:
        emit({"event": "note", "text": "changed since the last start: " + "; ".join(changes)})
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(redact_tree(configuration.to_dict(config)), sort_keys=False, allow_unicode=True)
    write_whole(folder / "config.yaml", content.encode())
    write_whole(folder / "tokenizer.json", corpus.tokenizer.content.encode())
    about = {"folder": str(corpus.folder.resolve()), "fingerprint": corpus.fingerprint}
    write_whole(folder / "corpus.json", json.dumps(about).encode())
    write_whole(folder / "environment.json", json.dumps(lineage(world.device, world.size), indent=1).encode())


def _note(world: process_group.DistContext, emit: Emit, text: str) -> None:
    if world.is_rank0:
        emit({"event": "note", "text": text})
