"""A prepared corpus on disk: plain WebDataset tar shards, a table of their samples, and an index that proves them.

    <corpus>/index.json            what is here, with sha256 of everything; written last: without it there is no corpus
    <corpus>/tokenizer.json
    <corpus>/train-000000.tar      samples 000000000.meta.json {"source", "bytes"}, 000000000.tokens.npy
    <corpus>/train.table.npy       int64 (3, samples): where tokens begin in the tar (bytes), places, bytes of text
    <corpus>/verified.txt          stamps of files whose sha256 was checked, so that the next open need not

A document of n tokens is stored as [EOT, t1 .. tn, EOT]: it has n + 1 *places*, inputs being the first n + 1 ids and
targets the last n + 1. All counts of "tokens" here are places. webdataset writes the tars; local ones are read
at the offsets of the table. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from train.data.corpus.index_schema import check_index, check_members, check_table
from train.data.corpus.verified_files import CURE, VerifiedFiles, check_size
from train.data.sampling.epoch_order import DocSpans
from train.data.tokenizer import FILE as TOKENIZER_FILE
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.errors import UserError
from train.util import io as files

VERSION = 1
INDEX = "index.json"
_BLOCK = 512
_MAX_OPEN = 256
"""Shards held open at once, well below the usual limit of 1024 files."""
_MAP_AFTER = 64
_MAP_SIZE = 16 << 20
"""Pieces read from a shard before it is mapped, and the largest that is (bytes). A page's first touch costs more than a
read, so a resumed run reads at first; a page mapped whole and used again costs a tenth of a read."""
_SMALL_TABLE = 64 << 20
"""Bytes up to which a table is read at once."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the index promises it: sums of its samples, places and bytes of text; its size and sha256."""

    name: str
    samples: int
    tokens: int
    bytes: int
    size: int
    sha256: str


class _Hashing:
    """A file that hashes what passes through it, so that a shard is read by nobody to be proved."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self._file.write(block)


def write_shard(path: Path, first: int, documents: Iterable[tuple[str, int, NDArray[Any]]]) -> tuple[ShardEntry, Ids]:
    """Write one tar, whole or not at all; returns its entry and its table (3, samples).

    ``documents`` are (source, bytes of text, stored ids); ``first`` is the number of the first in its split. The bytes
    written are a function of the arguments.
    """
    from webdataset import TarWriter  # 1.3 s, and only writers need it

    rows: list[tuple[int, int, int]] = []
    temporary = files.temporary_path(path)
    with temporary.open("wb") as file:
        hashing = _Hashing(file)
        with TarWriter(hashing, encoder=False, mtime=0) as writer:
            for number, (source, text_bytes, ids) in enumerate(documents, first):
                meta = json.dumps({"source": source, "bytes": text_bytes}, ensure_ascii=False).encode()
                stored = npy_bytes(ids)
                begin = writer.tarstream.offset
                writer.write({"__key__": f"{number:09d}", "meta.json": meta, "tokens.npy": stored})
                header = len(stored) - ids.nbytes
                rows.append((begin + 2 * _BLOCK + -(-len(meta) // _BLOCK) * _BLOCK + header, len(ids) - 1, text_bytes))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    files.publish(temporary, path)
    table = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    sums = [int(total) for total in table.sum(axis=1)]
    return ShardEntry(path.name, len(rows), sums[1], sums[2], size, hashing.digest.hexdigest()), table


@dataclass
class _Shard:
    """An open shard: its file, how many pieces were read from it, and its bytes in memory once that pays."""

    file: io.FileIO
    uses: int = 0
    mapped: memoryview | None = None


class CorpusSplit:
    """One split of a corpus: the table of its samples, and their stored ids. Samples are numbered from 0."""

    def __init__(self, folder: Path, split: dict[str, Any], dtype: str, stamps: VerifiedFiles) -> None:
        self.folder = folder
        self.entries = [ShardEntry(**entry) for entry in split["shards"]]
        self.samples = sum(entry.samples for entry in self.entries)
        self.tokens = sum(entry.tokens for entry in self.entries)
        self.bytes = sum(entry.bytes for entry in self.entries)
        self.shard_samples: Ids = np.array([entry.samples for entry in self.entries], np.int64)
        self.shard_tokens: Ids = np.array([entry.tokens for entry in self.entries], np.int64)
        self.first: Ids = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)
        self.dtype = np.dtype(dtype)
        self._stamps = stamps
        self._open: dict[int, _Shard] = {}
        for entry in self.entries:
            check_size(folder, entry.name, entry.size)
        table = split["table"]
        stamps.check(folder, table["name"], table["size"], table["sha256"], self._check_table)
        self._table = _open_table(folder / table["name"])
        self.sizes: Ids = self._table[1]  # places of every sample
        self.text_bytes: Ids = self._table[2]

    def _check_table(self, path: Path) -> None:
        check_table(path, _open_table(path), self.entries, self.dtype.itemsize)

    def read(self, pieces: DocSpans, out: NDArray[Any]) -> None:
        """Read ``length`` stored ids of each piece from its place ``start`` on, one after the other, into ``out`` (flat).

        A sample -1 gives zeros. Raises UserError for a shard that is damaged; each is hashed when it is first opened.
        """
        width = self.dtype.itemsize
        shards = np.searchsorted(self.first, pieces.sample, side="right") - 1
        begins = self._table[0][pieces.sample] + pieces.start * width
        numbers, counts = np.unique(shards, return_counts=True)
        used = zip(numbers.tolist(), counts.tolist(), strict=True)
        opened = {shard: self._shard(shard, count) for shard, count in used if shard >= 0}
        place = memoryview(out.data).cast("B")
        at = 0
        for shard, begin, size in zip(shards.tolist(), begins.tolist(), (pieces.length * width).tolist(), strict=True):
            end = at + size
            if shard < 0:
                place[at:end] = bytes(size)
            elif (mapped := opened[shard].mapped) is not None:
                place[at:end] = mapped[begin : begin + size]
            elif os.preadv(opened[shard].file.fileno(), (place[at:end],), begin) != size:
                entry = self.entries[shard]
                check_size(self.folder, entry.name, entry.size)
                raise UserError(f"{self.folder / entry.name}: cut short while it was read. {CURE}")
            at = end

    def document(self, sample: int) -> NDArray[Any]:
        """The ids of one document, without the EOT around it."""
        ids = np.empty(int(self.sizes[sample]) - 1, self.dtype)
        self.read(DocSpans(np.array([sample]), np.array([1]), np.array([len(ids)])), ids)
        return ids

    def source(self, sample: int) -> str:
        """The name of the file that a document came from, as its shard has it."""
        shard = int(np.searchsorted(self.first, sample, side="right")) - 1
        begin = 0
        if sample > self.first[shard]:
            end = int(self._table[0][sample - 1]) + (int(self.sizes[sample - 1]) + 1) * self.dtype.itemsize
            begin = -(-end // _BLOCK) * _BLOCK
        file = self._shard(shard, 0).file
        size = tarfile.TarInfo.frombuf(os.pread(file.fileno(), _BLOCK, begin), "utf-8", "strict").size
        return str(json.loads(os.pread(file.fileno(), size, begin + _BLOCK))["source"])

    def _shard(self, shard: int, uses: int) -> _Shard:
        """An open shard, checked the first time, mapped when it has been used much. It closes when nobody holds it."""
        found = self._open.get(shard)
        if found is None:
            entry = self.entries[shard]
            self._stamps.check(self.folder, entry.name, entry.size, entry.sha256, check_members)
            found = _Shard(io.FileIO(self.folder / entry.name))
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open)), None)
            self._open[shard] = found
        found.uses += uses
        if found.mapped is None and found.uses >= _MAP_AFTER and self.entries[shard].size <= _MAP_SIZE:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            found.mapped = memoryview(mmap.mmap(found.file.fileno(), 0, flags=flags, prot=mmap.PROT_READ))
        return found


def _open_table(path: Path) -> Ids:
    """A table: in memory, or mapped where it is large, since a rank needs parts of it."""
    how: Literal["r"] | None = "r" if path.stat().st_size > _SMALL_TABLE else None
    try:
        return np.load(path, mmap_mode=how, allow_pickle=False).view(np.ndarray)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}. {CURE}") from None


class Corpus:
    """A prepared corpus, opened. Raises UserError, with the cure, for anything missing, cut short or changed."""

    def __init__(self, folder: Path | str, special: Sequence[str] = ()) -> None:
        """The tokenizer gets the ``special`` tokens of a model: shards hold none, so that one corpus serves every objective."""
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.stamps = VerifiedFiles(self.folder)
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != self.index["tokenizer"]["sha256"]:
            raise UserError(f"{self.folder / TOKENIZER_FILE}: not the tokenizer that made these shards. {CURE}")
        self.tokenizer = self.tokenizer.extended(special)
        self._splits: dict[str, CorpusSplit] = {}

    @property
    def fingerprint(self) -> str:
        """Hex digest over the index, and so over every byte of shards and tokenizer: equal only for an equal corpus."""
        return fingerprint(self.index)

    def split(self, name: str) -> CorpusSplit:
        """The samples of "train", "val" or "test"; the latter may be empty (``samples == 0``). UserError for one not made."""
        if name not in self.index["splits"]:
            raise UserError(
                f"{self.folder} has no split {name!r}: it has {', '.join(self.index['splits'])} (data.test_fraction)"
            )
        if name not in self._splits:
            self._splits[name] = CorpusSplit(self.folder, self.index["splits"][name], self.index["dtype"], self.stamps)
        return self._splits[name]


def fingerprint(index: dict[str, Any]) -> str:
    """What names a corpus: a hex digest over its index."""
    return sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared corpus. Raises UserError if there is none, or one of another version."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no prepared corpus (no {INDEX}): run `./launch.sh prepare` first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). {CURE}") from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version {version}, this program reads {VERSION}: prepare the corpus again")
    check_index(path, index)
    return index


def index_split(entries: list[ShardEntry], table: dict[str, Any]) -> dict[str, Any]:
    """What the index says about one split."""
    sums = {key: sum(getattr(entry, key) for entry in entries) for key in ("samples", "tokens", "bytes")}
    return {**sums, "table": table, "shards": [asdict(entry) for entry in entries]}


def write_index(
    folder: Path, origin: dict[str, Any], made: Tokenizer, dtype: str, splits: dict[str, dict[str, Any]]
) -> None:
    """Write the index, and with it declare the corpus whole. ``origin`` is its recipe's digest and settings."""
    index = {
        "version": VERSION,
        **origin,
        "tokenizer": {"sha256": made.fingerprint, "vocab_size": made.vocab_size, "eot": made.eot},
        "dtype": dtype,
        "splits": splits,
    }
    files.write_whole(folder / INDEX, json.dumps(index, indent=1).encode())


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    stored = io.BytesIO()
    np.lib.format.write_array(stored, array, version=(1, 0), allow_pickle=False)
    return stored.getvalue()


def write_table(folder: Path, split: str, table: Ids, stamps: VerifiedFiles) -> dict[str, Any]:
    """Write a split's table (3, samples); returns its entry for the index."""
    content = npy_bytes(table)
    path, digest = folder / f"{split}.table.npy", sha256(content).hexdigest()
    files.write_whole(path, content)
    stamps.add(path, digest)
    return {"name": path.name, "size": len(content), "sha256": digest}


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a corpus holds, for showing: folder, vocabulary, and per split its documents, tokens (places), bytes, shards."""
    keys = ("samples", "tokens", "bytes")
    splits = {
        name: {**{key: split[key] for key in keys}, "shards": len(split["shards"])}
        for name, split in corpus.index["splits"].items()
    }
    return {"folder": str(corpus.folder), "vocab_size": corpus.tokenizer.vocab_size, "splits": splits}
