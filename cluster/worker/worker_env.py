"""The environment of a worker, as one pure function of its host's, its driver's and its order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.worker.fork_server_client import BEFORE_FORK_ENV
from cluster.worker.messages import StartOrder
from train.util.redact import SECRET_NAME, redact

SHARED_PREFIXES = ("NCCL_", "GLOO_", "FI_", "UCX_", "TORCH_", "PYTORCH_", "CUDA_", "TRITON_")
"""Variables of these names change how ranks talk or compute: all ranks have the driver's, and no others."""
HOST_NAMES = frozenset(
    {
        *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "CUDA_DEVICE_ORDER"),
        *("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"),
        *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "UCX_NET_DEVICES"),
    }
)
"""Those of them that name devices or paths: what a host says of itself comes before what the driver says."""
WANDB_NAMES = frozenset({"WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_TAGS"})
"""Where and under what a run is kept: what the driver says comes before what rank 0's host says, whoever that is."""
FLIGHT_RECORDER_ENTRIES = 20_000
"""Collectives that NCCL's flight recorder keeps: some steps of ZeRO stage 3 of a large model."""
TRACE_PREFIX = "nccl_rank_"
"""Of a rank's flight recorder: its dump in the run's logs, and the pipe in the job's folder that asks for one."""


def forwarded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a driver that its workers get on every host: neither secrets nor the devices that it sees."""
    return {
        name: value
        for name, value in environ.items()
        if name in WANDB_NAMES
        or (name.startswith(SHARED_PREFIXES) and name != "CUDA_VISIBLE_DEVICES" and not SECRET_NAME.search(name))
    }


def describe_forwarded(environ: Mapping[str, str]) -> str:
    """The variables that workers get of a driver, in words; empty where there are none."""
    forwarded = sorted(forwarded_variables(environ).items())
    listed = ", ".join(f"{name}={value}" for name, value in forwarded)
    return redact(f"every worker gets from this shell: {listed}") if listed else ""


def worker_environment(own: Mapping[str, str], order: StartOrder, folder: str, cache: str | None) -> dict[str, str]:
    """The whole environment of the worker that ``order`` starts.

    ``own``: that of its host's fork server. ``folder``: the job's on this host. ``cache``: this user's folder for
    caches on the host's own disk.
    """
    environment = {name: value for name, value in own.items() if not _must_be_the_drivers(name)}
    for name, value in order.forwarded.items():
        if not (name in HOST_NAMES and name in own):
            environment[name] = value
    environment |= order.env
    for (name, *older), value in _defaults(order, folder, cache).items():
        if value and not any(known in environment for known in (name, *older)):
            environment[name] = value
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(order.gpus) if order.device == "gpu" else ""
    return environment


def _must_be_the_drivers(name: str) -> bool:
    return name.startswith(SHARED_PREFIXES) and name not in HOST_NAMES and name not in BEFORE_FORK_ENV


def _defaults(order: StartOrder, folder: str, cache: str | None) -> dict[tuple[str, ...], str]:
    """Values of variables that nobody has set, by their names, newest first."""
    interface = order.interface
    defaults: dict[tuple[str, ...], str] = {
        ("GLOO_SOCKET_IFNAME",): interface,
        ("NCCL_SOCKET_IFNAME",): interface and f"={interface}",  # without the sign eth1 would mean eth10 too
        # Connections as they are used, for a mesh of all ranks in every group would need thousands of sockets.
        ("TORCH_GLOO_LAZY_INIT",): "1",
    }
    if order.device == "gpu":
        defaults |= {
            ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"): "expandable_segments:True",
            ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): str(FLIGHT_RECORDER_ENTRIES),
            ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
            ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(
                Path(order.log).with_name(TRACE_PREFIX)
            ),
            # Not beside the logs: a shared file system may refuse pipes, which ends NCCL's start.
            ("TORCH_NCCL_DEBUG_INFO_PIPE_FILE",): f"{folder}/{TRACE_PREFIX}",
            ("TRITON_CACHE_DIR",): f"{cache}/triton" if cache else "",
        }
    return defaults
