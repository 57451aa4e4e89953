"""The time limits of supervision keep their order, within the cluster and against the limits of training."""

import pytest

from cluster.supervision import timeouts
from train import run


@pytest.mark.parametrize(
    ("shorter", "longer", "why"), timeouts.INEQUALITIES, ids=[why for *_, why in timeouts.INEQUALITIES]
)
def test_each_limit_is_longer_than_the_ones_that_it_must_cover(shorter, longer, why):
    assert shorter < longer, why


def test_upload_of_a_stopped_run_ends_before_its_worker_is_killed():
    assert 0 < run.MIRROR_WAIT_STOPPED < 1  # of cluster.stop_grace, after which a worker without an agent is killed
