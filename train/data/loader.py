"""Batches for one rank: a thread plans and reads the next steps while the model works on this one."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from train.batch import Batch, mask_rows
from train.config import schema
from train.data.corpus.shards import Corpus, CorpusSplit
from train.data.examples import build_examples
from train.data.examples.example_builder import Columns, ExampleBuilder, ReadRows
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle, SplitSizes, take_spans
from train.distributed.process_group import DistContext
from train.errors import UserError

Step = tuple[list[Batch], Cursor]
"""The micro-batches of one rank for one optimizer step, and where the data stands after it."""

_ReadStep = tuple[ReadRows, int, Cursor]
"""A step that is read but not yet written to tensors: its rows, which step of them it is, and the cursor after it."""

_CHUNKS_AHEAD = 2
"""Chunks that wait for the model."""
EVAL_TOKENS_PER_GROUP = 8192
"""Held-out tokens of one forward pass where batch.micro leaves it open: no function of the world, so sums are the same in any."""


@dataclass(frozen=True)
class RankShare:
    """Whose rows: those of the streams s with s mod ``world`` = ``rank``, in micro-batches of ``micro`` rows."""

    rank: int
    world_size: int
    micro: int


def split_sizes(shards: CorpusSplit) -> SplitSizes:
    """What the order must know of a split."""
    return SplitSizes(shards.shard_samples, shards.shard_tokens, shards.sample_tokens)


class Loader:
    """Endless steps of training data from a cursor on; every rank gets equally many micro-batches of ``micro`` rows.

    Rows beyond a rank's own (it owns fewer streams than another, or ``micro`` does not divide them) weigh nothing:
    all their targets are IGNORE. ``next()`` raises what went wrong while preparing, UserError for damaged shards
    included.
    """

    def __init__(
        self, shards: CorpusSplit, plan: BatchPlan, share: RankShare, examples: ExampleBuilder, pin: bool = False
    ) -> None:
        if share.world_size > plan.shape.streams:
            raise UserError(
                f"{share.world_size} workers for {plan.shape.streams} streams: a worker would have no data. Take at most "
                f"{plan.shape.streams} workers, or a larger batch.global"
            )
        self.plan = plan
        self._split, self._share, self._examples, self._pin = shards, share, examples, pin
        self._streams = range(share.rank, plan.shape.streams, share.world_size)
        most = plan.rows_per_stream * -(-plan.shape.streams // share.world_size)
        self.micro = share.micro
        self.micro_batches = -(-most // share.micro)
        self._chunk = max(1, examples.chunk_tokens // (self.micro_batches * share.micro * plan.shape.seq_len))
        self._cursor = Cursor()
        self._skipped: Mapping[Cursor, frozenset[int]] = {}
        self._ready: deque[_ReadStep] = deque()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._queue: queue.Queue[list[_ReadStep] | BaseException] = queue.Queue(_CHUNKS_AHEAD)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """This rank's share of the next step, and the cursor after it."""
        if not self._ready:
            self._ready.extend(self._start_thread() if self._thread is None else self._next_chunk())
        at = self._cursor
        rows, step, self._cursor = self._ready.popleft()
        return self._micro_batches(rows, step, at), self._cursor

    def peek(self, cursor: Cursor) -> list[Batch]:
        """This rank's share of the step at a cursor, read here and now; the loader stays where it is."""
        return self._micro_batches(*self._read_steps(cursor, 1)[0][:2], cursor)

    def skip_rows(self, rows: Mapping[Cursor, frozenset[int]]) -> None:
        """From now on these rows of the steps at these cursors weigh nothing, and no others do."""
        self._skipped = rows

    def row_numbers(self) -> list[int]:
        """Which rows of the global batch this rank's are, in the order in which its micro-batches hold them."""
        return [
            i * self.plan.shape.streams + stream for i in range(self.plan.rows_per_stream) for stream in self._streams
        ]

    def seek(self, cursor: Cursor) -> None:
        """Go on from a cursor; what was prepared ahead is dropped. Raises UserError if it lies in no epoch."""
        self.plan.check_cursor(cursor)
        self.close()
        self._cursor = cursor

    def data_hash(self, cursor: Cursor) -> str:
        """A hash of what the whole world's step at the cursor trains on, the same on every rank of any world."""
        return self.plan.data_hash(cursor, self._skipped.get(cursor, ()))

    def close(self) -> None:
        """Stop preparing. The loader goes on from its last step if it is asked again."""
        self._stop.set()
        while self._thread is not None:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.001)
                self._thread = self._thread if self._thread.is_alive() else None
        self._ready.clear()

    def _start_thread(self) -> list[_ReadStep]:
        """Read one step here and now, so that the first batch waits for nobody, and begin the thread behind it."""
        first = self._read_steps(self._cursor, 1)
        self._stop = threading.Event()
        self._queue = queue.Queue(_CHUNKS_AHEAD)
        arguments = (first[-1][2], self._stop, self._queue)
        self._thread = threading.Thread(target=self._prepare_ahead, args=arguments, name="loader", daemon=True)
        self._thread.start()
        return first

    def _next_chunk(self) -> list[_ReadStep]:
        chunk = self._queue.get()
        if isinstance(chunk, BaseException):
            self.close()
            raise chunk
        return chunk

    def _prepare_ahead(
        self, cursor: Cursor, stop: threading.Event, out: queue.Queue[list[_ReadStep] | BaseException]
    ) -> None:
        """The thread: one step at first, so that the second batch is there soon, then twice as many each time."""
        steps = 1
        while not stop.is_set():
            try:
                steps = min(steps, self._chunk, self.plan.steps_left(cursor))
                chunk = self._read_steps(cursor, steps)
            except BaseException as error:
                out.put(error)
                return
            cursor, steps = chunk[-1][2], 2 * steps
            while not stop.is_set():
                try:
                    out.put(chunk, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def _read_steps(self, cursor: Cursor, steps: int) -> list[_ReadStep]:
        """This rank's next ``steps`` steps from a cursor, all in one epoch."""
        own, rows_each = len(self._streams), steps * self.plan.rows_per_stream
        pieces = self.plan.row_spans(self._streams, cursor, steps)
        if own > 1:
            # From stream after stream to step after step, and in a step to the rows' order j = i * S + s.
            stream, row = np.divmod((np.cumsum(pieces.length) - 1) // self.plan.shape.seq_len, rows_each)
            pieces = take_spans(pieces, np.argsort(row * own + stream, kind="stable"))
        rows = self._examples.read_rows(self._split, pieces, cursor.epoch)
        return [(rows, step, self.plan.after(cursor, step + 1)) for step in range(steps)]

    def _micro_batches(self, rows: ReadRows, step: int, at: Cursor) -> list[Batch]:
        micro, used = self._share.micro, self.plan.rows_per_stream * len(self._streams)
        batch = empty_batch(self._examples.columns, self.micro_batches * micro, self._pin)
        rows.write(step * used, {key: value[:used].numpy() for key, value in batch.items()})
        if "memory" in batch:  # of the row in the whole step, and none at an epoch's start
            numbers = torch.tensor(self.row_numbers()) + 1
            batch["memory"][:used] = batch["memory"][:used] * numbers if at.position else -numbers
        if used < self.micro_batches * micro:
            mask_rows({key: value[used:] for key, value in batch.items()})
        if skipped := self._skipped.get(at):
            for place, number in enumerate(self.row_numbers()):
                if number in skipped:
                    mask_rows({key: value[place : place + 1] for key, value in batch.items()})
        parts = [slice(first, first + micro) for first in range(0, self.micro_batches * micro, micro)]
        return [{key: value[part] for key, value in batch.items()} for part in parts]


class EvalLoader:
    """The rows of a split in the order of storage, in groups of ``micro`` rows that are the same for any world.

    Rank r gives groups r, r + world, ...; those that are missing at the end weigh nothing, so that every rank gives
    equally many. ``tokens`` limits it to the first groups that hold so many places. An empty split gives no groups.
    """

    def __init__(
        self,
        shards: CorpusSplit,
        shape: StepShape,
        share: RankShare,
        examples: ExampleBuilder,
        tokens: int | None = None,
    ) -> None:
        self._split, self._share, self._examples = shards, share, examples
        self._shape = StepShape(share.micro, shape.seq_len, 1, shape.pack)
        self.groups = 0
        if shards.samples:
            self._plan = BatchPlan(EpochOrder(split_sizes(shards), Shuffle(0, 0), shape.pack), self._shape)
            self.groups = self._plan.steps_per_epoch
            if tokens is not None:
                self.groups = min(self.groups, -(-tokens // (share.micro * shape.seq_len)))

    def first_groups(self, tokens: int) -> EvalLoader:
        """The first groups, as many as hold ``tokens`` places."""
        part = copy(self)
        part.groups = min(self.groups, -(-tokens // (self._shape.rows * self._shape.seq_len)))
        return part

    def __len__(self) -> int:
        return -(-self.groups // self._share.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for group in range(self._share.rank, len(self) * self._share.world_size, self._share.world_size):
            yield self._read_group(group)

    @property
    def bytes(self) -> float:
        """Bytes of text that the groups predict: exact for the whole split, in proportion to places for a part."""
        if not self.groups:
            return 0.0
        unit = self._shape.seq_len if self._shape.pack else 1
        end = min(self.groups * self._share.micro * unit, self._plan.order.units)
        places = (
            end
            if self._shape.pack
            else int(np.minimum(self._split.sample_tokens[:end], unit and self._shape.seq_len).sum())
        )
        return self._split.bytes * places / self._split.tokens

    def _read_group(self, group: int) -> Batch:
        batch = empty_batch(self._examples.columns, self._shape.rows, pin=False)
        if group >= self.groups:
            mask_rows(batch)
            return batch
        unit = self._shape.seq_len if self._shape.pack else 1
        pieces = self._plan.row_spans([0], Cursor(0, group * self._shape.rows * unit), 1)
        rows = self._examples.read_rows(self._split, pieces, 0)
        rows.write(0, {key: value.numpy() for key, value in batch.items()})
        if "memory" in batch:
            batch["memory"].zero_()  # a held-out row begins with nothing, so that groups are the same in any world
        return batch


def empty_batch(layout: Columns, rows: int, pin: bool) -> Batch:
    """Tensors of a Batch, not filled; page-locked with ``pin``, as copies to a GPU need."""
    return {key: torch.empty((rows, *shape), dtype=dtype, pin_memory=pin) for key, (shape, dtype) in layout.items()}


def training_loader(corpus: Corpus, config: schema.Config, share: RankShare, pin: bool = False) -> Loader:
    """The training split as the configuration orders it. Raises UserError where streams, batch and world do not fit."""
    data, shards = config.data, corpus.split("train")
    order = EpochOrder(split_sizes(shards), Shuffle(config.seed, data.shuffle_shards), data.pack)
    examples = build_examples(config, corpus.tokenizer)
    shape = StepShape(config.batch.global_, examples.row_tokens, data.streams or config.batch.global_, data.pack)
    return Loader(shards, BatchPlan(order, shape), share, examples, pin)


def held_out_loader(corpus: Corpus, config: schema.Config, world: DistContext, split: str = "val") -> EvalLoader:
    """The rank's part of a held-out split, in groups that are the same for any world."""
    group = config.batch.micro or max(1, EVAL_TOKENS_PER_GROUP // config.batch.seq_len)
    examples = build_examples(config, corpus.tokenizer)
    shape = StepShape(group, examples.row_tokens, 1, config.data.pack)
    return EvalLoader(corpus.split(split), shape, RankShare(world.rank, world.size, group), examples)


def loaders(corpus: Corpus, config: schema.Config, world: DistContext) -> tuple[Loader, EvalLoader]:
    """The rank's training data, and what is held out of it."""
    streams = config.data.streams or config.batch.global_
    depth = config.batch.global_ // streams
    rows, usual = (-(-streams // size) * depth for size in (world.size, config.cluster.workers))
    # A world that has lost workers takes more micro-batches, not larger ones: memory was measured for the usual share.
    share = RankShare(world.rank, world.size, config.batch.micro or -(-rows // max(1, -(-rows // usual))))
    return training_loader(corpus, config, share, pin=world.device.type == "cuda"), held_out_loader(
        corpus, config, world
    )


def held_out_text(corpus: Corpus, split: str = "val") -> Iterator[bytes]:
    """The text of the held-out documents, one by one: what bits per byte are counted over."""
    shards = corpus.split(split)
    return (corpus.tokenizer.decode(shards.document(sample).tolist()).encode() for sample in range(shards.samples))
