"""A start order as a driver makes it, for tests of what a worker and its agent do with it."""

import pytest

from cluster.worker.messages import RendezvousAddress, StartOrder


@pytest.fixture
def order(tmp_path):
    """Rank 0's order of the first attempt of job "a"."""
    return StartOrder(
        job="a",
        rank=0,
        size=2,
        local_rank=0,
        rendezvous=RendezvousAddress("127.0.0.1", 29500, 0),
        target="helpers.toy:train_rank",
        device="cpu",
        config="{}",
        corpus="corpus",
        cwd=str(tmp_path),
        log=str(tmp_path / "rank_0.log"),
        threads=1,
        env={"RANK": "0"},
    )
