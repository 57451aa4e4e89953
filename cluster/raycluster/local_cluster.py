"""A Ray cluster on this host for one job or one sweep, restarted when Ray's processes end."""

from __future__ import annotations

import ray

from cluster.raycluster import cluster_client, ray_node


class ClusterLostError(Exception):
    """A shared Ray cluster has ended under a job, which may not restart it itself."""


class LocalRayCluster:
    """A cluster that the driver has started on its own host.

    Without its raylet or its head Ray's actors live on for some seconds only, and no new ones come. The fork server and
    what is on disk do not depend on it. ``shared``: several jobs run on it, and only their sweep may restart it, once
    they all have ended.
    """

    def __init__(self, spec: ray_node.NodeSpec, job_name: str, shared: bool = False) -> None:
        self.spec, self.job_name, self.shared = spec, job_name, shared
        self._start()

    def _start(self) -> None:
        self.node = ray_node.start_head(self.spec)
        cluster_client.init_driver(self.node.address, self.job_name, None, self.spec.ip)

    def lost(self) -> bool:
        """Whether one of Ray's processes has ended."""
        return self.node.lost()

    def check(self) -> None:
        """Raises RayError where one of Ray's processes has ended: calls to actors would block for a while."""
        if self.lost():
            raise ray.exceptions.RayError("processes of Ray's own have ended on the driver's host")

    def restart(self, by_sweep: bool = False) -> None:
        """Ends what is left of the old cluster and starts a new one with the same token.

        ClusterLostError where a job calls it on a shared cluster.
        """
        if self.shared and not by_sweep:
            raise ClusterLostError
        self.end()
        self._start()

    def end(self) -> None:
        """Ends the cluster and this process's connection to it."""
        ray.shutdown()  # first: it would wait for a head that is gone
        self.node.end()
