"""Cleaning of a document: examples of every rule, and idempotence."""

import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.prepare.clean import clean, clean_pieces, is_independent


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("caf\u0065\u0301", "caf\u00e9"),
        ("\ufeffa\x00b\x07c\x0c\td\x85e\x7f", "abc\td e"),
        ("one\x0ctwo\x0bthree\x85four\x1e\x1dfive", "one two three four five"),
        ("end\x0c\n\x0cdef f():\x07\x0c\x07 x", "end\ndef f(): x"),
        ("one\u2028two", "one\u2028two"),
        ("a  \t\nb\u3000\n  c", "a\nb\n  c"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("\n\n  a\n\n\n", "  a\n"),
        (" \n\t\n\ufeff", ""),
        ("中文，标点。\r\n第二行", "中文，标点。\n第二行"),
    ],
)
def test_clean_normalises_each_kind_of_character(raw, expected):
    assert clean(raw) == expected


@given(
    st.text(
        alphabet=st.one_of(
            st.characters(codec="utf-8"), st.sampled_from("\n\r \t\ufeff\x00\x0c\x85a\u0301\u1100\u1161")
        )
    )
)
def test_cleaning_twice_equals_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


SIGNS = st.sampled_from([*"\n\n\n\r  \t\ufeff\x00\x85ab\u0301\u0316\u0344\u1100\u1161\u11a8e\u3000\u0f73\u09c7\u09be"])


@given(st.lists(st.text(alphabet=SIGNS, max_size=12)))
def test_cleaned_pieces_are_the_cleaned_text_wherever_it_is_cut(pieces):
    cleaned = list(clean_pieces(pieces))
    assert "".join(cleaned) == clean("".join(pieces))
    assert all(cleaned)


def test_no_character_that_joins_the_one_before_it_is_called_independent():
    for character in map(chr, range(sys.maxunicode + 1)):
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            assert not is_independent(chr(int(parts[1], 16)))
            assert is_independent(chr(int(parts[0], 16))) or not is_independent(character)


def test_time_of_cleaning_is_in_proportion_to_a_run_of_marks():
    text = "a" + "\u0301\u0316" * 100_000
    begin = time.process_time()
    assert clean(text) == "\u00e1" + "\u0316" * 100_000 + "\u0301" * 99_999
    assert time.process_time() - begin < 20  # sorted by the normalisation itself: several minutes
