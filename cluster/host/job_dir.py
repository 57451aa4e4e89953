"""What a job keeps on one host: a private folder with the socket of its warm process, and the evidence of a killing.

The folder (mode 700, in the temporary directory) has the job's name on every host. Whoever needs the warm process first
starts it and owns it: the driver on its own machine, while Ray is still coming up; a steward elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from train.errors import UserError

PREFIX = "trireme-"
MARK = "TRIREME_JOB"
"""The environment variable that everything a driver starts on its own host inherits: the job's folder."""
LONGEST_TEMP = 18
"""Characters: a Unix socket's path ends at 107, a job folder's name has up to 21, and Ray's below it 68."""

QUIET = {
    "DS_BUILD_OPS": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
}
"""The warm process's environment: no thread pools and no CUDA before the fork. A trainer's threads are set after it."""


@functools.cache  # the same after a driver has given its process another directory for temporary files
def temp_root() -> Path:
    """The directory that job folders are in."""
    root = tempfile.gettempdir()
    return Path(root if len(root) <= LONGEST_TEMP else "/tmp")


def make_folder() -> Path:
    """A new job folder of the driver's, after what dead jobs of this user left behind is swept away."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temp_root()))
    hold(folder)
    return folder


def temporary_files(folder: Path) -> str:
    """The directory in a job folder for its processes' temporary files, which go with it, even after SIGKILL."""
    directory = folder / "tmp"
    directory.mkdir(exist_ok=True)
    return str(directory)


def hold(folder: Path) -> None:
    """Marks ``folder`` as in use for as long as this process lives."""
    fd = os.open(folder / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)


def sweep(patience_s: float = 0.0) -> None:
    """Removes the folders of this user's jobs that nobody holds any more; ``patience_s`` for those whose processes are ending."""
    deadline = time.monotonic() + patience_s
    while _sweep() and time.monotonic() < deadline:
        time.sleep(0.05)


def _sweep() -> bool:
    """Whether a folder is left that somebody holds."""
    held = False
    for folder in temp_root().glob(f"{PREFIX}*"):
        try:
            with (folder / "held").open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            held = True
        except OSError:
            continue  # another user's, or gone by now
    return held


def end_job(folder: str) -> None:
    """Kills what a driver that is gone left on its host, found by the mark in its environment or by its open files.

    The kernel has ended Ray's main processes and the trainers with it; Ray's agents would look around for some seconds.
    """
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(place.name) != os.getpid() and _belongs(place, folder):
                os.kill(int(place.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(place: Path, folder: str) -> bool:
    """Whether a process of /proc is of the job. One that renames itself, as Ray's do, may write over its environment."""
    if f"{MARK}={folder}".encode() in (place / "environ").read_bytes().split(b"\0"):
        return True
    return any(str(file.readlink()).startswith(f"{folder}/") for file in (place / "fd").iterdir())


def own_folder(name: str) -> Path:
    """The job folder ``name`` on this host, made where it is missing; refuses one that somebody else made."""
    folder = temp_root() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise UserError(f"{folder} is not private to this user: remove it")
    hold(folder)
    return folder


class WarmProcess:
    """Owns a warm process: it lives until ``close``, or until this process ends in any way."""

    def __init__(self, folder: Path, target: str) -> None:
        path = folder / "warm.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(128)
        with listener, (folder / "warm.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.worker.fork_server", target, str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env={**os.environ, **QUIET, "TMPDIR": temporary_files(folder)},
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )

    def set_device(self, device: str) -> None:
        """Says what the trainers will run on, "cpu" or "gpu"; the warm process waits for it between two imports."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(f"{device}\n".encode())
                self.process.stdin.flush()

    def close(self) -> None:
        """Ends it, and with it every trainer it forked."""
        self.process.kill()
        self.process.wait()


def connect_warm(folder: Path) -> socket.socket | None:
    """A connection to the host's warm process, or None where none lives."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(folder / "warm.sock"))
    except OSError:
        sock.close()
        return None
    return sock


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps the host's stewards from starting two warm processes."""
    with (folder / "starting").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def count_gpus() -> int:
    """NVIDIA devices of this machine that this process may use; asked of the kernel, so that CUDA stays untouched."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        devices
        if visible is None
        else min(devices, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    )


def count_cpus() -> int:
    """Cores this process may use: its affinity, the quota of its cgroup (rounded down, at least 1), its share of a SLURM node."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    with contextlib.suppress(OSError, ValueError):
        microseconds = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        if microseconds > 0:
            cores = min(cores, max(1, microseconds // int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())))
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, int(os.environ["SLURM_CPUS_ON_NODE"]))
    return cores


def oom_kills() -> int:
    """How often the kernel has killed for want of memory, on this host and in this cgroup."""
    total = 0
    places = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            places.append(Path("/sys/fs/cgroup" + line.split(":", 2)[2]) / "memory.events")
    for path in places:
        with contextlib.suppress(OSError):
            total += sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill "))
    return total


def address_towards(address: str) -> str:
    """The address of this host that packets to ``address``, HOST:PORT, leave from. UserError where none leads there."""
    name, _, port = address.rpartition(":")
    try:
        family, _, _, _, there = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UserError(f"no way leads from this host to {address}: {error}") from error


def refuses(address: str, patience_s: float = 5.0) -> bool:
    """Whether the host of ``address``, HOST:PORT, answers that nobody listens there."""
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), patience_s).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def interface_of(ip: str) -> str | None:
    """The network interface that has address ``ip``."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return name
    return None
