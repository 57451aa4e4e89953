"""The making of a corpus folder from its recipe: tokenizer, shards, tables, index, each whole or absent.

A finished shard leaves a receipt (its entry and its table); a later prepare keeps every file that its receipt agrees
with, so going on after a kill and repairing damage are the same work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from train.config import schema
from train.data import tokenizer
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.data.prepare import workers
from train.data.prepare.corpus_spec import CorpusSpec, Report
from train.data.prepare.sources import LABEL, SourceFile, reading
from train.data.tokenizer import Tokenizer
from train.errors import UserError
from train.util import io

_RECIPE = "recipe.json"
_RECEIPTS = "receipts"
_LEARN_FROM = 256 << 20
"""Bytes of text that a bpe learns from at most: more would change few of its merges, and take long."""
_PROBE = 64
_PROBE_CHARACTERS = 1 << 16
"""Documents, and characters of each, that tell how many tokens a byte makes."""


@dataclass(frozen=True)
class Making:
    """All that the making of one corpus needs."""

    data: schema.DataConfig
    sources: list[SourceFile]
    recipe: CorpusSpec
    folder: Path
    run: workers.Run
    report: Report

    def texts(self, documents: workers.Documents) -> Iterator[str]:
        """The cleaned texts of some documents."""
        named, how = dict(enumerate(self.sources)), reading(self.data)
        return (workers.text_of(named, document, how).replace(LABEL, "") for document in documents)


def enter(folder: Path, recipe: CorpusSpec) -> None:
    """Make the folder this recipe's. Raises UserError if it is another's: nothing of it is touched then."""
    (folder / _RECEIPTS).mkdir(parents=True, exist_ok=True)
    path = folder / _RECIPE
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if old["recipe"] != recipe.digest:
            changed = [key for key, value in recipe.settings.items() if old["settings"].get(key) != value]
            what = f"other settings ({', '.join(f'data.{key}' for key in changed)})" if changed else "other text"
            raise UserError(
                f"data.dir={folder} holds a corpus of {what}: {old['recipe'][:12]}, not {recipe.digest[:12]}. "
                "Set another data.dir, or delete that folder"
            )
    else:
        io.write_whole(path, json.dumps({"recipe": recipe.digest, "settings": recipe.settings}).encode())


def make(making: Making) -> None:
    """Write tokenizer, shards, tables and index, each unless it is there and right."""
    folder, recipe = making.folder, making.recipe
    for left in [*folder.glob(f"{io.ASIDE}*"), *(folder / _RECEIPTS).glob(f"{io.ASIDE}*")]:
        left.unlink()  # of a prepare that was killed: we hold the lock
    stamps = VerifiedFiles(folder)
    made = _tokenizer(making, stamps)
    dtype = "uint16" if made.vocab_size <= 1 << 16 else "uint32"
    jobs = {name: _plan(making, made, name, dtype) for name in recipe.splits}
    receipts = _encode(making, [job for name in recipe.splits for job in jobs[name]], stamps)
    splits = {}
    for name in recipe.splits:
        done = [receipts[job.path.name] for job in jobs[name]]
        table = np.concatenate([np.zeros((3, 0), np.int64), *(table for _, table in done)], axis=1)
        splits[name] = shards.index_split([entry for entry, _ in done], shards.write_table(folder, name, table, stamps))
    shards.write_index(folder, {"recipe": recipe.digest, "settings": recipe.settings}, made, dtype, splits)


def _tokenizer(making: Making, stamps: VerifiedFiles) -> Tokenizer:
    """The tokenizer of the corpus, made unless it is there and the one that was made."""
    path, receipt = making.folder / tokenizer.FILE, making.folder / _RECEIPTS / f"{tokenizer.FILE}.json"
    try:
        digest = json.loads(receipt.read_text("utf-8"))
        if io.sha256_of(path) == digest:
            stamps.add(path, digest)
            return tokenizer.load_tokenizer(making.folder)
    except (OSError, ValueError):
        pass  # not made yet, or not whole
    train = making.recipe.splits["train"]
    share = min(1.0, _LEARN_FROM / max(1, int(train["bytes"].sum())))
    chosen = train[train["hash"][:, 1].astype(np.float64) / 2.0**64 < share] if share < 1 else train
    making.report({"phase": "tokenizer", "done": 0, "total": int(chosen["bytes"].sum())})
    content = tokenizer.build_tokenizer(making.data.tokenizer, making.texts(chosen), making.recipe.characters)
    io.write_whole(path, content.encode())
    made = tokenizer.load_tokenizer(making.folder)
    io.write_whole(receipt, json.dumps(made.fingerprint).encode())
    stamps.add(path, made.fingerprint)
    return made


def _plan(making: Making, made: Tokenizer, split: str, dtype: str) -> list[workers.ShardJob]:
    """Cut a split, in its order, into shards of about ``data.shard_tokens`` tokens."""
    documents = making.recipe.splits[split]
    if not len(documents):
        return []
    per_byte = _tokens_per_byte(making, made)
    ends = np.cumsum(documents["bytes"] * per_byte + 1)
    numbers = ((ends - 1) // making.data.shard_tokens).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(documents)]
    jobs = []
    for number, (first, last) in enumerate(pairwise(borders)):
        part = documents[first:last]
        named = {int(n): making.sources[int(n)] for n in np.unique(part["file"])}
        path = making.folder / f"{split}-{number:06d}.tar"
        jobs.append(workers.ShardJob(path, first, part, named, reading(making.data), dtype))
    return jobs


def _tokens_per_byte(making: Making, made: Tokenizer) -> float:
    """Measured on some documents of the training split, evenly apart."""
    train = making.recipe.splits["train"]
    probed = train[np.unique(np.linspace(0, len(train) - 1, _PROBE).astype(np.int64))]
    texts = [text[:_PROBE_CHARACTERS] for text in making.texts(probed)]
    return sum(len(made.encode(text)) for text in texts) / max(1, sum(len(text.encode()) for text in texts))


Receipt = tuple[shards.ShardEntry, shards.Ids]


def _encode(making: Making, jobs: list[workers.ShardJob], stamps: VerifiedFiles) -> dict[str, Receipt]:
    """Write every shard that has no receipt, or does not agree with it; the receipts by name of shard."""
    kept = {job.path.name: receipt for job in jobs if (receipt := _kept(making.folder, job.path, stamps))}
    missing = [job for job in jobs if job.path.name not in kept]
    sizes = {job.path.name: int(job.documents["bytes"].sum()) for job in jobs}
    total, done = sum(sizes.values()), sum(sizes[name] for name in kept)
    making.report({"phase": "tokenize", "done": done, "total": total, "shards": len(jobs), "kept": len(kept)})
    for number, (entry, table) in making.run(workers.encode_shard, [(job,) for job in missing]):
        _write_receipt(making.folder, entry, table)
        stamps.add(missing[number].path, entry.sha256)
        kept[entry.name] = entry, table
        done += sizes[entry.name]
        making.report({"phase": "tokenize", "done": done, "total": total})
    return kept


def _kept(folder: Path, path: Path, stamps: VerifiedFiles) -> Receipt | None:
    """The receipt of a shard that is there and whole."""
    receipt = folder / _RECEIPTS / f"{path.name}.json"
    try:
        entry = shards.ShardEntry(**json.loads(receipt.read_text("utf-8")))
        stamps.check(folder, entry.name, entry.size, entry.sha256)
        return entry, np.load(receipt.with_suffix(".npy"), allow_pickle=False)
    except (OSError, ValueError, TypeError, UserError):
        return None


def _write_receipt(folder: Path, entry: shards.ShardEntry, table: shards.Ids) -> None:
    receipt = folder / _RECEIPTS / f"{entry.name}.json"
    io.write_whole(receipt.with_suffix(".npy"), shards.npy_bytes(table))
    io.write_whole(receipt, json.dumps(asdict(entry)).encode())
