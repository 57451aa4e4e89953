"""Text and names of users as people see them: nothing that a terminal would obey, and one escape for each kind."""

from __future__ import annotations

import pytest

from train.errors import shown_name
from train.printable import printable


@pytest.mark.parametrize(
    ("text", "shown", "on_one_line"),
    [
        ("a b.txt", "a b.txt", "a b.txt"),
        ("a\tb\nc", "a\tb\nc", r"a\tb\nc"),
        ("\x1b[2J", r"\x1b[2J", r"\x1b[2J"),
        ("x\udcff", r"x\xff", r"x\xff"),
        ("\u202egpj", r"\u202egpj", r"\u202egpj"),
        ("語\u3000é", "語\u3000é", "語\u3000é"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469", "\U0001f468\\u200d\U0001f469"),
    ],
    ids=["plain", "lines", "escape", "foreign byte", "direction", "letters and blanks", "joiner"],
)
def test_text_keeps_its_lines_and_a_name_stays_on_one(text: str, shown: str, on_one_line: str):
    assert printable(text) == shown
    assert printable(text, one_line=True) == shown_name(text) == on_one_line


def test_half_of_a_surrogate_pair_can_be_printed():
    assert printable("\ud83d").encode() == rb"\ud83d"


def test_name_of_foreign_bytes_is_shown_by_its_bytes():
    assert shown_name(b"caf\xe9.txt") == r"caf\xe9.txt"
