"""The process that keeps a node of a cluster on this host, and ends it.

    python -m cluster.raycluster.node_daemon ORDER        (started by ``./launch.sh cluster up`` and ``join``, and left behind)

A lasting cluster's node lives until ``./launch.sh cluster down``, or until the head is gone. A node that joined for one job lives
as long as the standard input that the job's driver holds open for it, through ssh or srun: so it ends with the driver, however
that ends. All that Ray keeps is in one folder of this user's, which goes with the node.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.host import job_dir, network, resources
from cluster.raycluster import ray_auth as token
from cluster.raycluster import ray_node, versions
from cluster.worker import fork_server_client
from train.errors import ExitCode, UserError
from train.util.io import FileLock

LIFELINE_CHECK_S = 0.5
NODE_SAVE_S = 70.0
"""How long a job's node that was told to end (a batch system tells everybody) leaves its trainers to save."""
BACK_S = 1800.0
"""How long a lost head is asked whether it is back."""
AGAIN_S = 2.0
SWEEP_S = 5.0
"""How long the processes of jobs that were here may take to end, once the node has."""
LIFELINE = 0
"""Standard input, in the node of one job."""


@dataclass(frozen=True)
class NodeOrder:
    """What node to keep."""

    folder: str
    token: str
    ip: str
    port: int
    cpus: int
    gpus: int
    address: str | None = None
    """The cluster to join; None: this is the head of a new one."""


def lasting_folder() -> Path:
    """This user's folder of the lasting cluster's node on this host."""
    return job_dir.temp_root() / f"{job_dir.PREFIX}cluster-{os.getuid()}"


def living(folder: Path) -> dict[str, Any] | None:
    """What the node in ``folder`` says of itself: {"pid", "address", "ip", "head", "node", "since"}; None where none lives."""
    with (
        contextlib.suppress(OSError, ValueError),
        contextlib.closing(FileLock(folder / "node.json", create=False)) as lock,
    ):
        if folder.lstat().st_uid != os.getuid():
            return None  # anybody can make a folder of that name in /tmp, and be sent our token
        if not lock.acquire(wait=False):  # its keeper holds it as long as it lives, so the pid is right
            return dict(json.loads(lock.file.read()))
    return None


def end(folder: Path, patience_s: float = 10.0) -> bool:
    """Ends the node in ``folder`` with all that runs on it; whether there was one."""
    found = living(folder)
    if found is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found["pid"], signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while living(folder) is not None:
            if time.monotonic() > deadline:
                os.kill(found["pid"], signal.SIGKILL)  # the kernel ends Ray's processes with it
            time.sleep(0.05)
    if folder.exists():
        job_dir.end_job(str(folder))
    return found is not None


class NodeDaemon:
    """Keeps one node."""

    def __init__(self, order: NodeOrder, lifeline: bool) -> None:
        self.order = order
        self.folder = Path(order.folder)
        self.lifeline = lifeline
        self.told = False
        self.lock: FileLock | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._tell)

    def _tell(self, number: int, frame: object) -> None:
        self.told = True

    def start(self) -> dict[str, Any]:
        """Starts the node, and returns what it is (see ``living``). UserError where the cluster does not take it."""
        order = self.order
        job_dir.mark_in_use(self.folder)
        start = ray_node.NodeSpec(order.ip, self.folder, Path(order.token), order.cpus, order.gpus, order.port)
        if order.address is None:
            self.node = ray_node.start_head(start)
            ray_node.publish(self.node.address, versions.here())
        else:
            ray_node.authenticate(start.token, order.address)
            versions.compare(ray_node.published(order.address), order.address)
            self.node = ray_node.start_member(start, order.address)
        about = {
            "pid": os.getpid(),
            "address": self.node.address,
            "ip": order.ip,
            "head": order.address is None,
            "node": self.node.node_id,
        }
        about |= {"since": time.time(), "host": socket.gethostname(), "cpus": order.cpus, "gpus": order.gpus}
        self.lock = FileLock(self.folder / "node.json")
        self.lock.acquire()
        self.lock.write(json.dumps(about))
        return about

    def keep(self) -> None:
        """Returns when the node is to end, or has ended."""
        give_up = None
        while not self._forsaken():
            if not self.lifeline and (self.told or self.node.lost()):
                return
            if self.lifeline and give_up is None and (self.told or self.node.lost()):
                # The trainers are held by the warm process, not by Ray: what they were told, they do.
                give_up = time.monotonic() + (NODE_SAVE_S if self.told else 0.0)
            if give_up is not None and time.monotonic() > give_up:
                return

    def back(self, address: str) -> bool:
        """Whether the cluster has taken this host back, after the network between them was lost. The head is asked for a while;
        one whose host answers, but which does not, is gone.
        """
        self.node.end()
        if self.lock is not None:
            self.lock.close()
        deadline = time.monotonic() + BACK_S
        while not self.told and time.monotonic() < deadline and not network.refuses_connections(address):
            with contextlib.suppress(UserError):
                if ray_node.published(address).get("down"):
                    return False
                self.start()
                return True
            time.sleep(AGAIN_S)
        return False

    def _forsaken(self) -> bool:
        """Whether the driver that this node is for has gone. Waits a moment for that."""
        if not self.lifeline:
            time.sleep(LIFELINE_CHECK_S)
            return False
        ready, _, _ = select.select([LIFELINE], [], [], LIFELINE_CHECK_S)
        return bool(ready) and not os.read(LIFELINE, 4096)

    def end(self) -> None:
        """Ends the node and what is left of it."""
        if hasattr(self, "node"):
            self.node.end()
        job_dir.end_job(str(self.folder))
        job_dir.remove_unused_folders(SWEEP_S)  # of the jobs that were here


def main() -> int:
    """Starts the node, says so in one line on standard output, {"address", ...} or {"error"}, and keeps it, in the background."""
    order = NodeOrder(**json.loads(sys.argv[1]))
    keeper = NodeDaemon(order, lifeline=False)
    try:
        say(keeper.start())
        with (keeper.folder / "node.log").open("a") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        keeper.keep()
        while not keeper.told and order.address is not None and keeper.back(order.address):
            keeper.keep()
    except UserError as error:
        say({"error": str(error)})
        return ExitCode.BAD_INPUT
    finally:
        keeper.end()
    return ExitCode.OK


def serve_job(address: str, job: str, device: str, target: str) -> int:
    """This host's node for one job, in the foreground: its token comes as the first line of standard input, which the job's driver
    then holds open. Says the same line as ``main``.

    The warm process starts at once, beside Ray, and is ours: it holds the trainers when a signal to everybody ends Ray here.
    """
    folder = job_dir.temp_root() / job
    if living(folder) is not None:
        end(folder, patience_s=0.0)  # the network was lost and is back; who held that node is gone
    keeper = None
    warm = None
    try:
        job_dir.own_folder(job)
        token.write(folder / "token", sys.stdin.readline().strip())
        gpus = resources.count_gpus()
        warm = fork_server_client.ForkServerProcess(folder, target)
        warm.set_device(("gpu" if gpus else "cpu") if device == "auto" else device)
        order = NodeOrder(
            str(folder),
            str(folder / "token"),
            network.address_towards(address),
            0,
            resources.count_cpus(),
            gpus,
            address,
        )
        keeper = NodeDaemon(order, lifeline=True)
        say(keeper.start())
        keeper.keep()
    except UserError as error:
        say({"error": str(error), "host": socket.gethostname()})
        return ExitCode.BAD_INPUT
    finally:
        if warm is not None:
            warm.close()
        keeper.end() if keeper is not None else job_dir.end_job(str(folder))
    return ExitCode.OK


def local() -> dict[str, Any]:
    """The lasting cluster's node that is up on this host (see ``living``), or UserError."""
    found = living(lasting_folder())
    if found is None:
        raise UserError("no cluster is up on this host: ./launch.sh cluster up, or ./launch.sh cluster join ADDRESS")
    return found


def say(message: dict[str, Any]) -> None:
    """One line for whoever started this process."""
    print(json.dumps(message), flush=True)


def order_line(order: NodeOrder) -> str:
    """The argument that ``main`` takes. There is no secret in it."""
    return json.dumps(asdict(order))


def fresh(folder: Path) -> Path:
    """The folder for a new node, private and empty."""
    if folder.exists():
        job_dir.end_job(str(folder))
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UserError(f"{folder} is not this user's: have it removed") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
