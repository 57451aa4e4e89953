"""The job's own Ray cluster, and a new one in its place when one of Ray's processes has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


class Private:
    """A cluster that the driver has started. Without its raylet or its head Ray's actors live on for some seconds only, and no new
    ones come; the warm processes and what is on disk are not concerned.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        """``start`` starts the nodes, joins them, and returns the head ``Node``."""
        self.start = start
        self.node = start()

    def lost(self) -> bool:
        """Whether a process of the head node has ended."""
        return any(info.process.poll() is not None for infos in self.node.all_processes.values() for info in infos)

    def check(self) -> None:
        """Raises RayError where one has: calls to actors would neither return nor fail for a while."""
        if self.lost():
            raise ray.exceptions.RayError("processes of Ray's own have ended on the driver's host")

    def again(self) -> None:
        """Ends what is left of the old cluster and starts a new one."""
        self.node.kill_all_processes(check_alive=False, allow_graceful=False)
        ray.shutdown()
        self.node = self.start()
