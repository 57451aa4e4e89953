"""A private Ray cluster for tests that place workers themselves, as a driver makes one for its job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.host import job_dir
from cluster.raycluster import ray_auth, ray_node
from cluster.raycluster.local_cluster import LocalRayCluster
from cluster.worker import fork_server_client


@contextlib.contextmanager
def private(cores: int, target: str, *module_folders: Path, gpus: int = 0) -> Iterator[LocalRayCluster]:
    """A private Ray cluster of this host with a job folder (``.spec.folder``) and a fork server that runs ``target``.

    Ray takes the host for one of ``cores`` cores and ``gpus`` GPUs, which it only counts.
    ``module_folders`` become the processes' PYTHONPATH.
    """
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, module_folders))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.environ.update, before)
        cleanup.callback(os.environ.clear)
        folder = job_dir.make_folder()
        fork_server = fork_server_client.ForkServerProcess(folder, target)
        cleanup.callback(fork_server.close)
        fork_server.set_device("cpu")
        ray_auth.create_token(folder / "token")
        cluster = LocalRayCluster(ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cores, gpus), "tests")
        cleanup.callback(cluster.end)
        yield cluster
