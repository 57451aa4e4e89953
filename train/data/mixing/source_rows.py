"""The rows of one source: an endless sequence, epoch after epoch, without padding between them.

The epochs of a source, each permuted by ``EpochOrder``, are laid end to end and cut into rows of R units (tokens, or
documents where a row holds one), so that a row may hold the end of an epoch and the beginning of the next. Every unit
comes once an epoch. The rows that begin in an epoch are read in turn from COLUMNS places of it, far apart, so that a
long document does not fill a step. All of it is arithmetic: row n is reached without those before it.
"""

from __future__ import annotations

import numpy as np

from train.data.sampling.epoch_order import DocSpans, EpochOrder, Ints, concat_spans, expand_ranges, take_spans

COLUMNS = 64
"""Places of an epoch that successive rows of a source come from."""


class SourceRows:
    """Rows of ``row_units`` units of a source; of ``limit`` units in all, if given: the last row may be short."""

    def __init__(self, order: EpochOrder, row_units: int, limit: int | None = None) -> None:
        self.order, self.row_units, self.limit = order, row_units, limit
        self.rows = None if limit is None else -(-limit // row_units)

    def epoch_of(self, number: Ints) -> Ints:
        """The epoch that each row, in the order in which rows are read, begins in."""
        return number * self.row_units // self.order.units

    def unit_ranges(self, number: Ints) -> tuple[Ints, Ints]:
        """The units [begin, end) of each row, counted from the start of the first epoch."""
        units, size = self.order.units, self.row_units
        epoch = self.epoch_of(number)
        first, after = (-(-units * edge // size) for edge in (epoch, epoch + 1))
        if self.rows is not None:
            after = np.minimum(after, self.rows)
        columns = np.minimum(COLUMNS, after - first)
        depth, column = np.divmod(number - first, columns)
        least, longer = np.divmod(after - first, columns)  # the first columns are longer by a row
        begin = (first + column * least + np.minimum(column, longer) + depth) * size
        return begin, begin + size if self.limit is None else np.minimum(begin + size, self.limit)

    def spans(self, number: Ints, keep: bool = True) -> tuple[DocSpans, Ints, Ints]:
        """Spans of the rows, each row's in order; the index in ``number``, and the epoch, of each span.

        ``keep``: see ``EpochOrder.spans``.
        """
        units = self.order.units
        begin, end = self.unit_ranges(number)
        first, last = begin // units, (end - 1) // units
        owner, epoch = expand_ranges(first, last - first + 1)
        low = np.maximum(begin[owner] - epoch * units, 0)
        high = np.minimum(end[owner] - epoch * units, units)
        parts, owners, epochs = [], [], []
        for which in np.unique(epoch).tolist():
            pieces = np.flatnonzero(epoch == which)
            spans, piece = self.order.spans(which, low[pieces], high[pieces], keep)
            parts.append(spans)
            owners.append(owner[pieces][piece])
            epochs.append(np.full(len(piece), which, np.int64))
        of_row, of_epoch = np.concatenate(owners), np.concatenate(epochs)
        by_row = np.argsort(of_row, kind="stable")
        return take_spans(concat_spans(parts), by_row), of_row[by_row], of_epoch[by_row]
