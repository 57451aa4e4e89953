"""What a text classifier is to be measured by: the commonest label, and TF-IDF with logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.shards import Corpus
from train.reporting.metrics import accuracy

NGRAMS, RARE, STRENGTHS = ((1, 2), (1, 3)), (1, 2), (2.0, 4.0, 8.0, 16.0, 32.0)
"""Characters of a feature, documents that a feature must be in, C of the regression: what is tried."""
Labels = NDArray[np.int64]
Split = tuple[list[str], Labels]


def documents(corpus: Corpus, split: str, classes: Sequence[str]) -> Split:
    """The texts of a split, and the number of each one's class: what the shards hold, and so what our models read."""
    tokenizer, shards = corpus.tokenizer, corpus.split(split)
    texts, labels = [], []
    for sample in range(shards.samples):
        ids = shards.document(sample).tolist()
        border = ids.index(tokenizer.eot)
        texts.append(tokenizer.decode(ids[:border]))
        labels.append(classes.index(tokenizer.decode(ids[border + 1 :]).strip()))
    return texts, np.array(labels)


def confusion(said: Labels, true: Labels, classes: int) -> NDArray[np.int64]:
    """(classes, classes): how often class i was said to be j."""
    return np.bincount(true * classes + said, minlength=classes**2).reshape(classes, classes)


def majority(train: Labels, test: Labels, classes: int) -> NDArray[np.int64]:
    """The confusion matrix of who always says the commonest label of ``train``."""
    commonest = np.bincount(train, minlength=classes).argmax()
    return confusion(np.full_like(test, commonest), test, classes)


@dataclass(frozen=True)
class Linear:
    """A regression on TF-IDF of characters: what was chosen on the held-out split, and what it says of the test split."""

    chosen: str
    features: int
    val: float
    """Accuracy on the held-out split."""
    test: NDArray[np.int64]


def tfidf(train: Split, val: Split, test: Split, classes: int) -> Linear:
    """TF-IDF (sublinear) of runs of characters, with logistic regression: of all that is tried, the best on ``val``."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    best: tuple[float, Any, Any, str] | None = None
    for (low, high), rare in product(NGRAMS, RARE):
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(low, high), min_df=rare, sublinear_tf=True)
        seen, held = vectors.fit_transform(train[0]), vectors.transform(val[0])
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, solver="liblinear").fit(seen, train[1])
            found = accuracy(confusion(model.predict(held), val[1], classes))
            if best is None or found > best[0]:
                best = found, vectors, model, f"{low} to {high} characters in {rare} documents or more, C={strength:g}"
    assert best is not None
    found, vectors, model, chosen = best
    said = model.predict(vectors.transform(test[0]))
    return Linear(chosen, len(vectors.vocabulary_), found, confusion(said, test[1], classes))
