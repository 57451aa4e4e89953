"""Real hosts for tests, on one machine: each with its own address, name, processes, /tmp, /run and /dev/shm, joined by a switch.

    with hosts(3, shared=tmp_path) as [a, b, c]:
        a.run(["ss", "-ltn"])
        b.cut_off()

They are namespaces of the kernel. What they share is the rest of the file system, and ``shared``: the storage that every host of
a real cluster sees. They know each other by name. Namespaces themselves have no names and end with us, so nothing is left behind
and any number of tests may run at once. Needs root, iproute2 and util-linux; ``WHY_NOT`` says what is missing.
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
HOME = "/tmp/home"
TOKEN = f"{HOME}/.ray/auth_token"
PORT = 6379
"""Where `cluster up` listens."""
TOOLS = ("ip", "nsenter", "unshare", "mount", "hostname")
PROBE = "ip link add one type veth peer name two && ip link add three type bridge"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FOREIGN = ("RAY_", "TRIREME_", "SLURM_", "TMP")
"""Environment variables that say something of the machine that the tests run on."""


def why_not() -> str:
    """What keeps this machine from having hosts, in words; empty if nothing does."""
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
    """One of the hosts. Commands on it see its processes, its address and its /tmp only; its user's home is ``HOME``."""

    def __init__(self, name: str, ip: str, cores: set[int], switch: subprocess.Popen, shared: Sequence[str]) -> None:
        self.name, self.ip, self.cores, self.switch, self.shared = name, ip, cores, switch, shared
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        """Makes it, or makes it anew after ``kill``: with an empty /tmp and the same address."""
        self.boots += 1
        self.plug = f"to_{self.name}_{self.boots}"
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self.holder = _hold(spaces, [self.name, *self.shared])
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.init = int(children.read_text())
        address = "02:00:" + ":".join(
            f"{int(part):02x}" for part in self.ip.split(".")
        )  # others remember it over a boot
        _in(self.switch.pid, f"ip link add {self.plug} type veth peer name eth0 address {address} netns {self.init}")
        _in(self.switch.pid, f"ip link set {self.plug} up")
        for words in (f"addr add {self.ip}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _in(self.init, f"ip {words}")
        self.reconnect()

    def cut_off(self) -> None:
        """Takes the host off the network without a sound: what it sends, and what is sent to it, is lost."""
        _in(self.switch.pid, f"ip link set {self.plug} nomaster")

    def reconnect(self) -> None:
        """Puts it back."""
        _in(self.switch.pid, f"ip link set {self.plug} master bridge")

    def kill(self) -> None:
        """As if the power went: all its processes at once, and not even a goodbye gets out."""
        self.cut_off()
        self.holder.kill()
        self.holder.wait()

    def pids(self) -> list[int]:
        """Every living process on this host but the first, as this machine numbers them."""
        found, space = [], Path(f"/proc/{self.init}/ns/pid").readlink()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
                if (place / "ns/pid").readlink() == space and state != "Z" and int(place.name) != self.init:
                    found.append(int(place.name))
        return found

    def start(
        self, command: Sequence[Any], env: dict[str, str] | None = None, cwd: Any = "/tmp", **options: Any
    ) -> subprocess.Popen:
        """Starts a command on this host. The signals that end a program are passed on to it, and SIGKILL ends it too."""
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
        """Runs a command on this host to its end; ``.stdout`` has what it wrote, stderr included."""
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
    paths = sorted(
        {str(p) for p in (shared, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)) if p.is_relative_to("/tmp")}
    )
    there = sorted(os.sched_getaffinity(0))
    made: list[Host] = []
    switch = _hold(("--net",), [])
    try:
        _in(switch.pid, "ip link add bridge type bridge")
        _in(switch.pid, "ip link set bridge up")
        for n in range(number):
            mine = {there[(n * cores + k) % len(there)] for k in range(cores)}
            made.append(Host(ascii_lowercase[n], f"{NETWORK}.{n + 1}", mine, switch, paths))
        yield made
    finally:
        for holder in (*(host.holder for host in made), switch):
            holder.kill()
            holder.wait()


def trireme(host: Host, *arguments: Any, timeout: float = 240, **options: Any) -> subprocess.CompletedProcess:
    """``./launch.sh ...`` on a host, without its setup."""
    return host.run([sys.executable, "-m", "cluster", *arguments], timeout=timeout, **options)


def give_token(host: Host, token: str) -> None:
    """Puts a token where a host's user has it."""
    host.run(["sh", "-c", f"mkdir -p ~/.ray && umask 077 && printf %s {token} > {TOKEN}"])


def form_cluster(head: Host, *others: Host) -> str:
    """A lasting cluster of these hosts; what ``cluster up`` said."""
    said = trireme(head, "cluster", "up", f"bind={head.ip}")
    assert said.returncode == 0, said.stdout
    token = head.run(["cat", TOKEN]).stdout
    for host in others:
        give_token(host, token)
        joined = trireme(host, "cluster", "join", f"{head.ip}:{PORT}")
        assert joined.returncode == 0, joined.stdout
    return said.stdout


def living_hosts(host: Host, address: str) -> set[str]:
    """The addresses of the nodes that ``cluster status`` shows."""
    return set(re.findall(r"│ (10\.\S+)", trireme(host, "cluster", "status", address).stdout))


def _hold(spaces: Sequence[str], arguments: Sequence[str]) -> subprocess.Popen:
    """The first process of new namespaces. They end with it, and it ends with us, by its standard input at the latest."""
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
    """A new host's name, what it alone sees, in /tmp what is shared there, and the names of the others."""
    subprocess.run(["hostname", name], check=True)
    _mount("-t", "tmpfs", "stash", "/mnt")
    for number, path in enumerate(shared):
        Path(f"/mnt/{number}").mkdir()
        _mount("--bind", path, f"/mnt/{number}")
    for place in ("/tmp", "/run", "/dev/shm"):
        _mount("-t", "tmpfs", "-o", "mode=1777", name, place)
    for number, path in enumerate(shared):
        Path(path).mkdir(parents=True)
        _mount("--bind", f"/mnt/{number}", path)
    Path(HOME).mkdir(mode=0o700)
    known = Path("/run/hosts")
    known.write_text(
        "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{n + 1} {letter}\n" for n, letter in enumerate(ascii_lowercase))
    )
    _mount("--bind", str(known), "/etc/hosts")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", "-n", *arguments], check=True)


def _enter(init: int, cwd: str, command: Sequence[str]) -> int:
    """Runs a command in the namespaces of ``init``, as its parent: it is the child that is in the new space of processes."""
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
    if code < 0:  # to end as it ended, without a second core dump
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1] == "enter":
        sys.exit(_enter(int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
    if sys.argv[2:]:
        _furnish(sys.argv[2], sys.argv[3:])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the first process of a host is everybody's heir
    print("ready", flush=True)
    sys.stdin.read()
