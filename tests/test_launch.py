"""``launch.sh`` itself: what it does before any Python of ours runs."""

import _ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gloo_ranks


def test_an_environment_that_processes_use_is_not_made_anew_under_them(tmp_path):
    shutil.copy(gloo_ranks.REPOSITORY / "launch.sh", tmp_path)
    (tmp_path / "requirements.lock").write_text("another\n")
    library = tmp_path / ".venv" / "lib" / "some.so"
    library.parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, library)
    loads = f"import ctypes, sys; ctypes.CDLL({str(library)!r}); print('loaded', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", loads], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout.readline() == b"loaded\n"
        command = ["bash", str(tmp_path / "launch.sh"), "check"]
        environment = {"PATH": "/usr/bin:/bin", "TRIREME_PYTHON": sys.executable}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        user.stdin.close()
    assert done.returncode == 1
    assert f"is in use (processes {user.pid})" in done.stderr
    assert library.exists()


@pytest.mark.skipif(not (Path(sys.prefix) / ".ready").exists(), reason="this environment was not made by launch.sh")
def test_what_a_bench_starts_begins_when_it_is_started(tmp_path):
    """Else a run's time to its first step has all that the bench did before."""
    for name in ("launch.sh", "requirements.lock"):
        shutil.copy2(gloo_ranks.REPOSITORY / name, tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "told.py").write_text("import os; print('TRIREME_T0' in os.environ)")
    command = ["bash", str(tmp_path / "launch.sh"), "bench", "told"]
    done = subprocess.run(
        command, env={**os.environ, "TRIREME_VENV": sys.prefix}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
