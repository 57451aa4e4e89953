"""Verification of a corpus folder: sizes at every start, sha256 once for each state of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.errors import UserError
from train.util import io
from train.util.reading import UNREADABLE

_FILE = "verified.txt"
CURE = "Run `./launch.sh prepare` again with the same settings: it makes anew what is damaged and keeps the rest."


class VerifiedFiles:
    """Remembers which files of a folder were hashed and had the right sha256, by size, mtime (ns) and inode.

    A changed file no longer matches its line in ``verified.txt``. In a read-only folder the memory lasts as long as the
    process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except UNREADABLE:
            lines = []
        self._known = set(lines)

    @staticmethod
    def _line(path: Path, digest: str) -> str:
        stat = path.stat()
        return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {digest}"

    def is_verified(self, path: Path, digest: str) -> bool:
        """Whether the file, in its present state, is known to have this sha256."""
        return self._line(path, digest) in self._known

    def add(self, path: Path, digest: str) -> None:
        """Remember that the file, in its present state, has the sha256 ``digest``."""
        line = self._line(path, digest)
        self._known.add(line)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass  # a folder that is read only: hash again next time

    def check(
        self, folder: Path, name: str, size: int | None, digest: str, inspect: Callable[[Path], None] | None = None
    ) -> None:
        """Raise UserError unless the file has this size and sha256; hashes it only if its state is not verified yet.

        ``size`` is in bytes, None if unknown. ``inspect`` is called after hashing and raises UserError for bad content.
        """
        path = folder / name
        check_size(folder, name, size)
        if self.is_verified(path, digest):
            return
        if (actual := io.sha256_of(path)) != digest:
            raise UserError(f"{path}: damaged: its sha256 is {actual}, the index says {digest}. {CURE}")
        if inspect is not None:
            inspect(path)
        self.add(path, digest)


def check_size(folder: Path, name: str, size: int | None) -> None:
    """Raise UserError if the file is missing or has another size (bytes; None: any)."""
    path = folder / name
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {CURE}") from None
    if size is not None and actual != size:
        raise UserError(f"{path}: truncated or overwritten: it has {actual:,} bytes, the index says {size:,}. {CURE}")
