"""A job's private folder on a host: made, marked as in use, and removed with what is left of the job.

The folder (mode 700, in the temporary directory) has the job's name on every host. It holds the fork server's socket
and log, Ray's token and all that Ray keeps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from pathlib import Path

from train.errors import UserError
from train.util.io import FileLock

PREFIX = "trireme-"
JOB_ENV = "TRIREME_JOB"
"""Environment variable with the job's folder; every process that a driver starts on its own host inherits it."""
USABLE_TEMP = re.compile(r"[A-Za-z0-9_/.+-]{1,18}")
"""Paths that job folders can be below. A Unix socket's path ends at 107 bytes, a job folder's name has up to 21, and
Ray's below it 68; Ray takes ASCII only, and quotes nothing in its commands.
"""
OTHER_TEMPS = ("/tmp", "/var/tmp")
"""Where job folders are made if the directory for temporary files (TMPDIR) is not usable."""
LEAST_FREE = 32 << 20
"""Bytes: Ray's logs of a job take some MiB, and on a disk that has no more, Ray's processes wait for ever."""


_held: list[FileLock] = []
"""The locks of this process's job folders, kept as long as it lives."""


@functools.cache  # the same after a driver has given its process another directory for temporary files
def temp_root() -> Path:
    """The directory that job folders are made in. UserError where none can be written."""
    roots = list(OTHER_TEMPS)
    with contextlib.suppress(FileNotFoundError):  # it has found no directory that can be written
        roots.insert(0, tempfile.gettempdir())
    for root in roots:
        if USABLE_TEMP.fullmatch(root) and _has_room(root):
            return Path(root)
    raise UserError(
        f"no directory for temporary files: none of {', '.join(dict.fromkeys(roots))} can be written and has "
        f"{LEAST_FREE >> 20} MiB free. Make room there, or set TMPDIR to another on a disk of this host, by a path of "
        "at most 18 letters, digits and _ / . + -"
    )


def _has_room(root: str) -> bool:
    return os.access(root, os.W_OK | os.X_OK) and shutil.disk_usage(root).free >= LEAST_FREE


def make_folder() -> Path:
    """Makes a new job folder for a driver, after removing the folders of this user's dead jobs.

    UserError where there is no directory for it.
    """
    remove_unused_folders()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temp_root()))
    mark_in_use(folder)
    return folder


def temporary_files(folder: Path) -> str:
    """Make the directory in a job folder for its processes' temporary files, which go with it, even after SIGKILL."""
    directory = folder / "tmp"
    directory.mkdir(exist_ok=True)
    return str(directory)


def mark_in_use(folder: Path) -> None:
    """Marks ``folder`` as in use for as long as this process lives, by a shared lock on a file in it."""
    lock = FileLock(folder / "held")
    lock.acquire(shared=True)
    _held.append(lock)


def remove_unused_folders(patience_s: float = 0.0) -> None:
    """Removes the folders of this user's jobs that no process uses.

    Waits up to ``patience_s`` for processes that are ending.
    """
    deadline = time.monotonic() + patience_s
    while _remove_unused_folders() and time.monotonic() < deadline:
        time.sleep(0.05)


def _remove_unused_folders() -> bool:
    """Whether a folder is left because a process uses it."""
    in_use = False
    for folder in temp_root().glob(f"{PREFIX}*"):
        try:
            with contextlib.closing(FileLock(folder / "held", create=False)) as lock:
                if not lock.acquire(wait=False):
                    in_use = True
                elif folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another user's, or gone by now
    return in_use


def end_job(folder: str) -> None:
    """Kills what is left on this host of a job whose driver is gone, and removes its folder.

    The processes are found by ``JOB_ENV`` in their environment or by their open files. The kernel has ended Ray's main
    processes and the workers already; Ray's agents would look around for some seconds.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and _belongs_to_job(process, folder):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs_to_job(process: Path, folder: str) -> bool:
    """Whether the process of a /proc folder is of the job.

    By environment or open files: one that renames itself, as Ray's do, may overwrite its environment.
    """
    if f"{JOB_ENV}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
        return True
    return any(str(file.readlink()).startswith(f"{folder}/") for file in (process / "fd").iterdir())


def cache_folder() -> str | None:
    """This user's folder for caches on this host's own disk, which outlives jobs; None where it is not private."""
    folder = temp_root() / f"{PREFIX}cache-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if _is_private(folder):
            return str(folder)
    return None


def own_folder(name: str) -> Path:
    """The job folder ``name`` on this host, made where missing. UserError where it is not private to this user."""
    folder = temp_root() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder):
        raise UserError(f"{folder} is not private to this user: remove it, or have its owner do so")
    mark_in_use(folder)
    return folder


def _is_private(folder: Path) -> bool:
    info = folder.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077
