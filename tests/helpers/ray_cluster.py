"""A private Ray cluster for tests that place workers themselves, as a driver makes one for its job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.host import job_dir
from cluster.raycluster import ray_auth, ray_node
from cluster.raycluster.local_cluster import LocalRayCluster


@contextlib.contextmanager
def private(cores: int, target: str, *places: Path) -> Iterator[LocalRayCluster]:
    """A cluster of this host, which Ray takes for one of so many cores, and the warm process of ``target`` in its folder
    (``.spec.folder``). ``places`` are where its processes look for modules.
    """
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
    with contextlib.ExitStack() as ends:
        ends.callback(os.environ.update, before)
        ends.callback(os.environ.clear)
        folder = job_dir.make_folder()
        warm = job_dir.ForkServerProcess(folder, target)
        ends.callback(warm.close)
        warm.set_device("cpu")
        ray_auth.create_token(folder / "token")
        cluster = LocalRayCluster(
            ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cores, gpus=0), "tests"
        )
        ends.callback(cluster.end)
        yield cluster
