"""A mixture as the loader reads it: the same global batch for any world, each token once an epoch of its source."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.config import load as configuration
from train.data.examples.causal import CausalExamples
from train.data.loader import Loader, RankShare, training_plan
from train.data.mixing.mixture_corpus import MixtureSplit, open_corpus, write_mixture
from train.data.sampling.batch_plan import Cursor
from train.errors import UserError

SHARDS = {
    "code": [[3, 50, 2, 9, 4, 6, 8], [110], [1 + i % 13 for i in range(90)]],
    "notes": [[30] * 9],
    "talk": [[5, 7, 60], [20] * 11],
}


@pytest.fixture
def mixture(build_corpus, tmp_path):
    """The opened mixture of three small corpora."""
    write_mixture(tmp_path / "mix", {name: build_corpus(shards, name=name) for name, shards in SHARDS.items()})
    return open_corpus(tmp_path / "mix")


def config_of(*keys: str, sources: str = "{code: {dir: a}, notes: {dir: b}, talk: {dir: c}}"):
    base = ["data=mix", f"data.sources={sources}", "model=gpt_tiny", "batch.seq_len=16", "batch.global=12", "steps=50"]
    return configuration.load([*base, *keys, "cluster.workers=1"])


WEIGHTED = "{code: {dir: a, weight: 5}, notes: {dir: b, weight: 2}, talk: {dir: c, weight: 1}}"


def plan_of(mixture, *keys: str, sources: str = WEIGHTED):
    config = config_of(*keys, sources=sources)
    return training_plan(mixture.split("train"), config, config.batch.seq_len)


def tokens_by_source(mixture, plan, steps: int) -> dict[str, Counter]:
    """How often each (epoch, sample, offset) of each source stands in the first steps."""
    split, seen = mixture.split("train"), defaultdict(Counter)
    for step in range(steps):
        for _, sample, start, length in plan.step_table(plan.after(Cursor(), step)).tolist():
            key, epoch = split.name_of(sample)
            name, _, local = key.partition("/train/")
            seen[name].update((epoch, int(local), start + i) for i in range(length))
    return seen


def all_tokens(name: str, epoch: int) -> set:
    sizes = [size for shard in SHARDS[name] for size in shard]
    tokens = set()
    for sample, size in enumerate(sizes):
        tokens |= {(epoch, sample, offset) for offset in range(size + 1)}  # and the end of the text
    return tokens


def test_no_token_comes_twice_and_epochs_follow_each_other(mixture):
    plan = plan_of(mixture)
    for name, seen in tokens_by_source(mixture, plan, 60).items():
        assert set(seen.values()) == {1}
        last = max(epoch for epoch, _, _ in seen)
        assert last >= 1, "the test reads each source more than once"
        for epoch in range(last - 1):
            assert all_tokens(name, epoch) <= set(seen)


def test_shares_are_exact_in_tokens_over_every_block_of_steps(mixture):
    plan = plan_of(mixture)
    rows = [Counter() for _ in range(400)]
    for step, count in enumerate(rows):
        for _, sample, _, length in plan.step_table(plan.after(Cursor(), step)).tolist():
            count[mixture.split("train").name_of(sample)[0].partition("/")[0]] += length
    for first in range(0, 400, 40):
        block = sum(rows[first : first + 40], Counter())
        total = sum(block.values())
        assert total == 40 * 12 * 16  # no padding
        assert abs(block["code"] / total - 5 / 8) < 0.005
        assert abs(block["notes"] / total - 2 / 8) < 0.005


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 40), st.sampled_from(["", "data.streams=6"]), st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_share_the_same_global_batch_in_any_world(mixture, world, micro, first, streams, pack):
    keys = [*([streams] if streams else []), f"data.pack={pack}".lower()]
    plan = plan_of(mixture, *keys)
    start = plan.after(Cursor(), first)

    def rows(rank: int, size: int):
        loader = Loader(mixture.split("train"), plan, RankShare(rank, size, micro), CausalExamples(16, True))
        loader.seek(start)
        (batches, cursor), numbers = next(loader), loader.row_numbers(start)
        assert cursor == plan.after(start)
        loader.close()
        lines = np.concatenate([np.stack([b["tokens"], b["targets"], b["segments"]], 1) for b in batches])
        return {number: line.tobytes() for number, line in zip(numbers, lines, strict=False)}

    alone, together = rows(0, 1), {}
    for rank in range(world):
        together |= rows(rank, world)
    assert together == alone


def rows_of(plan, steps: int) -> list[list]:
    """The spans of each row of the first steps, row after row."""
    rows = []
    for step in range(steps):
        cursor = plan.after(Cursor(), step)
        spans = [[] for _ in range(plan.rows_per_stream(cursor) * plan.shape.streams)]
        for row, *span in plan.step_table(cursor).tolist():
            spans[row].append(span)
        rows += spans
    return rows


def test_ramp_of_the_batch_reads_the_same_rows_in_smaller_steps(mixture):
    ramped = plan_of(mixture, "batch.ramp=[[4,5],[6,9]]")
    assert [ramped.rows_per_stream(ramped.after(Cursor(), n)) for n in (0, 4, 5, 8, 9)] == [2, 2, 3, 3, 6]
    assert ramped.full_size == ramped.after(Cursor(), 9) == Cursor(0, 44)
    rows = rows_of(ramped, 20)
    assert rows == rows_of(plan_of(mixture), 15)[: len(rows)]
    with pytest.raises(UserError, match="not one of a mixture"):
        ramped.check_cursor(Cursor(0, 46))


def test_stage_begins_at_its_step_under_a_ramp_of_the_batch(mixture):
    stages = "data.stages=[{until: 10, weights: {code: 1}}, {weights: {notes: 1}}]"
    plan = plan_of(
        mixture, "batch.ramp=[[4,5],[6,9]]", stages, sources="{code: {dir: a}, notes: {dir: b}, talk: {dir: c}}"
    )
    assert set(plan.row_sources(plan.after(Cursor(), 9))) == {1}
    assert set(plan.row_sources(plan.after(Cursor(), 10))) == {2}


def test_what_is_read_is_the_text_of_the_source(mixture):
    plan, split = plan_of(mixture), mixture.split("train")
    loader = Loader(split, plan, RankShare(0, 1, 12), CausalExamples(16, True))
    for _ in range(8):
        (batch,), cursor = next(loader)
        before = Cursor(0, cursor.position - 12)
        targets = defaultdict(list)
        for row, sample, start, length in plan.step_table(before).tolist():
            ids = [*split.document(sample), 256][start : start + length]
            targets[row] += ids
        assert [targets[row] for row in range(12)] == batch["targets"].tolist()
    loader.close()


def test_seek_reaches_any_step_without_those_before_it(mixture):
    plan = plan_of(mixture)
    far = plan.after(Cursor(), 10**9)
    assert far == Cursor(0, 12 * 10**9)
    assert len(plan.step_table(far)) >= 12
    plan.check_cursor(far)
    for wrong in (Cursor(1, 0), Cursor(0, 5), Cursor(0, -12)):
        with pytest.raises(UserError, match="not one of a mixture of 12 rows"):
            plan.check_cursor(wrong)


def test_the_batches_of_a_mixture_stay_what_they_are(mixture):
    assert plan_of(mixture).data_hash(Cursor(0, 1200)) == "ee0b11ef71e9161e"


STAGES = "data.stages=[{until: 20, weights: {code: 1, notes: 1}}, {weights: {code: 1, talk: 3}}]"


def test_a_stage_reads_on_where_the_one_before_it_ended(mixture):
    plain = "{code: {dir: a}, notes: {dir: b}, talk: {dir: c}}"
    plan = plan_of(mixture, STAGES, sources=plain)
    seen = tokens_by_source(mixture, plan, 50)
    assert all(set(counts.values()) == {1} for counts in seen.values())
    first = tokens_by_source(mixture, plan, 20)
    assert set(first) == {"code", "notes"}
    assert seen["notes"] == first["notes"]


@pytest.mark.parametrize("exhausted", ["drop", "stop"])
def test_a_source_that_runs_out_is_read_to_its_last_token(mixture, exhausted):
    sources = "{code: {dir: a, weight: 1, epochs: 2}, notes: {dir: b, weight: 1}, talk: {dir: c, weight: 1}}"
    plan = plan_of(mixture, f"data.exhausted={exhausted}", sources=sources)
    seen = tokens_by_source(mixture, plan, plan.steps)
    assert set(seen["notes"]) == all_tokens("notes", 0)  # the smallest
    assert (set(seen["talk"]) == all_tokens("talk", 0)) == (exhausted == "drop")
    if exhausted == "drop":
        assert set(seen["code"]) == all_tokens("code", 0) | all_tokens("code", 1)
    assert not len(plan.step_table(plan.after(Cursor(), plan.steps)))


def test_without_weights_shares_follow_from_what_is_to_be_read(mixture):
    plan = plan_of(mixture, sources="{code: {dir: a}, notes: {dir: b, epochs: 3}, talk: {dir: c, tokens: 500}}")
    counts = plan.schedule.counts(100_000) / 100_000
    sizes = [mixture.sources["code"].split("train").tokens, 3 * mixture.sources["notes"].split("train").tokens, 500]
    assert counts == pytest.approx(np.array(sizes) / sum(sizes), abs=2e-5)


def test_progress_counts_tokens_and_epochs_of_each_source(mixture):
    plan = plan_of(mixture)
    numbers = plan.progress(Cursor(), plan.after(Cursor(), 50))
    assert sum(numbers[f"tokens/{name}"] for name in SHARDS) == 50 * 12 * 16
    code = mixture.sources["code"].split("train").tokens
    assert numbers["epochs/code"] == pytest.approx(numbers["tokens/code"] / code, abs=1e-6)


def test_sources_of_different_tokenizers_are_refused(build_corpus, tmp_path):
    one, other = build_corpus([[5]], name="one"), build_corpus([[5]], name="other")
    other.index["tokenizer"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match=r"share one tokenizer: one .*257 tokens.*and other"):
        write_mixture(tmp_path / "mix", {"one": one, "other": other})


def test_a_source_that_changed_is_refused(build_corpus, tmp_path):
    write_mixture(tmp_path / "mix", {"one": build_corpus([[5]], name="one")})
    (tmp_path / "one").rename(tmp_path / "away")
    with pytest.raises(UserError, match="one is no prepared corpus"):
        open_corpus(tmp_path / "mix")
    build_corpus([[6]], name="one")
    with pytest.raises(UserError, match="not the corpus that one was"):
        open_corpus(tmp_path / "mix")


def test_names_of_documents_tell_source_and_epoch(mixture):
    split = mixture.split("train")
    assert isinstance(split, MixtureSplit)
    sizes = {name: sum(map(len, shards)) for name, shards in SHARDS.items()}
    total = sum(sizes.values())
    assert split.name_of(0) == ("code/train/000000000", 0)
    assert split.name_of(sizes["code"] + 2 * total) == ("notes/train/000000000", 2)
    assert split.document(sizes["code"] + 2 * total).tolist() == split.document(sizes["code"]).tolist()
    assert split.source(sizes["code"] + 2 * total) == "d0"
