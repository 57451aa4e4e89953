"""Kinds of files, by their names and first bytes: which hold text, and for the others what they are and the cure."""

from __future__ import annotations

import codecs
import json
from pathlib import PurePath

from train.util.io import LFS_POINTER

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
"""Names of files of JSON Lines: each line is a record."""
JSON_SUFFIX = ".json"
"""A JSON array of records, or records one after another, laid out in any way."""
HEAD = 1 << 16
"""Bytes at the start of a file by which its kind is known."""
MARKUP = (".html", ".htm", ".xhtml", ".xml", ".svg")

_AS_IT_STANDS = "to train on it as it stands, give it the ending .txt"
_TABLE_CURE = (
    "make rows of a .jsonl file of it: python3 -c 'import csv, json, sys; sys.stdout.writelines(json.dumps(row) + "
    "chr(10) for row in csv.DictReader(sys.stdin{delimiter}))' <FILE >rows.jsonl; "
    "data.text_key then names the column of the text. Or, " + _AS_IT_STANDS
)
_PANDAS = 'python3 -c \'import pandas; pandas.read_{}("FILE").to_json("rows.jsonl", orient="records", lines=True)\''

_BY_NAME = {
    ".csv": ("a table of comma-separated values, which has rows of its own", _TABLE_CURE.format(delimiter="")),
    ".tsv": (
        "a table of tab-separated values, which has rows of its own",
        _TABLE_CURE.format(delimiter=', delimiter="\\t"'),
    ),
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
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip -k FILE"),
    (0, b"BZh", "compressed by bzip2", "unpack it: bunzip2 -k FILE"),
    (0, b"\xfd7zXZ\x00", "compressed by xz", "unpack it: unxz -k FILE"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unpack it: unzstd FILE"),
    (0, b"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it: unlz4 FILE"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x FILE"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x FILE"),
    (257, b"ustar", "a tar archive", "unpack it: tar -xf FILE"),
    (0, b"PAR1", "a Parquet table", f"convert it: {_PANDAS.format('parquet')}; data.text_key names the column"),
    (0, b"ARROW1", "an Arrow table", f"convert it: {_PANDAS.format('feather')}; data.text_key names the column"),
    (
        *(0, b"\xff\xff\xff\xff", "an Arrow stream, as the library datasets caches it"),
        'convert it: python3 -c \'from datasets import Dataset; Dataset.from_file("FILE").to_json("rows.jsonl")\'',
    ),
    (0, b"ORC", "an ORC table", f"convert it: {_PANDAS.format('orc')}; data.text_key names the column"),
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
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_UTF8_MARK = b"\xef\xbb\xbf"
_WIDE = {"UTF-32LE": 4, "UTF-32BE": 4, "UTF-16LE": 2, "UTF-16BE": 2}
"""Encodings of text that has zero bytes, and the bytes of their units."""
_WIDE_SAMPLE = 4096


def refusal(path: str, head: bytes, text_key: str) -> tuple[str, str] | None:
    """The kind of a file that holds no text as it stands, and the cure; None for a file to read.

    ``head`` has its first bytes. In the cure FILE stands for the path.
    """
    suffix = PurePath(path).suffix.lower()
    if head.startswith(b"PK\x03\x04"):
        zipped = _ZIPPED.get(suffix)
        return (zipped, _EXPORT) if zipped else ("a zip archive", "unpack it: unzip FILE")
    for offset, magic, what, cure in _BY_MAGIC:
        if head.startswith(magic, offset):
            return what, cure
    if head.startswith(_PICKLES) and b"." in head:
        return "a Python pickle", _EXPORT
    if encoding := _wide_encoding(head):
        return f"{encoding} text, not UTF-8", f"convert it: iconv -f {encoding} -t UTF-8 FILE >new{suffix or '.txt'}"
    if suffix in _BY_NAME:
        return _BY_NAME[suffix]
    return _misnamed_records(suffix, head, text_key)


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
    if suffix in (*LINE_SUFFIXES, JSON_SUFFIX):
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
