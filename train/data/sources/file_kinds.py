"""Kinds of files, by their names and first bytes: which hold text, and for the others what they are and the cure."""

from __future__ import annotations

import codecs
import json
import os
from enum import Enum
from pathlib import PurePath

from train.util.io import LFS_POINTER

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
"""Names of files of JSON Lines: each line is a record."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_SHORT = {".tgz": (".tar", ".gz"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz"), ".tzst": (".tar", ".zst")}


class FileKind(Enum):
    """How documents lie in a file."""

    PLAIN = "the file is a document"
    LINES = "JSON Lines"
    JSON = "JSON: an array of records, or records one after another, laid out in any way"
    TABLE = "a table of separated values"
    PARQUET = "a Parquet table"
    ARROW = "an Arrow table"
    TAR = "a tar of samples"
    TOKENS = "token ids"


_KINDS = {
    **dict.fromkeys(LINE_SUFFIXES, FileKind.LINES),
    ".json": FileKind.JSON,
    **dict.fromkeys((".csv", ".tsv"), FileKind.TABLE),
    **dict.fromkeys((".parquet", ".pq"), FileKind.PARQUET),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), FileKind.ARROW),
    ".tar": FileKind.TAR,
    ".bin": FileKind.TOKENS,
}
TEXT_KINDS = (FileKind.PLAIN, FileKind.LINES, FileKind.JSON, FileKind.TABLE)
"""Kinds of files that are text as a whole, in an encoding."""


def inner_suffix(path: str) -> tuple[str, str | None]:
    """The ending that tells the kind of a file, and that of its compression, None without: (".jsonl", ".gz")."""
    pure = PurePath(path)
    outer = pure.suffix.lower()
    if outer in _SHORT:
        return _SHORT[outer]
    if outer not in COMPRESSIONS:
        return outer, None
    return PurePath(pure.stem).suffix.lower(), outer


def kind_of(path: str) -> FileKind:
    """The kind of a file by the ending of its name, or of a URL."""
    return _KINDS.get(inner_suffix(path)[0], FileKind.PLAIN)


HEAD = 1 << 16
"""Bytes at the start of a file by which its kind is known."""
MARKUP = (".html", ".htm", ".xhtml", ".xml", ".svg")

_AS_IT_STANDS = "to train on it as it stands, give it the ending .txt"
_ANY_TABLE = 'convert it: python3 -c \'import pandas; pandas.read_{}("FILE").to_parquet("rows.parquet")\''

_BY_NAME = {
    ".ipynb": (
        "a notebook, which is JSON with its outputs inside",
        "take its code out: jupyter nbconvert --to script FILE. Or, " + _AS_IT_STANDS,
    ),
}
_ZIPPED = {
    ".docx": "a Word document",
    ".odt": "an OpenDocument text",
    ".epub": "an electronic book",
    ".xlsx": "an Excel workbook",
    ".pptx": "a PowerPoint presentation",
    ".npz": "an archive of NumPy arrays",
    ".pt": "a PyTorch file",
    ".pth": "a PyTorch file",
}
_NO_TEXT = "it has no text to train on: leave it out"
_EXPORT = "export its text to a .txt or .jsonl file"
_BY_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", "compressed by gzip", "give it the ending .gz, or unpack it: gunzip -k FILE"),
    (0, b"BZh", "compressed by bzip2", "give it the ending .bz2, or unpack it: bunzip2 -k FILE"),
    (0, b"\xfd7zXZ\x00", "compressed by xz", "give it the ending .xz, or unpack it: unxz -k FILE"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "give it the ending .zst, or unpack it: unzstd FILE"),
    (0, b"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it: unlz4 FILE"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x FILE"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x FILE"),
    (257, b"ustar", "a tar archive", "give it the ending .tar, or unpack it: tar -xf FILE"),
    (0, b"PAR1", "a Parquet table", "give it the ending .parquet"),
    (0, b"ARROW1", "an Arrow table", "give it the ending .arrow"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream, as the library datasets caches it", "give it the ending .arrow"),
    (0, b"ORC", "an ORC table", _ANY_TABLE.format("orc")),
    (0, b"Obj\x01", "an Avro file", "convert it to .jsonl, as avro-tools tojson does"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", "a corpus is made of text, not of token ids: give the text that it was made of"),
    (0, b"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (0, b"%PDF-", "a PDF document", "take its text out: pdftotext FILE"),
    (0, b"%!PS", "a PostScript document", "take its text out: ps2ascii FILE FILE.txt"),
    (0, b"{\\rtf", "a Rich Text document", "save it as plain text"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an old Office program", "save it as plain text"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", _NO_TEXT),
    (0, b"\xff\xd8\xff", "a JPEG image", _NO_TEXT),
    (0, b"GIF8", "a GIF image", _NO_TEXT),
    (0, b"\x7fELF", "a program", _NO_TEXT),
    (
        *(0, LFS_POINTER, "a Git LFS pointer, not the file itself"),
        "fetch the files in their repository: git lfs pull",
    ),
    (
        0,
        b"/annex/objects/",
        "a git-annex pointer, not the file itself",
        "fetch it in its repository: git annex get FILE",
    ),
)
_OWN_MAGIC = {
    FileKind.PARQUET: (b"PAR1",),
    FileKind.ARROW: (b"ARROW1", b"\xff\xff\xff\xff"),
    FileKind.TAR: (b"ustar",),
}
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_UTF8_MARK = b"\xef\xbb\xbf"
_WIDE = {"UTF-32LE": 4, "UTF-32BE": 4, "UTF-16LE": 2, "UTF-16BE": 2}
"""Encodings of text that has zero bytes, and the bytes of their units."""
_WIDE_SAMPLE = 4096


def refusal(path: str, head: bytes, text_key: str) -> tuple[str, str] | None:
    """The kind of a file that holds no text as it stands, and the cure; None for a file to read.

    ``head`` has its first bytes, unpacked. In the cure FILE stands for the path.
    """
    (suffix, _), kind = inner_suffix(path), kind_of(path)
    if head.startswith(b"PK\x03\x04") and kind in TEXT_KINDS:
        zipped = _ZIPPED.get(suffix)
        return (zipped, _EXPORT) if zipped else ("a zip archive", "unpack it: unzip FILE")
    for offset, magic, what, cure in _BY_MAGIC:
        if head.startswith(magic, offset):
            own = magic in _OWN_MAGIC.get(kind, ()) or (kind is FileKind.TOKENS and not _is_pointer(magic))
            return None if own else (what, cure)
    if kind not in TEXT_KINDS:
        return _lacks_magic(kind, head)
    if head.startswith(_PICKLES) and b"." in head:
        return "a Python pickle", _EXPORT
    if encoding := _wide_encoding(head):
        iconv = f"iconv -f {encoding} -t UTF-8 FILE >new{suffix or '.txt'}"
        return f"{encoding} text, not UTF-8", f"convert it: {iconv}; or take data.encoding={encoding}"
    if suffix in _BY_NAME:
        return _BY_NAME[suffix]
    return _misnamed_records(suffix, head, text_key)


def file_state(path: str) -> tuple[int, ...]:
    """Numbers that change when another file takes this path, or its content changes."""
    stat = os.stat(path)  # noqa: PTH116
    return stat.st_ino, stat.st_dev, stat.st_size, stat.st_mtime_ns


def _is_pointer(magic: bytes) -> bool:
    """Whether the first bytes tell that a file stands for another one; token ids may begin in any other way."""
    return magic == LFS_POINTER or b"annex" in magic


def _lacks_magic(kind: FileKind, head: bytes) -> tuple[str, str] | None:
    """The problem of a table that begins as none does; an old tar and token ids have no mark."""
    if kind in (FileKind.PARQUET, FileKind.ARROW) and head:
        return f"not {kind.value}, for it does not begin as one", "give it the ending of what it is"
    return None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, with or without a byte-order mark; None for anything else."""
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    ascii_characters = {name: _ascii_if_text(head[:_WIDE_SAMPLE], name) for name in _WIDE}
    likeliest = max(_WIDE, key=ascii_characters.__getitem__)  # English of the other byte order looks like Chinese
    return likeliest if ascii_characters[likeliest] else None


def _ascii_if_text(sample: bytes, encoding: str) -> int:
    """The number of ASCII characters, which each text has, if the bytes are text in this encoding; else 0."""
    if b"\x00" not in sample:
        return 0
    width = _WIDE[encoding]
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample[: len(sample) // width * width])
    except UnicodeDecodeError:
        return 0
    is_text = all(character in "\t\n\r\f" or character.isprintable() for character in text)
    return sum(map(str.isascii, text)) if is_text else 0


def _misnamed_records(suffix: str, head: bytes, text_key: str) -> tuple[str, str] | None:
    """A refusal of JSON of another layout than its name says; .txt is believed unless rows have the text's field."""
    line, end, _ = head.removeprefix(_UTF8_MARK).lstrip().partition(b"\n")
    if suffix in LINE_SUFFIXES and (line.strip() in (b"{", b"[") or line.startswith(b"[{")):
        return "JSON, but not with a record on each line", "give it the ending .json, which may have any layout"
    if suffix in _KINDS:
        return None
    if not line.startswith(b"{") or not (end or len(head) < HEAD):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not record or (suffix == ".txt" and text_key not in record):
        return None
    other = "" if suffix == ".txt" else f"; {_AS_IT_STANDS}"
    return "rows of JSON, each a record", f"name it .jsonl, so that its rows are read{other}"
