"""Writes a corpus folder from its spec: tokenizer, shards, tables, index, each file atomically.

Every finished shard leaves a receipt: its index entry and its table. A later prepare keeps each shard that agrees with
its receipt, so continuing after a kill and repairing damage are the same operation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.config import schema
from train.data.chat.conversations import said_in
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.data.prepare import workers
from train.data.prepare.chat_shards import PackOptions, describe_counts, encode_conversations
from train.data.prepare.corpus_spec import CorpusSpec
from train.data.prepare.documents import LABEL, read_options, token_maker
from train.data.prepare.first_pass import ReportProgress
from train.data.sampling.epoch_order import hash_key
from train.data.screening.screen import DROPPED
from train.data.sources.source_files import SourceFile
from train.data.tokenizer import FILE as TOKENIZER_FILE
from train.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, parts_to_learn
from train.errors import UserError
from train.util import io
from train.util.format import plural
from train.util.reading import UNREADABLE, read_object
from train.util.run_layout import RunDir

_RECIPE = "recipe.json"
_RECEIPTS = "receipts"
SET_ASIDE = "skipped.jsonl"
"""The list of documents and files that could not be read, in the folder of the corpus."""
_MAX_UNKNOWN = 0.01
"""Share of unknown text above which a given tokenizer is refused, unless data.tokenizer.max_unknown allows it."""
_LEARN_FROM = 256 << 20
"""Bytes of text that a bpe learns from, about: more would change few merges and take long."""
_LEARN_PART = 1 << 16
"""Characters of a document that it learns from together."""
_REPORT_AFTER = 4 << 20
"""Bytes of text after which progress is reported."""
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
    packing: PackOptions | None = None
    """How conversations become rows; None for a corpus of text."""

    def pieces(self, document: np.void) -> Iterator[str]:
        """The cleaned text of a document in pieces, a label appended without a separator; of token ids their text, of
        a conversation what is said in it.
        """
        file, options = self.sources[int(document["file"])], read_options(self.data)
        pieces = workers.document_pieces(file, document, options)
        if self.packing:
            yield from said_in("".join(pieces))
            return
        for piece in pieces:
            if isinstance(piece, str):
                yield piece.removeprefix(LABEL)
            else:
                yield from token_maker(options).decode_parts(piece)


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
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 and not build.packing else "uint32"
    jobs = {name: _plan_shards(build, tokenizer, name, dtype) for name in spec.splits}
    receipts = _write_shards(build, list(chain.from_iterable(jobs.values())), verified)
    _check_unknown(build, receipts.values())
    if build.packing:
        build.packing.template.write(RunDir(folder).chat_template)  # a run takes a copy of it, by the same name
        counts = sum((count for _, _, count in receipts.values()), workers.Counts())
        build.report({"phase": "note", "text": describe_counts(counts, build.packing.row_tokens)})
    splits = {}
    for name in spec.splits:
        done = [receipts[job.path.name] for job in jobs[name]]
        table = np.concatenate([np.zeros((3, 0), np.int64), *(table for _, table, _ in done)], axis=1)
        splits[name] = shards.split_entry(
            [entry for entry, _, _ in done], shards.write_table(folder, name, table, verified)
        )
    _list_set_aside(build)
    shards.write_index(folder, {"recipe": spec.digest, "settings": spec.settings}, tokenizer, dtype, splits)


def _list_set_aside(build: CorpusBuild) -> None:
    """Write the list of what could not be read and was left out, and examples of what was dropped, if there is any."""
    rows = []
    for problem in build.spec.set_aside:
        row = {"file": problem.path, "place": problem.place, "offset": problem.offset, "problem": problem.what}
        rows.append(io.to_json({key: value for key, value in row.items() if value is not None}) + "\n")
    if rows:
        io.write_whole(build.folder / SET_ASIDE, "".join(rows).encode())
    if build.spec.dropped:
        lines = [io.to_json(example) + "\n" for example in build.spec.dropped]
        io.write_whole(build.folder / DROPPED, "".join(lines).encode())


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
    total = int(build.spec.splits["train"]["bytes"].sum())
    build.report({"phase": "tokenizer", "done": 0, "total": total})
    content = build_tokenizer(build.data.tokenizer, _texts_to_learn(build, total), build.spec.characters)
    if build.packing and build.data.tokenizer.kind != "file":  # a given one has its tokens
        content = Tokenizer(content).extended(build.packing.template.special_tokens()).content
    io.write_whole(path, content.encode())
    tokenizer = load_tokenizer(build.folder)
    io.write_whole(receipt, json.dumps(tokenizer.fingerprint).encode())
    verified.add(path, tokenizer.fingerprint)
    wanted = build.data.tokenizer.vocab_size
    if build.data.tokenizer.kind == "bpe" and wanted and tokenizer.vocab_size < wanted:
        note = (
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, not the {wanted:,} of data.tokenizer.vocab_size: the "
            f"{total:,} bytes of text in train have no more pairs to merge. Take "
            f"data.tokenizer.vocab_size={tokenizer.vocab_size}, or more text"
        )
        build.report({"phase": "note", "text": note})
    return tokenizer


def _texts_to_learn(build: CorpusBuild, total: int) -> Iterator[str]:
    """About _LEARN_FROM of the ``total`` bytes of the training split, all if there are fewer.

    A large document is chosen by parts of _LEARN_PART: a corpus may be one document. The choice is a hash of the
    document and the number of the part.
    """
    share = _LEARN_FROM / max(1, total)
    passed = reported = learned = 0
    for document in build.spec.splits["train"]:
        place, size = int(document["hash"][1]), int(document["bytes"])
        if size < _LEARN_PART and place >= share * 2.0**64:
            passed += size
            continue
        for number, part in enumerate(parts_to_learn(build.pieces(document), _LEARN_PART)):
            length = len(part.encode())
            if (hash_key(place, number) if number else place) < share * 2.0**64:
                learned += length
                yield part
            passed += length
            if passed - reported > _REPORT_AFTER:
                build.report({"phase": "tokenizer", "done": passed, "total": total})
                reported = passed
    build.report({"phase": "tokenizer", "done": total, "total": total})
    build.report({"phase": "merges", "done": 0, "total": learned})


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
    texts = [_first_characters(build.pieces(document), _PROBE_CHARACTERS) for document in probed]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens / max(1, sum(len(text.encode()) for text in texts))


def _first_characters(pieces: Iterator[str], count: int) -> str:
    text = ""
    for piece in pieces:
        text += piece[: count - len(text)]
        if len(text) == count:
            break
    return text


Receipt = tuple[shards.ShardEntry, shards.Ids, workers.Counts]
"""Entry and table of a shard, and what was counted in it."""


def _write_shards(build: CorpusBuild, jobs: list[workers.ShardJob], verified: VerifiedFiles) -> dict[str, Receipt]:
    """Write every shard that is missing or disagrees with its receipt; returns all receipts by name of shard."""
    finished = {job.path.name: _finished_shard(build.folder, job.path, verified) for job in jobs}
    kept = {name: receipt for name, receipt in finished.items() if receipt}
    missing = [job for job in jobs if job.path.name not in kept]
    sizes = {job.path.name: int(job.documents["bytes"].sum()) for job in jobs}
    total, done = sum(sizes.values()), sum(sizes[name] for name in kept)
    build.report({"phase": "tokenize", "done": done, "total": total, "shards": len(jobs), "kept": len(kept)})
    encode: Any = encode_conversations if build.packing else workers.encode_shard
    tasks = [(job, *([build.packing] if build.packing else [])) for job in missing]
    for number, (entry, table, counts) in build.run_tasks(encode, tasks):
        _write_receipt(build.folder, (entry, table, counts))
        verified.add(missing[number].path, entry.sha256)
        kept[entry.name] = entry, table, counts
        done += sizes[entry.name]
        build.report({"phase": "tokenize", "done": done, "total": total})
    return kept


def _finished_shard(folder: Path, path: Path, verified: VerifiedFiles) -> Receipt | None:
    """The receipt of a shard that is there and whole, else None."""
    receipt = folder / _RECEIPTS / f"{path.name}.json"
    try:
        values = json.loads(receipt.read_bytes())
        known = {each.name for each in fields(shards.ShardEntry)}
        counts = workers.Counts({key: int(values.pop(key)) for key in values.keys() - known})
        entry = shards.ShardEntry(**values)
        if entry.name != path.name:
            return None
        verified.check(folder, entry.name, entry.size, entry.sha256)
        return entry, shards.open_table(receipt.with_suffix(".npy")), counts
    except UserError:
        return None
    except UNREADABLE:
        return None


def _check_unknown(build: CorpusBuild, receipts: Iterable[Receipt]) -> None:
    """Say how much of the text the tokenizer does not know. Raises UserError where it is more than may be."""
    tokens = unknown = 0  # unknown: in characters, as if each were a token
    for entry, _, count in receipts:
        tokens, unknown = tokens + entry.tokens, unknown + count["unknown"]
    if not unknown:
        return
    share, settings = unknown / (tokens + unknown), build.data.tokenizer
    most = _MAX_UNKNOWN if settings.max_unknown is None else settings.max_unknown
    what = f"{share:.2%} of the text is unknown to the tokenizer ({plural(unknown, 'character')})"
    if share > most:
        raise UserError(
            f"data.tokenizer.path={settings.path}: {what}, more than data.tokenizer.max_unknown={most:g}: it was made "
            "for other text, and losses would say nothing. Take data.tokenizer.kind=bpe or bytes, which know every "
            "text, or a tokenizer with bytes; data.tokenizer.max_unknown=1 takes it as it is"
        )
    build.report({"phase": "note", "text": what})


def _write_receipt(folder: Path, shard: Receipt) -> None:
    entry, table, counts = shard
    receipt = folder / _RECEIPTS / f"{entry.name}.json"
    io.write_whole(receipt.with_suffix(".npy"), shards.npy_bytes(table))
    io.write_whole(receipt, json.dumps(asdict(entry) | {"unknown": 0} | counts).encode())
