"""Atomic file writes, JSON, JSON Lines and file locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Bytes that a note begins with which Git LFS leaves in the place of a file."""

TEMPORARY_PREFIX = ".aside-"
"""Prefix of the name of a file that is still being written; such a file found later was left by a killed process."""


def temporary_path(path: Path) -> Path:
    """The path where the content of ``path`` is written before it is renamed."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete temporary file (flushed with fsync) to ``path``, and fsync the folder so that the name is
    durable.
    """
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` atomically: a reader sees the old file or the new one, whole."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing to a full disk names no file


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of a value; numbers that are not finite become null, since JSON has none and its readers stop there.

    Numbers of foreign types, such as NumPy's, become floats.
    """
    return json.dumps(null_nonfinite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=_plain_number)


def null_nonfinite(value: Any) -> Any:
    """The same tree of dicts and lists, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: null_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def append_line(path: Path, line: str) -> None:
    """Append a line, on the disk when this returns. A line that a crash cut short before stays apart from it."""
    with path.open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((("\n" if torn else "") + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hex SHA-256 digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a note that Git LFS left in the place of the real one, which was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; a line cut short by a crash is left out. Empty where there is no
    file.
    """
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(record := json.loads(line), dict):
                    records.append(record)
    return records


def steps_of(records: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records of ``metrics.jsonl`` by their step, the last of each; a record without a step is damage."""
    return {record["step"]: record for record in records if type(record.get("step")) is int}


class FileLock:
    """An flock on a file: held until ``close``, and freed by the kernel when its holder ends in any way.

    As a context manager it waits for the lock, and is closed at the end.
    """

    def __init__(self, path: Path, *, create: bool = True, on_wait: Callable[[], None] = lambda: None) -> None:
        """Opens the file, and makes it where that is allowed; ``on_wait`` is called before another holder is waited
        for.

        Raises OSError where it cannot be opened.
        """
        self.file, self.on_wait = path.open("a+" if create else "r+", encoding="utf-8"), on_wait

    def acquire(self, *, wait: bool = True, shared: bool = False) -> bool:
        """Take the lock, ``shared`` with others that share it; False where another holds it and ``wait`` is false."""
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                return False
            self.on_wait()
            fcntl.flock(self.file, how)
        return True

    def write(self, content: str) -> None:
        """Make ``content`` all that the file holds: who has the lock."""
        self.file.truncate(0)
        self.file.write(content)
        self.file.flush()

    def close(self) -> None:
        """Release the lock and close the file."""
        self.file.close()

    def __enter__(self) -> FileLock:
        """Acquire the lock, waiting for another holder."""
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock and close the file."""
        self.close()
