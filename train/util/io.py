"""Files that are whole or absent: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".aside-"
"""How the name of a file that is still being written begins; one found later is what a kill left."""


def aside(path: Path) -> Path:
    """Where the content of ``path`` is written before it gets its name."""
    return path.with_name(f"{ASIDE}{path.name}.{os.getpid()}")


def publish(temporary: Path, path: Path) -> None:
    """Give a file that was written aside (and flushed with fsync) its name, and make the name last."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader sees all of it or nothing."""
    temporary = aside(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def append_line(path: Path, line: str) -> None:
    """Add a line; it is on the disk when this returns. One that a crash cut short stays apart, on a line of its own."""
    with path.open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((("\n" if torn else "") + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of ``path`` (made if absent); calls ``on_wait`` once before waiting for another holder.

    The lock belongs to the open file, so the kernel frees it when its holder dies in any way.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
