"""Loaders: contents of rows, exact partition among ranks, seek to any cursor, errors of the thread."""

import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from train.batch import IGNORE
from train.config.keys.data import TokenizerConfig
from train.data import tokenizer
from train.data.examples.causal import CausalExamples
from train.data.loader import EvalLoader, Loader, RankShare, held_out_text, split_sizes
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle
from train.errors import UserError

UNEVEN = [[3, 5, 2, 9, 4, 6, 8], [11], [1 + i % 13 for i in range(100)]]  # shards of 7, 1 and 100 documents


def build_plan(corpus, shape: StepShape, seed: int = 0) -> BatchPlan:
    return BatchPlan(EpochOrder(split_sizes(corpus.split("train")), Shuffle(seed, 2), shape.pack), shape)


def read_steps(
    corpus, shape: StepShape, share: RankShare, count: int, start: Cursor | None = None, isolate: bool = True
):
    loader = Loader(corpus.split("train"), build_plan(corpus, shape), share, CausalExamples(shape.seq_len, isolate))
    loader.seek(start or Cursor())
    steps = [next(loader) for _ in range(count)]
    loader.close()
    return steps


def real_rows(micro_batches) -> list[tuple]:
    """Every row with a target, as (tokens, targets, positions, segments)."""
    whole = {}
    for key in micro_batches[0]:
        whole[key] = torch.cat([batch[key] for batch in micro_batches])
    rows = zip(*(column.tolist() for column in whole.values()), strict=True)
    return [tuple(map(tuple, row)) for row in rows if any(row[3])]


def count_targets(micro_batches) -> int:
    return sum(int((batch["targets"] != IGNORE).sum()) for batch in micro_batches)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_uneven_shards_give_an_exact_epoch_for_any_world_size(build_corpus, pack, micro, world):
    corpus = build_corpus(UNEVEN)
    split = corpus.split("train")
    shape = StepShape(10, 16, 5, pack)
    plan = build_plan(corpus, shape)
    count = plan.steps_per_epoch
    alone = read_steps(corpus, shape, RankShare(0, 1, 10), count)
    ranks = [read_steps(corpus, shape, RankShare(rank, world, micro), count) for rank in range(world)]
    micro_batches = [step[0] for step in chain.from_iterable(ranks)]
    assert len({len(batches) for batches in micro_batches}) == 1
    assert all(batch["tokens"].shape == (micro, 16) for batch in chain.from_iterable(micro_batches))
    for number in range(count):
        union = chain.from_iterable(real_rows(rank[number][0]) for rank in ranks)
        assert sorted(union) == sorted(real_rows(alone[number][0]))
        assert {rank[number][1] for rank in ranks} == {alone[number][1]}
    assert sum(count_targets(step[0]) for step in alone) == split.tokens
    assert alone[-1][1] == Cursor(1, 0)
    if not pack:  # each document is a row, and came once
        rows = list(chain.from_iterable(real_rows(step[0]) for step in alone))
        documents = [tuple(split.document(sample).tolist()) for sample in range(split.samples)]
        assert sorted(row[1][: row[3].count(1) - 1] for row in rows) == sorted(documents)


def reference_row(split, spans, T: int, isolate: bool) -> tuple:
    """A row built from its spans token by token, as ``train.batch`` defines it."""
    tokens, targets, positions, segments = [], [], [], []
    number = 0
    for sample, start, length in spans:
        if sample < 0:
            tokens += [0] * length
            targets += [IGNORE] * length
            segments += [0] * length
        else:
            number += 1
            stored = [256, *split.document(sample).tolist(), 256]
            tokens += stored[start : start + length]
            targets += stored[start + 1 : start + length + 1]
            segments += [number if isolate else 1] * length
        positions += range(length)
    return tokens, targets, positions if isolate else list(range(T)), segments


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_rows_equal_a_token_by_token_reference(build_corpus, pack, isolate):
    corpus = build_corpus(UNEVEN)
    split, T = corpus.split("train"), 16
    shape = StepShape(4, T, 2, pack)
    plan = build_plan(corpus, shape)
    cursor = Cursor()
    for micro_batches, after in read_steps(corpus, shape, RankShare(0, 1, 4), plan.steps_per_epoch, isolate=isolate):
        rows, room = [[]], T
        for span in np.stack(plan.row_spans(range(2), cursor, 1), axis=1).tolist():
            if not room:
                rows.append([])
                room = T
            rows[-1].append(span)
            room -= span[2]
        for stream in range(2):
            for i in range(2):
                expected = reference_row(split, rows[stream * 2 + i], T, isolate)
                row = i * 2 + stream  # row j of a step comes from stream j mod S
                actual = tuple(value[row].tolist() for value in micro_batches[0].values())
                assert actual == tuple(list(column) for column in expected)
        cursor = after


def test_document_longer_than_a_row_continues_with_new_positions(build_corpus):
    corpus = build_corpus([[40]])
    (first, _), (second, _) = read_steps(corpus, StepShape(1, 16, 1), RankShare(0, 1, 1), 2)
    assert first[0]["tokens"][0, 0] == 256
    assert first[0]["targets"][0, -1] == second[0]["tokens"][0, 0]
    assert second[0]["positions"][0].tolist() == list(range(16))


def test_batches_have_the_keys_and_dtypes_of_the_contract(build_corpus):
    ((batches, _),) = read_steps(build_corpus(UNEVEN), StepShape(4, 16, 2), RankShare(0, 1, 2), 1)
    assert [value.dtype for value in batches[0].values()] == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert list(batches[0]) == ["tokens", "targets", "positions", "segments"]
    for batch in batches:
        assert all(value.is_contiguous() for value in batch.values())


@pytest.mark.parametrize("pack", [True, False])
def test_seek_equals_replay_across_epochs(build_corpus, pack):
    corpus = build_corpus(UNEVEN)
    shape = StepShape(6, 16, 3, pack)
    count = 3 * build_plan(corpus, shape).steps_per_epoch
    replay = read_steps(corpus, shape, RankShare(1, 2, 2), count)
    for number in range(0, count - 2, 3):
        sought = read_steps(corpus, shape, RankShare(1, 2, 2), 2, start=replay[number][1])
        for (actual, after), (expected, expected_after) in zip(sought, replay[number + 1 :], strict=False):
            assert after == expected_after
            for a, b in zip(actual, expected, strict=True):
                assert all(torch.equal(a[key], b[key]) for key in a)


def test_stops_at_other_world_sizes_lose_and_repeat_nothing(build_corpus):
    corpus = build_corpus(UNEVEN)
    shape = StepShape(12, 8, 6)
    count = 2 * build_plan(corpus, shape).steps_per_epoch
    unbroken = [sorted(real_rows(step[0])) for step in read_steps(corpus, shape, RankShare(0, 1, 12), count)]
    cursor, seen = Cursor(), []
    for world in (4, 2, 6, 1, 5):
        part = count // 5 + 1
        ranks = [read_steps(corpus, shape, RankShare(rank, world, 2), part, start=cursor) for rank in range(world)]
        for step in range(part):
            seen.append(sorted(chain.from_iterable(real_rows(rank[step][0]) for rank in ranks)))
        cursor = ranks[0][-1][1]
    assert seen[:count] == unbroken


def test_cursor_is_that_of_the_batch_consumed_not_of_the_one_read(build_corpus):
    corpus = build_corpus([[200] * 20])
    loader = Loader(
        corpus.split("train"), build_plan(corpus, StepShape(2, 8, 2)), RankShare(0, 1, 2), CausalExamples(8, True)
    )
    positions = [next(loader)[1].position for _ in range(5)]
    loader.close()
    assert positions == [8, 16, 24, 32, 40]


def test_close_ends_the_thread_and_next_starts_it_again(build_corpus):
    corpus = build_corpus(UNEVEN)
    shape, share = StepShape(4, 16, 2), RankShare(0, 1, 4)
    expected = read_steps(corpus, shape, share, 4)
    before = threading.active_count()
    loader = Loader(corpus.split("train"), build_plan(corpus, shape), share, CausalExamples(shape.seq_len, True))
    steps = [next(loader), next(loader)]
    loader.close()
    loader.close()
    assert threading.active_count() == before
    steps += [next(loader), next(loader)]
    loader.close()
    for (_, cursor), (_, expected_cursor) in zip(steps, expected, strict=True):
        assert cursor == expected_cursor


def test_damaged_shard_is_reported_by_next(build_corpus):
    corpus = build_corpus([[50] * 4])
    path = corpus.folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    loader = Loader(
        corpus.split("train"), build_plan(corpus, StepShape(1, 8, 1)), RankShare(0, 1, 1), CausalExamples(8, True)
    )
    with pytest.raises(UserError, match=r"train-000000.tar: damaged.*launch.sh prepare"):
        next(loader)


def test_more_workers_than_streams_are_refused(build_corpus):
    corpus = build_corpus(UNEVEN)
    with pytest.raises(UserError, match="3 workers for 2 streams"):
        Loader(
            corpus.split("train"), build_plan(corpus, StepShape(4, 16, 2)), RankShare(0, 3, 1), CausalExamples(16, True)
        )


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_held_out_groups_are_the_same_for_any_world_size(build_corpus, pack, world):
    corpus = build_corpus([[5]], UNEVEN)
    split, shape = corpus.split("val"), StepShape(1, 16, 1, pack)
    alone = [
        batch
        for batch in EvalLoader(split, shape, RankShare(0, 1, 4), CausalExamples(shape.seq_len, True))
        if count_targets([batch])
    ]
    loaders = [
        EvalLoader(split, shape, RankShare(rank, world, 4), CausalExamples(shape.seq_len, True))
        for rank in range(world)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    groups = [list(loader) for loader in loaders]
    interleaved = [groups[number % world][number // world] for number in range(world * len(loaders[0]))]
    for number, batch in enumerate(interleaved):
        if number < len(alone):
            assert all(torch.equal(batch[key], alone[number][key]) for key in batch)
        else:
            assert count_targets([batch]) == 0
            assert not batch["segments"].any()
    assert count_targets(alone) == split.tokens
    assert loaders[0].bytes == split.bytes


def test_held_out_tokens_can_be_limited_to_the_first_groups(build_corpus):
    split = build_corpus([[5]], UNEVEN).split("val")
    loader = EvalLoader(split, StepShape(1, 16, 1), RankShare(0, 1, 4), CausalExamples(16, True), tokens=100)
    assert loader.groups == 2
    assert count_targets(list(loader)) == 128
    assert loader.bytes == pytest.approx(split.bytes * 128 / split.tokens)


def test_empty_held_out_split_has_no_groups(build_corpus):
    loader = EvalLoader(
        build_corpus([[5]]).split("val"), StepShape(1, 16, 1), RankShare(0, 2, 4), CausalExamples(16, True)
    )
    assert (len(loader), loader.bytes, list(loader)) == (0, 0.0, [])


def test_held_out_text_comes_back_byte_for_byte(build_corpus):
    corpus = build_corpus([[5]], UNEVEN)
    assert sum(map(len, held_out_text(corpus))) == corpus.split("val").bytes


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_long_held_out_text_comes_in_parts_cut_between_characters(at_once: int, monkeypatch):
    monkeypatch.setattr(tokenizer, "_DECODED_AT_ONCE", at_once)
    settings = TokenizerConfig(kind="bytes")
    of_bytes = tokenizer.Tokenizer(tokenizer.build_tokenizer(settings, (), ""))
    text = "a语b\U0001f600c" * 3 + "é"
    parts = list(of_bytes.decode_parts(np.array(of_bytes.encode(text))))
    assert "".join(parts) == text
    assert len(parts) > 1
    assert list(of_bytes.decode_parts(np.array([], np.uint16))) == [""]


def test_preparing_and_planning_do_not_import_torch():
    modules = "train.data.prepare.prepare, train.data.sampling.batch_plan, sys"
    code = f"import {modules}; raise SystemExit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_damage_read_ahead_is_reported_when_its_step_is_due(build_corpus):
    corpus = build_corpus([[50] * 4, [50] * 4])
    plan = BatchPlan(EpochOrder(split_sizes(corpus.split("train")), Shuffle(0, 0), True), StepShape(1, 51, 1))
    (corpus.folder / "train-000001.tar").write_bytes(b"\0" * (corpus.folder / "train-000001.tar").stat().st_size)
    loader = Loader(corpus.split("train"), plan, RankShare(0, 1, 1), CausalExamples(plan.shape.seq_len, True))
    for _ in range(3):
        next(loader)
    with pytest.raises(UserError, match=r"train-000001.tar: damaged"):
        [next(loader) for _ in range(2)]
