"""One shard of conversations: rendered, encoded, cut by turn where too long, and packed into rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.chat.packed_rows import DTYPE, mark_ids, pack_best_fit
from train.data.chat.sandbox import TemplateError
from train.data.chat.template import ChatTemplate, EncodedConversation, TemplateSource
from train.data.corpus.shards import Ids, ShardEntry, write_shard
from train.data.prepare.workers import Counts, ShardJob, document_pieces
from train.data.sources import row_files
from train.data.sources.problems import Problems
from train.data.tokenizer import load_tokenizer
from train.errors import UserError


@dataclass(frozen=True)
class PackOptions:
    """How conversations become rows."""

    template: TemplateSource
    row_tokens: int
    """Inputs of a row, which conversations share."""
    pack: bool
    """Whether several conversations share a row."""
    skip_rows: bool
    """Whether conversations that cannot be used are left out."""


@lru_cache(maxsize=1)
def _chat_template(source: TemplateSource, folder: Path) -> ChatTemplate:
    return ChatTemplate(source, load_tokenizer(folder))


def encode_conversations(job: ShardJob, options: PackOptions) -> tuple[ShardEntry, Ids, Counts]:
    """Write the shard of a job beside the tokenizer; last, what was counted.

    Raises UserError with every conversation that cannot be used.
    """
    template = _chat_template(options.template, job.path.parent)
    problems, counts = Problems(), Counts()
    names: list[str] = []
    conversations: list[NDArray[np.uint32]] = []
    for document in job.documents:
        file = job.files[int(document["file"])]
        conversation = json.loads("".join(document_pieces(file, document, job.options)))
        try:
            encoded = _cut_to_row(template.encode(conversation), options.row_tokens, counts)
        except (TemplateError, UserError, _TooLongError) as error:
            if options.skip_rows:
                counts["skipped"] += 1
            else:
                by = f"the chat template {options.template.name} " if isinstance(error, TemplateError) else ""
                what = f"cannot be used: {by}{error}"
                offset = int(document["offset"])
                problems.add(file.bad_row(what, offset, row_files.place_of(file, offset)))
            continue
        names.append(file.name)
        conversations.append(mark_ids(encoded.ids, encoded.trained))
        counts["conversations"] += 1
        counts["tokens"] += len(encoded.ids)
        counts["trained"] += sum(encoded.trained)
    problems.raise_all()
    sizes = [len(ids) - 1 for ids in conversations]  # the last id is a target only
    rows = pack_best_fit(sizes, options.row_tokens) if options.pack else [[number] for number in range(len(sizes))]
    end = np.array([template.tokenizer.eot], np.uint32)
    stored = ((names[row[0]], 0, [end, *map(conversations.__getitem__, row), end]) for row in rows)
    entry, table = write_shard(job.path, job.first, np.dtype(DTYPE), stored)
    counts["rows"] += len(rows)
    return entry, table, counts


class _TooLongError(Exception):
    """A conversation of which no trained turn fits into a row."""


def _cut_to_row(encoded: EncodedConversation, row_tokens: int, counts: Counts) -> EncodedConversation:
    """The conversation up to its last trained turn that fits into a row: nothing behind that is trained or needed."""
    fitting = [end for end in encoded.turn_ends if end - 1 <= row_tokens]
    if not fitting:
        raise _TooLongError(
            f"it has {encoded.turn_ends[0]} tokens up to the end of its first trained turn, and a row has {row_tokens} "
            "(data.row_tokens, by default batch.seq_len): raise that, or take data.bad_rows=skip"
        )
    counts["cut_turns"] += len(encoded.turn_ends) - len(fitting)
    counts["cut_conversations"] += len(encoded.turn_ends) > len(fitting)
    end = fitting[-1]
    return EncodedConversation(encoded.ids[:end], encoded.trained[:end], fitting)


def describe_counts(counts: Counts, row_tokens: int) -> str:
    """The counts of a corpus in one line. Raises UserError where nothing, or everything, is trained."""
    if not counts["conversations"]:
        raise UserError("no conversation is left: all were skipped")
    share = counts["trained"] / counts["tokens"]
    if counts["trained"] in (0, counts["tokens"]):
        raise UserError(
            f"{share:.0%} of the tokens would be trained, which is never meant: the template must tell what the "
            "assistant says from what it is asked"
        )
    inputs = counts["tokens"] - counts["conversations"]
    text = (
        f"{counts['conversations']:,} conversations in {counts['rows']:,} rows of {row_tokens:,} tokens, "
        f"{inputs / (counts['rows'] * row_tokens):.1%} full; {share:.1%} of their tokens are trained"
    )
    if counts["cut_turns"]:
        longer = f"{counts['cut_conversations']:,} that are longer than a row"
        text += f"; {counts['cut_turns']:,} turns were cut from {longer}"
    if counts["skipped"]:
        text += f"; {counts['skipped']:,} could not be used and were skipped"
    return text
