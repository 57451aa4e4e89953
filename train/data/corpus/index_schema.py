"""Validation of a corpus that may come from somebody else: index, tables and members of tars.

A hash proves that a file is the one in the index, not that their author is trustworthy. So names must not lead out of
the folder, counts must agree with the files, and a tar with a link, a path or a pickle in it is refused, although
nothing here would unpack it.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from train.errors import UserError
from train.util.reading import reading

MEMBER = re.compile(r"\d{9,}\.(meta\.json|tokens\.npy)")
"""Names of the members a shard may have: the two files of each sample."""
CURE = "It was not made by `./launch.sh prepare`: prepare the text anew, and do not use this folder"

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _IndexedTable(_StrictModel):
    name: Annotated[str, Field(pattern=r"^(train|val|test)\.table\.npy$")]
    size: Count
    sha256: Digest


class _IndexedShard(_StrictModel):
    name: Annotated[str, Field(pattern=r"^(train|val|test)-\d{6,}\.tar$")]
    samples: Count
    tokens: Count
    bytes: Count
    size: Count
    sha256: Digest


class _IndexedSplit(_StrictModel):
    samples: Count
    tokens: Count
    bytes: Count
    table: _IndexedTable
    shards: list[_IndexedShard]


class _IndexedTokenizer(_StrictModel):
    sha256: Digest
    vocab_size: Count
    eot: Count


class _CorpusIndex(BaseModel):
    """The index; its other keys, which say where the corpus comes from, are for people."""

    model_config = ConfigDict(strict=True)
    tokenizer: _IndexedTokenizer
    dtype: Literal["uint16", "uint32"]
    splits: dict[Literal["train", "val", "test"], _IndexedSplit]


def check_index(path: Path, index: Any) -> None:
    """Raise UserError, naming the first bad entry, unless an index has the form that prepare writes."""
    try:
        _CorpusIndex.model_validate(index)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where} is {repr(first['input'])[:80]}: {first['msg'].lower()}. {CURE}") from None


def check_members(path: Path) -> None:
    """Raise UserError, naming the member, if a tar holds anything but samples. Reads the headers only.

    Header by header, since ``tarfile`` would allocate what a header for a long name announces.
    """
    size = path.stat().st_size
    with reading(path, CURE), path.open("rb") as tar:
        while (header := tar.read(tarfile.BLOCKSIZE)) not in (b"", bytes(tarfile.BLOCKSIZE)):
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            link = f", a link to {member.linkname!r}" if member.linkname else ""
            if link or not member.isreg() or not MEMBER.fullmatch(member.name):
                raise UserError(f"{path}: holds {member.name!r}{link}, which is no part of a sample. {CURE}")
            if not 0 <= member.size <= size - tar.tell():
                raise ValueError(f"{member.name} is cut short")
            tar.seek(-(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, io.SEEK_CUR)


def check_table(path: Path, table: NDArray[np.int64], shards: Sequence[Any], width: int) -> None:
    """Raise UserError unless the table of a split, (3, samples) int64, agrees with the entries of its shards.

    ``width`` is the bytes of a token id. Every sample must lie inside its shard.
    """
    samples = np.array([shard.samples for shard in shards], np.int64)
    if table.dtype != np.int64 or table.shape != (3, samples.sum()):
        raise UserError(
            f"{path}: {table.dtype} {table.shape}, where the index speaks of {samples.sum()} samples. {CURE}"
        )
    ends = np.concatenate([[0], np.cumsum(samples)])
    for shard, first, last in zip(shards, ends, ends[1:], strict=False):
        begin, tokens, text_bytes = table[:, first:last]
        inside = (
            (begin >= 0)
            & (tokens >= 1)
            & (tokens <= shard.size // width)
            & (begin <= shard.size - (tokens + 1) * width)
        )
        if not inside.all():
            raise UserError(f"{path}: sample {first + int(np.argmin(inside))} lies outside of {shard.name}. {CURE}")
        if (tokens.sum(), text_bytes.sum()) != (shard.tokens, shard.bytes):
            raise UserError(
                f"{path}: {shard.name} has {tokens.sum()} tokens, and the index says {shard.tokens}. {CURE}"
            )
