"""Which documents are left out on purpose: by rules of quality, for passages of evaluation files, as near-duplicates.

Off unless asked for. Each document is judged as a whole, in memory. How many were dropped for which reason is counted,
and the first few of each are kept as examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.data.screening import near_duplicates
from train.data.screening.contamination import evaluation_passages, shared_passage
from train.data.screening.quality import quality_problem
from train.data.sources.source_files import SourceFile
from train.util.format import plural

_EXAMPLES = 10
"""Documents that are kept as examples, of each reason."""
_SHOWN = 300
"""Characters of an example's text."""
NEAR, _PASSAGE = "near-duplicate", "evaluation passage"


@dataclass(frozen=True)
class ScreenOptions:
    """The rules, files and signatures by which documents are screened."""

    filters: tuple[str, ...] = ()
    near_dedup: bool = False
    evaluation: tuple[SourceFile, ...] = ()

    @property
    def active(self) -> bool:
        """Whether documents are screened at all."""
        return bool(self.filters or self.near_dedup or self.evaluation)


@dataclass
class Dropped:
    """Documents that were dropped: their number by reason, and examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reason: str, example: Callable[[], dict[str, Any]]) -> None:
        """Count a document, and keep it as an example, which is then made, if it is among the first of its reason."""
        self.counts[reason] += 1
        if self.counts[reason] <= _EXAMPLES:
            self.examples.append({"reason": reason, **example()})

    def merge(self, other: Dropped) -> None:
        """Add what another part of the text has, which comes behind."""
        before = self.counts.copy()
        self.counts += other.counts
        for example in other.examples:
            before[example["reason"]] += 1
            if before[example["reason"]] <= _EXAMPLES:
                self.examples.append(example)

    def as_note(self) -> str:
        """How many were dropped, by reason, the most frequent first."""
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        return f"{plural(self.counts.total(), 'document')} dropped ({reasons}); examples in {DROPPED}"


DROPPED = "dropped.jsonl"
"""Examples of what was dropped, in the folder of a corpus."""


class Screen:
    """The screening of some documents in one process; the signatures of those that stay, in order."""

    def __init__(self, options: ScreenOptions) -> None:
        self.options, self.dropped = options, Dropped()
        self.signatures = list[near_duplicates.Signatures]()

    def keeps(self, file: SourceFile, offset: int, text: str) -> bool:
        """Whether a document stays."""
        reason, more = quality_problem(text, self.options.filters), {}
        if reason is None and self.options.evaluation:
            passage = shared_passage(text, evaluation_passages(self.options.evaluation))
            reason, more = (_PASSAGE, {"passage": passage}) if passage else (None, {})
        if reason is not None:
            self.dropped.add(reason, lambda: {"file": file.name, "offset": offset, **more, "text": text[:_SHOWN]})
        elif self.options.near_dedup:
            self.signatures.append(near_duplicates.signature(text))
        return reason is None

    def stacked(self) -> near_duplicates.Signatures:
        """The signatures (documents, hashes)."""
        nothing = np.zeros((0, near_duplicates.HASHES), np.uint32)
        return np.stack(self.signatures) if self.signatures else nothing
