"""Sweeps on a cluster of which a trial leaves a part because of a fault of the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import gloo_ranks
from helpers.ray_cluster import private

from cluster.host.stop_request import StopSignals
from cluster.raycluster import ray_auth, ray_node, status
from cluster.sweep.slot_pool import SweepResources

TARGET = "helpers.failing_device:train_rank"


@pytest.mark.timeout(900)
def test_host_that_one_trial_left_gets_no_later_trial(swept_on, tmp_path: Path):
    with private(1, TARGET, gloo_ranks.REPOSITORY, gloo_ranks.REPOSITORY / "tests") as cluster:
        folder = cluster.spec.folder
        spec = ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0)
        ray_node.start_member(spec, cluster.node.address)
        resources = SweepResources("cpu", status.living_nodes(), TARGET, folder.name, StopSignals(), cluster)
        words = ["seed=range(3)", "cluster.workers=1", "cluster.max_failures=1", f"sweep.dir={tmp_path}/s"]
        sweep = swept_on(resources, *words)
        assert sweep.states == ["done"] * 3, sweep.said.getvalue()
        [place] = sweep.scheduler.pool.left
        nodes = [json.loads((trial.folder / "world.json").read_text())["ranks"][0]["node"] for trial in sweep.trials]
        assert place.node not in nodes
        assert len(set(nodes)) == 1
        assert f"no trial of this sweep trains on host {place.host} (uncorrectable ECC" in sweep.said.getvalue()
