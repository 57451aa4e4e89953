"""All uses of Ray's private API (``ray._private``, ``ray._raylet``), each with its reason.

No other module imports them. Ray may change these names in any minor release, so pyproject.toml pins one: a new one is
tried with this file in hand.
"""

from __future__ import annotations

import logging
import os
import sys

import ray
import ray._private.node
import ray._private.parameter
import ray._private.services
import ray._private.state
import ray._private.utils
import ray._private.worker
import ray.exceptions
import ray.job_config
from ray._private import ray_constants
from ray._private.state import GlobalState
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    GcsClient,
    GcsClientOptions,
    persist_port,
)

from train.errors import UserError

# The node that `ray start` makes. Ray offers no public class for it, and `ray.init` and `ray start` add a dashboard, an
# autoscaler's monitor and a log forwarder to it, and sleep while they wait; ray_node.LeanNode does without them.
BaseNode = ray._private.node.Node

# The arguments of that node, most of which `ray start` does not offer: the address to listen on, no log monitor.
NodeParameters = ray._private.parameter.RayParams

# Ray's names for two of its own Python programs, as `lower_priority_of_ray_agents` gets them.
RAY_AGENTS = {ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT}
RAY_AGENTS_NICENESS = 10
"""They start beside our fork server, whose imports everybody waits for; nobody waits for them, see ``tell_ports``."""

NOT_IN_USE = -1
"""What Ray's own dashboard agent writes for its ports where Ray is installed without what it needs."""


def lower_priority_of_ray_agents() -> None:
    """Has Ray start its agents with a lower priority. Private: Ray has no setting for the command that it uses."""
    ray._private.services._build_python_executable_command_memory_profileable = _interpreter_command


def _interpreter_command(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
    """The command with which Ray starts a Python program of its own."""
    nice = ["nice", "-n", str(RAY_AGENTS_NICENESS)] if component in RAY_AGENTS else []
    return [*nice, sys.executable, *(["-u"] if unbuffered else [])]


def tell_ports(session_dir: str, node_id: str, runtime_env_agent: int) -> None:
    """Tells the raylet of a node, before it starts, on which ports Ray's two agents will listen.

    Private: else it waits for them to tell it themselves, two seconds of imports, and nobody could wait less. The
    dashboard agent only passes on metrics, and finds its ports itself: to the raylet it is not in use. The runtime
    environments of a cluster with shared folders need the other.
    """
    for name in (DASHBOARD_AGENT_LISTEN_PORT_NAME, METRICS_AGENT_PORT_NAME, METRICS_EXPORT_PORT_NAME):
        persist_port(session_dir, node_id, name, NOT_IN_USE)
    persist_port(session_dir, node_id, RUNTIME_ENV_AGENT_PORT_NAME, runtime_env_agent)


def reread_environment() -> None:
    """Has Ray's C++ part read the environment again. Private: it does so once, when ray is imported."""
    Config.initialize("")


def has_auth_token() -> bool:
    """Whether Ray finds a token for this user, even if none is asked for. Private: Ray's API does not tell.

    UserError where the file that is named for it is not there, or has none.
    """
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except ray.exceptions.AuthenticationError as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"{why}. Write the cluster's token into it, or unset RAY_AUTH_TOKEN_PATH") from error


def forget_auth_token() -> None:
    """Has Ray read the token from its file again. Private: it caches the first one for the life of the process."""
    AuthenticationTokenLoader.instance().reset_cache()


def allow_loopback_cluster() -> None:
    """Has Ray accept a loopback address as a node's own.

    Private: Ray decides it by platform, as the constant below at import and by the variable in its processes.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def silence_ray_driver(job_name: str) -> None:
    """Has ``ray.init`` print nothing of its own, and call this driver ``job_name``.

    Private: Ray's switch for logs does not cover the messages about lost processes, of which we tell whom it concerns;
    and a job's name is its command line, which may hold secrets.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray._private.worker.listen_error_messages = lambda worker, threads_stopped: None
    ray._private.utils.get_entrypoint_name = lambda: job_name


class SafePathJobConfig(ray.job_config.JobConfig):
    """A job whose workers import from their own PYTHONPATH only.

    Private: ``ray.init`` adds the driver's working directory to the search path of every worker, before all else, and
    has no switch for it: a ``train.py`` or ``json.py`` that lies there would run in place of ours.
    """

    def _serialize(self) -> str:
        self._py_driver_sys_path: list[str] = []
        return super()._serialize()


def gcs_client(address: str) -> GcsClient:
    """A client of the head at ``address``: its key-value store, its list of nodes, draining.

    Private: Ray's public calls need ``ray.init`` first, which tries for minutes where nobody answers.
    """
    return GcsClient(address=address)


def joined_state() -> GlobalState:
    """Tables of the cluster that this process has joined: nodes, free resources, jobs, placement groups.

    Private: ``ray.nodes`` and ``ray.available_resources`` know neither the free resources by node nor the jobs.
    """
    return ray._private.state.state


def state_of(address: str) -> GlobalState:
    """The same tables of the cluster at ``address``. Private: without it one must join a cluster to look at it."""
    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    return state
