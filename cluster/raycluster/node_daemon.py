"""The process that keeps a node of a cluster on this host, and ends it.

    python -m cluster.raycluster.node_daemon ORDER        (started by ``./launch.sh cluster up`` and ``join``)

It stays in the background. A lasting cluster's node lives until ``./launch.sh cluster down``, or until the head is
gone. A node that joined for one job lives as long as the standard input that the job's driver holds open for it through
ssh or srun: so it ends with the driver, however that ends. All that Ray keeps is in one folder of this user's, which
goes with the node.
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
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cluster.host import job_dir, network, resources
from cluster.raycluster import cluster_client, ray_auth, ray_node, versions
from cluster.worker import fork_server_client
from train.config.schema import LONGEST_GRACE_S
from train.errors import ExitCode, UserError
from train.util.io import FileLock
from train.util.reading import UNREADABLE, as_object

LIFELINE_CHECK_S = 0.5
NODE_SAVE_S = LONGEST_GRACE_S + 10.0
"""How long the node of a job that is told to end (a batch system tells everybody) leaves its workers to save, at most:
it ends with the driver, which ends once they have.
"""
REJOIN_LIMIT_S = 1800.0
"""How long a lost head is asked whether it is back."""
REJOIN_RETRY_S = 2.0
CLEANUP_S = 5.0
"""How long the processes of jobs that were here may take to end, once the node has ended."""
LIFELINE = 0
"""Standard input, in the node of one job."""


@dataclass(frozen=True)
class NodeOrder:
    """The node that a daemon is to keep. It is an argument that everybody can read, so it holds no secret."""

    folder: str
    token: str
    """Path of the file that holds it."""
    ip: str
    port: int
    cpus: int
    gpus: int
    address: str | None = None
    """The cluster to join; None: this is the head of a new one."""


class NodeDescription(BaseModel):
    """The keys that a daemon writes about its node into its folder; others are kept."""

    model_config = ConfigDict(extra="allow")
    pid: Annotated[int, Field(gt=0)]
    address: str
    head: bool
    node: str
    host: str
    ip: str
    cpus: int
    gpus: int


def lasting_folder() -> Path:
    """This user's folder of the lasting cluster's node on this host."""
    return job_dir.temp_root() / f"{job_dir.PREFIX}cluster-{os.getuid()}"


def read_living_node(folder: Path) -> dict[str, Any] | None:
    """The description of the node in ``folder`` that its daemon wrote; None where no daemon lives.

    Keys: "pid" (of the daemon), "address" (of the cluster), "ip", "head", "node" (its id), "since", "host", "cpus",
    "gpus".
    """
    with (
        contextlib.suppress(*UNREADABLE),
        contextlib.closing(FileLock(folder / "node.json", create=False)) as lock,
    ):
        if folder.lstat().st_uid != os.getuid():
            return None  # anybody can make a folder of that name in /tmp, and be sent our token
        if not lock.acquire(wait=False):  # the daemon holds the lock for as long as it lives, so the pid is right
            return NodeDescription.model_validate_json(lock.file.read()).model_dump()
    return None


def end_node(folder: Path, patience_s: float = 10.0) -> None:
    """Ends the node in ``folder`` with all that runs on it, and removes what a crash may have left of it."""
    node = read_living_node(folder)
    if node is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node["pid"], signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while read_living_node(folder) is not None:
            if time.monotonic() > deadline:
                os.kill(node["pid"], signal.SIGKILL)  # the kernel ends Ray's processes with it
            time.sleep(0.05)
    if folder.exists():
        job_dir.end_job(str(folder))


class NodeDaemon:
    """Starts one node, waits until it is to end, and ends it."""

    def __init__(self, order: NodeOrder, lifeline: bool) -> None:
        """``lifeline``: the node is of one job and ends with the standard input of this process."""
        self.order = order
        self.folder = Path(order.folder)
        self.lifeline = lifeline
        self.told_to_end = False
        self.lock: FileLock | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.told_to_end = True

    def start_node(self) -> dict[str, Any]:
        """Starts the node, and returns its description (see ``read_living_node``). UserError where it is refused."""
        order = self.order
        job_dir.mark_in_use(self.folder)
        spec = ray_node.NodeSpec(order.ip, self.folder, Path(order.token), order.cpus, order.gpus, order.port)
        if order.address is None:
            self.node = ray_node.start_head(spec)
            cluster_client.publish_versions(self.node.address, versions.local_versions())
        else:
            ray_auth.authenticate(spec.token, order.address)
            versions.check_versions(cluster_client.published_versions(order.address), order.address)
            self.node = ray_node.start_member(spec, order.address)
        description = {
            "pid": os.getpid(),
            "address": self.node.address,
            "ip": order.ip,
            "head": order.address is None,
            "node": self.node.node_id,
            "since": time.time(),
            "host": socket.gethostname(),
            "cpus": order.cpus,
            "gpus": order.gpus,
        }
        self.lock = FileLock(self.folder / "node.json")
        self.lock.acquire()
        self.lock.write(json.dumps(description))
        return description

    def wait_for_end(self) -> None:
        """Returns when the node is to end, or has ended."""
        give_up = None
        while not self._driver_is_gone():
            if not self.lifeline and (self.told_to_end or self.node.lost()):
                return
            if self.lifeline and give_up is None and (self.told_to_end or self.node.lost()):
                # The workers belong to the fork server, not to Ray: they do what they were told, which may be to save.
                give_up = time.monotonic() + (NODE_SAVE_S if self.told_to_end else 0.0)
            if give_up is not None and time.monotonic() > give_up:
                return

    def rejoin(self, address: str) -> bool:
        """Whether the node could join the cluster at ``address`` again, after the network between them was lost.

        The head is asked for a while. A host that answers, but on which no head does, means that the cluster is gone.
        """
        self.node.end()
        if self.lock is not None:
            self.lock.close()
        deadline = time.monotonic() + REJOIN_LIMIT_S
        while not self.told_to_end and time.monotonic() < deadline and not network.refuses_connections(address):
            with contextlib.suppress(UserError):
                if cluster_client.published_versions(address).get("down"):
                    return False
                self.start_node()
                return True
            time.sleep(REJOIN_RETRY_S)
        return False

    def _driver_is_gone(self) -> bool:
        """Whether the driver whose job this node serves has ended. Takes a moment to find out."""
        if not self.lifeline:
            time.sleep(LIFELINE_CHECK_S)
            return False
        ready, _, _ = select.select([LIFELINE], [], [], LIFELINE_CHECK_S)
        return bool(ready) and not os.read(LIFELINE, 4096)

    def end(self) -> None:
        """Ends the node, and removes its folder and those of the jobs that were here."""
        if hasattr(self, "node"):
            self.node.end()
        job_dir.end_job(str(self.folder))
        job_dir.remove_unused_folders(CLEANUP_S)  # of the jobs that were here


def main() -> int:
    """Starts a node, prints one line of JSON, its description or {"error"}, and keeps the node in the background."""
    daemon = None
    try:
        order = from_argument(sys.argv[1])
        daemon = NodeDaemon(order, lifeline=False)
        print_message(daemon.start_node())
        with (daemon.folder / "node.log").open("a", encoding="utf-8") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        daemon.wait_for_end()
        while not daemon.told_to_end and order.address is not None and daemon.rejoin(order.address):
            daemon.wait_for_end()
    except UserError as error:
        print_message({"error": str(error)})
        return ExitCode.BAD_INPUT
    finally:
        if daemon is not None:
            daemon.end()
    return ExitCode.OK


def serve_job(address: str, job: str, device: str, target: str) -> int:
    """Keeps this host's node for one job, in the foreground; prints the same line as ``main``.

    The token is the first line of standard input, which the job's driver then holds open. The fork server starts at
    once, beside Ray, and belongs to this process: it keeps the workers when a signal to everybody ends Ray here.
    """
    folder = job_dir.temp_root() / job
    if read_living_node(folder) is not None:
        end_node(folder, patience_s=0.0)  # the network was lost and is back, and that node's driver connection is gone
    daemon = None
    fork_server = None
    try:
        job_dir.own_folder(job)
        ray_auth.write_token(folder / "token", sys.stdin.readline().strip())
        gpus = resources.count_gpus()
        fork_server = fork_server_client.ForkServerProcess(folder, target)
        fork_server.set_device(("gpu" if gpus else "cpu") if device == "auto" else device)
        order = NodeOrder(
            str(folder),
            str(folder / "token"),
            network.address_towards(address),
            0,
            resources.count_cpus(),
            gpus,
            address,
        )
        daemon = NodeDaemon(order, lifeline=True)
        print_message(daemon.start_node())
        daemon.wait_for_end()
    except UserError as error:
        print_message({"error": str(error), "host": socket.gethostname()})
        return ExitCode.BAD_INPUT
    finally:
        if fork_server is not None:
            fork_server.close()
        daemon.end() if daemon is not None else job_dir.end_job(str(folder))
    return ExitCode.OK


def local_node() -> dict[str, Any]:
    """The lasting cluster's node that is up on this host (see ``read_living_node``), or UserError."""
    node = read_living_node(lasting_folder())
    if node is None:
        raise UserError("no cluster is up on this host: ./launch.sh cluster up, or ./launch.sh cluster join ADDRESS")
    return node


def print_message(message: dict[str, Any]) -> None:
    """Prints one line of JSON for whoever started this process."""
    print(json.dumps(message), flush=True)


def parse_message(line: str) -> dict[str, Any] | None:
    """The message in a line that a node printed; None for another line, as a shell's start-up files print."""
    with contextlib.suppress(*UNREADABLE):
        return as_object(json.loads(line))
    return None


def to_argument(order: NodeOrder) -> str:
    """The order as the command-line argument that ``main`` reads."""
    return json.dumps(asdict(order))


def from_argument(text: str) -> NodeOrder:
    """The order that ``to_argument`` wrote. Raises UserError for anything else."""
    try:
        return TypeAdapter(NodeOrder).validate_json(text, strict=True)
    except ValueError:
        raise UserError("this is no order for a node: `./launch.sh cluster up` and `join` start one") from None


def make_node_folder(folder: Path) -> Path:
    """Makes the private and empty folder of a new node, after ending what an earlier one left there."""
    if folder.exists():
        job_dir.end_job(str(folder))
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UserError(f"{folder} is not this user's: have it removed") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
