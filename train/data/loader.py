"""Micro-batches of one rank; a thread plans and reads the next steps while the model trains."""

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
from train.data.mixing.stages import mixture_plan
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepPlan, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle, SplitSizes, take_spans
from train.distributed.process_group import DistContext
from train.errors import UserError
from train.util.format import plural

Step = tuple[list[Batch], Cursor]
"""The micro-batches of one rank for one optimizer step, and the cursor after it."""

_ReadStep = tuple[ReadRows, int, Cursor]
"""A step that is read but not yet written to tensors: rows of several steps, its index in them, the cursor after it."""

_CHUNKS_AHEAD = 2
"""Chunks of steps that the thread reads ahead of the model."""
EVAL_TOKENS_PER_GROUP = 8192
"""Held-out tokens of a forward pass where batch.micro is unset: the same for any world size, as evaluation is."""


@dataclass(frozen=True)
class RankShare:
    """A rank's part of each step: the streams s with s mod ``world_size`` = ``rank``, ``micro`` rows a micro-batch.

    A step of a ramp in which a rank has fewer rows than that has one micro-batch of them.
    """

    rank: int
    world_size: int
    micro: int


def split_sizes(split: CorpusSplit) -> SplitSizes:
    """The sizes of a split's shards and samples, as ``EpochOrder`` needs them."""
    return SplitSizes(split.shard_samples, split.shard_tokens, split.sample_tokens)


class Loader:
    """Endless iterator over a rank's training steps; every rank gets equally many micro-batches of ``micro`` rows.

    ``micro_batches`` is their number once the batch has its whole size: fewer in the steps of a ramp.

    Rows beyond a rank's own (it owns fewer streams than another, or ``micro`` does not divide them) are masked: all
    their targets are IGNORE. ``next()`` raises any error of the thread that reads ahead, such as UserError for a
    damaged shard.
    """

    def __init__(
        self, split: CorpusSplit, plan: StepPlan, share: RankShare, examples: ExampleBuilder, pin: bool = False
    ) -> None:
        if share.world_size > plan.shape.streams:
            raise UserError(
                f"{plural(share.world_size, 'worker')} for {plural(plan.shape.streams, 'stream')}: a worker would have "
                f"no data. Take at most {plural(plan.shape.streams, 'worker')}, or a larger batch.global"
            )
        self.plan = plan
        self._split, self._share, self._examples, self._pin = split, share, examples, pin
        self._streams = range(share.rank, plan.shape.streams, share.world_size)
        self._most_streams = -(-plan.shape.streams // share.world_size)
        self.micro = share.micro
        self.micro_batches = -(-plan.shape.rows // plan.shape.streams * self._most_streams // share.micro)
        self._steps_per_chunk = max(1, examples.chunk_tokens // (self.micro_batches * share.micro * plan.shape.seq_len))
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
        cursor = self._cursor
        rows, step, self._cursor = self._ready.popleft()
        return self._micro_batches(rows, step, cursor), self._cursor

    def peek(self, cursor: Cursor) -> list[Batch]:
        """This rank's share of the step at a cursor, read in the calling thread; the loader's position stays."""
        rows, step, _ = self._read_steps(cursor, 1)[0]
        return self._micro_batches(rows, step, cursor)

    def skip_rows(self, rows: Mapping[Cursor, frozenset[int]]) -> None:
        """Mask these rows of the global batch at these cursors from now on; replaces what was set before."""
        self._skipped = rows

    def row_numbers(self, cursor: Cursor) -> list[int]:
        """The numbers, in the step at a cursor, of this rank's rows, in the order of its micro-batches."""
        firsts = np.arange(self.plan.rows_per_stream(cursor)) * self.plan.shape.streams
        return [int(number) for number in np.add.outer(firsts, self._streams).ravel()]

    def seek(self, cursor: Cursor) -> None:
        """Continue from a cursor and drop what was read ahead. Raises UserError if the cursor lies in no epoch."""
        self.plan.check_cursor(cursor)
        self.close()
        self._cursor = cursor

    def data_hash(self, cursor: Cursor) -> str:
        """A hash of the data of the global batch at the cursor: the same on every rank and for any world size."""
        return self.plan.data_hash(cursor, self._skipped.get(cursor, ()))

    def close(self) -> None:
        """Stop the thread. A later ``next()`` starts it again behind the last step that was returned."""
        self._stop.set()
        while self._thread is not None:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.001)
                self._thread = self._thread if self._thread.is_alive() else None
        self._ready.clear()

    def _start_thread(self) -> list[_ReadStep]:
        """Read the first step in the calling thread, which is fastest, and start the thread that reads on behind it."""
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
        """The thread: reads one step, so that the second batch is there soon, then twice as many steps each time."""
        steps = 1
        while not stop.is_set():
            try:
                steps = min(steps, self._steps_per_chunk, self.plan.steps_left(cursor))
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
        """This rank's next ``steps`` steps from a cursor, all in one epoch and of one size."""
        own, rows_each = len(self._streams), steps * self.plan.rows_per_stream(cursor)
        spans = self.plan.row_spans(self._streams, cursor, steps)
        if own > 1:
            # From stream after stream to step after step, and in a step to the rows' order j = i * streams + stream.
            stream, row = np.divmod((np.cumsum(spans.length) - 1) // self.plan.shape.seq_len, rows_each)
            spans = take_spans(spans, np.argsort(row * own + stream, kind="stable"))
        rows = self._examples.read_rows(self._split, spans, cursor.epoch)
        return [(rows, step, self.plan.after(cursor, step + 1)) for step in range(steps)]

    def _micro_batches(self, rows: ReadRows, step: int, cursor: Cursor) -> list[Batch]:
        """Write one of the steps that were read, the one at ``cursor``, to tensors; mask surplus and skipped rows."""
        each = self.plan.rows_per_stream(cursor)
        used, most = each * len(self._streams), each * self._most_streams
        micro = (
            min(self._share.micro, most) if each * self.plan.shape.streams < self.plan.shape.rows else self._share.micro
        )
        held = -(-most // micro) * micro
        batch = empty_batch(self._examples.columns, held, self._pin)
        rows.write(step * used, {key: value[:used].numpy() for key, value in batch.items()})
        if "memory" in batch:  # the row's number in the global batch; negative at the start of an epoch
            numbers = torch.tensor(self.row_numbers(cursor)) + 1
            batch["memory"][:used] = batch["memory"][:used] * numbers if cursor.position else -numbers
        if (sources := self.plan.row_sources(cursor)) is not None:
            batch |= empty_batch({"source": ((), torch.int64)}, held, self._pin)
            batch["source"][:used] = torch.from_numpy(sources[self.row_numbers(cursor)])
        if used < held:
            mask_rows({key: value[used:] for key, value in batch.items()})
        if skipped := self._skipped.get(cursor):
            for index, number in enumerate(self.row_numbers(cursor)):
                if number in skipped:
                    mask_rows({key: value[index : index + 1] for key, value in batch.items()})
        parts = [slice(first, first + micro) for first in range(0, held, micro)]
        return [_slice_batch(batch, part) for part in parts]


class EvalLoader:
    """The rows of a split in storage order, in groups of ``micro`` rows that are the same for any world size.

    Rank r yields groups r, r + world_size, ...; groups that are missing at the end are masked, so that every rank
    yields equally many. ``tokens`` limits it to the first groups with so many tokens. An empty split has no groups.
    """

    def __init__(
        self,
        split: CorpusSplit,
        shape: StepShape,
        share: RankShare,
        examples: ExampleBuilder,
        tokens: int | None = None,
    ) -> None:
        self._split, self._share, self._examples = split, share, examples
        self._shape = StepShape(share.micro, shape.seq_len, 1, shape.pack)
        self.groups = 0
        if split.samples:
            self._plan = BatchPlan(EpochOrder(split_sizes(split), Shuffle(0, 0), shape.pack), self._shape)
            self.groups = self._plan.steps_per_epoch
            if tokens is not None:
                self.groups = min(self.groups, -(-tokens // (share.micro * shape.seq_len)))

    def first_groups(self, tokens: int) -> EvalLoader:
        """A loader of the first groups only, as many as hold ``tokens`` tokens."""
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
        """Bytes of text that the groups predict: exact for the whole split, in proportion to tokens otherwise."""
        if not self.groups:
            return 0.0
        if self._shape.pack:
            tokens = min(self.groups * self._share.micro * self._shape.seq_len, self._plan.order.units)
        else:
            end = min(self.groups * self._share.micro, self._plan.order.units)
            tokens = int(np.minimum(self._split.sample_tokens[:end], self._shape.seq_len).sum())
        return self._split.bytes * tokens / self._split.tokens

    def _read_group(self, group: int) -> Batch:
        batch = empty_batch(self._examples.columns, self._shape.rows, pin=False)
        if group >= self.groups:
            mask_rows(batch)
            return batch
        units_per_row = self._shape.seq_len if self._shape.pack else 1
        spans = self._plan.row_spans([0], Cursor(0, group * self._shape.rows * units_per_row), 1)
        rows = self._examples.read_rows(self._split, spans, 0)
        rows.write(0, {key: value.numpy() for key, value in batch.items()})
        if "memory" in batch:
            batch["memory"].zero_()  # no carried state in evaluation, so that groups are the same in any world
        return batch


@dataclass(frozen=True)
class HeldOut:
    """The held-out split of each source of a mixture by its name; of a single corpus, without a name."""

    parts: Mapping[str, EvalLoader]

    @property
    def groups(self) -> int:
        """Groups of rows of all sources."""
        return sum(part.groups for part in self.parts.values())

    @property
    def bytes(self) -> float:
        """Bytes of text that all groups predict."""
        return sum(part.bytes for part in self.parts.values())

    def first_groups(self, tokens: int) -> HeldOut:
        """Loaders of the first groups only, which hold ``tokens`` tokens, as many of every source."""
        each = -(-tokens // len(self.parts))
        return HeldOut({name: part.first_groups(each) for name, part in self.parts.items() if part.groups})


def _slice_batch(batch: Batch, rows: slice) -> Batch:
    return {key: value[rows] for key, value in batch.items()}


def empty_batch(columns: Columns, rows: int, pin: bool) -> Batch:
    """Uninitialised tensors of a Batch; ``pin`` page-locks them, which asynchronous copies to a GPU need."""
    return {key: torch.empty((rows, *shape), dtype=dtype, pin_memory=pin) for key, (shape, dtype) in columns.items()}


def training_loader(corpus: Corpus, config: schema.Config, share: RankShare, pin: bool = False) -> Loader:
    """The loader of the training split. Raises UserError where streams, global batch and world size do not fit."""
    split, examples = corpus.split("train"), build_examples(config, corpus.tokenizer)
    return Loader(split, training_plan(split, config, examples.row_tokens), share, examples, pin)


def training_plan(split: CorpusSplit, config: schema.Config, row_tokens: int) -> StepPlan:
    """The plan of a training split, in rows of ``row_tokens`` tokens: of a corpus, or of a mixture."""
    data, batch = config.data, config.batch
    streams = data.streams or batch.default_streams
    shape = StepShape(batch.global_, row_tokens, streams, data.cuts_rows, batch.ramp_steps)
    orders = {
        name: EpochOrder(split_sizes(part), Shuffle(config.seed, data.shuffle_shards), data.cuts_rows)
        for name, part in split.parts.items()
    }
    if data.source == "mix":
        return mixture_plan(config, split.parts, orders, shape)
    return BatchPlan(orders[""], shape)


def held_out_loader(corpus: Corpus, config: schema.Config, world: DistContext, split: str = "val") -> HeldOut:
    """The loaders of this rank's part of a held-out split, in groups that are the same for any world size."""
    group = config.batch.micro or max(1, EVAL_TOKENS_PER_GROUP // config.batch.seq_len)
    examples = build_examples(config, corpus.tokenizer)
    shape = StepShape(group, examples.row_tokens, 1, config.data.cuts_rows)
    share = RankShare(world.rank, world.size, group)
    return HeldOut({name: EvalLoader(part, shape, share, examples) for name, part in corpus.split(split).parts.items()})


def loaders(corpus: Corpus, config: schema.Config, world: DistContext) -> tuple[Loader, HeldOut]:
    """This rank's loaders of the training split and of the validation split."""
    streams = config.data.streams or config.batch.default_streams
    rows_per_stream = config.batch.global_ // streams
    rows, usual = (-(-streams // size) * rows_per_stream for size in (world.size, config.cluster.workers or world.size))
    # A world that lost workers takes more micro-batches, not larger ones: memory was measured for the configured world.
    micro = config.batch.micro or -(-rows // max(1, -(-rows // usual)))
    share = RankShare(world.rank, world.size, micro)
    train = training_loader(corpus, config, share, pin=world.device.type == "cuda")
    return train, held_out_loader(corpus, config, world)


def held_out_text(corpus: Corpus, split: str = "val") -> Iterator[bytes]:
    """The UTF-8 text of each held-out document, a long one in parts: the bytes that bits per byte are counted over."""
    documents = corpus.split(split)
    for number in range(documents.samples):
        for part in corpus.tokenizer.decode_parts(documents.document(number)):
            yield part.encode()
