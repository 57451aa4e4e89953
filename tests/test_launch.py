"""``launch.sh`` itself: the environments that it makes, the clock that it starts, the command that it shows."""

import _ctypes
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers import gloo_ranks

TELL = "import json, os, sys, time; print(json.dumps([sys.argv[1:], time.time(), os.environ.get('TRIREME_T0')]))"
NOTHING = "# no package\n"
NAMES = {"launch": "launch.sh", "lock": "requirements.lock"}


def copy_launch(folder: Path) -> Path:
    """A repository with launch.sh, empty locks, and verbs that print their arguments, the time and ``TRIREME_T0``."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(gloo_ranks.REPOSITORY / "launch.sh", folder)
    for name in ("requirements.lock", "requirements-test.lock", "requirements-extra.lock"):
        (folder / name).write_text(NOTHING)
    for file in ("review/__main__.py", "bench/told.py", "bench/gpu.py", "bench/tools/run.py", "pytest.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(TELL)
    (folder / "train" / "util").mkdir(parents=True)
    for file in ("util/redact.py", "util/extra_packages.py", "errors.py", "printable.py"):
        shutil.copy(gloo_ranks.REPOSITORY / "train" / file, folder / "train" / file)
    return folder


def launch(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    """Runs launch.sh of a copied repository in a clean environment; it must succeed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TRIREME_PYTHON": sys.executable, **env}
    command = ["bash", str(folder / "launch.sh"), *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess, float]:
    """A repository in a folder with spaces and letters beyond ASCII, its first run, and the seconds that it took."""
    folder = copy_launch(tmp_path_factory.mktemp("launch") / "ein Ordner mit Straße")
    began = time.time()
    done = launch(folder, "review", "a b")
    return folder, done, time.time() - began


def told(done: subprocess.CompletedProcess) -> tuple[list[str], float, str | None]:
    """The arguments that a verb got, the time when it ran, and its ``TRIREME_T0``."""
    words, now, start = json.loads(done.stdout)
    return words, now, start


def test_first_run_in_folder_with_spaces_sets_up_and_runs(first):
    folder, done, _ = first
    assert told(done)[0] == ["a b"]
    assert f"Setting up {folder}/.venv with Python 3." in done.stderr
    assert "Set up in " in done.stderr
    assert done.stderr.splitlines()[-1] == "+ .venv/bin/python -m review a b"
    again = launch(folder, "review")
    assert again.stderr == "+ .venv/bin/python -m review\n"
    assert sorted(
        path.name for path in (folder / ".venv").iterdir() if path.name.startswith((".", "setup", "tmp"))
    ) == [".ready"]


def test_clock_of_first_run_starts_after_set_up(first):
    """Else the first run counts the set-up as its start, and its goodput is that of another program."""
    _, done, seconds = first
    _, now, start = told(done)
    assert start is not None
    assert 0 <= now - float(start) < seconds / 2


def test_test_verb_adds_second_lock_once_and_other_verbs_do_not(first):
    folder = first[0]
    assert not (folder / ".venv" / ".ready-test").exists()
    for lock, said in ((NOTHING, "Adding to "), (NOTHING, ""), ("# other\n", "Adding to ")):
        if lock != (folder / "requirements-test.lock").read_text():
            (folder / "requirements-test.lock").write_text(lock)
        done = launch(folder, "test", "x")
        assert told(done)[0] == ["-n", "2", "x"]
        assert ("Adding to " in done.stderr) == bool(said)
        assert "Setting up" not in done.stderr


def make_wheel(folder: Path, package: str) -> Path:
    """An installable wheel of a package with nothing in it."""
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    about = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{package}/__init__.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return wheel


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    """A repository, set up, whose verb review imports the package sparepart."""
    folder = copy_launch(tmp_path / "a clone")
    (folder / "review/__main__.py").write_text(
        "from train.util.extra_packages import import_extra\n"
        "print(import_extra('sparepart', 'x.spare: a file of spare parts').__name__)\n"
    )
    launch(folder, "setup")
    return folder


def test_verb_adds_package_that_its_data_needs_once(asking, tmp_path):
    line = f"sparepart @ file://{quote(str(make_wheel(tmp_path, 'sparepart')))}\n"
    (asking / "requirements-extra.lock").write_text(line)
    done = launch(asking, "review")
    assert done.stdout == "sparepart\n"
    said = done.stderr.splitlines()
    assert said[1] == "x.spare: a file of spare parts, which takes the package sparepart: adding it"
    assert said[2].startswith(f"Adding to {asking}/.venv what some kinds of data need (once")
    assert said[3].startswith("Added in ")
    assert len(said) == 4
    assert launch(asking, "review").stderr == said[0] + "\n"


def test_package_that_cannot_be_added_is_named_with_the_cure(asking):
    done = run_in(asking, f"{shlex.quote(str(asking / 'launch.sh'))} review")
    assert "UserError: x.spare: a file of spare parts, which takes the package sparepart" in done.stderr
    assert "could not be added (see above): pip install sparepart" in done.stderr
    (asking / ".venv/.ready").unlink()  # not of launch.sh's making
    (asking / "requirements-extra.lock").write_text("# other\n")
    done = run_in(asking, "PYTHONPATH=. .venv/bin/python -m review")
    assert "Adding" not in done.stderr
    assert done.stderr.endswith("which takes the package sparepart: pip install sparepart\n")


def test_setup_makes_only_what_it_is_asked_for(tmp_path):
    folder = copy_launch(tmp_path)
    for words, stamps in (((), {"ready"}), (("extra",), {"ready", "ready-extra"})):
        assert launch(folder, "setup", *words).stdout == ""
        assert {path.name[1:] for path in (folder / ".venv").glob(".ready*")} == stamps
    launch(folder, "setup", "test")
    assert (folder / ".venv/.ready-test").exists()
    done = run_in(folder, "./launch.sh setup tests")
    assert done.returncode == 2
    assert "there is no 'tests': say extra, test, or nothing" in done.stderr


def test_bench_gpu_has_what_tests_need(first):
    (first[0] / "requirements-test.lock").write_text("# of bench gpu\n")
    assert "Adding to " not in launch(first[0], "bench", "told").stderr
    assert "Adding to " in launch(first[0], "bench", "gpu", "--only", "tests").stderr


def test_bench_is_given_no_clock_of_launch(first):
    """Else a run's time to its first step has all that the bench did before."""
    assert told(launch(first[0], "bench", "told"))[2] is None


def test_shown_command_hides_secrets(first):
    secret = "data.paths=[s3://k:CAN/ARY@b,s3://CANARY@c]"
    words = [
        "wandb.key=CANARY",
        "data.text_key=body",
        secret,
        "x.token=CANARY",
        "u=http://h?sig=CANARY&y=1",
        "v=MY-CANARY",
    ]
    done = launch(first[0], "review", *words, DB_PASSWORD="MY-CANARY")
    assert told(done)[0] == words
    assert done.stderr == (
        "+ .venv/bin/python -m review wandb.key=[hidden] data.text_key=body data.paths=[s3://[hidden]@b,"
        "s3://[hidden]@c] x.token=[hidden] u=http://h?sig=[hidden]&y=1 v=[hidden]\n"
    )


def test_shown_command_is_dim_on_a_terminal(first):
    folder = first[0]
    ours, theirs = pty.openpty()
    command = ["bash", str(folder / "launch.sh"), "review"]
    subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown == "\x1b[2m+ .venv/bin/python -m review\x1b[0m\r\n"


def test_path_with_colon_is_refused_in_words(tmp_path: Path):
    folder = copy_launch(tmp_path / "a:b")
    done = subprocess.run(["bash", str(folder / "launch.sh"), "review"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Python cannot be run from a path with a colon" in done.stderr


def test_environment_in_use_is_not_made_anew(tmp_path: Path):
    folder = copy_launch(tmp_path / "repository")
    library = folder / ".venv" / "lib" / "some.so"
    library.parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, library)
    loads = f"import ctypes, sys; ctypes.CDLL({str(library)!r}); print('loaded', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", loads], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout.readline() == b"loaded\n"
        command = ["bash", str(folder / "launch.sh"), "check"]
        environment = {"PATH": "/usr/bin:/bin", "TRIREME_PYTHON": sys.executable}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        user.stdin.close()
    assert done.returncode == 1
    assert f"is in use (processes {user.pid})" in done.stderr
    assert library.exists()


def run_in(folder: Path, line: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a line of bash that calls launch.sh, in a folder beside the repository."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TRIREME_PYTHON": sys.executable, **env}
    return subprocess.run(["bash", "-c", line], env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "line",
    [
        "sh {launch} review a",
        "ln -sf {launch} trireme; PATH=$PATH:$PWD trireme review a",
        "mkdir -p in; ln -sf {launch} absolute; ln -sf ../absolute in/relative; in/relative review a",
        "cd ..; export CDPATH=/usr:$PWD; ein*/launch.sh review a",
        "set -o noclobber -o posix -o noglob; export SHELLOPTS; {launch} review a",
        "POSIXLY_CORRECT=1 {launch} review a",
        "unset HOME; {launch} review a",
        "{launch} review a 2>&-",
        "{launch} review a 2>/dev/full",
        "{launch} review a <&-",
    ],
)
def test_launch_works_however_it_is_called(line, first, tmp_path):
    folder = first[0]
    done = run_in(folder if "cd .." in line else tmp_path, line.format(launch=shlex.quote(f"{folder}/launch.sh")))
    assert done.returncode == 0, done.stderr
    assert told(done)[0] == ["a"]


def test_stamp_that_cannot_be_touched_fails_no_command(first, tmp_path):
    """A read-only environment whose clone is newer: the touch only saves the next command a digest."""
    folder = first[0]
    (tmp_path / "touch").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "touch").chmod(0o755)
    os.utime(folder / "requirements.lock")
    done = launch(folder, "review", "a", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert told(done)[0] == ["a"]
    assert done.stderr == "+ .venv/bin/python -m review a\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mkdir gone; cd gone; rmdir ../gone; {launch} review", "the folder that this is called in is no longer there"),
        ("source {launch} review; exit 1", "run it, as ./launch.sh"),
        ("TRIREME_VENV=/proc/none/venv {launch} review", "/proc/none cannot be written"),
        ("touch {lock}; PATH=$PWD/few TRIREME_VENV=new {launch} review", "needs flock sha256sum"),
    ],
)
def test_launch_says_in_words_what_cannot_work(line, words, first, tmp_path):
    folder = first[0]
    (tmp_path / "few").mkdir()
    for tool in ("bash", "dirname", "readlink", "cut", "cat"):
        (tmp_path / "few" / tool).symlink_to(shutil.which(tool))
    quoted = {name: shlex.quote(f"{folder}/{file}") for name, file in NAMES.items()}
    done = run_in(tmp_path, line.format(**quoted))
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "new").exists()
