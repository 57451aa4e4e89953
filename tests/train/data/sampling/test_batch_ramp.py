"""A ramp of the batch size: every unit once an epoch, the same steps for any world, any step reached by arithmetic."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import load as configuration
from train.config.load import ConfigError
from train.data.examples.causal import CausalExamples
from train.data.loader import Loader, RankShare, split_sizes
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle, SplitSizes

SHARDS = [[3, 5, 2, 9, 4, 6, 8], [11], [1 + i % 13 for i in range(100)]]


@st.composite
def shapes(draw):
    streams = draw(st.integers(1, 4))
    multiples = sorted(draw(st.sets(st.integers(1, 6), min_size=2, max_size=4)))
    ramp = tuple((streams * size, draw(st.integers(0, 30))) for size in multiples[:-1])
    return StepShape(streams * multiples[-1], draw(st.integers(1, 9)), streams, draw(st.booleans()), ramp)


def plan_of(split, shape: StepShape) -> BatchPlan:
    return BatchPlan(EpochOrder(split_sizes(split), Shuffle(1, 2), shape.pack), shape)


def plan_of_sizes(shape: StepShape) -> BatchPlan:
    sizes = SplitSizes(
        np.array([*map(len, SHARDS)]), np.array([*map(sum, SHARDS)]), np.array([*chain.from_iterable(SHARDS)])
    )
    return BatchPlan(EpochOrder(sizes, Shuffle(1, 2), shape.pack), shape)


def documents_of(plan: BatchPlan, cursor: Cursor) -> list[tuple[int, int]]:
    """(sample, offset) of every token of the step at a cursor."""
    tokens = []
    for _, sample, start, length in plan.step_table(cursor).tolist():
        tokens += [(sample, start + offset) for offset in range(length)]
    return tokens


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_every_token_comes_once_an_epoch_across_changes_of_size(shape):
    plan, expected = plan_of_sizes(shape), []
    for sample, size in enumerate(chain.from_iterable(SHARDS)):
        expected += [(sample, offset) for offset in range(size if shape.pack else min(size, shape.seq_len))]
    cursor = Cursor()
    for epoch in range(3):
        seen = []
        while cursor.epoch == epoch:
            seen += documents_of(plan, cursor)
            cursor = plan.after(cursor)
        assert sorted(seen) == sorted(expected)


@given(shapes(), st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_size_is_a_function_of_the_step_and_any_step_is_reached_at_once(shape, steps):
    plan = plan_of_sizes(shape)
    sizes = list(chain.from_iterable([rows] * count for rows, count in shape.ramp))
    cursor = Cursor()
    for step in range(steps):
        expected = sizes[step] if step < len(sizes) else shape.rows
        assert plan.rows_per_stream(cursor) * shape.streams == expected
        assert plan.steps_left(cursor) >= 1
        cursor = plan.after(cursor)
    assert plan.after(Cursor(), steps) == cursor
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    plan.check_cursor(cursor)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_of_any_world_read_the_same_steps(build_corpus, world, pack):
    split = build_corpus(SHARDS).split("train")
    shape = StepShape(16, 4, 4, pack, ((4, 3), (8, 5)))
    plan = plan_of(split, shape)
    ranks = [Loader(split, plan, RankShare(rank, world, 4), CausalExamples(4, True)) for rank in range(world)]
    cursor = Cursor()
    for step in range(20):
        rows = {}
        for loader in ranks:
            micro_batches, after = next(loader)
            texts = chain.from_iterable(batch["tokens"].tolist() for batch in micro_batches)
            rows |= dict(zip(loader.row_numbers(cursor), texts, strict=False))
        assert len(rows) == (4 if step < 3 else 8 if step < 8 else 16)
        alone = Loader(split, plan, RankShare(0, 1, 16), CausalExamples(4, True)).peek(cursor)
        assert [rows[number] for number in sorted(rows)] == alone[0]["tokens"].tolist()
        cursor = after
    for loader in ranks:
        loader.close()


def test_loader_goes_on_from_the_middle_of_a_ramp(build_corpus):
    split = build_corpus(SHARDS).split("train")
    plan = plan_of(split, StepShape(8, 4, 2, True, ((2, 7), (4, 20))))
    loader = Loader(split, plan, RankShare(0, 1, 2), CausalExamples(4, True))
    steps = [next(loader) for _ in range(60)]
    loader.seek(plan.after(Cursor(), 13))
    for batches, after in steps[13:]:
        again, cursor = next(loader)
        assert cursor == after
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(again, batches, strict=True))
    loader.close()


def load(*words: str) -> configuration.Config:
    return configuration.load(["model=gpt_tiny", "batch.seq_len=64", "batch.global=32", "steps=100", *words])


def test_ramp_by_tokens_ends_with_the_step_that_reaches_them():
    config = load("batch.ramp=[[8,2000],[16,4097]]", "batch.ramp_by=tokens")
    # Steps of 512 tokens reach 2,048 with the fourth; steps of 1,024 then 4,097 with the third.
    assert config.batch.ramp_steps == ((8, 4), (16, 3))
    assert config.batch.sequences(100) == 4 * 8 + 3 * 16 + 93 * 32
    assert config.batch.sequences(5) == 4 * 8 + 16
    assert config.data.streams == 8


def test_run_without_a_ramp_has_its_streams_as_before():
    assert load().data.streams == 32
    assert load().batch.sequences(7) == 7 * 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch.ramp=[[8,10]]", "cluster.workers=3"], "stage of 8 sequences, which cluster.workers=3 cannot share"),
        (["batch.ramp=[[6,10]]", "data.streams=4"], "data.streams=4 does not divide the 6 sequences of batch.ramp"),
        (["batch.ramp=[[16,10],[8,20]]"], "sizes that do not grow up to batch.global=32"),
        (["batch.ramp=[[32,10]]"], "sizes that do not grow up to batch.global=32"),
        (["batch.ramp=[[8,10],[16,10]]"], "stages that end before they begin"),
        (["batch.ramp=[[8,100]]"], "lasts 100 steps, and steps=100"),
        (["batch.ramp_by=tokens"], "batch.ramp_by has no effect without batch.ramp"),
        (["batch.ramp=[[12,10]]", "batch.micro=4", "cluster.workers=2"], "divide a worker's share of 6 sequences in"),
    ],
)
def test_ramp_that_cannot_be_is_refused_with_the_cure(words, said):
    with pytest.raises(ConfigError) as error:
        load(*words)
    assert said in str(error.value)
