"""Writes a corpus folder from its spec: tokenizer, shards, tables, index, each file atomically.

Every finished shard leaves a receipt: its index entry and its table. A later prepare keeps each shard that agrees with
its receipt, so continuing after a kill and repairing damage are the same operation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from train.config import schema
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.data.prepare import workers
from train.data.prepare.corpus_spec import CorpusSpec, ReportProgress
from train.data.prepare.sources import LABEL, SourceFile, read_options
from train.data.tokenizer import FILE as TOKENIZER_FILE
from train.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from train.errors import UserError
from train.util import io
from train.util.reading import UNREADABLE, read_object

_RECIPE = "recipe.json"
_RECEIPTS = "receipts"
_LEARN_FROM = 256 << 20
"""Bytes of text that a bpe learns from at most: more would change few merges and take long."""
_PROBE = 64
_PROBE_CHARACTERS = 1 << 16
"""Documents, and characters of each, from which the tokens per byte are estimated."""


@dataclass(frozen=True)
class CorpusBuild:
    """The inputs of building one corpus."""

    data: schema.DataConfig
    sources: list[SourceFile]
    spec: CorpusSpec
    folder: Path
    run_tasks: workers.TaskRunner
    report: ReportProgress

    def texts(self, documents: workers.Documents) -> Iterator[str]:
        """The cleaned texts of some documents, labels appended without a separator."""
        files, options = dict(enumerate(self.sources)), read_options(self.data)
        return (workers.document_text(files, document, options).replace(LABEL, "") for document in documents)


def claim_folder(folder: Path, spec: CorpusSpec) -> None:
    """Record in the folder that it is this spec's. Raises UserError, and touches nothing, if it is another's."""
    (folder / _RECEIPTS).mkdir(parents=True, exist_ok=True)
    path = folder / _RECIPE
    if path.exists():
        old = read_object(path, "Set another data.dir, or delete that folder")
        if old.get("recipe") != spec.digest:
            settings = old["settings"] if isinstance(old.get("settings"), dict) else {}
            changed = [key for key, value in spec.settings.items() if settings.get(key) != value]
            what = f"other settings ({', '.join(f'data.{key}' for key in changed)})" if changed else "other text"
            raise UserError(
                f"data.dir={folder} holds a corpus of {what}: {str(old.get('recipe'))[:12]}, not {spec.digest[:12]}. "
                "Set another data.dir, or delete that folder"
            )
    else:
        io.write_whole(path, json.dumps({"recipe": spec.digest, "settings": spec.settings}).encode())


def build_corpus(build: CorpusBuild) -> None:
    """Write tokenizer, shards, tables and index; files that are there and whole are kept."""
    folder, spec = build.folder, build.spec
    for leftover in [*folder.glob(f"{io.TEMPORARY_PREFIX}*"), *(folder / _RECEIPTS).glob(f"{io.TEMPORARY_PREFIX}*")]:
        leftover.unlink()  # of a prepare that was killed: we hold the lock
    verified = VerifiedFiles(folder)
    tokenizer = _make_tokenizer(build, verified)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    jobs = {name: _plan_shards(build, tokenizer, name, dtype) for name in spec.splits}
    receipts = _write_shards(build, list(chain.from_iterable(jobs.values())), verified)
    splits = {}
    for name in spec.splits:
        done = [receipts[job.path.name] for job in jobs[name]]
        table = np.concatenate([np.zeros((3, 0), np.int64), *(table for _, table in done)], axis=1)
        splits[name] = shards.split_entry(
            [entry for entry, _ in done], shards.write_table(folder, name, table, verified)
        )
    shards.write_index(folder, {"recipe": spec.digest, "settings": spec.settings}, tokenizer, dtype, splits)


def _make_tokenizer(build: CorpusBuild, verified: VerifiedFiles) -> Tokenizer:
    """The tokenizer of the corpus; made unless the file is there and agrees with its receipt."""
    path, receipt = build.folder / TOKENIZER_FILE, build.folder / _RECEIPTS / f"{TOKENIZER_FILE}.json"
    try:
        digest = json.loads(receipt.read_text("utf-8"))
        if io.sha256_of(path) == digest:
            verified.add(path, digest)
            return load_tokenizer(build.folder)
    except UNREADABLE:
        pass  # not made yet, or damaged
    train = build.spec.splits["train"]
    fraction = min(1.0, _LEARN_FROM / max(1, int(train["bytes"].sum())))
    chosen = train[train["hash"][:, 1].astype(np.float64) / 2.0**64 < fraction] if fraction < 1 else train
    build.report({"phase": "tokenizer", "done": 0, "total": int(chosen["bytes"].sum())})
    content = build_tokenizer(build.data.tokenizer, build.texts(chosen), build.spec.characters)
    io.write_whole(path, content.encode())
    tokenizer = load_tokenizer(build.folder)
    io.write_whole(receipt, json.dumps(tokenizer.fingerprint).encode())
    verified.add(path, tokenizer.fingerprint)
    return tokenizer


def _plan_shards(build: CorpusBuild, tokenizer: Tokenizer, split: str, dtype: str) -> list[workers.ShardJob]:
    """Cut a split, in its order, into shards of about ``data.shard_tokens`` tokens."""
    documents = build.spec.splits[split]
    if not len(documents):
        return []
    per_byte = _tokens_per_byte(build, tokenizer)
    ends = np.cumsum(documents["bytes"] * per_byte + 1)
    numbers = ((ends - 1) // build.data.shard_tokens).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(documents)]
    jobs = []
    for number, (first, last) in enumerate(pairwise(borders)):
        part = documents[first:last]
        files = {int(n): build.sources[int(n)] for n in np.unique(part["file"])}
        path = build.folder / f"{split}-{number:06d}.tar"
        jobs.append(workers.ShardJob(path, first, part, files, read_options(build.data), dtype))
    return jobs


def _tokens_per_byte(build: CorpusBuild, tokenizer: Tokenizer) -> float:
    """Tokens per byte of text, measured on evenly spaced documents of the training split."""
    train = build.spec.splits["train"]
    probed = train[np.unique(np.linspace(0, len(train) - 1, _PROBE).astype(np.int64))]
    texts = [text[:_PROBE_CHARACTERS] for text in build.texts(probed)]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens / max(1, sum(len(text.encode()) for text in texts))


Receipt = tuple[shards.ShardEntry, shards.Ids]


def _write_shards(build: CorpusBuild, jobs: list[workers.ShardJob], verified: VerifiedFiles) -> dict[str, Receipt]:
    """Write every shard that is missing or disagrees with its receipt; returns all receipts by name of shard."""
    finished = {job.path.name: _finished_shard(build.folder, job.path, verified) for job in jobs}
    kept = {name: receipt for name, receipt in finished.items() if receipt}
    missing = [job for job in jobs if job.path.name not in kept]
    sizes = {job.path.name: int(job.documents["bytes"].sum()) for job in jobs}
    total, done = sum(sizes.values()), sum(sizes[name] for name in kept)
    build.report({"phase": "tokenize", "done": done, "total": total, "shards": len(jobs), "kept": len(kept)})
    for number, (entry, table) in build.run_tasks(workers.encode_shard, [(job,) for job in missing]):
        _write_receipt(build.folder, entry, table)
        verified.add(missing[number].path, entry.sha256)
        kept[entry.name] = entry, table
        done += sizes[entry.name]
        build.report({"phase": "tokenize", "done": done, "total": total})
    return kept


def _finished_shard(folder: Path, path: Path, verified: VerifiedFiles) -> Receipt | None:
    """The receipt of a shard that is there and whole, else None."""
    receipt = folder / _RECEIPTS / f"{path.name}.json"
    try:
        entry = shards.ShardEntry(**json.loads(receipt.read_bytes()))
        if entry.name != path.name:
            return None
        verified.check(folder, entry.name, entry.size, entry.sha256)
        return entry, shards.open_table(receipt.with_suffix(".npy"))
    except UserError:
        return None
    except UNREADABLE:
        return None


def _write_receipt(folder: Path, entry: shards.ShardEntry, table: shards.Ids) -> None:
    receipt = folder / _RECEIPTS / f"{entry.name}.json"
    io.write_whole(receipt.with_suffix(".npy"), shards.npy_bytes(table))
    io.write_whole(receipt, json.dumps(asdict(entry)).encode())
