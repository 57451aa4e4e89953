"""A job's nodes on other hosts: one command a host over ssh, or one srun for all in a SLURM allocation.

Each command runs ``./launch.sh cluster join`` there and lives as long as the node. The job's token goes through its standard
input, which stays open: when the driver ends, however that comes, it closes, and the nodes end.
"""

from __future__ import annotations

import contextlib
import json
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
from train.config.schema import ClusterConfig
from train.errors import UserError

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
"""No questions asked; a host that is cut off is given up after 15 s."""
AGAIN_S = 10.0
"""How long after its end a host is asked to join again."""
CLOSE_S = 10.0
WORDS = 5
"""Last lines of what a command said, shown where it failed."""


@dataclass(frozen=True)
class RemoteCommand:
    """What starts ``nodes`` nodes, and keeps them."""

    name: str
    words: list[str]
    nodes: int
    again: bool
    """Whether to say it again when it has ended: the host may be back."""


def hosts(named: Sequence[str] | str) -> list[str]:
    """The names of ``cluster.hosts``: as listed, or one a line of a file."""
    if not isinstance(named, str):
        return list(named)
    try:
        lines = Path(named).read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"cluster.hosts={named} is no file of host names ({error.strerror}): write one name a line, or say cluster.hosts=[a,b]"
        ) from error
    found = [line.partition("#")[0].strip() for line in lines]
    if not any(found):
        raise UserError(f"cluster.hosts={named} names no host: write one a line")
    return [name for name in found if name]


def ssh_address(name: str) -> str:
    """The name or address that ssh connects to for ``name``, which its configuration may say."""
    try:
        shown = subprocess.run(["ssh", "-G", "--", name], capture_output=True, text=True, timeout=10).stdout
    except FileNotFoundError:
        raise UserError("cluster.hosts needs the command ssh, and there is none here: install openssh-client") from None
    settings = dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
    return settings.get("hostname", name)


def over_ssh(names: Sequence[str], join: Sequence[str], folder: str) -> list[RemoteCommand]:
    """The commands that have each of ``names`` join; ``folder``: the repository there."""
    kept = [f"{key}={os.environ[key]}" for key in ("TRIREME_VENV",) if key in os.environ]
    line = f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *kept, './launch.sh', *join])}"
    return [RemoteCommand(name, [*SSH, "--", name, f"exec sh -c {shlex.quote(line)}"], 1, again=True) for name in names]


def over_srun(names: Sequence[str], join: Sequence[str], folder: str) -> list[RemoteCommand]:
    """The command that has ``names``, the other nodes of a SLURM allocation, join."""
    number = str(len(names))
    srun = ["srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", f"--nodelist={','.join(names)}"]
    srun += ["--overlap", "--mem=0", "--cpu-bind=none", "--kill-on-bad-exit=0", "--unbuffered", "--job-name=trireme"]
    return [RemoteCommand("srun", [*srun, f"{folder}/launch.sh", *join], len(names), again=False)]


def slurm_others(environment: dict[str, str]) -> list[str]:
    """The other nodes of the SLURM allocation that this process is in; none where it is in none."""
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"SLURM_JOB_NODELIST={nodes}, but `scontrol show hostnames` does not say which hosts that is: {error}"
        ) from error
    names = shown.stdout.split()
    mine = environment.get("SLURMD_NODENAME")
    if mine not in names:
        raise UserError(
            f"this host is not one of the SLURM allocation's ({nodes}): submit with `sbatch launch.sh train ...`, or say "
            "`srun --nodes=1 --ntasks=1 --overlap ./launch.sh train ...` in it; cluster.start=here stays on this host"
        )
    return [name for name in names if name != mine]


def others(cluster: ClusterConfig) -> tuple[str, list[str]]:
    """("ssh" or "slurm", the other hosts that the job's cluster is to have); none: it is this host alone."""
    if cluster.start == "here":
        return "", []
    if cluster.hosts or cluster.start == "ssh":
        if not cluster.hosts:
            raise UserError("cluster.start=ssh needs cluster.hosts=[a,b], or a file that names one host a line")
        return "ssh", hosts(cluster.hosts)
    names = slurm_others(dict(os.environ))
    if cluster.start == "slurm" and not os.environ.get("SLURM_JOB_NODELIST"):
        raise UserError("cluster.start=slurm, but this is no SLURM job: submit it with `sbatch launch.sh train ...`")
    return "slurm", names


class RemoteNodes:
    """The running commands. They end with this process, or by ``close``."""

    def __init__(self, commands: Sequence[RemoteCommand], secret: str, folder: Path) -> None:
        self.commands = commands
        self.secret = secret
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.said: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self.closing = False
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != job_dir.JOB_ENV}
        for command in commands:
            threading.Thread(target=self._keep, args=(command, kept), daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Returns when every node has joined; UserError names each that has not, and why."""
        missing = {command.name: command.nodes for command in self.commands}
        failed: list[str] = []
        deadline = time.monotonic() + seconds
        while missing:
            try:
                name, said = self.said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                failed += [
                    f"{name}: has not joined within cluster.start_timeout={seconds:.0f} s{self._words(name)}"
                    for name in missing
                ]
                break
            if name not in missing:
                continue
            if "error" in said:
                failed.append(f"{said.get('host', name)}: {said['error']}")
            missing[name] -= 1
            if not missing[name] or "code" in said:
                del missing[name]
        if failed:
            raise UserError("the other hosts could not all join the job:\n" + "\n".join(f"  {line}" for line in failed))

    def close(self) -> None:
        """Ends the nodes, and waits until they have."""
        self.closing = True
        for process in self.processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        deadline = time.monotonic() + CLOSE_S
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _keep(self, command: RemoteCommand, environment: dict[str, str]) -> None:
        """One command, again and again if that is asked for. Runs in a thread of its own."""
        while not self.closing:
            code = self._run(command, environment)
            self.said.put((command.name, {"error": f"ended with code {code}{self._words(command.name)}", "code": code}))
            if not command.again:
                return
            time.sleep(AGAIN_S)

    def _run(self, command: RemoteCommand, environment: dict[str, str]) -> int:
        with self._log(command.name).open("w") as log:
            process = subprocess.Popen(
                command.words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C on the terminal is the driver's to handle
            )
        self.processes[command.name] = process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.write(self.secret + "\n")
            process.stdin.flush()
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # what a shell's start-up files print
                said = json.loads(line)
                if isinstance(said, dict):
                    self.said.put((command.name, said))
        return process.wait()

    def _log(self, name: str) -> Path:
        return self.folder / f"host_{name.replace('/', '_')}.log"

    def _words(self, name: str) -> str:
        """The last words of a command, as an addition to a sentence."""
        with contextlib.suppress(OSError):
            lines = [line for line in self._log(name).read_text(errors="replace").splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith("+ ")][-WORDS:]
            return ": " + " / ".join(lines) if lines else ""
        return ""
