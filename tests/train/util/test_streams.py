"""Standard output and error that are closed, full, gone or not read: what a command does then."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from helpers import gloo_ranks

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(gloo_ranks.REPOSITORY), "PYTHONSAFEPATH": "1"}
WORK = """
import os, sys
from train.util import streams
streams.guard_{kind}()
for n in range({lines}):
    print(n, "x" * 100)
print("said", file=sys.stderr)
number = os.open("done", os.O_CREAT | os.O_WRONLY)
os.write(number, str(number).encode())
"""
LINES = "".join(f"{n} {'x' * 100}\n" for n in range(5000))


def start(tmp_path, kind, shell="exec", lines=50, **files):
    """A command that prints lines, says something and writes a file; ``shell`` redirects its streams."""
    program = tmp_path / "work.py"
    program.write_text(WORK.format(kind=kind, lines=lines))
    command = ["bash", "-c", f'exec "$@" {shell.removeprefix("exec")}', "bash", sys.executable, program]
    return subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **files)


def closed_pipe():
    """The writing end of a pipe whose reader has left."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("shell", [">&-", ">/dev/full", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_report_that_cannot_be_written_ends_no_work(shell, tmp_path):
    process = start(tmp_path, "report", shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert errors in (b"said\n", b"")
    assert out in (LINES.encode()[: len(out)], b"")
    assert int((tmp_path / "done").read_text()) > 2  # and no file of the work has the number of a closed stream


def test_report_whose_reader_left_goes_on_in_silence(tmp_path):
    process = start(tmp_path, "report", stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert process.communicate(timeout=30)[1] == b"said\n"
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


def test_report_on_a_terminal_that_closed_goes_on(tmp_path):
    ours, theirs = pty.openpty()
    os.close(ours)
    process = start(tmp_path, "report", stdout=theirs, stderr=theirs)
    assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_report_waits_for_no_reader_that_does_not_read(tmp_path):
    ours, theirs = os.pipe()
    process = start(tmp_path, "report", lines=5000, stdout=theirs)
    os.close(theirs)
    end = time.monotonic() + 30
    while not (tmp_path / "done").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    with os.fdopen(ours) as file:
        text = file.read()
    assert process.wait(30) == 0
    assert text == LINES[: len(text)]  # what was there when nobody read
    assert 1 << 16 < len(text) < len(LINES)


def test_lines_left_out_are_marked_where_they_are_missing(tmp_path):
    ours, theirs = os.pipe()
    program = (
        "import sys; from train.util import streams; streams.guard_report()\n"
        "for n in range(3000): print(n, 'x' * 100)\n"
        "print('wait', file=sys.stderr); sys.stdin.readline(); streams.flush_report(); print('end')"
    )
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "stdout": theirs}
    process = subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT, **pipes)
    os.close(theirs)
    assert process.stderr.readline() == b"wait\n"
    process.stdin.write(b"\n")
    process.stdin.close()
    with os.fdopen(ours) as file:
        text = file.read()
    assert process.wait(30) == 0
    assert text.endswith("\n[lines are missing here: they were not read in time]\nend\n")
    process.stderr.close()


def test_reader_who_is_slow_gets_every_line_of_a_report(tmp_path):
    process = start(tmp_path, "report", lines=5000, stdout=subprocess.PIPE)
    text = b""
    while part := os.read(process.stdout.fileno(), 20000):
        text += part
        time.sleep(0.01)
    assert process.wait(30) == 0
    assert text.decode() == LINES
    process.stdout.close()


def test_output_and_errors_of_a_report_keep_their_order(tmp_path):
    program = (
        "import sys; from train.util import streams; streams.guard_report()\n"
        "for n in range(100): print(n, file=(sys.stdout, sys.stderr)[n % 2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    assert done.stdout.decode().split() == [str(n) for n in range(100)]


def test_result_whose_reader_left_ends_quietly(tmp_path):
    process = start(tmp_path, "result", stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0
    assert not (tmp_path / "done").exists()


def test_result_on_a_full_disk_fails_in_words(tmp_path):
    process = start(tmp_path, "result", ">/dev/full", stderr=subprocess.PIPE)
    assert process.communicate(timeout=30)[1] == b"error: standard output cannot be written: No space left on device\n"
    assert process.returncode == 1


def test_result_to_a_closed_output_is_no_error(tmp_path):
    process = start(tmp_path, "result", ">&-", stderr=subprocess.PIPE)
    assert process.communicate(timeout=30)[1] == b"said\n"
    assert process.returncode == 0


@pytest.mark.parametrize("words", [["cluster", "train"], ["cluster", "cluster"], ["train", "prepare"], ["review"]])
def test_help_whose_reader_left_ends_quietly(words, tmp_path):
    command = [sys.executable, "-m", *words, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def block_interrupt():
    """In the process to be: as launch.sh starts the product's commands."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


@pytest.mark.parametrize("words", [["train", "prepare"], ["train", "generate"], ["cluster", "cluster"], ["review"]])
def test_interrupt_while_python_starts_shows_no_traceback(words, tmp_path):
    command = [sys.executable, "-m", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, preexec_fn=block_interrupt
    )
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 130


def test_guard_covers_prints_tracebacks_and_logs():
    program = (
        "import logging, sys; from train.util import streams; streams.guard_report(); print('a', 'CANARY123'); "
        "logging.warning('b CANARY123'); sys.stderr.write('c CANARY123\\n'); raise ValueError('d s3://k:CANARY@x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(gloo_ranks.REPOSITORY), "A_SECRET": "CANARY123"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == "a [hidden]\n"
    assert [line for line in ("b [hidden]", "c [hidden]", "d s3://[hidden]@x") if line not in done.stderr] == []
    assert "CANARY" not in done.stdout + done.stderr
