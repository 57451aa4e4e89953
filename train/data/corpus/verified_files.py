"""Proof that a corpus folder holds what its index says: sizes always, sha256 once for every state of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.errors import UserError
from train.util import io

_FILE = "verified.txt"
CURE = "Run `./launch.sh prepare` again with the same settings: it makes anew what is damaged and keeps the rest."


class VerifiedFiles:
    """Which files of a folder have been hashed and found right, told by size, mtime (ns) and inode.

    A file that changes gets another stamp. Where the folder cannot be written, stamps last as long as the process.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except OSError:
            lines = []
        self._known = set(lines)

    @staticmethod
    def _line(path: Path, digest: str) -> str:
        stat = path.stat()
        return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {digest}"

    def is_verified(self, path: Path, digest: str) -> bool:
        """Whether the file is the one that was found to have this sha256."""
        return self._line(path, digest) in self._known

    def add(self, path: Path, digest: str) -> None:
        """Note that the file's sha256 was found to be ``digest``."""
        line = self._line(path, digest)
        self._known.add(line)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass  # a folder that is read only: hash again next time

    def check(
        self, folder: Path, name: str, size: int | None, digest: str, look: Callable[[Path], None] | None = None
    ) -> None:
        """Raise UserError unless the file is whole and has this sha256; hashes it only if its stamp is unknown.

        ``size`` in bytes, or None where it is not known. ``look`` is what else must be seen of it, and raises UserError.
        """
        path = folder / name
        check_size(folder, name, size)
        if self.is_verified(path, digest):
            return
        if (found := io.sha256_of(path)) != digest:
            raise UserError(f"{path}: damaged: its sha256 is {found}, the index says {digest}. {CURE}")
        if look is not None:
            look(path)
        self.add(path, digest)


def check_size(folder: Path, name: str, size: int | None) -> None:
    """Raise UserError if the file is missing or has another size (bytes; None: any)."""
    path = folder / name
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. {CURE}") from None
    if size is not None and found != size:
        raise UserError(f"{path}: truncated or overwritten: it has {found:,} bytes, the index says {size:,}. {CURE}")
