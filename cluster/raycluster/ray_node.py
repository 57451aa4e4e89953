"""Starts Ray's processes on this host: lean, with a token, as the head of a cluster or a member.

``ray.init`` and ``ray start`` also start a dashboard, an autoscaler's monitor and a log forwarder, wait for them, and
rewrite a loopback address to the machine's public one. A job needs none of that: the same ``Node`` that they make is
made here without them, which halves the time. It listens where it is told to, and answers nobody without the token.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.host import network
from cluster.raycluster import cluster_client, ray_auth, ray_internals
from train.errors import UserError

OBJECT_STORE_BYTES = 80 << 20
"""Nothing travels through the object store but a few KiB of events; this is about the least that Ray accepts."""
RAYLET_S = 120.0
"""A start takes a second; on a host with ten times the work of its cores, a minute."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The raylet looks for its own object store, misses it by a millisecond, and would sleep a second.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
    # Ray's default is 15: the training workers, forked below Ray's, would give way to everything else on the host.
    "RAY_worker_niceness": "0",
    # A host that is cut off is missed after some 15 s, and not after a minute; a busy one has time to answer.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    # Short of memory, Ray would kill an agent, which holds next to none, and with it the worker that holds all; the
    # kernel takes the worker itself, and its agent can say so.
    "RAY_memory_monitor_refresh_ms": "0",
}
"""Settings of Ray that all processes of our clusters read."""


class LeanNode(ray_internals.BaseNode):
    """A Ray node without the dashboard's API server and without the half seconds that its base class sleeps."""

    def start_api_server(self, **options: Any) -> None:
        """Starts nothing: the API server only displays things."""

    def start_ray_processes(self) -> None:
        """Starts the raylet and waits until it is registered, so that the base class finds it at its first look.

        The base class looks every half second. UserError where the raylet ends or does not come up.
        """
        ray_internals.tell_ports(self.get_session_dir_path(), self._node_id or "", self.runtime_env_agent_port)
        super().start_ray_processes()
        deadline = time.monotonic() + RAYLET_S
        node_id = ray.NodeID.from_hex(self._node_id or "")
        while node_id not in self.get_gcs_client().get_all_node_info():
            ended = self.lost()
            if ended or time.monotonic() > deadline:
                how = "ended as they started" if ended else f"are not up after {RAYLET_S:.0f} s"
                self.end()
                raise UserError(
                    f"Ray's processes on this host {how}. Is it overloaded, or short of memory, processes (ulimit -u) "
                    "or open files (ulimit -n)? Nothing is lost: give the same command again"
                )
            time.sleep(0.01)

    def lost(self) -> bool:
        """Whether one of the node's processes has ended."""
        infos = itertools.chain.from_iterable(self.all_processes.values())
        return any(info.process.poll() is not None for info in infos)

    def end(self) -> None:
        """Kills the node's processes at once."""
        self.kill_all_processes(check_alive=False, allow_graceful=False)


@dataclass(frozen=True)
class NodeSpec:
    """A Ray node to be started on this host, with the resources that it offers."""

    ip: str
    """The address that it listens on, and that other nodes know it by."""
    folder: Path
    """The private folder in which Ray keeps its sockets and logs."""
    token: Path
    cpus: int
    gpus: int
    port: int = 0
    """Of the head; 0: any free one."""


def start_head(spec: NodeSpec) -> LeanNode:
    """Starts the first node of a cluster. It ends with this process, however that ends.

    To be called from the main thread: the kernel ends Ray's processes with the thread that started them.
    """
    return _start_node(spec, gcs_server_port=spec.port)


def start_member(spec: NodeSpec, address: str) -> LeanNode:
    """Starts a node that joins the cluster at ``address``; as ``start_head``. UserError where it is refused."""
    ray_auth.authenticate(spec.token, address)
    cluster_client.open_client(address)
    try:
        return _start_node(spec, gcs_address=address)
    except RuntimeError as error:  # Ray's own comparison of versions, on a cluster that we have not started
        raise UserError(str(error)) from error


def _start_node(spec: NodeSpec, **role: Any) -> LeanNode:
    ray_auth.authenticate(spec.token, spec.ip)
    os.environ.update(ENVIRONMENT)
    ray_internals.lower_priority_of_ray_agents()
    ray_internals.reread_environment()
    parameters = ray_internals.NodeParameters(
        node_ip_address=spec.ip,
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]
        no_monitor=True,
        temp_dir=str(spec.folder / "ray"),
        runtime_env_agent_port=network.free_port(),
        **role,
    )
    return LeanNode(parameters, head="gcs_address" not in role, shutdown_at_exit=False, spawn_reaper=True)
