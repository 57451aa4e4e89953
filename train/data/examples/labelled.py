"""Documents with a label, as they are stored: [EOT, text, EOT, label, EOT]."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train.data.corpus.shards import CorpusSplit
from train.data.sampling.epoch_order import DocSpans, Ints
from train.errors import UserError

_NONE = np.zeros(0, np.int64)


def read_labelled(shards: CorpusSplit, pieces: DocSpans, places: int, eot: int) -> Iterator[tuple[int, Ints, Ints]]:
    """(sample, ids of the text, ids of its label) of each row that pieces tile, one document a row; of an empty row nothing."""
    begins = np.cumsum(pieces.length) - pieces.length
    for sample in pieces.sample[begins % places == 0].tolist():
        if sample < 0:
            yield sample, _NONE, _NONE
            continue
        ids = shards.document(sample).astype(np.int64)
        borders = np.flatnonzero(ids == eot)
        if len(borders) != 1:
            raise UserError(
                f"document {sample} of {shards.source(sample)} has no label: prepare the corpus with data.label_key=<field>, from "
                ".jsonl files"
            )
        yield sample, ids[: borders[0]], ids[borders[0] + 1 :]
