"""Keys of the objectives: causal, masked, seq2seq and classify."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from train.config.keys.base import Above0, Fraction, Section
from train.util.format import some

_MAX_SHOWN = 60
"""Characters of a label that a message repeats: the field may hold a whole text."""

ClassName = Annotated[
    str, BeforeValidator(lambda name: json.dumps(name) if isinstance(name, bool | int | float) else name)
]
"""A label as the data has it; true and 3 are spelled as in JSON, as labels of the data are."""


class Smoothed(Section):
    """Regularisers of a cross-entropy over the vocabulary: label smoothing and z-loss."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of a target, spread over the vocabulary"
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of logsumexp(logits)^2 in the training loss, as PaLM's"
    )


class Causal(Smoothed):
    """Next-token prediction: each token from those before it."""

    name: Literal["causal"]


class Masked(Smoothed):
    """Masked language modelling, optionally with next-sentence prediction."""

    name: Literal["masked"]
    rate: Fraction = Field(
        0.15, description="share of tokens to predict: of them 80 % are hidden, 10 % are others, 10 % stay"
    )
    whole_words: bool = Field(True, description="the tokens of a word are chosen together")
    next_sentence: bool = Field(
        True, description="rows are pairs: half of them neighbours, half with text from elsewhere"
    )


class Seq2seq(Smoothed):
    """Encoder-decoder training: a target is predicted given its source."""

    name: Literal["seq2seq"]
    task: Literal["spans", "pairs"] = Field(
        description="spans: what is cut out of the text; pairs: the text of data.label_key"
    )
    rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="share of tokens that are cut out, for task=spans"
    )
    span: Above0 = Field(3.0, description="tokens of a cut, on average, for task=spans")
    target_len: Annotated[int, Field(gt=1)] = Field(128, description="longest target, in tokens, for task=pairs")


class Classify(Section):
    """Classification of documents, or regression where no classes are given."""

    name: Literal["classify"]
    classes: list[ClassName] = Field(
        [], description="the labels, as the data has them, in their order; empty: labels are scores"
    )
    pool: Literal["own", "mean"] = Field(
        "own",
        description="what stands for a row: own: a first or last token, as the model has it; "
        "mean: of its hidden states",
    )

    def label_problem(self, label: str) -> str | None:
        """The problem, with its cure, of a label that is not one of the classes or not a number; None if it is fine."""
        if self.classes:
            if label in self.classes:
                return None
            return (
                f"the label {_beginning(label)} is none of objective.classes ({some(self.classes)}): "
                "name it there, or mend the data"
            )
        try:
            finite = math.isfinite(float(label))
        except ValueError:
            finite = False
        cure = "name the classes in objective.classes=[...], or mend the data"
        return None if finite else f"the label {_beginning(label)} is no number: {cure}"


def _beginning(label: str) -> str:
    return repr(label) if len(label) <= _MAX_SHOWN else f"{label[:_MAX_SHOWN]!r}... ({len(label):,} characters)"
