"""Samples of WebDataset tars that hold text: members that follow each other and share all of a name before its dot.

The text of a sample is its member ``.<data.text_key>`` or ``.txt``, or the field of that name in its ``.json``, whose
other fields go with it. Nothing is unpacked, and a tar with a link, a device or a path that leads out is refused.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import IO, Any, NamedTuple

from train.data.sources import records
from train.data.sources.records import BadRecord
from train.util.reading import UNREADABLE, reason

_LONGEST_HEADER = 1 << 20
"""Bytes of a header of a tar, with long names: ``tarfile`` would allocate whatever one announces."""
_TEXT_SUFFIX, _RECORD_SUFFIX = "txt", "json"
_NO_PLACE = "a tar of text has files and folders only, whose names lead to no other place: make it anew"


class _Member(NamedTuple):
    """A file in a tar: name, where its header begins, where its bytes lie."""

    name: str
    header: int
    begin: int
    size: int

    @property
    def key(self) -> str:
        """The name of its sample: the path up to the first dot of the last part."""
        folder, slash, last = self.name.rpartition("/")
        return folder + slash + last.partition(".")[0]

    @property
    def suffix(self) -> str:
        """The part of the name behind the first dot, which says what the file is to its sample."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()


class _HeadersOnly(io.BufferedReader):
    """A file of which no reader takes more at once than a header has."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header announces {size:,} bytes of names")
        return super().read(size)


def scan(path: str, text_key: str) -> Iterator[tuple[int, int, Callable[[], dict[str, Any]]]]:
    """(offset, length, parse) of every sample, from its first header to its last byte. Raises BadRecord."""
    with open(path, "rb") as stream, _HeadersOnly(io.FileIO(path)) as headers:  # noqa: PTH123
        for key, group in groupby(_members(headers), lambda member: member.key):
            members = list(group)
            begin, end = members[0].header, members[-1].begin + members[-1].size
            yield begin, end - begin, partial(_parse, stream, key, members, text_key)


def load(path: str, offset: int, length: int, text_key: str) -> dict[str, Any]:
    """The fields of the sample at ``offset``. Raises BadRecord."""
    with open(path, "rb") as stream:  # noqa: PTH123
        stream.seek(offset)
        sample = io.BytesIO(stream.read(length) + bytes(-length % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE))
        members = list(_members(sample))
        if not members:
            raise BadRecord("is no longer there")
        return _parse(sample, members[0].key, members, text_key)


def _members(stream: IO[bytes]) -> Iterator[_Member]:
    """The files of a tar that are not hidden, in order. Raises BadRecord where it is damaged or not to be trusted."""
    last = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would hold all of them
                last = member.name
                _check_member(member)
                name = member.name.removeprefix("./")
                if member.isreg() and "/." not in f"/{name}":
                    yield _Member(name, member.offset, member.offset_data, member.size)
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("what follows is no header, and no end mark")
    except BadRecord:
        raise
    except UNREADABLE as error:
        where = f"behind the member {last!r}" if last else "at its start"
        raise BadRecord(f"is broken or cut short {where}: {reason(error)}", place="the tar") from None


def _check_member(member: tarfile.TarInfo) -> None:
    """Raise BadRecord for a member that a tar of text has no use for."""
    what = ""
    if member.issym() or member.islnk():
        what = f", a link to {member.linkname!r}"
    elif not (member.isreg() or member.isdir()):
        what = ", which is a device or a pipe"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        what = ", a name that leads out of the folder it would be unpacked in"
    if what:
        raise BadRecord(f"holds {member.name!r}{what}", cure=_NO_PLACE)


def _parse(stream: IO[bytes], key: str, members: list[_Member], text_key: str) -> dict[str, Any]:
    """The fields of a sample: those of its .json, and its text. Raises BadRecord."""
    place = f"the sample {key!r}"
    by_suffix = {member.suffix: member for member in members}
    if len(by_suffix) < len(members):
        raise BadRecord("has two files of the same ending", place=place)
    fields: dict[str, Any] = {}
    try:
        if record := by_suffix.get(_RECORD_SUFFIX):
            value = records.parse_record(_read(stream, record).decode(), [text_key])
            fields = value if isinstance(value, dict) else {}
        text = by_suffix.get(text_key.lower()) or by_suffix.get(_TEXT_SUFFIX)
        if text:
            fields[text_key] = _read(stream, text).decode()
    except (UnicodeDecodeError, BadRecord) as error:
        raise BadRecord(reason(error), place=place) from None
    if text_key not in fields:
        endings = ", ".join(f".{suffix}" for suffix in sorted(by_suffix))
        known = f" with the fields {json.dumps(sorted(fields))}" if fields else ""
        what = (
            f"has no text: its files end in {endings}{known}; data.text_key names the ending or the field of the text"
        )
        raise BadRecord(what, place=place)
    return fields


def _read(stream: IO[bytes], member: _Member) -> bytes:
    stream.seek(member.begin)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise BadRecord(f"is cut short in {member.name!r}")
    if b"\0" in content:
        raise BadRecord(f"has a zero byte in {member.name!r}: it is no text")
    return content
