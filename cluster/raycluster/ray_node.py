"""Ray's own processes: the nodes that we start, lean and with a token, and the way onto a cluster that exists.

``ray.init`` and ``ray start`` also start a dashboard, an autoscaler's monitor and a log forwarder, wait for them, and rewrite
a loopback address to the machine's public one. A job needs none of that: the same ``Node`` that they make is made here
without them, which halves the time. It listens where it is told to, and answers nobody without the token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.node
import ray._private.parameter
import ray._private.services
import ray._private.state
import ray._private.utils
import ray._private.worker
from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationTokenLoader,
    Config,
    GcsClient,
)

from cluster.raycluster import ray_auth as token
from cluster.raycluster.placement import Node
from train.errors import UserError

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20
"""Nothing travels through the object store but a few KiB of news; this is about the least Ray takes."""
RAYLET_S = 120.0
"""A start takes a second; on a host with ten times the work of its cores, a minute."""
ANSWER_S = 5.0
ABOUT = b"trireme"
"""Where the head keeps what it runs, for those who join: a JSON object, in the namespace of the same name."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The raylet looks for its own object store, misses it by a millisecond, and would sleep a second.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
    # Ray's own is 15: the trainers, which are forked below its workers, would give way to everything else on the host.
    "RAY_worker_niceness": "0",
    # A host that is cut off is missed after some 15 s, and not after a minute; a busy one has time to answer.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
}
"""What every process of a cluster of ours reads."""
AGENTS = {ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT}
AGENTS_NICENESS = 5
"""They start beside our warm process, whose imports everybody waits for; nobody waits for them. But the raylet ends where they take
more than 15 s, so on a busy host they do not give way."""


class LeanNode(ray._private.node.Node):
    """A node without the API server, which only shows things, and without half seconds slept through."""

    def start_api_server(self, **options: Any) -> None:
        """Starts nothing."""

    def start_ray_processes(self) -> None:
        """Starts the raylet and sees it register; the base class then finds it on its first look, of one every half
        second. Raises UserError where it does not come.
        """
        super().start_ray_processes()
        deadline = time.monotonic() + RAYLET_S
        mine = ray.NodeID.from_hex(self._node_id or "")
        while mine not in self.get_gcs_client().get_all_node_info():
            ended = self.lost()
            if ended or time.monotonic() > deadline:
                how = "ended as they started" if ended else f"are not up after {RAYLET_S:.0f} s"
                self.end()
                raise UserError(
                    f"Ray's processes on this host {how}. Is it overloaded, or short of memory, processes (ulimit -u) or "
                    "open files (ulimit -n)? Nothing is lost: give the same command again"
                )
            time.sleep(0.01)

    def lost(self) -> bool:
        """Whether one of its processes has ended."""
        return any(info.process.poll() is not None for infos in self.all_processes.values() for info in infos)

    def end(self) -> None:
        """Ends its processes, now."""
        self.kill_all_processes(check_alive=False, allow_graceful=False)


@dataclass(frozen=True)
class NodeSpec:
    """A node to be started on this host."""

    ip: str
    """The address that it listens on, and that the others know it by."""
    folder: Path
    """Where Ray keeps its sockets and logs; a private one."""
    token: Path
    cpus: int
    gpus: int
    port: int = 0
    """The head's; 0: any free one."""


def start_head(start: NodeSpec) -> LeanNode:
    """The first node of a cluster. It ends with this process, however that ends.

    To be called from the main thread: the kernel ends Ray's processes with the thread that started them.
    """
    return _node(start, gcs_server_port=start.port)


def start_member(start: NodeSpec, address: str) -> LeanNode:
    """One more node of the cluster at ``address``; as above. UserError where that does not take it."""
    authenticate(start.token, address)
    check(address)
    try:
        return _node(start, gcs_address=address)
    except RuntimeError as error:  # Ray's own comparison of versions, on a cluster that we have not started
        raise UserError(str(error)) from error


def _node(start: NodeSpec, **which: Any) -> LeanNode:
    authenticate(start.token, start.ip)
    os.environ.update(SETTINGS)
    ray._private.services._build_python_executable_command_memory_profileable = _interpreter
    Config.initialize("")  # Ray read the environment when it was imported
    parameters = ray._private.parameter.RayParams(
        node_ip_address=start.ip,
        num_cpus=start.cpus,
        num_gpus=start.gpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]
        no_monitor=True,
        temp_dir=str(start.folder / "ray"),
        **which,
    )
    return LeanNode(parameters, head="gcs_address" not in which, shutdown_at_exit=False, spawn_reaper=True)


def _interpreter(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
    """The command that Ray starts a Python program of its own with."""
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    nice = ["nice", "-n", str(AGENTS_NICENESS)] if component in AGENTS and not busy else []
    return [*nice, sys.executable, *(["-u"] if unbuffered else [])]


def authenticate(path: Path | None, address: str) -> None:
    """Has this process, and what it starts, speak to the cluster at ``address`` with the token in ``path``.

    None: with the token that this user has, if there is one. A token in the environment would be shown to every worker.
    """
    if path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(token.use(path))
    elif "RAY_AUTH_MODE" not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_MODE"] = "token"
    if address.startswith(LOOPBACK):
        # Ray's name for it: a loopback address may be a node's own, which it allows on laptops only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def check(address: str) -> GcsClient:
    """A client of the cluster at ``address``; Ray itself would try for minutes. UserError says why there is none."""
    host_name, _, port = address.rpartition(":")
    has = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has:
        token.check(token.place())
    try:
        socket.create_connection((host_name, int(port)), ANSWER_S).close()
        with _quiet():
            return GcsClient(address=address)
    except ray.exceptions.AuthenticationError as error:
        why = "refuses the token that this host has" if has else "asks for a token, and this host has none"
        raise UserError(
            f"the cluster at {address} {why}: copy {token.PLACE} of the cluster's head to {token.place()} here, mode 600"
        ) from error
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no Ray cluster answers at {address} ({why}). Give HOST:PORT of its head: `./launch.sh cluster status` shows it there"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Ray's C++ part writes of a refusal from the terminal: we say it in words."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def publish(address: str, about: dict[str, str]) -> None:
    """Leaves with the head what it runs."""
    check(address).internal_kv_put(ABOUT, json.dumps(about).encode(), True, ABOUT)


def published(address: str) -> dict[str, str]:
    """What the head of a cluster of ours runs; nothing where another has started it."""
    found = check(address).internal_kv_get(ABOUT, ABOUT)
    return dict(json.loads(found)) if found else {}


def drain(address: str, node: str | None = None) -> None:
    """Takes one node out of the cluster, or, without ``node``, every one: each ends."""
    client = check(address)
    if node is None:  # so that those who lose it do not wait for it
        client.internal_kv_put(ABOUT, json.dumps({"down": "yes"}).encode(), True, ABOUT)
    gone = (
        [one.binary() for one in client.get_all_node_info()] if node is None else [ray.NodeID.from_hex(node).binary()]
    )
    client.drain_nodes(gone)


def join(address: str, name: str, import_from: str | None, ip: str | None = None) -> None:
    """Makes this process the driver of a job called ``name`` on the cluster at ``address``; its workers find our code at
    ``import_from``.

    ``ip``: which of the nodes on this machine, where there are several. Raises UserError where that does not work.
    """
    authenticate(None, address)
    check(address)
    try:
        drive(address, name, import_from, ip)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"this machine is not a node of the cluster at {address} ({str(error).strip().partition(chr(10))[0]}): "
            f"say `./launch.sh cluster join {address}` here, or start the job on a machine that is one"
        ) from error


def drive(address: str, name: str, import_from: str | None, ip: str | None) -> None:
    """As ``join``, on a cluster that is known to answer."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    # What becomes of Ray's processes is said by us, in words, and to whoever it concerns.
    ray._private.worker.listen_error_messages = lambda worker, threads_stopped: None
    ray._private.utils.get_entrypoint_name = lambda: name  # else the command line, with what is secret in it
    ray.init(
        address=address,
        namespace="trireme",
        log_to_driver=False,
        configure_logging=False,
        runtime_env=worker_environment(import_from) if import_from else None,
        _node_ip_address=ip,
    )


def worker_environment(import_from: str) -> dict[str, Any]:
    """Ray's runtime environment for workers that import our code from ``import_from``, the same folder on every host."""
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": import_from}}
    quoted = shlex.quote(sys.executable)
    if quoted != sys.executable:  # Ray gives the shell the path of Python as it is, and a space would cut it in two
        environment["py_executable"] = quoted
    return environment


def inventory() -> list[Node]:
    """The living nodes of the cluster that this process has joined: what they have, and what is free now."""
    return nodes_of(ray._private.state.state)


def nodes_of(state: Any) -> list[Node]:
    """The living nodes that a Ray ``GlobalState`` knows; two of one name are told apart by their addresses."""
    free = state.available_resources_per_node()
    living = [info for info in state.node_table() if info["Alive"]]
    names = [info["NodeManagerHostname"] for info in living]
    nodes = []
    for info in living:
        has, left = info["Resources"], free.get(info["NodeID"], {})
        name, address = info["NodeManagerHostname"], info["NodeManagerAddress"]
        nodes.append(
            Node(
                name=name if names.count(name) == 1 else f"{name} ({address})",
                cpus=has.get("CPU", 0.0),
                gpus=has.get("GPU", 0.0),
                free_cpus=left.get("CPU", 0.0),
                free_gpus=left.get("GPU", 0.0),
            )
        )
    return nodes
