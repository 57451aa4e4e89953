"""Near-duplicates: recall and precision on made-up pairs, and the same groups whatever the workers."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from train.data.corpus.shards import Corpus
from train.data.prepare.prepare import prepare
from train.data.screening import near_duplicates
from train.data.screening.near_duplicates import SignatureFile, earlier_twins, signature
from train.data.screening.word_grams import grams, words_of

PAIRS = 1000
LENGTH, GRAMS = 454, 450
CODAS = ["n", "r", "st", "l", "th", "m", "ck", "sh", "nd", "x", "p", "lf", "rm", "ps", "t", "ng"]
ENGLISH = [f"{a}{b}{c}" for a in "bdfgklmnprstvwz" for b in "aeiou" for c in CODAS]
CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def similarity(one: str, other: str) -> float:
    left, right = (set(grams(words_of(text), 5)) for text in (one, other))
    return len(left & right) / len(left | right)


def made_up_pair(draw: random.Random, words: list[str], joint: str, changed: int) -> tuple[str, str]:
    """Two texts of 450 sequences of five words, of which ``changed`` words, far from each other, are others."""
    one = draw.choices(words[:-500], k=LENGTH)
    other = list(one)
    for number in range(changed):
        other[7 + 15 * number + draw.randrange(5)] = draw.choice(words[-500:])
    return joint.join(one), joint.join(other)


def found_pairs(pairs: list[tuple[str, str]]) -> float:
    """The share of pairs whose texts are taken for one; none may be joined with another pair."""
    file = SignatureFile()
    numbers = file.append(np.stack([signature(text) for pair in pairs for text in pair]))
    twins = earlier_twins(file.rows(), numbers)
    strangers = [n for n, twin in enumerate(twins.tolist()) if twin not in (n, n - n % 2)]
    assert strangers == []
    return float(np.mean(twins[1::2] == numbers[::2]))


@pytest.mark.parametrize(("words", "joint"), [(ENGLISH, " "), (CHINESE, "")], ids=["english", "chinese"])
def test_recall_at_four_fifths_and_precision_at_a_half(words, joint):
    """Each word that is changed takes five sequences from either text: 10 leave 400 of 500, 30 leave 300 of 600."""
    draw = random.Random(0)
    alike = [made_up_pair(draw, words, joint, 10) for _ in range(PAIRS)]
    apart = [made_up_pair(draw, words, joint, 30) for _ in range(PAIRS)]
    assert [round(similarity(*pair), 2) for pair in (alike[0], alike[-1], apart[0], apart[-1])] == [0.8, 0.8, 0.5, 0.5]
    assert found_pairs(alike) >= 0.92
    assert found_pairs(apart) <= 0.01


def test_signature_does_not_change():
    """A corpus that is prepared again must drop the same documents: this holds the library to its hashes."""
    expected = [3226007209, 3447945005, 3225939462]
    for text in ("床前明月光，疑是地上霜 and the moon", "床前明月光疑是地上霜\nAND THE MOON!"):
        assert signature(text).tolist()[:3] == expected


def test_groups_are_linked_by_pairs_and_named_by_their_first():
    random_rows = np.random.default_rng(0)
    rows = random_rows.integers(0, 1 << 32, (9, near_duplicates.HASHES), np.uint32)
    rows[4] = rows[1]
    rows[7] = rows[4]
    rows[7, :30] = rows[8, :30]  # like 1 and 4; a band of 8 is equal too, and not more
    rows[2] = rows[5] = near_duplicates.NO_WORDS
    assert earlier_twins(rows, np.arange(9)).tolist() == [0, 1, 2, 3, 1, 5, 6, 1, 8]
    assert earlier_twins(rows, np.array([7, 3, 4, 1])).tolist() == [0, 1, 0, 0]


def shard_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def write_rows(path) -> None:
    draw = random.Random(1)
    rows = []
    for number in range(60):
        text = " ".join(draw.choices(ENGLISH, k=120))
        rows.append(text)
        if number % 3 == 0:
            rows.append(text + " and a few words more")
        if number % 20 == 0:
            rows.append("See: " + text.upper())
    draw.shuffle(rows)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def test_dropped_documents_are_counted_and_shown(tmp_path, text_data):
    write_rows(tmp_path / "a.jsonl")
    events = []
    folder = prepare(text_data("a.jsonl", near_dedup=True), events.append)
    corpus = Corpus(folder)
    assert sum(corpus.split(split).samples for split in ("train", "val")) == 60
    notes = [event["text"] for event in events if event["phase"] == "note"]
    assert "23 documents dropped (23 near-duplicate); examples in dropped.jsonl" in notes
    examples = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert len(examples) == 10
    assert all(example["like"]["offset"] < example["offset"] for example in examples)
    plain = Corpus(prepare(text_data("a.jsonl"), lambda event: None))
    assert sum(plain.split(split).samples for split in ("train", "val")) == 83


def test_groups_are_the_same_for_any_number_of_workers(tmp_path, text_data, monkeypatch):
    monkeypatch.setattr("train.data.prepare.first_pass._SPAN", 4000)
    write_rows(tmp_path / "a.jsonl")
    folders = [prepare(text_data("a.jsonl", near_dedup=True, dir=f"{n}", workers=n), print) for n in (1, 2)]
    one, two = map(shard_bytes, folders)
    assert one == two
    assert len({(folder / "dropped.jsonl").read_bytes() for folder in folders}) == 1
