"""Rows for BERT: the published rates, and draws that depend on (seed, epoch, sample, offset) alone."""

import numpy as np
import pytest

from train.batch import IGNORE
from train.config.keys import objectives
from train.config.keys.base import ENCODER_TOKENS
from train.data.examples.masked import MaskedExamples
from train.data.loader import Loader, RankShare, split_sizes
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle
from train.data.tokenizer import Tokenizer

T = 64


@pytest.fixture
def text(build_corpus):
    """A corpus of some 50,000 random letters in documents of a few hundred."""
    return build_corpus([[300] * 100, [211] * 100])


def read_epoch(corpus, epoch=0, seed=0, world=1, steps=None, seq_len=T, **keys):
    """All rows of an epoch, stream after stream, as arrays; and the tokenizer."""
    tokenizer = corpus.tokenizer.extended(ENCODER_TOKENS)
    examples = MaskedExamples(seq_len, True, objectives.Masked(name="masked", **keys), tokenizer, seed)
    shards = corpus.split("train")
    plan = BatchPlan(EpochOrder(split_sizes(shards), Shuffle(seed, 4), True), StepShape(6, examples.row_tokens, 6))
    rows = []
    for rank in range(world):
        loader = Loader(shards, plan, RankShare(rank, world, 1), examples)
        loader.seek(Cursor(epoch, 0))
        for step in range(steps or plan.steps_per_epoch):
            numbers, batches = loader.row_numbers(Cursor()), next(loader)[0]
            rows += [(step, number, batch) for number, batch in zip(numbers, batches, strict=False)]
        loader.close()
    rows.sort(key=lambda row: (row[1], row[0]))  # stream after stream
    columns = zip(*(batch.values() for _, _, batch in rows), strict=True)
    return dict(zip(rows[0][2], map(np.concatenate, columns), strict=True)), tokenizer


@pytest.mark.parametrize("whole_words", [True, False])
def test_masking_rates_are_the_published_ones(text, whole_words):
    rows, tokenizer = (
        read_epoch(text, next_sentence=False, whole_words=False)
        if not whole_words
        else read_epoch(text, next_sentence=False)
    )
    tokens, targets = rows["tokens"], rows["targets"]
    chosen = targets != IGNORE
    ordinary = (
        (rows["segments"] > 0)
        & (tokens != tokenizer.eot)
        & ~np.isin(tokens, [tokenizer.id_of(n) for n in ("[CLS]", "[SEP]")])
    )
    if whole_words:  # the letters of a document are one word, masked whole or not at all
        assert 0.05 < chosen.sum() / ordinary.sum() < 0.3
        runs = chosen[:, 2:-1] == chosen[:, 1:-2]
        assert runs[
            (rows["segments"][:, 2:-1] == rows["segments"][:, 1:-2]) & ordinary[:, 2:-1] & ordinary[:, 1:-2]
        ].all()
        return
    n = ordinary.sum()
    assert chosen.sum() / n == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / n) ** 0.5)
    hidden = (tokens == tokenizer.id_of("[MASK]"))[chosen]
    kept = (tokens == targets)[chosen]
    for share, rate in ((hidden, 0.8), (kept, 0.1 + 0.1 / 256), (~hidden & ~kept, 0.1)):
        assert share.mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / chosen.sum()) ** 0.5)
    assert tokens[chosen].max() == tokenizer.id_of("[MASK]") == tokenizer.vocab_size - 1


def test_half_of_the_text_pairs_are_neighbours(text):
    rows, tokenizer = read_epoch(text, whole_words=False)
    sep, cls = tokenizer.id_of("[SEP]"), tokenizer.id_of("[CLS]")
    answers = rows["next_targets"][rows["segments"].any(1)]
    n = len(answers)
    assert set(answers.tolist()) == {0, 1}
    assert answers.mean() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    whole = np.where(rows["targets"] == IGNORE, rows["tokens"], rows["targets"])
    shards, documents = text.split("train"), []
    documents = [bytes(shards.document(n).tolist()) for n in range(shards.samples)]
    for row in range(0, n, 40):
        real = int(rows["segments"][row].sum())
        middle, end = np.flatnonzero(whole[row] == sep)
        assert (whole[row, 0], end) == (cls, real - 1)
        assert rows["types"][row, : middle + 1].max() == 0 == rows["types"][row, real:].sum()
        assert rows["types"][row, middle + 1 : real].min() == 1
        first, second = whole[row, 1:middle], whole[row, middle + 1 : end]
        border = bytes(b for b in (*first[-8:], *second[:8]) if b != tokenizer.eot)
        neighbours = tokenizer.eot not in (*first[-8:], *second[:8]) and any(
            border in document for document in documents
        )
        if tokenizer.eot not in (*first[-8:], *second[:8]):
            assert neighbours == (rows["next_targets"][row] == 0)


def test_every_token_comes_once_an_epoch_without_pairs(text):
    rows, tokenizer = read_epoch(text, next_sentence=False)
    whole = np.where(rows["targets"] == IGNORE, rows["tokens"], rows["targets"])[rows["segments"] > 0]
    assert (whole < 256).sum() == 100 * 300 + 100 * 211
    assert (whole == tokenizer.eot).sum() == 200


@pytest.mark.parametrize("pairs", [True, False])
def test_masks_depend_on_seed_epoch_and_sample_not_on_world_size(text, pairs):
    once, _ = read_epoch(text, steps=20, next_sentence=pairs)
    for world in (2, 4):
        again, _ = read_epoch(text, steps=20, next_sentence=pairs, world=world)
        assert all(np.array_equal(once[key], again[key]) for key in once)
    for other in ({"epoch": 1}, {"seed": 1}):
        assert not np.array_equal(
            once["targets"], read_epoch(text, steps=20, next_sentence=pairs, **other)[0]["targets"]
        )


def test_tokens_of_a_document_are_masked_alike_at_any_row_length(text):
    """Within one epoch and seed, whether a token is masked does not depend on the row that it is in."""

    def shown_texts(seq_len):
        rows, tokenizer = read_epoch(text, seq_len=seq_len, next_sentence=False, whole_words=False)
        real = (rows["segments"] > 0) & ~np.isin(rows["tokens"], [tokenizer.id_of(n) for n in ("[CLS]", "[SEP]")])
        whole = np.where(rows["targets"] == IGNORE, rows["tokens"], rows["targets"])[real]
        shown, texts, start = rows["tokens"][real], {}, 0
        for end in [*np.flatnonzero(whole == tokenizer.eot)[1:], len(whole)]:
            texts[bytes(whole[start + 1 : end].tolist())] = shown[start + 1 : end].tolist()
            start = end
        return texts

    here, there = shown_texts(40), shown_texts(T)
    common = [key for key in here.keys() & there.keys() if len(key) > 200]
    assert len(common) > 100, "six streams cut a few documents, and the others stand whole in both"
    assert all(here[key] == there[key] for key in common)


def test_word_borders_are_right_in_any_script():
    made = Tokenizer(words_tokenizer())
    from train.data.examples.masked import _word_continuations

    begins, ends = _word_continuations(made)
    ids = {name: made.find(name, -1) for name in ("Ġto", "day", "我", "!", "##s")}
    assert [bool(begins[ids[name]]) for name in ("Ġto", "day", "我", "!", "##s")] == [False, True, False, False, True]
    assert [bool(ends[ids[name]]) for name in ("Ġto", "day", "我", "!")] == [True, True, False, False]


def words_tokenizer() -> str:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    fast = Fast(models.WordLevel({name: n for n, name in enumerate(("Ġto", "day", "我", "!", "##s"))}, unk_token="!"))
    fast.decoder = decoders.Replace("Ġ", " ")
    fast.add_special_tokens(["<|endoftext|>"])
    return fast.to_str()
