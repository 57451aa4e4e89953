"""Ray's own processes, started for real, one of which is killed at once."""

import os
import threading
import time

import psutil
import pytest

from cluster.host import job_dir
from cluster.raycluster import ray_auth, ray_node
from train.errors import UserError


@pytest.fixture
def folder():
    """A job's private folder, with a token."""
    before = dict(os.environ)
    made = job_dir.make_folder()
    ray_auth.create_token(made / "token")
    yield made
    os.environ.clear()
    os.environ.update(before)


def test_raylet_that_ends_at_its_start_raises_a_user_error(folder):
    def kill_raylet():
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for child in psutil.Process().children():
                if child.name() == "raylet":
                    child.kill()
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_raylet)
    killer.start()
    with pytest.raises(UserError, match="Ray's processes on this host ended as they started"):
        ray_node.start_head(ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0))
    killer.join()
    assert not [
        child for child in psutil.Process().children() if child.name() == "gcs_server" and child.status() != "zombie"
    ]
