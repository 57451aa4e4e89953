"""Passages of evaluation files in the text to train on: sequences of 13 words, as GPT-3's authors looked for them.

A document that shares one such sequence is left out as a whole (Brown et al. 2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from train.data.screening.word_grams import grams, words_of
from train.data.sources import local_copies, row_files
from train.data.sources.source_files import SourceFile

GRAM = 13
_WHOLE = 1 << 62


@lru_cache(maxsize=1)
def evaluation_passages(files: tuple[SourceFile, ...]) -> frozenset[str]:
    """Every 13 words in a row of evaluation files: of a plain file, or of each text in a row. Held in memory.

    Texts of fewer words give none. Raises BadText.
    """
    found: set[str] = set()
    for file in files:
        local_copies.make_copy(file, "utf-8", "strict")
        for text in _texts(file):
            words = words_of(text)
            if len(words) >= GRAM:
                found.update(grams(words, GRAM))
    return frozenset(found)


def shared_passage(text: str, passages: frozenset[str]) -> str | None:
    """The first 13 words of a text that are in an evaluation file; None without any."""
    words = words_of(text)
    if len(words) < GRAM:
        return None
    return next((gram for gram in grams(words, GRAM) if gram in passages), None)


def _texts(file: SourceFile) -> Iterator[str]:
    if row_files.has_rows(file):
        for _, _, load in row_files.scan_rows(file, (0, _WHOLE), [], "replace"):
            yield from _strings(load())
        return
    with open(file.bytes_path, "rb") as stream:  # noqa: PTH123
        yield "".join(row_files.decode_blocks(file, 0, iter([stream.read()]), "replace"))


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
