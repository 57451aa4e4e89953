"""The documents of a corpus: cleaned text in pieces, each with its place in a file, from where it can be read again.

A plain file is one document; of a file with rows each row is one. Files are read in spans of bytes, so that processes
can share a large one of JSON Lines: a line belongs to the span in which it begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

from train.config import schema
from train.config.keys.data import TokenizerConfig
from train.data import tokenizer
from train.data.prepare.clean import clean_pieces
from train.data.sources import file_kinds, local_copies, records, row_files, token_files
from train.data.sources.file_kinds import FileKind
from train.data.sources.problems import BadText
from train.data.sources.source_files import SourceFile
from train.errors import UserError, shown_name

CHANGED = "the file changed while it was being prepared: run the same command again"
LABEL = "\x1e"
"""Separates a text from its label: cleaning removes this character from both."""
_LONGEST_META = 4096
"""Characters of a field that is kept beside a document, of which the rest is cut off: it names the document."""

Pieces = Iterator[Any]
"""One document in parts, cut anywhere: str, or for a file of token ids arrays of them (uint32)."""
Meta = dict[str, Any]
"""What is stored of a document beside its tokens: its "source", if rows name theirs, and the fields that are kept."""


@dataclass(frozen=True)
class ReadOptions:
    """How bytes become text: fields of a record, handling of what is not UTF-8, check of labels."""

    text_key: str
    errors: str
    label_key: str | None = None
    label_problem: Callable[[str], str | None] | None = None
    """Returns the problem with a label, or None; unset where any label is allowed."""
    skip_rows: bool = False
    """Whether rows that cannot be read are left out."""
    skip_files: bool = False
    """Whether files that cannot be read are left out."""
    encoding: str = "utf-8"
    name_key: str | None = None
    meta_keys: tuple[str, ...] = ()
    chat: bool = False
    """Whether rows are conversations."""
    tokenizer: TokenizerConfig | None = None
    """The given tokenizer, by which files of token ids are read; None without one."""

    @property
    def keys(self) -> list[str]:
        """The fields of a record that are read, the text's first; empty for a conversation: all of them."""
        if self.chat:
            return []
        named = [self.text_key, self.label_key, self.name_key, *self.meta_keys]
        return list(dict.fromkeys(key for key in named if key))

    @property
    def has_meta(self) -> bool:
        """Whether anything of a record is stored beside its text and label."""
        return bool(self.name_key or self.meta_keys)


def read_options(data: schema.DataConfig, objective: schema.Objective | None = None) -> ReadOptions:
    """The options of reading a corpus, with its labels checked by ``objective``.

    In the standard library undecodable bytes are replaced: that corpus must work on every machine.
    """
    label_problem = objective.label_problem if isinstance(objective, schema.Classify) and data.label_key else None
    return ReadOptions(
        text_key=data.text_key,
        errors="replace" if data.source == "stdlib" else data.encoding_errors,
        label_key=data.label_key,
        label_problem=label_problem,
        skip_rows="skip" in (data.bad_rows, data.bad),
        skip_files=data.bad == "skip",
        encoding=data.encoding,
        name_key=data.name_key,
        meta_keys=tuple(data.meta_keys),
        chat=data.is_chat,
        tokenizer=data.tokenizer if data.tokenizer.kind == "file" else None,
    )


def read_span(
    file: SourceFile, begin: int, end: int, options: ReadOptions, meta: Meta | None = None
) -> Iterator[tuple[int, int, Pieces]]:
    """(offset, length, pieces of the cleaned text) of every document that begins in bytes [begin, end) of a file.

    The pieces of a document are read before the next document is asked for, and raise BadText where it cannot be read:
    so all problems can be reported at once. An empty document has no piece. ``meta`` then holds what is stored beside
    the document. Raises BadText itself where what follows, or the file as a whole, cannot be read.
    """
    meta = {} if meta is None else meta
    if file.local:
        local_copies.make_copy(file, options.encoding, options.errors)
        end = os.path.getsize(file.local)  # noqa: PTH202
    with open(file.bytes_path, "rb") as stream:  # noqa: PTH123
        if problem := _refused_kind(file, stream, options):
            if begin:
                return  # the file's first span tells
            raise problem
        if file.package_file:
            for offset, length, block in row_files.raw_rows(file, stream, begin, end):
                yield offset, length, _clean_line(file, offset, block, options)
        elif file.kind is FileKind.TOKENS:
            yield from _token_documents(file, options)
        elif row_files.has_rows(file):
            for offset, length, load in row_files.scan_rows(file, (begin, end), options.keys, options.errors):
                yield offset, length, _clean_row(file, offset, load, options, meta)
        else:
            yield 0, file.size, _clean_file(file, stream, options)


def read_document(file: SourceFile, offset: int, length: int, options: ReadOptions, meta: Meta | None = None) -> Pieces:
    """The cleaned text of a document that ``read_span`` listed. Raises UserError if the file has changed since."""
    meta = {} if meta is None else meta
    try:
        with open(file.bytes_path, "rb") as stream:  # noqa: PTH123
            if file.package_file:
                stream.seek(offset)
                yield from _clean_line(file, offset, iter([stream.read(length)]), options)
            elif file.kind is FileKind.TOKENS:
                yield from _token_pieces(file, offset, length)
            elif row_files.has_rows(file):
                yield from _clean_row(
                    file,
                    offset,
                    lambda: row_files.load_row(file, (offset, length), options.keys, options.errors),
                    options,
                    meta,
                )
            else:
                yield from _clean_file(file, stream, options)
    except OSError as error:
        raise UserError(f"{shown_name(file.path)}: {error.strerror or error} ({CHANGED})") from None
    except BadText as error:
        raise UserError(f"{error} ({CHANGED})") from None


def _refused_kind(file: SourceFile, stream: BinaryIO, options: ReadOptions) -> BadText | None:
    """The problem of a file that holds no text as it stands; leaves the stream at its start."""
    if file.package_file:
        return None
    refused = file_kinds.refusal(file.path, stream.read(file_kinds.HEAD), options.text_key)
    stream.seek(0)
    if refused is None and options.label_key and not row_files.has_rows(file):
        refused = (
            f"plain text, and only rows of JSON have labels (data.label_key={options.label_key})",
            "make rows of a .jsonl file of it",
        )
    return BadText(file.path, refused[0], cure=refused[1]) if refused else None


@lru_cache(maxsize=1)
def _named_tokenizer(path: str, end_token: str | None) -> tokenizer.Tokenizer:
    settings = TokenizerConfig(kind="file", path=path, end_token=end_token)
    return tokenizer.Tokenizer(tokenizer.given_tokenizer(settings))


def token_maker(options: ReadOptions) -> tokenizer.Tokenizer:
    """The tokenizer that made the files of token ids, which the settings name."""
    assert options.tokenizer is not None
    assert options.tokenizer.path is not None
    return _named_tokenizer(options.tokenizer.path, options.tokenizer.end_token)


def text_size(piece: Any, options: ReadOptions) -> int:
    """The bytes of text of a piece, those that its ids stand for if it has ids."""
    text = piece if isinstance(piece, str) else "".join(token_maker(options).decode_parts(piece))
    return len(text.encode())


def _token_documents(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, int, Pieces]]:
    """(number of the first token, tokens, pieces) of the documents of a file of token ids. Raises BadText."""
    if options.tokenizer is None:
        cure = "name their tokenizer: data.tokenizer.kind=file data.tokenizer.path=/where/tokenizer.json"
        raise BadText(file.path, "token ids, or another binary file, without the tokenizer that made them", cure=cure)
    maker = token_maker(options)
    try:
        for first, count in token_files.scan(file.bytes_path, maker.eot, maker.vocab_size):
            yield first, count, _token_pieces(file, first, count)
    except records.BadRecord as error:
        raise BadText(file.path, str(error), cure=error.cure) from None


def _token_pieces(file: SourceFile, first: int, count: int) -> Pieces:
    try:
        for begin in range(first, first + count, row_files.BLOCK):
            yield token_files.load(file.bytes_path, begin, min(row_files.BLOCK, first + count - begin))
    except records.BadRecord as error:
        raise BadText(file.path, str(error)) from None


def _clean_file(file: SourceFile, stream: BinaryIO, options: ReadOptions) -> Pieces:
    """The cleaned text of a plain file."""
    blocks = iter(lambda: stream.read(row_files.BLOCK), b"")
    return clean_pieces(row_files.decode_blocks(file, 0, blocks, options.errors))


def _clean_line(file: SourceFile, offset: int, block: Iterator[bytes], options: ReadOptions) -> Pieces:
    """The cleaned text, and the label, of a line of an installed package."""
    assert file.package_file
    line = "".join(row_files.decode_blocks(file, offset, block, options.errors))
    fields = [file.package_file.text(line), *([file.package_file.label] if options.label_key else [])]
    yield from _clean_fields(file, offset, fields, options)


def _clean_row(file: SourceFile, offset: int, load: row_files.LoadRow, options: ReadOptions, meta: Meta) -> Pieces:
    """The cleaned text, and the label, of a row; sets ``meta`` before the first piece."""
    meta.clear()
    record: Any = load()
    try:
        if options.chat:
            return (yield from records.conversation_lines(record))
        replace = options.errors == "replace"
        fields = records.record_fields(record, options.text_key, options.label_key, replace=replace)
        meta.update(_row_meta(record, options))
    except records.BadRecord as error:
        raise file.bad_row(str(error), offset, row_files.place_of(file, offset)) from None
    del record
    yield from _clean_fields(file, offset, fields, options)


def _row_meta(record: dict[str, Any], options: ReadOptions) -> Meta:
    """The fields of a row that are stored. Raises BadRecord for a row without a name, where rows are to have one."""
    meta = {key: _short(record[key]) for key in options.meta_keys if record.get(key) is not None}
    if options.name_key:
        name = record.get(options.name_key)
        if not isinstance(name, str | int) or not str(name).strip():
            raise records.BadRecord(f"has no name in the field {options.name_key!r} (data.name_key)")
        meta["source"] = _short(str(name))
    return meta


def _short(value: Any) -> Any:
    """A value as JSON can hold it, cut to what names a document."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) > _LONGEST_META:
        return text[:_LONGEST_META]
    return value if isinstance(value, str | int | float | bool) else text


def _clean_fields(file: SourceFile, offset: int, fields: list[str], options: ReadOptions) -> Pieces:
    """The cleaned text in pieces; its label, if labels are read, is one more, which begins with LABEL."""
    pieces = [_cut(field) for field in fields]
    del fields[:]
    labels = ["".join(clean_pieces(part)) for part in pieces[1:]]
    empty = True
    for piece in clean_pieces(pieces[0]):
        if empty and options.label_problem and (problem := options.label_problem(labels[0].strip())):
            raise file.bad_row(f"cannot be used: {problem}", offset, row_files.place_of(file, offset))
        empty = False
        yield piece
    if not empty:
        yield from (LABEL + part for part in labels)


def _cut(text: str) -> Pieces:
    """The pieces of a text that is in memory."""
    return (text[begin : begin + row_files.BLOCK] for begin in range(0, len(text), row_files.BLOCK))
