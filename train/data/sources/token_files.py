"""Files of token ids that other programs made: nanoGPT's and llm.c's .bin, and Megatron's .bin with its .idx.

nanoGPT writes plain uint16; llm.c a header of 1,024 bytes before uint16 or uint32; Megatron ids of the type, and
documents of the borders, that its .idx tells. A document also ends at each end-of-text token. Ids are mapped, not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.sources.file_kinds import file_state
from train.data.sources.records import BadRecord

Ids = NDArray[np.uint32]

_LLMC_HEADER = 256
"""Numbers of int32 in llm.c's header: magic, version, tokens, and zeros."""
_LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}
"""llm.c's magic numbers, of GPT-2's vocabulary and of Llama 3's, and the type of the ids."""
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the types of ids in the header of a .idx; 6 and 7 are floats."""
_BLOCK = 1 << 20
"""Ids that are looked at together."""


class TokenFile(NamedTuple):
    """The ids in a file, mapped, and where its documents begin beside those that follow an end of text."""

    ids: NDArray[Any]
    begins: NDArray[np.int64]


def scan(path: str, eot: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """(number of the first token, tokens) of every document that is not empty. Raises BadRecord.

    So it does for an id that a vocabulary of ``vocab_size`` does not have.
    """
    file = _open(path, file_state(path))
    begin = 0
    for block in range(0, len(file.ids), _BLOCK):
        ids = file.ids[block : block + _BLOCK]
        foreign = (ids >= vocab_size) | (ids < 0)
        if foreign.any():
            at = int(np.argmax(foreign))
            raise BadRecord(
                f"holds the id {int(ids[at]):,} (token {block + at:,}), and the tokenizer of data.tokenizer.path has "
                f"{vocab_size:,}",
                cure="name the tokenizer that made it",
            )
        low, high = np.searchsorted(file.begins, [block, block + len(ids)])
        ends = np.flatnonzero(ids == eot) + block
        borders = np.union1d(np.union1d(ends, ends + 1), file.begins[low:high])
        for border in borders.tolist():
            if border > begin and file.ids[begin] != eot:
                yield begin, border - begin
            begin = max(begin, border)
    if begin < len(file.ids) and file.ids[begin] != eot:
        yield begin, len(file.ids) - begin


def load(path: str, first: int, count: int) -> Ids:
    """``count`` ids from the number ``first`` on. Raises BadRecord if they are no longer there."""
    ids = _open(path, file_state(path)).ids[first : first + count]
    if len(ids) < count:
        raise BadRecord("is shorter than it was")
    return ids.astype(np.uint32)


@lru_cache(maxsize=8)
def _open(path: str, state: tuple[int, ...]) -> TokenFile:
    index = path.removesuffix(".bin") + ".idx"
    if os.path.exists(index):  # noqa: PTH110
        return _open_megatron(path, index)
    size = os.path.getsize(path)  # noqa: PTH202
    header = np.fromfile(path, "<i4", min(_LLMC_HEADER, size // 4))
    nothing = np.zeros(0, np.int64)
    if len(header) == _LLMC_HEADER and int(header[0]) in _LLMC_TYPES and header[1] == 1:
        dtype = np.dtype(_LLMC_TYPES[int(header[0])])
        expected = 4 * _LLMC_HEADER + int(header[2]) * dtype.itemsize
        if size != expected:
            raise BadRecord(f"is cut short: its header tells of {expected:,} bytes, and it has {size:,}")
        return TokenFile(_mapped(path, dtype, 4 * _LLMC_HEADER), nothing)
    if size % 2:
        raise BadRecord(f"is no file of token ids: its {size:,} bytes are no whole number of ids of two bytes")
    return TokenFile(_mapped(path, np.dtype("<u2"), 0), nothing)


def _open_megatron(path: str, index: str) -> TokenFile:
    with open(index, "rb") as stream:  # noqa: PTH123
        head = stream.read(34)
        version, code = int.from_bytes(head[9:17], "little"), head[17] if len(head) == 34 else 0
        if head[:9] != _MEGATRON or version != 1 or code not in _MEGATRON_TYPES:
            raise BadRecord(f"has an index, {index}, which is none of Megatron's with integer ids (version 1)")
        sequences, documents = np.frombuffer(head, "<u8", 2, 18).astype(np.int64).tolist()
        expected = 34 + 12 * sequences + 8 * documents
        if os.path.getsize(index) != expected:  # noqa: PTH202
            raise BadRecord(f"has an index, {index}, that is cut short: its header tells of {expected:,} bytes")
        lengths = np.fromfile(stream, "<i4", sequences).astype(np.int64)
        stream.seek(8 * sequences, 1)
        first_sequences = np.fromfile(stream, "<i8", documents)
    dtype = np.dtype(_MEGATRON_TYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if os.path.getsize(path) != int(ends[-1]) * dtype.itemsize:  # noqa: PTH202
        raise BadRecord(f"is cut short, or not the file of {index}, which tells of {int(ends[-1]):,} ids")
    return TokenFile(_mapped(path, dtype, 0), np.unique(ends[first_sequences.clip(0, sequences)]))


def _mapped(path: str, dtype: np.dtype[Any], offset: int) -> NDArray[Any]:
    if os.path.getsize(path) == offset:  # noqa: PTH202
        return np.zeros(0, dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype, "r", offset).view(np.ndarray)
