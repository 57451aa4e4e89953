"""Guards of readers and verbs: bad input names file, reason and cure; a bug stays a bug."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from train.errors import UserError, bad_input, guard_verb
from train.util import reading
from train.util.io import read_records, write_whole


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff", "not UTF-8|utf-8"),
        (b"[" * 5000, "nested too deeply"),
        (b"[1]", "a list, not an object"),
        (b"{", "Expecting property name"),
        (b"9" * 5000, "4300 digits"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused_by_name(content: bytes, why: str, tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json cannot be read: .*({why}).*\. Mend it$"):
        reading.read_object(file, "Mend it")


def test_a_byte_order_mark_is_no_error(tmp_path: Path):
    file = tmp_path / "x"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert reading.read_object(file, "") == {"a": 1}
    assert read_records(file) == [{"a": 1}]
    assert reading.read_text(file, "") == '{"a": 1}\n'


def test_a_line_separator_within_json_ends_no_record(tmp_path: Path):
    (tmp_path / "x").write_text('{"a": "\u2028\x85"}\n[1]\n', "utf-8")
    assert read_records(tmp_path / "x") == [{"a": "\u2028\x85"}]


def test_yaml_that_its_aliases_make_endless_is_refused():
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    with pytest.raises(ValueError, match="more than 200,000 values"):
        reading.parse_yaml("a0: &a0 [x]\n" + "\n".join(levels))
    with pytest.raises(ValueError, match="more than 200,000 values"):
        reading.parse_yaml("&a [*a]")


def test_writing_to_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "sub").touch()
    with (
        pytest.raises(UserError, match=r"sub/x: Not a directory \(there is a file"),
        guard_verb(),
    ):
        write_whole(tmp_path / "sub" / "x", b"")
    assert bad_input(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == (
        "/a/b: No space left on device (make room there, or name another place)"
    )


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError(errno.EBADF, "bad"), RuntimeError("x")])
def test_a_bug_is_no_bad_input(error: Exception):
    assert bad_input(error) is None
    with pytest.raises(type(error)), guard_verb():
        raise error
