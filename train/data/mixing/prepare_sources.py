"""Prepares the sources of a mixture, each by ``train.data.prepare``, with one tokenizer for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import schema
from train.data.corpus.shards import INDEX, Corpus
from train.data.mixing.mixture_corpus import mixture_digest, require_one_tokenizer, write_mixture
from train.data.tokenizer import FILE as TOKENIZER_FILE
from train.errors import UserError

Prepare = Callable[[schema.DataConfig], Path]
"""Prepares the corpus of a data section, or finds it, and returns its folder."""


def prepare_mixture(data: schema.DataConfig, prepare: Prepare) -> Path:
    """The folder of the mixture that ``data`` describes; ``prepare`` is called for each source given as text.

    The tokenizer of all is that of the first source with ``dir``; where there is none, the one that the first source
    learns. Raises UserError for a source without a prepared corpus, and for different tokenizers.
    """
    corpora = {name: Corpus(source.dir) for name, source in data.sources.items() if source.dir is not None}
    if corpora:
        require_one_tokenizer(corpora)  # before anything is prepared
    tokenizer = next((corpus.folder / TOKENIZER_FILE for corpus in corpora.values()), None)
    for name, source in data.sources.items():
        if source.dir is None:
            corpora[name] = Corpus(prepare(source_section(data, name, tokenizer)))
            tokenizer = tokenizer or corpora[name].folder / TOKENIZER_FILE
    sources = {name: corpora[name] for name in sorted(corpora)}
    folder = Path(data.dir) if data.dir else Path("corpora") / f"mix-{mixture_digest(sources)[:12]}"
    if (folder / INDEX).exists():
        raise UserError(f"data.dir={folder} holds a prepared corpus: give a mixture another folder, or leave it out")
    write_mixture(folder, sources)
    return folder


def source_section(data: schema.DataConfig, name: str, tokenizer: Path | None) -> schema.DataConfig:
    """The data section that prepares one source: the mixture's, with its own text, and the ``tokenizer`` given."""
    source = data.sources[name]
    own: dict[str, Any] = {"source": source.source, "paths": source.paths, "dir": None, "sources": {}, "stages": []}
    if tokenizer is not None and data.tokenizer.kind in ("bpe", "chars"):
        given = {"kind": "file", "vocab_size": None, "path": str(tokenizer)}
        own["tokenizer"] = data.tokenizer.model_copy(update=given)
    return data.model_copy(update=own)
