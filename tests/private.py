"""A private Ray cluster for tests that place workers themselves, as a driver makes one for its job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster import host, nodes, token
from cluster.private import Private


@contextlib.contextmanager
def private(cores: int, target: str, *places: Path) -> Iterator[Private]:
    """A cluster of this host, which Ray takes for one of so many cores, and the warm process of ``target`` in its folder
    (``.start.folder``). ``places`` are where its processes look for modules.
    """
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
    with contextlib.ExitStack() as ends:
        ends.callback(os.environ.update, before)
        ends.callback(os.environ.clear)
        folder = host.make_folder()
        warm = host.WarmProcess(folder, target)
        ends.callback(warm.close)
        warm.set_device("cpu")
        token.make(folder / "token")
        cluster = Private(nodes.Start(nodes.LOOPBACK, folder, folder / "token", cores, gpus=0), "tests")
        ends.callback(cluster.end)
        yield cluster
