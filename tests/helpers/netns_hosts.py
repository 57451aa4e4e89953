"""Several hosts for tests on one machine, made of Linux namespaces and joined by a switch.

    with hosts(3, shared=tmp_path) as [a, b, c]:
        a.run(["ss", "-ltn"])
        b.cut_off()

Each host has its own address, name, processes, /tmp, /run and /dev/shm. The rest of the file system is common to all,
and so are, wherever they lie, the repository, the environment and the folder ``shared``: the storage that every host of
a real cluster sees. Hosts resolve each other's names. The namespaces are anonymous and end with the test's process, so
nothing is left behind and any number of tests may run at once. Needs root, iproute2 and util-linux; ``WHY_NOT`` says
what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
HOME = "/tmp/home_of_host"
TOKEN = f"{HOME}/.ray/auth_token"
PORT = 6379
"""Where `cluster up` listens."""
TOOLS = ("ip", "nsenter", "unshare", "mount", "hostname")
PROBE = "ip link add one type veth peer name two && ip link add three type bridge"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FOREIGN = ("RAY_", "TRIREME_", "SLURM_", "TMP", "TEMP", "XDG_", "TORCHINDUCTOR_")
"""Prefixes of environment variables that describe the tests' own machine, and so are not passed to a host."""
PRIVATE = ("/tmp", "/run", "/dev/shm")
"""The folders of which every host has an empty one of its own."""


def why_not() -> str:
    """The reason why this machine cannot have such hosts, for a skip; empty where it can."""
    if os.getuid():
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    return subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "sh", "-c", PROBE], capture_output=True, text=True
    ).stderr.strip()


WHY_NOT = why_not()


class Host:
    """One host: commands on it see only its processes, its address and its ``PRIVATE`` folders; home is ``HOME``."""

    def __init__(self, name: str, ip: str, cores: set[int], switch: subprocess.Popen, shared: Sequence[str]) -> None:
        self.name, self.ip, self.cores, self.switch, self.shared = name, ip, cores, switch, shared
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """Create the host's namespaces; after ``kill`` again, with the same address and empty ``PRIVATE`` folders."""
        self.boots += 1
        self.plug = f"to_{self.name}_{self.boots}"
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.holder = _hold(spaces, [self.name, *self.shared])
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.init = int(children.read_text())
        mac = "02:00:" + ":".join(
            f"{int(part):02x}" for part in self.ip.split(".")
        )  # others have it in their ARP caches
        _in(self.switch.pid, f"ip link add {self.plug} type veth peer name eth0 address {mac} netns {self.init}")
        _in(self.switch.pid, f"ip link set {self.plug} up")
        for setting in (f"addr add {self.ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _in(self.init, f"ip {setting}")
        self.reconnect()

    def cut_off(self) -> None:
        """Take the host off the network: packets to and from it are dropped, and no connection is closed."""
        _in(self.switch.pid, f"ip link set {self.plug} nomaster")

    def reconnect(self) -> None:
        """Put the host back on the network."""
        _in(self.switch.pid, f"ip link set {self.plug} master bridge")

    def kill(self) -> None:
        """Power failure: all processes end at once, and no packet that says so leaves the host."""
        self.cut_off()
        self.holder.kill()
        self.holder.wait()

    def pids(self) -> list[int]:
        """The living processes of this host, without the first one, numbered as on this machine."""
        living, space = [], Path(f"/proc/{self.init}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if (process / "ns/pid").readlink() == space and state != "Z" and int(process.name) != self.init:
                    living.append(int(process.name))
        return living

    def start(
        self, command: Sequence[Any], env: dict[str, str] | None = None, cwd: Any = "/tmp", **options: Any
    ) -> subprocess.Popen:
        """Start a command on this host; ``FORWARDED`` signals are passed on to it, and SIGKILL ends it too."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        environment = {**kept, "HOME": HOME, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, "enter", str(self.init), str(cwd), *map(str, command)],
            env=environment,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self.cores),
            **options,
        )

    def run(self, command: Sequence[Any], timeout: float = 60, **options: Any) -> subprocess.CompletedProcess:
        """Run a command on this host to its end; ``.stdout`` has its standard output and error."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            process.kill()
            raise AssertionError(f"{command} on {self.name} took over {timeout} s: {late.stdout!r}") from None
        return subprocess.CompletedProcess(list(command), process.returncode, out)


@contextlib.contextmanager
def hosts(number: int, shared: Path, cores: int = 1) -> Iterator[list[Host]]:
    """``number`` hosts named a, b, c..., of ``cores`` cores each, which all see the folder ``shared``."""
    assert not WHY_NOT, WHY_NOT
    paths = hidden_paths([shared, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)])
    available = sorted(os.sched_getaffinity(0))
    made: list[Host] = []
    switch = _hold(("--net",), [])
    try:
        _in(switch.pid, "ip link add bridge type bridge")
        _in(switch.pid, "ip link set bridge up")
        for n in range(number):
            mine = {available[(n * cores + k) % len(available)] for k in range(cores)}
            made.append(Host(ascii_lowercase[n], f"{NETWORK}.{n + 1}", mine, switch, paths))
        yield made
    finally:
        for holder in (*(host.holder for host in made), switch):
            holder.kill()
            holder.wait()


def hidden_paths(common: Sequence[Path]) -> list[str]:
    """The paths below ``PRIVATE`` folders, which a host's own would hide; those inside others are left out.

    A path with a symbolic link in it is needed both as it is written and as it resolves.
    """
    hidden: list[Path] = []
    for path in sorted({*common, *(path.resolve() for path in common)}):  # a folder comes before what is in it
        if any(path.is_relative_to(folder) for folder in PRIVATE) and not any(map(path.is_relative_to, hidden)):
            hidden.append(path)
    return [str(path) for path in hidden]


def trireme(host: Host, *arguments: Any, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess:
    """Run a verb of ``python -m cluster`` on a host, as ``./launch.sh`` does when the environment is set up."""
    return host.run([sys.executable, "-m", "cluster", *arguments], timeout=timeout, **options)


def give_token(host: Host, token: str) -> None:
    """Write a cluster's token to the file where the host's user has it."""
    host.run(["sh", "-c", f"mkdir -p ~/.ray && umask 077 && printf %s {token} > {TOKEN}"])


def form_cluster(head: Host, *others: Host) -> str:
    """Start a lasting cluster of these hosts; returns the output of ``cluster up``."""
    up = trireme(head, "cluster", "up", f"bind={head.ip}")
    assert up.returncode == 0, up.stdout
    token = head.run(["cat", TOKEN]).stdout
    for host in others:
        give_token(host, token)
        joined = trireme(host, "cluster", "join", f"{head.ip}:{PORT}")
        assert joined.returncode == 0, joined.stdout
    return up.stdout


def living_hosts(host: Host, address: str) -> set[str]:
    """The addresses of the nodes that ``cluster status`` shows."""
    return set(re.findall(r"│ (10\.\S+)", trireme(host, "cluster", "status", address).stdout))


def _hold(spaces: Sequence[str], arguments: Sequence[str]) -> subprocess.Popen:
    """Start the first process of new namespaces; they end with it, and it ends with this process (a pipe to it)."""
    command = ["unshare", *spaces, sys.executable, "-I", "-S", __file__, "hold", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _in(pid: int, command: str) -> None:
    subprocess.run(
        ["nsenter", f"--target={pid}", "--net", "--", *command.split()], check=True, stdin=subprocess.DEVNULL
    )


def _furnish(name: str, shared: Sequence[str]) -> None:
    """Set a new host's name, mount its ``PRIVATE`` folders with ``shared`` in them, and list all hosts' names."""
    subprocess.run(["hostname", name], check=True)
    opened = [os.open(path, os.O_PATH) for path in shared]  # before they are hidden
    for folder in PRIVATE:
        _mount("-t", "tmpfs", "-o", "mode=1777", name, folder)
    for path, fd in zip(shared, opened, strict=True):
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount("--no-canonicalize", "--rbind", f"/proc/self/fd/{fd}", path, pass_fds=[fd])
        os.close(fd)
    Path(HOME).mkdir(mode=0o700)
    table = Path("/run/hosts")
    table.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{n + 1} {letter}\n" for n, letter in enumerate(ascii_lowercase))
    )
    _mount("--bind", str(table), "/etc/hosts")


def _mount(*arguments: str, pass_fds: Sequence[int] = ()) -> None:
    subprocess.run(["mount", "-n", *arguments], check=True, pass_fds=pass_fds)


def _enter(init: int, cwd: str, command: Sequence[str]) -> int:
    """Run a command in the namespaces of ``init`` as a child: setns puts only children into the PID namespace."""
    libc = ctypes.CDLL(None)
    for space in [os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "pid", "mnt")]:
        if libc.setns(space, 0):
            raise OSError(f"no such host any more: {init}")
        os.close(space)
    child = os.fork()
    if child == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # nohup and & hand down that these are ignored
        try:
            os.chdir(cwd)
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
    for number in FORWARDED:
        signal.signal(number, lambda heard, frame: os.kill(child, heard))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # end by the same signal, without a second core dump
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "enter":
        sys.exit(_enter(int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    if sys.argv[2:]:
        _furnish(sys.argv[2], sys.argv[3:])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of a host become its children
    print("ready", flush=True)
    sys.stdin.read()
