"""This process as a client of a Ray cluster: opened, told the versions, drained, driven."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from typing import Any

import ray

from cluster.host import network
from cluster.raycluster import ray_auth, ray_internals
from cluster.raycluster.ray_internals import GcsClient
from train.errors import UserError
from train.util.reading import UNREADABLE, as_object

ANSWER_S = 5.0
"""How long a head may take to accept a connection."""
ABOUT = b"trireme"
"""Key and namespace in the head's key-value store of what it runs: a JSON object, for hosts that join."""


def open_client(address: str) -> GcsClient:
    """A client of the head at ``address``. UserError says why there is none; Ray itself would try for minutes."""
    host = network.split_address(address)
    has_token = ray_internals.has_auth_token()
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and not has_token:
        ray_auth.check_token(ray_auth.token_path())
    try:
        socket.create_connection(host, ANSWER_S).close()
        with _silent_stderr():
            return ray_internals.gcs_client(address)
    except ray.exceptions.AuthenticationError as error:
        why = "refuses the token that this host has" if has_token else "asks for a token, and this host has none"
        raise UserError(
            f"the cluster at {address} {why}: copy {ray_auth.DEFAULT_PATH} of the cluster's head to "
            f"{ray_auth.token_path()} here, mode 600"
        ) from error
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no Ray cluster answers at {address} ({why}). Give HOST:PORT of its head: "
            "`./launch.sh cluster status` shows it there"
        ) from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discards what Ray's C++ part writes to the terminal about a refusal: the UserError says it."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def publish_versions(address: str, versions: dict[str, str]) -> None:
    """Stores with the head at ``address`` which versions it runs."""
    open_client(address).internal_kv_put(ABOUT, json.dumps(versions).encode(), True, ABOUT)


def published_versions(address: str) -> dict[str, str]:
    """The versions that the head at ``address`` runs; {"down"} where it is ending; {} where it is not one of ours."""
    return parse_versions(open_client(address).internal_kv_get(ABOUT, ABOUT) or b"{}")


def parse_versions(stored: bytes) -> dict[str, str]:
    """The versions as ``publish_versions`` stored them; {} for anything else, which is not one of ours."""
    with contextlib.suppress(*UNREADABLE):
        return {name: str(version) for name, version in as_object(json.loads(stored)).items()}
    return {}


def drain_nodes(address: str, node: str | None = None) -> None:
    """Takes the node of that id out of the cluster at ``address``, or without ``node`` all of them: each ends."""
    client = open_client(address)
    if node is None:  # so that hosts that lose it do not wait for it to come back
        client.internal_kv_put(ABOUT, json.dumps({"down": "yes"}).encode(), True, ABOUT)
        ids = [known.binary() for known in client.get_all_node_info()]
    else:
        ids = [ray.NodeID.from_hex(node).binary()]
    client.drain_nodes(ids)


def join_as_driver(address: str, job_name: str, import_from: str | None, ip: str | None = None) -> None:
    """Makes this process the driver of a job called ``job_name`` on the cluster at ``address``.

    ``import_from``: the folder in which its workers find our code. ``ip``: which of this machine's nodes to use, where
    there are several. UserError where the cluster does not answer or this machine is not a node of it.
    """
    ray_auth.authenticate(None, address)
    open_client(address)
    try:
        init_driver(address, job_name, import_from, ip)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"this machine is not a node of the cluster at {address} ({str(error).strip().partition(chr(10))[0]}): "
            f"say `./launch.sh cluster join {address}` here, or start the job on a machine that is one"
        ) from error


def init_driver(address: str, job_name: str, import_from: str | None, ip: str | None) -> None:
    """As ``join_as_driver``, on a cluster that is known to answer and with the token set already."""
    ray_internals.silence_ray_driver(job_name)
    ray.init(
        address=address,
        namespace="trireme",
        log_to_driver=False,
        configure_logging=False,
        job_config=ray_internals.SafePathJobConfig(),
        runtime_env=worker_environment(import_from) if import_from else None,
        _node_ip_address=ip,
    )


def worker_environment(import_from: str) -> dict[str, Any]:
    """Ray's runtime environment for workers that import this code from ``import_from``, the same on every host."""
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": import_from, "PYTHONSAFEPATH": "1"}}
    quoted = shlex.quote(sys.executable)
    if quoted != sys.executable:  # Ray gives the shell the path of Python as it is, and a space would cut it in two
        environment["py_executable"] = quoted
    return environment
