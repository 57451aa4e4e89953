"""``launch.sh`` itself: what it does before any Python of ours runs."""

import _ctypes
import shutil
import subprocess
import sys

import worlds


def test_an_environment_that_processes_use_is_not_made_anew_under_them(tmp_path):
    shutil.copy(worlds.REPOSITORY / "launch.sh", tmp_path)
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
