"""UTF-8 in a process and its children whatever the locale and the environment say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
"""As a locale of another encoding, which need not be installed: Python takes ASCII for all text."""

PROGRAM = """
import subprocess, sys
from pathlib import Path
from train.util import utf8

utf8.use_utf8()
Path(sys.argv[1]).write_text(sys.stdin.read())  # in the encoding of the locale, as libraries do it
child = "import sys, locale; print(locale.getpreferredencoding(False), *sys.argv[1:])"
print(subprocess.run([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.PIPE, text=True).stdout, end="")
"""


def run(
    arguments: list[str], folder: Path, sent: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **ASCII, **environment}
    return subprocess.run(
        [sys.executable, *arguments], input=sent, capture_output=True, cwd=folder, env=env, timeout=60
    )


@pytest.mark.parametrize("environment", [{}, {"PYTHONIOENCODING": "utf-8"}], ids=["plain", "named"])
def test_arguments_files_input_and_children_are_utf8(tmp_path, environment):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(["program.py", "语料.txt"], tmp_path, "é, 中".encode(), **environment)
    assert done.stderr == b""
    assert done.stdout.decode().split() == ["utf-8", "语料.txt"]
    assert (tmp_path / "语料.txt").read_bytes() == "é, 中".encode()


def test_output_that_a_terminal_cannot_show_is_replaced(tmp_path):
    code = "from train.util import utf8; utf8.use_utf8(); print('a \\xb7 b')"
    done = run(["-c", code], tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"a ? b\n")


def test_message_of_a_verb_holds_the_argument(tmp_path):
    done = run(["-m", "train", "evaluate", "语=1"], tmp_path)
    assert done.returncode == 2
    assert "'语=1' is not one of" in done.stderr.decode()
