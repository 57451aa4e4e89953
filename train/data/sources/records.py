"""Records: where they lie in a JSON file, and the text and the label of one of any format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO

from train.data.chat.conversations import NotAConversation, read_conversation, to_text

_BLOCK = 1 << 20
_LONGEST = 1 << 28
"""Bytes of the longest record of a .json file: an object that holds all rows is no record."""
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_END = 16
"""Characters before the end of what was read where an error may only mean that the rest is missing."""
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_KINDS = {type(None): "null", bool: "a boolean", dict: "an object", list: "a list", str: "a string", bytes: "bytes"}


class BadRecord(ValueError):  # noqa: N818  it is shown with others as a BadText
    """A record, or the layout of its file, that cannot be read; the message follows the name of the place.

    ``place`` names it where ``offset`` names no line; ``cure`` is set where the file as a whole is at fault.
    """

    def __init__(
        self, what: str, offset: int | None = None, *, place: str | None = None, cure: str | None = None
    ) -> None:
        super().__init__(what)
        self.offset, self.place, self.cure = offset, place, cure


class _Ambiguous(dict[str, Any]):
    """An object in which a key stands twice."""

    twice: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    keys = [key for key, _ in pairs]
    ambiguous = _Ambiguous(plain)
    ambiguous.twice = frozenset(key for key in plain if keys.count(key) > 1)
    return ambiguous


# Decimal: an integer of any length keeps its digits; Python's own have a limit, which JSON has not.
_CAREFUL = json.JSONDecoder(object_pairs_hook=_object, parse_int=Decimal)
_SCANNER = json.JSONDecoder(parse_int=len)


def _decode(text: str, keys: Sequence[str]) -> Any:
    """The value of a line of JSON; one in which a key may stand twice, or with a long integer, takes longer."""
    if not any(text.count(f'"{key}"') > 1 for key in keys):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            pass  # of an integer
    return _CAREFUL.decode(text)


def parse_record(text: str, keys: Sequence[str]) -> Any:
    """The value of a JSON record, with a mark where one of ``keys`` stands twice. Raises BadRecord."""
    try:
        return _decode(text.removeprefix("\ufeff"), keys)
    except RecursionError:
        raise BadRecord("is nested too deep") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"is not JSON ({error.msg} at character {error.pos + 1}{_hint(text, error)})") from None


def conversation_lines(record: Any) -> list[str]:
    """The conversation of a record as one line; nothing of one that is not trained on. Raises BadRecord."""
    try:
        conversation = read_conversation(record)
    except NotAConversation as error:
        raise BadRecord(str(error)) from None
    return [to_text(conversation)] if conversation else []


def record_fields(record: Any, text_key: str, label_key: str | None, *, replace: bool) -> list[str]:
    """[text], or [text, label] if ``label_key`` is set, of a record of any format. Raises BadRecord.

    A half of a surrogate pair, which UTF-8 cannot encode, becomes U+FFFD if ``replace``.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"has no text in the field {text_key!r} (it is not an object, but {_kind(record)})")
    value = _field(record, text_key, "text")
    if not isinstance(value, str):
        raise BadRecord(f"has no text in the field {text_key!r}: it is {_kind(value)}, not text")
    fields = [value]
    if label_key:
        label = _field(record, label_key, "label")
        if label is None or isinstance(label, dict | list) or not str(label).strip():
            raise BadRecord(f"has no label in the field {label_key!r}: it is {_kind(label)}")
        fields.append(json.dumps(label) if isinstance(label, bool) else str(label))
    return [_whole_characters(field, replace) for field in fields]


def _field(record: dict[str, Any], key: str, what: str) -> Any:
    if isinstance(record, _Ambiguous) and key in record.twice:
        raise BadRecord(f"has the field {key!r} twice")
    if key not in record:
        raise BadRecord(f"has no {what} in the field {key!r} (its fields are {sorted(record)}); set data.{what}_key")
    return record[key]


def _kind(value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        return "empty"
    return next((words for kind, words in _KINDS.items() if isinstance(value, kind)), "a number")


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """What the layout of a line that is not JSON suggests."""
    comma = error.msg == "Extra data" and text[error.pos :].strip() == ","
    return ": the comma at its end is too much" if comma else ""


def _whole_characters(text: str, replace: bool) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if replace:
            return _HALF_PAIR.sub("\ufffd", text)
        half = f"\\u{ord(text[error.start]):04x}"
        cure = "mend it, or take data.encoding_errors=replace"
        raise BadRecord(f"has {half}, half of a surrogate pair, which is no character; {cure}") from None
    return text


def find_records(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each value of a JSON array, or of values that follow each other, from the stream's start.

    What is held in memory is bounded by the longest value. Raises BadRecord where the layout is not that.
    """
    window = _Window(stream)
    window.skip(_SPACE)
    array = window.take("[")
    window.skip(_SPACE)
    if array and window.take("]"):
        window.expect_end()
        return
    while not window.at_end():
        yield window.value()
        window.skip(_SPACE)
        if array and not window.take(","):
            if not window.take("]"):
                cut = "the array is cut short"
                raise window.error(cut if window.at_end() else "Expecting ',' or ']' after a record")
            window.expect_end()
            return
        window.skip(_SPACE)
    if array:
        raise window.error("the array is cut short")


class _Window:
    """A part of a JSON file, each byte as one character: structure is ASCII, so that offsets are those of bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.text, self.begin, self.at, self.ended = stream, "", 0, 0, False
        self.more()
        self.at = 3 if self.text.startswith("\xef\xbb\xbf") else 0  # a byte-order mark

    def more(self) -> None:
        """Drop what has been read, and double the rest, at least by a block."""
        self.begin, self.text, self.at = self.begin + self.at, self.text[self.at :], 0
        block = self.stream.read(max(_BLOCK, len(self.text)))
        self.text, self.ended = self.text + block.decode("latin-1"), not block

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Go to the next character that is no white space."""
        while True:
            match = pattern.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return
            self.more()

    def at_end(self) -> bool:
        """Whether nothing is left; after ``skip``."""
        return self.at >= len(self.text)

    def take(self, sign: str) -> bool:
        """Whether the next character is ``sign``, which then is passed."""
        found = self.text.startswith(sign, self.at)
        self.at += found
        return found

    def expect_end(self) -> None:
        """Raise BadRecord if anything follows."""
        self.skip(_SPACE)
        if not self.at_end():
            raise self.error("text after the end of the array")

    def error(self, what: str) -> BadRecord:
        """The error that the file is no JSON from here on."""
        return BadRecord(f"is not JSON ({what}); what follows cannot be read", self.begin + self.at)

    def value(self) -> tuple[int, bytes]:
        """The offset and the bytes of the value that begins here, which is passed."""
        while True:
            try:
                _, end = _SCANNER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    break
            except RecursionError:
                raise BadRecord("is nested too deep; what follows cannot be read", self.begin + self.at) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _NEAR_END
                if self.ended or not cut:
                    self.at = min(error.pos, len(self.text))
                    raise self.error(error.msg) from None
            if len(self.text) - self.at > _LONGEST:
                raise BadRecord(
                    f"begins a record of over {_LONGEST >> 20} MiB; an object that holds all rows is none: write "
                    "them to a .jsonl file, a row a line",
                    self.begin + self.at,
                )
            self.more()
        found = self.begin + self.at, self.text[self.at : end].encode("latin-1")
        self.at = end
        return found
