"""Rows for predicting the next token: inputs, targets, positions and segments from pieces of stored documents."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.batch import IGNORE
from train.data.order import Pieces
from train.data.shards import Shards


class Rows(NamedTuple):
    """Four arrays of one shape (..., seq_len): the keys of a Batch."""

    tokens: NDArray[Any]
    targets: NDArray[Any]
    positions: NDArray[Any]
    segments: NDArray[Any]


def fill(shards: Shards, pieces: Pieces, isolate: bool, out: Rows) -> None:
    """Write the rows that ``pieces`` tile, in their order, into ``out`` (arrays that may be strided views).

    A piece of n places is read as n + 1 ids of its own document, so a target never comes from another one. Inside a
    row all pieces but the last end their documents with EOT, which is also what the next begins with; so one line of
    seq_len + 1 ids holds the inputs and the targets of a row. Padding: token 0, target IGNORE, segment 0.

    With ``isolate`` positions count within the piece and segments number the pieces of a row from 1; without, a row
    is one segment and positions count within it.
    """
    shape, seq_len = out.tokens.shape, out.tokens.shape[-1]
    begins = np.cumsum(pieces.length) - pieces.length
    row = begins // seq_len
    first = np.append(True, row[1:] != row[:-1])
    last = np.append(first[1:], True)
    padding = pieces.sample < 0
    # The one id more is the last real piece's; where a row is all padding, the padding's.
    more = np.where(padding, first & last, last | np.append(padding[1:], False))
    lines = np.empty(out.tokens.size + out.tokens.size // seq_len, shards.dtype)
    np.concatenate(shards.stored(pieces.sample, pieces.start, pieces.length + more), out=lines)
    lines = lines.reshape(*shape[:-1], seq_len + 1)
    out.tokens[...] = lines[..., :-1]
    out.targets[...] = lines[..., 1:]
    if isolate:
        places = np.arange(out.tokens.size, dtype=np.int32)
        places -= np.repeat(begins.astype(np.int32), pieces.length)
        numbers = np.arange(1, len(row) + 1, dtype=np.int32)
        numbers -= np.maximum.accumulate(np.where(first, numbers, 1)) - 1
        numbers[padding] = 0
        out.positions[...] = places.reshape(shape)
        out.segments[...] = np.repeat(numbers, pieces.length).reshape(shape)
    else:
        out.positions[...] = np.arange(seq_len)
        out.segments[...] = 1
    if padding.any():
        empty = np.repeat(padding, pieces.length).reshape(shape)
        out.tokens[empty] = 0
        out.targets[empty] = IGNORE
        out.segments[empty] = 0
