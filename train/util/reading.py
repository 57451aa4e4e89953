"""Reading files that may be damaged, crafted, or of another kind: each failure names the file and the cure.

Every reader of the product guards what it takes out of a file by ``reading``, or, where damage is no error, by
``except UNREADABLE``: there is no other list of what parsing may raise.
"""

from __future__ import annotations

import json
import tarfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from train.errors import UserError, place_error, shown_name
from train.printable import escape_foreign_bytes

UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, MemoryError, RecursionError),
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),  # UnicodeError is a ValueError
    *(SyntaxError, tokenize.TokenError, yaml.YAMLError, tarfile.TarError, SafetensorError),  # numpy parses Python
)
"""All that parsing a foreign file, and taking out of it what ought to be there, may raise."""

MAX_YAML_BYTES, MAX_YAML_VALUES = 4 << 20, 200_000
"""Limits of a YAML file: of its size, and of its values once every alias is followed, which may be 2^60 of one page."""


@contextmanager
def reading(path: Path | str, cure: str) -> Iterator[None]:
    """Raise UserError, with the file, the reason and the cure, for whatever the block fails at."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{shown_name(path)} cannot be read: {reason(error)}. {cure}") from error


def reason(error: Exception) -> str:
    """Why a file could not be read, for people: a line, without the names of Python's exceptions where it has words."""
    if isinstance(error, OSError) and error.strerror:
        return place_error(OSError(error.errno, error.strerror))
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing" if error.args else "a key is missing"
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())[:300]
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
    return escape_foreign_bytes(str(error)).strip()[:300] or type(error).__name__


def read_text(path: Path, cure: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises UserError."""
    with reading(path, cure):
        return path.read_text("utf-8-sig")


def read_object(path: Path, cure: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    with reading(path, cure):
        return as_object(json.loads(path.read_bytes()))


def as_object(value: Any) -> dict[str, Any]:
    """``value`` if it is a JSON object. Raises TypeError for any other."""
    if not isinstance(value, dict):
        raise TypeError(f"it holds {_KINDS.get(type(value), 'a value')}, not an object")
    return value


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def read_yaml(path: Path, cure: str, kind: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value in a YAML file, of bounded size, after ``kind`` has checked it. Raises UserError."""
    with reading(path, cure):
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"it has more than {MAX_YAML_BYTES:,} bytes")
        return kind(parse_yaml(path.read_bytes()))


def parse_yaml(content: str | bytes) -> Any:
    """The value of a YAML document. Raises one of UNREADABLE, also for one that its aliases make endless."""
    value = yaml.safe_load(content)
    left, ahead = MAX_YAML_VALUES, [value]
    while ahead:
        inner = ahead.pop()
        children = [*inner.keys(), *inner.values()] if isinstance(inner, dict) else inner
        if isinstance(children, list | tuple | set):
            left -= len(children)
            if left < 0:
                raise ValueError(f"it has more than {MAX_YAML_VALUES:,} values")
            ahead += children
    return value
