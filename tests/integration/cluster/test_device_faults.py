"""Jobs whose device fails, on real Ray: they leave its host, take another or shrink, or say why they cannot."""

import contextlib
import json
import time
from pathlib import Path

import pytest
from helpers.ray_cluster import private

from cluster.host.stop_request import StopRequest
from cluster.raycluster import ray_auth, ray_node, status
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.left_places import LeftPlace
from cluster.supervision.slots import JobSlots
from cluster.supervision.supervisor import Supervisor
from train.config import load as configuration
from train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
TARGET = "helpers.toy:train_rank"
ECC = (
    "CUDA error: uncorrectable ECC error encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)


@pytest.fixture
def cluster_of():
    """Makes a private cluster of so many nodes of a core each; returns its folder."""
    with private(1, TARGET, REPOSITORY, REPOSITORY / "tests") as cluster:
        folder = cluster.spec.folder

        def make(nodes):
            for _ in range(nodes - 1):
                spec = ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0)
                ray_node.start_member(spec, cluster.node.address)
            return folder

        yield make


def run_job(folder, tmp_path, slots_on="cpu", **cluster):
    """Runs a job of two workers of which rank 1 meets the error once: verdict, events, and each attempt's nodes.

    With ``slots_on`` "gpu" each worker's slot has one of Ray's GPUs, and instead of the nodes these are returned.
    """
    base = configuration.to_dict(configuration.load([f"run.dir={tmp_path}/run", "schedule.warmup=0"]))
    values = {**base, "steps": 12, "cluster": {**base["cluster"], "workers": 2, **cluster}}
    (tmp_path / "run" / "logs").mkdir(parents=True)
    events, worlds = [], []

    def show(event):
        events.append(event)
        if event["event"] == "plan":
            ranks = json.loads((tmp_path / "run" / "world.json").read_text())["ranks"]
            nodes = [rank["node"] for rank in ranks]
            gpus = [slot.info.gpus for slot in supervisor.slots.up_slots()]
            worlds.append(gpus if slots_on == "gpu" else nodes)

    fault = json.dumps({"rank": 1, "step": 3, "do": "raise", "say": ECC, "times": 1})
    job = Job(configuration.parse(values), fault, TARGET, folder.name, show, StopRequest(), StartupClock(time.time()))
    supervisor = Supervisor(job, "cpu")
    supervisor.slots.device = slots_on
    try:
        return supervisor.run(), events, worlds
    finally:
        supervisor.release_slots()


@pytest.fixture
def with_gpus():
    """Makes a private cluster of one host that Ray takes for one of so many GPUs; returns its folder."""
    with contextlib.ExitStack() as cleanup:

        def make(gpus):
            clusters = private(4, TARGET, REPOSITORY, REPOSITORY / "tests", gpus=gpus)
            return cleanup.enter_context(clusters).spec.folder

        yield make


def failures(events):
    return [event for event in events if event["event"] == "failure"]


def test_host_of_a_failed_device_is_left_for_another(cluster_of, tmp_path):
    verdict, events, worlds = run_job(cluster_of(3), tmp_path)
    assert verdict.kind == "done", events
    before, after = worlds
    [failure] = failures(events)
    assert "lost its device in data of step 3: uncorrectable ECC error encountered" in failure["lines"][0]
    assert any(line.startswith("cure: the job leaves that device") for line in failure["lines"])
    assert "starting again without host " in failure["next"]
    assert before[1] not in after
    assert len(set(after)) == 2
    assert all(event["event"] != "note" for event in events), events
    [recovered] = [event for event in events if event["event"] == "recovered"]
    assert (recovered["fault"], recovered["workers"]) == ("device", 2)


def test_failed_gpu_is_left_for_another_of_its_host(with_gpus, tmp_path):
    verdict, events, (before, after) = run_job(with_gpus(3), tmp_path, slots_on="gpu")
    assert verdict.kind == "done", events
    assert sorted(before) == [("0",), ("1",)]
    assert sorted(after) == sorted([before[0], ("2",)])
    [failure] = failures(events)
    assert f"starting again without GPU {before[1][0]} of " in failure["next"]
    [recovered] = [event for event in events if event["event"] == "recovered"]
    assert (recovered["fault"], recovered["workers"]) == ("device", 2)


def test_job_shrinks_where_no_other_gpu_is_left(with_gpus, tmp_path):
    verdict, events, (before, after) = run_job(with_gpus(2), tmp_path, slots_on="gpu", min_workers=1)
    assert verdict.kind == "done", events
    assert after == before[:1]
    assert any(event.get("text", "").startswith("going on with 1 of 2 workers") for event in events), events


def test_job_shrinks_where_no_other_host_is_left(cluster_of, tmp_path):
    verdict, events, (before, after) = run_job(cluster_of(2), tmp_path, min_workers=1)
    assert verdict.kind == "done"
    assert after == before[:1]
    assert failures(events)[0]["again"]


def test_job_that_cannot_shrink_says_which_host_to_mend(cluster_of, tmp_path):
    verdict, events, _ = run_job(cluster_of(2), tmp_path)
    assert (verdict.kind, verdict.fault) == ("failed", "device")
    [failure] = failures(events)
    assert not failure["again"]
    shortage = "(uncorrectable ECC error encountered) only 1 worker fits on the cluster, and 2 are needed"
    assert shortage in failure["next"]
    assert "drain and reboot" in failure["next"]
    assert "or use cluster.min_workers=1" in failure["next"]


def test_slots_that_are_reserved_anew_stay_out_of_places_that_were_left(cluster_of, tmp_path):
    folder = cluster_of(2)
    bad, good = status.living_nodes()
    overrides = [f"run.dir={tmp_path}", "cluster.workers=2"]

    def reserve(*more):
        config = configuration.load([*overrides, *more])
        job = Job(config, "", TARGET, folder.name, lambda event: None, StopRequest(), StartupClock(time.time()))
        slots = JobSlots(job, "cpu")
        slots.left = [LeftPlace(bad.id, bad.name, "Xid 79: the GPU has fallen off the bus")]
        try:
            slots.reserve_slots(2)
            return [slot.info.node for slot in slots.up_slots()]
        finally:
            slots.release_slots()

    assert reserve("cluster.min_workers=1") == [good.id]
    with pytest.raises(UserError, match=r"giving up: without host .* only 1 worker fits on the cluster, and 2 are"):
        reserve()
