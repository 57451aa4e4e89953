"""A prepared corpus on disk: WebDataset tar shards, tables of their samples, and an index.

    <corpus>/index.json            list of all files with their sha256; written last: without it there is no corpus
    <corpus>/tokenizer.json
    <corpus>/train-000000.tar      samples 000000000.meta.json {"source", "bytes"}, 000000000.tokens.npy
    <corpus>/train.table.npy       int64 (3, samples): byte offset of the ids in the tar, tokens, bytes of text
    <corpus>/verified.txt          size, mtime and sha256 of files that were hashed, so that the next open need not

A document of n ids is stored as [EOT, t1 .. tn, EOT] and counts as n + 1 tokens: inputs are the first n + 1 ids,
targets the last n + 1. webdataset writes the tars; ids are read at the offsets of the table. Nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.index_schema import check_index, check_members, check_table
from train.data.corpus.verified_files import CURE, VerifiedFiles, check_size
from train.data.sampling.epoch_order import DocSpans
from train.data.tokenizer import FILE as TOKENIZER_FILE
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import UserError
from train.util import io as files
from train.util.reading import as_object, read_object, reading

VERSION = 1
INDEX = "index.json"
_BLOCK = 512
_MAX_OPEN = 256
"""Shards held open at once, well below the usual limit of 1024 files."""
_MAP_AFTER = 64
_MAP_SIZE = 16 << 20
"""Spans read from a shard before it is mapped, and the largest shard that is mapped (bytes). The first touch of a page
costs more than a read, so a resumed run reads at first; a mapped page that is used again costs a tenth of a read."""
_SMALL_TABLE = 64 << 20
"""Bytes up to which a table is read into memory; a larger one is mapped."""

_SPOOL = 8 << 20
"""Bytes of a document's ids up to which they are gathered in memory; those of a larger one in a temporary file."""

ID_BITS = 24
"""Bits of a 32-bit stored id that are the id: those above are marks (`train.data.chat.packed_rows`). No tokenizer has
more ids."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the index: number of samples, tokens and bytes of text; size (bytes) and sha256 of its file."""

    name: str
    samples: int
    tokens: int
    bytes: int
    size: int
    sha256: str


class _HashingFile:
    """A file that hashes what is written to it, so that a new shard need not be read back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self._file.write(block)


def write_shard(
    path: Path, first: int, dtype: np.dtype[Any], documents: Iterable[tuple[Any, int, Iterable[NDArray[Any]]]]
) -> tuple[ShardEntry, Ids]:
    """Write one tar atomically; returns its index entry and its table (3, samples).

    ``documents`` are (source, bytes of text, stored ids in parts), the source a name or a dict with a "source"
    among them; ``first`` is the number of the first document in its split. Equal arguments give equal bytes, however
    the ids are parted.
    """
    from webdataset import TarWriter  # 1.3 s, and only writers need it

    rows: list[tuple[int, int, int]] = []
    temporary = files.temporary_path(path)
    with temporary.open("wb") as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, encoder=False, mtime=0) as writer:
            for number, (source, text_bytes, parts) in enumerate(documents, first):
                about = source if isinstance(source, dict) else {"source": source}
                about = {"source": about["source"], "bytes": text_bytes, **about}
                meta = json.dumps(about | {"bytes": text_bytes}, ensure_ascii=False).encode()
                writer.write({"__key__": f"{number:09d}", "meta.json": meta})
                with tempfile.SpooledTemporaryFile(max_size=_SPOOL, dir=str(path.parent)) as spool:
                    count, header = _write_npy(spool, dtype, parts)
                    rows.append((writer.tarstream.offset + _BLOCK + header, count - 1, text_bytes))
                    _add_member(writer, f"{number:09d}.tokens.npy", spool)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    files.publish(temporary, path)
    table = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    sums = [int(total) for total in table.sum(axis=1)]
    return ShardEntry(path.name, len(rows), sums[1], sums[2], size, hashing.digest.hexdigest()), table


def _write_npy(file: IO[bytes], dtype: np.dtype[Any], parts: Iterable[NDArray[Any]]) -> tuple[int, int]:
    """Write the .npy file of an array that comes in parts; returns (its length, bytes before its first element)."""
    _write_npy_header(file, dtype, 0)
    header, count = file.tell(), 0
    for part in parts:
        file.write(part.astype(dtype, copy=False).tobytes())
        count += len(part)
    file.seek(0)
    _write_npy_header(file, dtype, count)
    assert file.tell() == header, "numpy pads the header for any length"
    return count, header


def _write_npy_header(file: IO[bytes], dtype: np.dtype[Any], count: int) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, described)


def _add_member(writer: Any, name: str, content: IO[bytes]) -> None:
    """Add a file to the tar of a ``TarWriter`` as its ``write`` does, but from a file: it may be larger than memory."""
    member = tarfile.TarInfo(name)
    member.size = content.seek(0, os.SEEK_END)
    member.mtime, member.mode, member.uname, member.gname = writer.mtime, writer.mode, writer.user, writer.group
    content.seek(0)
    writer.tarstream.addfile(member, content)


@dataclass
class _OpenShard:
    """An open shard: its file, how many spans were read from it, and its mapped bytes once mapping pays."""

    file: io.FileIO
    uses: int = 0
    mapped: memoryview | None = None


class CorpusSplit:
    """One split of a corpus: sizes of its samples (documents, numbered from 0), and their stored ids."""

    def __init__(self, folder: Path, split: dict[str, Any], dtype: str, verified: VerifiedFiles) -> None:
        self.folder = folder
        self.entries = [ShardEntry(**entry) for entry in split["shards"]]
        self.samples = sum(entry.samples for entry in self.entries)
        self.tokens = sum(entry.tokens for entry in self.entries)
        self.bytes = sum(entry.bytes for entry in self.entries)
        self.shard_samples: Ids = np.array([entry.samples for entry in self.entries], np.int64)
        self.shard_tokens: Ids = np.array([entry.tokens for entry in self.entries], np.int64)
        self.first_samples: Ids = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)
        self.dtype = np.dtype(dtype)
        self._verified = verified
        self._open: dict[int, _OpenShard] = {}
        for entry in self.entries:
            check_size(folder, entry.name, entry.size)
        table = split["table"]
        verified.check(folder, table["name"], table["size"], table["sha256"], self._check_table)
        self._table = open_table(folder / table["name"])
        self.sample_tokens: Ids = self._table[1]
        self.text_bytes: Ids = self._table[2]

    def _check_table(self, path: Path) -> None:
        check_table(path, open_table(path), self.entries, self.dtype.itemsize)

    @property
    def parts(self) -> Mapping[str, CorpusSplit]:
        """The splits that this one is made of, by the name of their source: itself, without a name."""
        return {"": self}

    def name_of(self, sample: int) -> tuple[str, int]:
        """(key of a sample in the shards, epoch that its number stands for): a mixture numbers epochs apart."""
        return f"train/{sample:09d}", 0

    def read_spans(self, spans: DocSpans, out: NDArray[Any], at: Ids | None = None) -> None:
        """Read the stored ids of all spans into ``out`` (flat); padding reads as zeros.

        They are written one after another, or at the positions ``at`` (spans,), in ids.

        Raises UserError for a damaged shard; each shard is verified when it is first opened.
        """
        width = self.dtype.itemsize
        shards = np.searchsorted(self.first_samples, spans.sample, side="right") - 1
        begins = self._table[0][spans.sample] + spans.start * width
        numbers, counts = np.unique(shards, return_counts=True)
        used = zip(numbers.tolist(), counts.tolist(), strict=True)
        opened = {shard: self._open_shard(shard, count) for shard, count in used if shard >= 0}
        buffer = memoryview(out.data).cast("B")
        places = (np.cumsum(spans.length) - spans.length if at is None else at) * width
        columns = (shards.tolist(), begins.tolist(), (spans.length * width).tolist(), places.tolist())
        for shard, begin, size, position in zip(*columns, strict=True):
            end = position + size
            if shard < 0:
                buffer[position:end] = bytes(size)
            elif (mapped := opened[shard].mapped) is not None:
                buffer[position:end] = mapped[begin : begin + size]
            elif os.preadv(opened[shard].file.fileno(), (buffer[position:end],), begin) != size:
                entry = self.entries[shard]
                check_size(self.folder, entry.name, entry.size)
                raise UserError(f"{self.folder / entry.name}: cut short while it was read. {CURE}")

    def document(self, sample: int, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """The ids [begin, end) of one document without the EOT on both sides; one inside separates text and label."""
        ids = self.stored(sample, begin, end)
        return ids & ((1 << ID_BITS) - 1) if self.dtype.itemsize == 4 else ids

    def stored(self, sample: int, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``document``, with the marks that 32-bit ids may have."""
        length = int(self.sample_tokens[sample]) - 1
        ids = np.empty(max(0, min(length if end is None else end, length) - begin), self.dtype)
        self.read_spans(DocSpans(np.array([sample]), np.array([1 + begin]), np.array([len(ids)])), ids)
        return ids

    def source(self, sample: int) -> str:
        """The name of the file that a document came from, as stored in its shard, or that its row had."""
        return str(self.about(sample)["source"])

    def about(self, sample: int) -> dict[str, Any]:
        """The fields stored beside a document's tokens: "source", "bytes" of text, and fields of its row."""
        shard = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        begin = 0
        if sample > self.first_samples[shard]:
            end = int(self._table[0][sample - 1]) + (int(self.sample_tokens[sample - 1]) + 1) * self.dtype.itemsize
            begin = -(-end // _BLOCK) * _BLOCK
        file = self._open_shard(shard, 0).file
        with reading(self.folder / self.entries[shard].name, CURE):
            size = tarfile.TarInfo.frombuf(os.pread(file.fileno(), _BLOCK, begin), "utf-8", "strict").size
            if size > self.entries[shard].size:
                raise ValueError(f"a member of {size:,} bytes is larger than the file")
            about = as_object(json.loads(os.pread(file.fileno(), size, begin + _BLOCK)))
            return about | {"source": str(about["source"]), "bytes": int(about["bytes"])}

    def _open_shard(self, shard: int, uses: int) -> _OpenShard:
        """An open shard: verified when first opened, mapped after many uses, closed with its last reference."""
        opened = self._open.get(shard)
        if opened is None:
            entry = self.entries[shard]
            self._verified.check(self.folder, entry.name, entry.size, entry.sha256, check_members)
            opened = _OpenShard(io.FileIO(self.folder / entry.name))
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)), None)
            self._open[shard] = opened
        opened.uses += uses
        if opened.mapped is None and opened.uses >= _MAP_AFTER and self.entries[shard].size <= _MAP_SIZE:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            opened.mapped = memoryview(mmap.mmap(opened.file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))
        return opened


def open_table(path: Path) -> Ids:
    """The array of a table, of the size that its header says: in memory, or mapped if it is large, since a rank needs
    only parts of it.
    """
    mode: Literal["r"] | None = "r" if path.stat().st_size > _SMALL_TABLE else None
    with reading(path, CURE):
        with path.open("rb") as file:  # numpy would first allocate what the header announces
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is no table of this program")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if file.tell() + math.prod(shape) * dtype.itemsize != path.stat().st_size:
                raise ValueError(f"its header announces {shape} numbers, and they are not there")
        return np.load(path, mmap_mode=mode, allow_pickle=False).view(np.ndarray)


class Corpus:
    """A prepared corpus. Raises UserError, with the cure, for any file that is missing, cut short or changed."""

    def __init__(self, folder: Path | str, special: Sequence[str] = ()) -> None:
        """Adds the ``special`` tokens of a model to the tokenizer; shards hold none, so one corpus serves all."""
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.verified = VerifiedFiles(self.folder)
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != self.index["tokenizer"]["sha256"]:
            raise UserError(f"{self.folder / TOKENIZER_FILE}: not the tokenizer that made these shards. {CURE}")
        self.tokenizer = self.tokenizer.extended(special)
        self._splits: dict[str, CorpusSplit] = {}

    @cached_property  # a second or more for the index of a trillion tokens
    def fingerprint(self) -> str:
        """Hex digest over the index, and so over all shards and the tokenizer: equal only for equal corpora."""
        return fingerprint(self.index)

    def split(self, name: str) -> CorpusSplit:
        """The split "train", "val" or "test"; the last two may be empty. Raises UserError if it was not made."""
        if name not in self.index["splits"]:
            raise UserError(
                f"{self.folder} has no split {name!r}: it has {', '.join(self.index['splits'])} (data.test_fraction)"
            )
        if name not in self._splits:
            self._splits[name] = CorpusSplit(
                self.folder, self.index["splits"][name], self.index["dtype"], self.verified
            )
        return self._splits[name]


def fingerprint(index: dict[str, Any]) -> str:
    """The hex digest over an index that identifies a corpus."""
    return sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The validated index of a prepared corpus. Raises UserError if it is missing, damaged or of another version."""
    path = folder / INDEX
    if not path.exists():
        raise UserError(f"{folder} is no prepared corpus (no {INDEX}): run `./launch.sh prepare` first")
    index = read_object(path, CURE)
    version = index.get("version")
    if version != VERSION:
        raise UserError(f"{path}: version {version}, this program reads {VERSION}: prepare the corpus again")
    check_index(path, index)
    return index


def split_entry(entries: list[ShardEntry], table: dict[str, Any]) -> dict[str, Any]:
    """The index's entry of one split, from its shards and its table's entry."""
    shards = [asdict(entry) for entry in entries]
    sums = {key: sum(map(itemgetter(key), shards)) for key in ("samples", "tokens", "bytes")}
    return {**sums, "table": table, "shards": shards}


def write_index(
    folder: Path, origin: dict[str, Any], tokenizer: Tokenizer, dtype: str, splits: dict[str, dict[str, Any]]
) -> None:
    """Write the index, which makes the corpus complete. ``origin`` is the digest and the settings of its spec."""
    index = {
        "version": VERSION,
        **origin,
        "tokenizer": {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot},
        "dtype": dtype,
        "splits": splits,
    }
    files.write_whole(folder / INDEX, json.dumps(index, indent=1).encode())


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of an array's .npy file."""
    stored = io.BytesIO()
    np.lib.format.write_array(stored, array, version=(1, 0), allow_pickle=False)
    return stored.getvalue()


def write_table(folder: Path, split: str, table: Ids, verified: VerifiedFiles) -> dict[str, Any]:
    """Write the table (3, samples) of a split; returns its entry in the index."""
    content = npy_bytes(table)
    path, digest = folder / f"{split}.table.npy", sha256(content).hexdigest()
    files.write_whole(path, content)
    verified.add(path, digest)
    return {"name": path.name, "size": len(content), "sha256": digest}


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """A summary to show: folder, vocabulary size and, per split, documents, tokens, bytes of text and shards."""
    keys = ("samples", "tokens", "bytes")
    splits = {
        name: {**{key: split[key] for key in keys}, "shards": len(split["shards"])}
        for name, split in corpus.index["splits"].items()
    }
    return {"folder": str(corpus.folder), "vocab_size": corpus.tokenizer.vocab_size, "splits": splits}
