"""Cleaning of a document: examples of every rule, and idempotence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.prepare.clean import clean


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
