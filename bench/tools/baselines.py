"""Baselines for text classifiers: the most frequent label, and TF-IDF with logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import Corpus
from train.reporting.metrics import accuracy

NGRAMS, MIN_DOCUMENTS, STRENGTHS = ((1, 2), (1, 3)), (1, 2), (2.0, 4.0, 8.0, 16.0, 32.0)
"""Search space: characters of a feature, documents that a feature must occur in, C of the regression."""
Labels = NDArray[np.int64]
Split = tuple[list[str], Labels]


def documents(corpus: Corpus, split: str, classes: Sequence[str]) -> Split:
    """Texts and class indices of a split, decoded from the shards, so the baselines read what the models read."""
    tokenizer, shards = corpus.tokenizer, corpus.split(split)
    texts, labels = [], []
    for sample in range(shards.samples):
        ids = shards.document(sample).tolist()
        end_of_text = ids.index(tokenizer.eot)
        texts.append(tokenizer.decode(ids[:end_of_text]))
        labels.append(classes.index(tokenizer.decode(ids[end_of_text + 1 :]).strip()))
    return texts, np.array(labels)


def confusion(predictions: Labels, targets: Labels, classes: int) -> NDArray[np.int64]:
    """Confusion matrix (classes, classes): row i, column j counts targets i that were predicted as j."""
    return np.bincount(targets * classes + predictions, minlength=classes**2).reshape(classes, classes)


def majority(train: Labels, test: Labels, classes: int) -> NDArray[np.int64]:
    """Confusion matrix on ``test`` of always predicting the most frequent label of ``train``."""
    commonest = np.bincount(train, minlength=classes).argmax()
    return confusion(np.full_like(test, commonest), test, classes)


@dataclass(frozen=True)
class TfidfBaseline:
    """A logistic regression on character TF-IDF: the setting that is best on the held-out split, and its results."""

    chosen: str
    """The setting, in words."""
    features: int
    val: float
    """Accuracy on the held-out split."""
    test: NDArray[np.int64]
    """Confusion matrix on the test split."""


def tfidf(train: Split, val: Split, test: Split, classes: int) -> TfidfBaseline:
    """Sublinear TF-IDF of character n-grams with logistic regression, the best of the search space on ``val``."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    best: tuple[float, Any, Any, str] | None = None
    for (low, high), min_documents in product(NGRAMS, MIN_DOCUMENTS):
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(low, high), min_df=min_documents, sublinear_tf=True)
        features, held_out = vectors.fit_transform(train[0]), vectors.transform(val[0])
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, solver="liblinear").fit(features, train[1])
            val_accuracy = accuracy(confusion(model.predict(held_out), val[1], classes))
            if best is None or val_accuracy > best[0]:
                setting = f"{low} to {high} characters in {min_documents} documents or more, C={strength:g}"
                best = val_accuracy, vectors, model, setting
    assert best is not None
    val_accuracy, vectors, model, chosen = best
    predictions = model.predict(vectors.transform(test[0]))
    return TfidfBaseline(chosen, len(vectors.vocabulary_), val_accuracy, confusion(predictions, test[1], classes))
