"""Ray's own processes: a private cluster on this machine, started lean and on the loopback only, or one that exists.

``ray.init`` also starts a dashboard, an autoscaler's monitor and a log forwarder, waits for them, and rewrites a
loopback address to the machine's public one. A private cluster needs none of that: the same ``Node`` that ``ray.init``
makes is made here without them, which halves the time, and everything listens on 127.0.0.1 and asks for a token made
for this job.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import ray
import ray._private.node
import ray._private.parameter
import ray._private.state
from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]

from cluster.plan import Node
from train.errors import UserError

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20
"""Nothing travels through the object store but a few KiB of news; this is about the least Ray takes."""
RAYLET_S = 30.0
ANSWER_S = 5.0


class PrivateNode(ray._private.node.Node):
    """A head node without the API server, which only shows things, and without half seconds slept through."""

    def start_api_server(self, **options: Any) -> None:
        """Starts nothing."""

    def start_ray_processes(self) -> None:
        """Starts the raylet and sees it register; the base class then finds it on its first look, of one every half
        second.
        """
        super().start_ray_processes()
        deadline = time.monotonic() + RAYLET_S
        while time.monotonic() < deadline and not self.get_gcs_client().get_all_node_info():
            time.sleep(0.01)


def _settings(folder: Path) -> dict[str, str]:
    """What every process of a private cluster reads: a token of this job's own, known to this user only, and the
    loopback.
    """
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray's name for it: a loopback address may be a node's own, which it allows on laptops only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # The raylet looks for its own object store, misses it by a millisecond, and would sleep a second.
        "RAY_raylet_client_connect_timeout_milliseconds": "20",
        "RAY_raylet_client_num_connect_attempts": "500",
    }


def start_private(cpus: int, gpus: int, folder: Path) -> PrivateNode:
    """A cluster of this machine alone, up and joined. It ends with this process, however that ends.

    To be called from the main thread: the kernel ends Ray's processes with the thread that started them.
    """
    os.environ.update(_settings(folder))
    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")  # Ray read the environment when it was imported
    parameters = ray._private.parameter.RayParams(
        node_ip_address=LOOPBACK,
        num_cpus=cpus,
        num_gpus=gpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]
        no_monitor=True,
        temp_dir=str(folder / "ray"),
    )
    node = PrivateNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    _join(node.address, {})
    return node


def join(address: str, import_from: str) -> None:
    """Joins the cluster at ``address``; its workers find our code at ``import_from``. Raises UserError where there is
    none.
    """
    try:
        host_name, _, port = address.rpartition(":")
        socket.create_connection((host_name, int(port)), ANSWER_S).close()  # Ray itself would try for minutes
        _join(address, {"env_vars": {"PYTHONPATH": import_from}})
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).strip().splitlines()[0]}). "
            "Give HOST:PORT of its head, on a machine that is a node of it, with its token (RAY_AUTH_TOKEN_PATH)."
        ) from error


def _join(address: str, runtime_env: dict[str, Any]) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address=address,
        namespace="trireme",
        log_to_driver=False,
        configure_logging=False,
        runtime_env=runtime_env or None,
    )


def shutdown(node: PrivateNode | None) -> None:
    """Leaves the cluster, and ends it if it is ours."""
    ray.shutdown()
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def inventory() -> list[Node]:
    """The living nodes: what they have, and what is free now."""
    free = ray._private.state.available_resources_per_node()
    nodes = []
    for info in ray.nodes():
        if info["Alive"]:
            has, left = info["Resources"], free.get(info["NodeID"], {})
            nodes.append(
                Node(
                    name=info["NodeManagerHostname"] or info["NodeManagerAddress"],
                    cpus=has.get("CPU", 0.0),
                    gpus=has.get("GPU", 0.0),
                    free_cpus=left.get("CPU", 0.0),
                    free_gpus=left.get("GPU", 0.0),
                )
            )
    return nodes
