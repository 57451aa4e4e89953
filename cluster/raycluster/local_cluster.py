"""The job's own Ray cluster on this machine, and a new one in its place when one of Ray's processes has ended."""

from __future__ import annotations

import ray

from cluster.raycluster import ray_node


class LocalRayCluster:
    """A cluster that the driver has started for a job called ``name``. Without its raylet or its head Ray's actors live on for some
    seconds only, and no new ones come; the warm process and what is on disk are not concerned.
    """

    def __init__(self, start: ray_node.NodeSpec, name: str) -> None:
        self.start, self.name = start, name
        self._begin()

    def _begin(self) -> None:
        self.node = ray_node.start_head(self.start)
        ray_node.drive(self.node.address, self.name, None, self.start.ip)

    def lost(self) -> bool:
        """Whether one of Ray's processes has ended."""
        return self.node.lost()

    def check(self) -> None:
        """Raises RayError where one has: calls to actors would neither return nor fail for a while."""
        if self.lost():
            raise ray.exceptions.RayError("processes of Ray's own have ended on the driver's host")

    def again(self) -> None:
        """Ends what is left of the old cluster and starts a new one, with the same token."""
        self.end()
        self._begin()

    def end(self) -> None:
        """Ends the cluster."""
        ray.shutdown()  # first: it would wait for a head that is gone
        self.node.end()
