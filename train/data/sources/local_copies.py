"""Brings a file to where it can be read at any place: fetched from its URL, unpacked, in UTF-8, as a temporary copy.

A corpus is read twice, its documents in another order the second time, and a compressed stream has only one order. So
what is compressed, remote, or in another encoding is written once to a folder beside the corpus, which is deleted when
the corpus is prepared; it takes as much of the disk as the unpacked text. Memory is bounded by a few megabytes.
"""

from __future__ import annotations

import bz2
import codecs
import fcntl
import gzip
import io
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.data.sources import remote
from train.data.sources.file_kinds import COMPRESSIONS, TEXT_KINDS, inner_suffix
from train.data.sources.problems import BadText
from train.data.sources.source_files import SourceFile
from train.errors import UserError
from train.util.extra_packages import import_extra
from train.util.io import temporary_path
from train.util.reading import UNREADABLE, reason

PREFIX = ".unpacked-"
"""Prefix of the name of the folder of copies; one whose lock is free was left by a killed process."""
_BLOCK = 1 << 20
_ZSTD_BLOCK = 4096
"""Bytes of Zstandard that are unpacked at once: they may make 30,000 times as many."""


def assign_copies(files: list[SourceFile], folder: Path, encoding: str) -> list[SourceFile]:
    """The files, with a path in ``folder`` for each that has to be copied before it is read."""
    plain = is_utf8(encoding)
    placed = []
    for number, file in enumerate(files):
        suffix, compression = inner_suffix(file.path)
        foreign = not plain and file.package_file is None and file.kind in TEXT_KINDS
        if compression or foreign or remote.is_url(file.path):
            file = replace(file, local=str(folder / f"{number:07d}{suffix}"))
        placed.append(file)
    return placed


@contextmanager
def with_copies(files: list[SourceFile], beside: Path, encoding: str) -> Iterator[list[SourceFile]]:
    """The files, with a place for the copies of those that need one, in a folder that is deleted in the end."""
    if assign_copies(files, Path(), encoding) == files:
        yield files
        return
    try:
        with copies_folder(beside) as folder:
            yield assign_copies(files, folder, encoding)
    finally:
        with suppress(OSError):
            beside.rmdir()  # where nothing came of it


def is_utf8(encoding: str) -> bool:
    """Whether text in this encoding is read as it is."""
    return codecs.lookup(encoding).name == "utf-8"


@contextmanager
def copies_folder(beside: Path) -> Iterator[Path]:
    """A new folder for copies in ``beside``, deleted in the end; those that killed processes left there go first."""
    beside.mkdir(parents=True, exist_ok=True)
    for left in beside.glob(f"{PREFIX}*/lock"):
        with left.open("a", encoding="utf-8") as lock:
            if _locked(lock):
                shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=beside))
    with (folder / "lock").open("a", encoding="utf-8") as lock:
        _locked(lock)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def make_copy(file: SourceFile, encoding: str, errors: str) -> None:
    """Write the copy of a file that has one assigned, unless it is there. Raises BadText for what cannot be read.

    Raises UserError where it cannot be written.
    """
    if file.local is None or os.path.exists(file.local):  # noqa: PTH110
        return
    target = Path(file.local)
    blocks = _unpacked(file, remote.read_blocks(file.path) if remote.is_url(file.path) else _local_blocks(file.path))
    if not is_utf8(encoding) and file.kind in TEXT_KINDS:
        blocks = _recoded(file, blocks, encoding, errors)
    temporary = temporary_path(target)
    try:
        with temporary.open("wb") as copy:
            for block in blocks:
                copy.write(block)
        temporary.replace(target)
    except OSError as error:
        raise UserError(
            f"{target.parent}: {error.strerror or error}, while {file.path} was being unpacked or fetched: that takes "
            "the room of its text there for as long as it is being prepared. Make room, or set data.dir elsewhere"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _local_blocks(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as stream:  # noqa: PTH123
            while block := stream.read(_BLOCK):
                yield block
    except OSError as error:
        raise BadText(path, error.strerror or str(error)) from None


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file that is read forward."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks, self._left = iter(blocks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._blocks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _unpacked(file: SourceFile, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks of a file without its compression. Raises BadText, with how far it could be unpacked."""
    compression = COMPRESSIONS.get(inner_suffix(file.path)[1] or "")
    if compression is None:
        yield from blocks
        return
    done = 0
    try:
        for block in _unpack(compression, blocks):
            yield block
            done += len(block)
    except BadText:
        raise
    except UNREADABLE as error:
        raise _broken(file, compression, done, reason(error)) from None
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "LZMAError", "error"):  # of libraries, with no class in common
            raise
        raise _broken(file, compression, done, str(error)) from None


def _broken(file: SourceFile, compression: str, done: int, why: str) -> BadText:
    what = f"broken or cut short: {why}, behind {done:,} bytes of what {compression} unpacks"
    return BadText(file.path, what, cure="get the file again")


def _unpack(compression: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    if compression == "zstd":
        yield from _unpack_zstd(blocks)
        return
    stream = io.BufferedReader(_Stream(blocks), _BLOCK)
    opener: Any = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[compression]
    with opener(fileobj=stream) if compression == "gzip" else opener(stream) as unpacked:
        while block := unpacked.read(_BLOCK):
            yield block


def _unpack_zstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Frame after frame: the library's own reader takes a stream that is cut short for one that ends."""
    zstandard = import_extra("zstandard", "a file compressed by Zstandard")
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    for block in blocks:
        for begin in range(0, len(block), _ZSTD_BLOCK):
            left = block[begin : begin + _ZSTD_BLOCK]
            while left:
                frame = frame or unpacker.decompressobj()
                if text := frame.decompress(left):
                    yield text
                left = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")


def _recoded(file: SourceFile, blocks: Iterator[bytes], encoding: str, errors: str) -> Iterator[bytes]:
    """The text in UTF-8. Raises BadText, with the offset, for bytes that are none of the encoding."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    done, last = 0, b""
    for last in blocks:
        try:
            yield decoder.decode(last).encode("utf-8", errors)
        except UnicodeError as error:
            raise _not_in(file, encoding, done, error) from None
        done += len(last)
    try:
        yield decoder.decode(b"", final=True).encode("utf-8", errors)
    except UnicodeError as error:
        raise _not_in(file, encoding, done, error) from None


def _not_in(file: SourceFile, encoding: str, done: int, error: UnicodeError) -> BadText:
    cure = "name the right one, or take data.encoding_errors=replace"
    byte = f"byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError) else reason(error)
    return BadText(file.path, f"not text in data.encoding={encoding}: {byte} at or behind offset {done}; {cure}")
