"""Rules of quality, each with a text that breaks it alone; and passages of evaluation files."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from train.data.corpus.shards import Corpus
from train.data.prepare.prepare import find_prepared, prepare
from train.data.screening.quality import quality_problem
from train.data.screening.word_grams import words_of
from train.errors import UserError

GOOD = (
    "The town lies where the river leaves the hills, and its people have lived from wool since anyone can remember. "
    "In spring they wash the fleeces below the mill! Later, when the nights grow cold, every house has a loom that "
    "runs with hardly a pause until the snow melts. Traders come twice in a year to fetch the cloth, which is thick "
    "and grey. Nobody else makes it. They pay in salt, iron and news of the coast, and they never stay for long."
)
GOOD_CHINESE = "".join(
    [
        "这座小镇位于河流离开山丘的地方，自古以来，居民们就靠羊毛为生。春天，他们在磨坊下面清洗羊毛！",
        "后来夜晚变冷，每家每户都有一台织布机，直到雪融化才停下来。商人每年来两次取走又厚又灰的布料。",
        "没有别人会做这种布。他们用盐、铁和海边的消息来付钱，从不久留。",
    ]
)
ALL = ["gopher", "repetition", "c4"]


def distinct(count: int) -> list[str]:
    return ["".join(random.Random(number).choices("abcdefgh", k=6)) for number in range(count)]


@pytest.mark.parametrize("text", [GOOD, GOOD_CHINESE], ids=["english", "chinese"])
def test_good_text_breaks_no_rule(text):
    assert quality_problem(text, ALL) is None


@pytest.mark.parametrize(
    ("rules", "text", "problem"),
    [
        (["gopher"], "Too short. It is. Really so.", "fewer than 50"),
        (["gopher"], " ".join(["an it of", *["be to"] * 40]), "fewer than 3 or more than 10 letters"),
        (["gopher"], GOOD + " ###" * 8, "more than one #"),
        (
            ["gopher"],
            "\n".join("- " + part for part in GOOD.split(". ")) + " wool and cloth" * 9,
            "more than 90% of the lines are bullets",
        ),
        (["gopher"], GOOD.replace(". ", "...\n"), "more than 30% of the lines end in an ellipsis"),
        (["gopher"], GOOD + " 12345" * 30, "no letter"),
        (["gopher"], " ".join(distinct(60)), "most frequent English words"),
        (["repetition"], "\n".join(distinct(6) + ["the same line again"] * 4), "repeated lines"),
        (["repetition"], "\n".join(distinct(10)) + "\n\nEnd.\n\nEnd.\n\nEnd.", "repeated paragraphs"),
        (["repetition"], " ".join(f"{word} buy now" for word in distinct(40)), "a sequence of 2 words"),
        (["repetition"], GOOD + " " + " ".join(GOOD.split()[:40]), "repeated sequences of 5 words"),
        (["c4"], GOOD + " Lorem ipsum dolor.", "lorem ipsum"),
        (["c4"], GOOD + " int main() { }", "a curly bracket"),
        (["c4"], "One sentence without an end\nand another. And so", "fewer than three sentences"),
    ],
)
def test_bad_text_is_told_by_its_rule(rules, text, problem):
    found = quality_problem(text, rules)
    assert found is not None
    assert found.startswith(f"{rules[0]}: ")
    assert problem in found
    assert quality_problem(text, []) is None


def test_words_are_characters_where_no_spaces_part_them():
    assert words_of("Don't_panic, 床前 x2!") == ["don", "t", "panic", "床", "前", "x2"]


def test_filters_drop_and_count_documents(tmp_path, text_data):
    rows = [GOOD, GOOD_CHINESE, "short", GOOD + " ###" * 8]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    events = []
    folder = prepare(text_data("a.jsonl", filters=["gopher"], val_fraction=0.0), events.append)
    assert Corpus(folder).split("train").samples == 2
    note = next(event["text"] for event in events if "dropped" in event.get("text", ""))
    assert note.startswith("2 documents dropped (1 gopher: fewer than 50 ")
    reasons = [json.loads(line)["reason"] for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [reason.split(":")[0] for reason in reasons] == ["gopher", "gopher"]


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_planted_passages_are_all_found_and_nothing_else(tmp_path, text_data, unit):
    """200 passages of 13 words, each in another spelling of spaces, case and punctuation, amid other text."""
    draw = random.Random(0)
    words = distinct(4000) if unit == "words" else [chr(0x4E00 + n) for n in range(4000)]
    joint = " " if unit == "words" else ""
    questions = [draw.choices(words, k=40) for _ in range(200)]
    rows = [{"question": joint.join(question), "n": 1, "options": ["yes", "no"]} for question in questions]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [draw.choices(words, k=200) for _ in range(400)]
    for question, document in zip(questions, documents[::2], strict=True):
        begin = draw.randrange(28)
        document[50:63] = [word.upper() + draw.choice(["", ",", "!\n"]) for word in question[begin : begin + 13]]
    texts = "".join(json.dumps({"text": joint.join(document)}) + "\n" for document in documents)
    (tmp_path / "a.jsonl").write_text(texts)
    data = text_data("a.jsonl", decontaminate=["test.jsonl"], val_fraction=0.0)
    folder = prepare(data, lambda event: None)
    split = Corpus(folder).split("train")
    kept = [Corpus(folder).tokenizer.decode(split.document(sample).tolist()) for sample in range(split.samples)]
    assert kept == [joint.join(document) for document in documents[1::2]]
    assert json.loads((folder / "dropped.jsonl").read_text().splitlines()[0])["passage"]
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert find_prepared(data) is None


def test_evaluation_files_may_be_compressed_and_must_have_text(tmp_path, text_data):
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": GOOD}).encode()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": GOOD}) + "\n" + json.dumps({"text": GOOD_CHINESE}) + "\n")
    data = text_data("a.jsonl", decontaminate=["test.jsonl.gz"], val_fraction=0.0)
    assert Corpus(prepare(data, lambda event: None)).split("train").samples == 1
    (tmp_path / "short.txt").write_text("too few words")
    with pytest.raises(UserError, match="no text of 13 words or more is in these files"):
        prepare(text_data("a.jsonl", decontaminate=["short.txt"]), lambda event: None)
    (tmp_path / "bad.txt").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"data.decontaminate: bad.txt: a binary file"):
        prepare(text_data("a.jsonl", decontaminate=["bad.txt"], bad="skip"), lambda event: None)
