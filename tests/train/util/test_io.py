"""Files whole or absent, lines that a crash cuts, and locks that end with their holder."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from train.util.io import FileLock, append_line, read_records, to_json, write_whole


def test_write_whole_replaces_the_content_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "a.json"
    for content in (b"1", b"22"):
        write_whole(file, content)
        assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_line_after_a_torn_one_is_whole_and_the_torn_one_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read_records(file) == []
    append_line(file, '{"step": 1}')
    with file.open("a") as out:
        out.write('{"step": 2, "lo')
    append_line(file, '{"step": 3}')
    assert [record["step"] for record in read_records(file)] == [1, 3]


def test_lock_is_refused_while_another_holds_it_and_free_after_close(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.write("me")
    first.write("I")
    assert (tmp_path / "lock").read_text() == "I"
    first.close()
    assert second.acquire(wait=False)
    second.close()


def test_shared_locks_are_held_together_and_exclude_others(tmp_path):
    locks = [FileLock(tmp_path / "lock") for _ in range(3)]
    assert locks[0].acquire(shared=True)
    assert locks[1].acquire(shared=True, wait=False)
    assert not locks[2].acquire(wait=False)
    for lock in locks:
        lock.close()


def test_lock_of_a_killed_process_is_free_and_waiting_for_it_is_told_once(tmp_path):
    code = "import sys, time; from pathlib import Path; from train.util.io import FileLock\n"
    code += "lock = FileLock(Path(sys.argv[1])); lock.acquire()\n"
    code += "print('held', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        waits = []
        with FileLock(tmp_path / "lock", on_wait=lambda: (waits.append(1), holder.send_signal(signal.SIGKILL))):
            assert waits == [1]


def test_lock_of_an_absent_file_raises_where_it_must_not_be_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "lock", create=False)


def test_numbers_that_json_has_not_are_written_as_null():
    text = to_json({"loss": float("nan"), "by": [np.float32("inf"), 1.5, (float("-inf"), "NaN")], "ü": 1}, indent=1)
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "by": [None, 1.5, [None, "NaN"]], "ü": 1}
