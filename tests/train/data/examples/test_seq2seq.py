"""Rows for T5: span corruption is reversible and at the published rates; given pairs are kept."""

import json
from itertools import chain

import numpy as np
import pytest

from train.batch import IGNORE
from train.config.keys import objectives
from train.config.keys.base import ENCDEC_TOKENS
from train.data.corpus.shards import Corpus
from train.data.examples.seq2seq import Seq2seqExamples, row_lengths
from train.data.loader import Loader, RankShare, split_sizes
from train.data.prepare.prepare import prepare
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle
from train.errors import UserError

SPANS = objectives.Seq2seq(name="seq2seq", task="spans")
PAIRS = objectives.Seq2seq(name="seq2seq", task="pairs", target_len=8)


def read_epoch(corpus, objective, seq_len, seed=0, isolate=True, pack=True, world=1):
    tokenizer = corpus.tokenizer.extended(ENCDEC_TOKENS)
    examples, shards = Seq2seqExamples(seq_len, isolate, objective, tokenizer, seed), corpus.split("train")
    plan = BatchPlan(
        EpochOrder(split_sizes(shards), Shuffle(seed, 4), pack), StepShape(6, examples.row_tokens, 6, pack)
    )
    rows = []
    for rank in range(world):
        loader = Loader(shards, plan, RankShare(rank, world, 1), examples)
        for step in range(plan.steps_per_epoch):
            rows += [(step, n, b) for n, b in zip(loader.row_numbers(Cursor()), next(loader)[0], strict=False)]
        loader.close()
    rows.sort(key=lambda row: row[:2])
    columns = zip(*(batch.values() for _, _, batch in rows), strict=True)
    return dict(zip(rows[0][2], map(np.concatenate, columns), strict=True)), tokenizer


def restore_text(source, target, tokenizer):
    """Reverses span corruption: the text that a source and its target were made from."""
    first = tokenizer.id_of("<extra_id_0>")
    removed, span = {}, None
    for token in target[:-1]:
        if token >= first:
            span = removed.setdefault(int(token), [])
        else:
            span.append(int(token))
    assert sorted(removed) == list(range(first, first + len(removed))), "sentinels come in order"
    return list(chain.from_iterable(removed.pop(int(t)) if t >= first else [int(t)] for t in source[:-1]))


@pytest.mark.parametrize("isolate", [True, False])
def test_source_and_target_restore_the_text(build_corpus, isolate):
    corpus = build_corpus([[100, 30, 7, 1, 260] * 4])
    rows, tokenizer = read_epoch(corpus, SPANS, 48, isolate=isolate)
    row_tokens, longest = row_lengths(48, SPANS)
    assert rows["targets"].shape[1] == longest
    texts, cut = [], 0
    for tokens, targets, segments in zip(rows["tokens"], rows["targets"], rows["segments"], strict=True):
        source, target = tokens[segments > 0], targets[targets != IGNORE]
        if len(source):
            assert source[-1] == target[-1] == tokenizer.eot
            texts.append(restore_text(source, target, tokenizer))
            if len(source) == 48:
                assert len(texts[-1]) == row_tokens
                cut += len(target) - 1 - len(set(target.tolist()) & set(range(258, 400)))
    full = sum(len(text) == row_tokens for text in texts)
    assert cut / (full * row_tokens) == pytest.approx(0.15, abs=0.01)
    documents = [bytes(corpus.split("train").document(n).tolist()) for n in range(20)]
    for text in texts:
        for part in bytes(n if n < 256 else 0 for n in text).split(b"\0"):
            assert any(part in document for document in documents)
    assert sum(len(text) for text in texts) >= 20 + 4 * 398 - 6, (
        "only single tokens at the ends of streams are left out"
    )


def test_lengths_are_those_of_mesh_tensorflow():
    assert row_lengths(512, SPANS) == (568, 114), "as mesh-tensorflow's random_spans_helper has it"


def test_decoder_input_is_the_target_shifted_within_each_document(build_corpus):
    rows, tokenizer = read_epoch(build_corpus([[100, 30, 7, 260] * 4]), SPANS, 48)
    real = rows["targets"] != IGNORE
    assert ((rows["target_segments"] > 0) == real).all()
    start, owner = tokenizer.id_of("<pad>"), rows["target_segments"]
    for row in range(len(real)):
        for t in range(real[row].sum()):
            is_first = t == 0 or owner[row, t] != owner[row, t - 1]
            assert rows["target_tokens"][row, t] == (start if is_first else rows["targets"][row, t - 1])
    assert (owner.max(1) > 1).any()


def test_spans_depend_on_seed_and_sample_not_on_world_size(build_corpus):
    corpus = build_corpus([[100, 30, 260] * 8])
    once, _ = read_epoch(corpus, SPANS, 48)
    again, _ = read_epoch(corpus, SPANS, 48, world=3)
    assert all(np.array_equal(once[key], again[key]) for key in once)
    assert not np.array_equal(once["targets"], read_epoch(corpus, SPANS, 48, seed=1)[0]["targets"])


@pytest.fixture
def pairs(tmp_path, text_data):
    lines = [{"text": f"say {n}", "answer": f"number {n}" if n % 2 else "no"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Corpus(prepare(text_data("pairs.jsonl", label_key="answer", val_fraction=0.0), lambda event: None))


def test_given_pairs_are_read_whole_and_truncated_at_their_ends(pairs):
    rows, tokenizer = read_epoch(pairs, PAIRS, 16, pack=False)
    pairs_read = set()
    for tokens, targets, segments in zip(rows["tokens"], rows["targets"], rows["segments"], strict=True):
        source, target = tokens[segments > 0].tolist(), targets[targets != IGNORE].tolist()
        assert source.pop() == target.pop() == tokenizer.eot
        pairs_read.add((tokenizer.decode(source), tokenizer.decode(target)))
    assert pairs_read == {(f"say {n}", f"number {n}"[:7] if n % 2 else "no") for n in range(12)}


def test_text_without_labels_is_refused_with_the_cure(build_corpus):
    with pytest.raises(UserError, match=r"has no label.*data\.label_key"):
        read_epoch(build_corpus([[9] * 6]), PAIRS, 16, pack=False)
