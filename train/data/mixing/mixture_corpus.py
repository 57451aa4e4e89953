"""Several prepared corpora of one tokenizer, under one numbering of samples; opens a corpus or a mixture.

    <mixture>/mixture.json    name, folder and fingerprint of each source, in order

A mixture holds no text: its fingerprint is over names and fingerprints of its sources, so shares may change and the
folders may move, but not what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from train.data.corpus.shards import Corpus, CorpusSplit, Ids
from train.data.sampling.epoch_order import DocSpans, Ints, take_spans
from train.errors import UserError
from train.util.io import to_json, write_whole
from train.util.reading import read_object, reading
from train.util.run_layout import RunDir

MIXTURE = "mixture.json"
_CURE = "Give the command of the run again, which writes it anew"


class _SourceEntry(BaseModel):
    name: str
    folder: str
    fingerprint: str


class _MixtureForm(BaseModel):
    sources: list[_SourceEntry]


def mixture_digest(sources: Mapping[str, Corpus]) -> str:
    """The fingerprint of a mixture: over names and fingerprints of its sources."""
    parts = [[name, corpus.fingerprint] for name, corpus in sources.items()]
    return sha256(json.dumps(["mixture", *parts]).encode()).hexdigest()


def write_mixture(folder: Path, sources: Mapping[str, Corpus]) -> None:
    """Write the list of sources that makes ``folder`` a mixture. Raises UserError where their tokenizers differ."""
    require_one_tokenizer(sources)
    entries = [
        {"name": name, "folder": str(corpus.folder.resolve()), "fingerprint": corpus.fingerprint}
        for name, corpus in sources.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MIXTURE, to_json({"sources": entries}, indent=1).encode())


def require_one_tokenizer(sources: Mapping[str, Corpus]) -> None:
    """Raise UserError, naming the sources, unless all were made with the same tokenizer."""
    (first, corpus), *others = sources.items()
    known = corpus.index["tokenizer"]
    for name, other in others:
        there = other.index["tokenizer"]
        if there["sha256"] != known["sha256"]:
            raise UserError(
                f"the sources of a mixture share one tokenizer: {first} ({corpus.folder}) has one of "
                f"{known['vocab_size']:,} tokens, {known['sha256'][:12]}, and {name} ({other.folder}) one of "
                f"{there['vocab_size']:,}, {there['sha256'][:12]}. Prepare {name} with data.tokenizer.kind=file "
                f"data.tokenizer.path={corpus.folder}/tokenizer.json, or give its text, as paths, in place of dir"
            )


class MixtureSplit(CorpusSplit):
    """One split of all sources: sample numbers as in ``mixture_plan``, each source's files read by its own split."""

    def __init__(self, parts: Mapping[str, CorpusSplit]) -> None:
        self._parts = dict(parts)
        self._splits = list(parts.values())
        self.samples = sum(split.samples for split in self._splits)
        self.tokens = sum(split.tokens for split in self._splits)
        self.bytes = sum(split.bytes for split in self._splits)
        self.first_samples = first_samples(parts)
        self.dtype = self._splits[0].dtype

    @property
    def parts(self) -> Mapping[str, CorpusSplit]:
        """The splits of the sources, by their names."""
        return self._parts

    @cached_property
    def sample_tokens(self) -> Ids:  # type: ignore[override]  # of all sources; only pairs of texts look at it
        """Tokens of each sample, source after source."""
        return np.concatenate([split.sample_tokens for split in self._splits])

    def name_of(self, sample: int) -> tuple[str, int]:
        """(source and key of the sample in its shards, epoch of the source)."""
        source, local = self._local(sample)
        return f"{list(self._parts)[source]}/train/{local:09d}", sample // self.samples

    def read_spans(self, spans: DocSpans, out: NDArray[Any], at: Ids | None = None) -> None:
        """As ``CorpusSplit.read_spans``, each source's spans by its own split."""
        places = np.cumsum(spans.length) - spans.length if at is None else at
        known = spans.sample >= 0
        number = spans.sample % self.samples
        owner = np.where(known, np.searchsorted(self.first_samples, number, side="right") - 1, 0)
        local = np.where(known, number - self.first_samples[owner], -1)
        for index in np.unique(owner).tolist():
            mine: Ints = np.flatnonzero(owner == index)
            self._splits[index].read_spans(take_spans(spans._replace(sample=local), mine), out, places[mine])

    def document(self, sample: int, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``CorpusSplit.document``."""
        source, local = self._local(sample)
        return self._splits[source].document(local, begin, end)

    def about(self, sample: int) -> dict[str, Any]:
        """As ``CorpusSplit.about``."""
        source, local = self._local(sample)
        return self._splits[source].about(local)

    def _local(self, sample: int) -> tuple[int, int]:
        number = sample % self.samples
        source = int(np.searchsorted(self.first_samples, number, side="right")) - 1
        return source, number - int(self.first_samples[source])


def first_samples(parts: Mapping[str, CorpusSplit]) -> Ids:
    """The number of each source's first sample in the mixture, then the samples of all: (sources + 1,)."""
    return np.concatenate([[0], np.cumsum([split.samples for split in parts.values()])]).astype(np.int64)


class MixtureCorpus(Corpus):
    """The sources of a mixture as one corpus. Raises UserError for a source that is missing or not the one it was."""

    def __init__(self, folder: Path | str, special: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        path = self.folder / MIXTURE
        listed = read_object(path, _CURE)
        with reading(path, _CURE):
            entries = _MixtureForm.model_validate(listed).sources
        self.sources = {entry.name: Corpus(entry.folder, special) for entry in entries}
        for entry in entries:
            if self.sources[entry.name].fingerprint != entry.fingerprint:
                raise UserError(
                    f"{entry.folder} is not the corpus that {entry.name} was when {path} was written: "
                    "restore it, or begin a new run on what is there now"
                )
        require_one_tokenizer(self.sources)
        self.tokenizer = next(iter(self.sources.values())).tokenizer
        self._mixed: dict[str, MixtureSplit] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over names and fingerprints of the sources."""
        return mixture_digest(self.sources)

    def split(self, name: str) -> MixtureSplit:
        """As ``Corpus.split``: that of all sources."""
        if name not in self._mixed:
            self._mixed[name] = MixtureSplit({k: corpus.split(name) for k, corpus in self.sources.items()})
        return self._mixed[name]


def open_corpus(folder: Path | str, special: Sequence[str] = ()) -> Corpus:
    """The corpus, or the mixture of corpora, in a folder. Raises UserError, with the cure, for what is damaged."""
    return (MixtureCorpus if (Path(folder) / MIXTURE).exists() else Corpus)(folder, special)


def open_trained_corpus(run_dir: RunDir, special: Sequence[str] = ()) -> Corpus:
    """The corpus that the run in a folder was trained on. Raises UserError where it is not there any more."""
    cure = "Restore it: it names the corpus that the run was trained on"
    about = read_object(run_dir.corpus, cure)
    with reading(run_dir.corpus, cure):
        folder, was = Path(about["folder"]), str(about["fingerprint"])
    corpus = open_corpus(folder, special)
    if corpus.fingerprint != was:
        raise UserError(f"{folder} is not the corpus that {run_dir.path} was trained on: prepare that one again")
    return corpus
