"""A job's nodes on other hosts: one command a host over ssh, or one srun for all hosts of SLURM.

Each command runs ``./launch.sh cluster join`` there and lives as long as the node. The job's token goes through its
standard input, which stays open: it closes when the driver ends, however that happens, and then the nodes end.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.host import job_dir
from cluster.raycluster import node_daemon
from train.config.schema import ClusterConfig
from train.errors import UserError
from train.util.reading import read_text

SSH = (
    "ssh",
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
"""Asks no questions, and gives up a host that is cut off after 15 s."""
REPEAT_S = 10.0
"""After the end of a host's command, how long until the host is asked to join again."""
CLOSE_S = 10.0
OUTPUT_LINES = 5
"""Last lines of a failed command's output that are shown."""


@dataclass(frozen=True)
class RemoteCommand:
    """A command on this host that starts ``nodes`` nodes on others and keeps them alive."""

    name: str
    argv: list[str]
    nodes: int
    repeat: bool
    """Whether to run it again when it has ended: the host may be back."""


def read_hosts(named: Sequence[str] | str) -> list[str]:
    """The host names of ``cluster.hosts``: a list, or the path of a file with one name a line."""
    if not isinstance(named, str):
        return list(named)
    cure = f"cluster.hosts={named} is no file of host names: write one name a line, or say cluster.hosts=[a,b]"
    lines = read_text(Path(named), cure).splitlines()
    names = [line.partition("#")[0].strip() for line in lines]
    if not any(names):
        raise UserError(f"cluster.hosts={named} names no host: write one a line")
    return [name for name in names if name]


def ssh_address(name: str) -> str:
    """The name or address that ssh connects to for ``name``, which its configuration may define."""
    try:
        command = ["ssh", "-G", "--", name]
        output = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10).stdout
    except subprocess.TimeoutExpired:
        raise UserError(f"`ssh -G {name}` does not answer: look at ~/.ssh/config, or give addresses") from None
    except FileNotFoundError:
        raise UserError("cluster.hosts needs the command ssh, and there is none here: install openssh-client") from None
    settings = dict(line.split(" ", 1) for line in output.splitlines() if " " in line)
    return settings.get("hostname", name)


def ssh_commands(hosts: Sequence[str], join: Sequence[str], folder: str) -> list[RemoteCommand]:
    """One command a host, which runs ``./launch.sh`` with the arguments ``join`` in ``folder``, the repository."""
    passed = [f"{key}={os.environ[key]}" for key in ("TRIREME_VENV",) if key in os.environ]
    line = f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *passed, './launch.sh', *join])}"
    remote = f"exec sh -c {shlex.quote(line)}"
    return [RemoteCommand(host, [*SSH, "--", host, remote], 1, repeat=True) for host in hosts]


def srun_commands(hosts: Sequence[str], join: Sequence[str], folder: str) -> list[RemoteCommand]:
    """The one command that runs ``./launch.sh`` with the arguments ``join`` on each of ``hosts``, nodes of SLURM."""
    number = str(len(hosts))
    srun = ["srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}"]
    srun += ["--overlap", "--mem=0", "--cpu-bind=none", "--kill-on-bad-exit=0", "--unbuffered", "--job-name=trireme"]
    return [RemoteCommand("srun", [*srun, f"{folder}/launch.sh", *join], len(hosts), repeat=False)]


def other_slurm_nodes(environment: dict[str, str]) -> list[str]:
    """The other nodes of the SLURM allocation that this process is in; none where it is in none."""
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"SLURM_JOB_NODELIST={nodes}, but `scontrol show hostnames` does not say which hosts that is: {error}"
        ) from error
    names = shown.stdout.split()
    mine = environment.get("SLURMD_NODENAME")
    if mine not in names:
        raise UserError(
            f"this host is not one of the SLURM allocation's ({nodes}): submit with `sbatch launch.sh train ...`, "
            "or say `srun --nodes=1 --ntasks=1 --overlap ./launch.sh train ...` in it; "
            "cluster.start=here stays on this host"
        )
    return [name for name in names if name != mine]


def other_hosts(cluster: ClusterConfig) -> tuple[str, list[str]]:
    """How other hosts are reached, "ssh" or "slurm", and their names; none where the job stays on this host."""
    if cluster.start == "here":
        return "", []
    if cluster.hosts or cluster.start == "ssh":
        if not cluster.hosts:
            raise UserError("cluster.start=ssh needs cluster.hosts=[a,b], or a file that names one host a line")
        return "ssh", read_hosts(cluster.hosts)
    names = other_slurm_nodes(dict(os.environ))
    if cluster.start == "slurm" and not os.environ.get("SLURM_JOB_NODELIST"):
        raise UserError("cluster.start=slurm, but this is no SLURM job: submit it with `sbatch launch.sh train ...`")
    return "slurm", names


class RemoteNodes:
    """The nodes on other hosts, as the running commands that keep them; they end with this process or by ``close``."""

    def __init__(self, commands: Sequence[RemoteCommand], token: str, folder: Path) -> None:
        self.commands = commands
        self.token = token
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.messages: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        """(name of a command, line that a node printed or {"error", "code"} at its end)."""
        self.closing = False
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != job_dir.JOB_ENV}
        for command in commands:
            threading.Thread(target=self._run_repeatedly, args=(command, environment), daemon=True).start()

    def wait_until_joined(self, seconds: float) -> None:
        """Returns when every node has joined. UserError names each that has not within ``seconds``, and why."""
        missing = {command.name: command.nodes for command in self.commands}
        problems: list[str] = []
        deadline = time.monotonic() + seconds
        while missing:
            try:
                name, message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                late = f"has not joined within cluster.start_timeout={seconds:.0f} s"
                problems += [f"{name}: {late}{self._last_output(name)}" for name in missing]
                break
            if name not in missing:
                continue
            if "error" in message:
                problems.append(f"{message.get('host', name)}: {message['error']}")
            missing[name] -= 1
            if not missing[name] or "code" in message:
                del missing[name]
        if problems:
            lines = "\n".join(f"  {line}" for line in problems)
            raise UserError(f"the other hosts could not all join the job:\n{lines}")

    def close(self) -> None:
        """Ends the nodes, and waits until they have ended."""
        self.closing = True
        for process in self.processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        deadline = time.monotonic() + CLOSE_S
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _run_repeatedly(self, command: RemoteCommand, environment: dict[str, str]) -> None:
        """Runs one command in a thread of its own, again and again where it is to be repeated."""
        while not self.closing:
            code = self._run(command, environment)
            error = f"ended with code {code}{self._last_output(command.name)}"
            self.messages.put((command.name, {"error": error, "code": code}))
            if not command.repeat:
                return
            time.sleep(REPEAT_S)

    def _run(self, command: RemoteCommand, environment: dict[str, str]) -> int:
        with self._log(command.name).open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )
        self.processes[command.name] = process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(self.token + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if (message := node_daemon.parse_message(line)) is not None:
                self.messages.put((command.name, message))
        return process.wait()

    def _log(self, name: str) -> Path:
        return self.folder / f"host_{name.replace('/', '_')}.log"

    def _last_output(self, name: str) -> str:
        """The last lines of a command's errors, to be appended to a sentence; empty where there are none."""
        with contextlib.suppress(OSError):
            lines = [line for line in self._log(name).read_text("utf-8", errors="replace").splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith("+ ")][-OUTPUT_LINES:]
            return ": " + " / ".join(lines) if lines else ""
        return ""
