"""Jobs that lose a worker or a host, go on without it, and take in another; on real Ray, and one on real DeepSpeed."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import gloo_ranks
from helpers.ray_cluster import private

from cluster.host.stop_request import StopRequest
from cluster.raycluster import ray_auth, ray_node
from cluster.supervision.job import Job, StartupClock
from cluster.supervision.supervisor import Supervisor
from train.config import load as configuration

TARGET = "train.run:train_rank"
REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = REPOSITORY / "tests"


def another_node(head, folder):
    """One more node of one core on this machine."""
    return ray_node.start_member(
        ray_node.NodeSpec(ray_auth.LOOPBACK, folder, folder / "token", cpus=1, gpus=0), head.address
    )


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def two():
    """A private cluster of two nodes of a core each, for the toy: its folder, the head and the other node."""
    with private(1, "helpers.toy:train_rank", REPOSITORY, TESTS) as cluster:
        yield cluster.spec.folder, cluster.node, another_node(cluster.node, cluster.spec.folder)


def test_killed_host_is_named_and_a_new_host_is_taken_in(two, tmp_path):
    folder, head, member = two
    base = configuration.to_dict(
        configuration.load([f"run.dir={tmp_path}/run", "schedule.warmup=0", "cluster.workers=2"])
    )
    values = {**base, "steps": 100_000, "cluster": {**base["cluster"], "min_workers": 1, "grow_after": 0}}
    (tmp_path / "run" / "logs").mkdir(parents=True)
    events, stop = [], StopRequest()
    target = "helpers.toy:train_rank"
    clock = StartupClock(time.time())
    job = Job(configuration.parse(values), '{"sleep": 0.05}', target, folder.name, events.append, stop, clock)

    def of(kind):
        return [event for event in events if event["event"] == kind]

    def play():
        until(lambda: len(of("step")) > 5)
        raylet = psutil.Process(member.all_processes["raylet"][0].process.pid)
        for process in [*raylet.children(recursive=True), raylet]:
            process.kill()
        until(lambda: len(of("recovered")) == 1)
        another_node(head, folder)
        until(lambda: len(of("recovered")) == 2)
        stop.request(signal.SIGTERM)

    script = threading.Thread(target=play)
    script.start()
    assert Supervisor(job, "cpu").run().kind == "stopped"
    script.join()
    [failure] = of("failure")
    assert "was lost with its host" in failure["lines"][0]
    assert [(event["workers"], event["fault"]) for event in of("recovered")] == [(1, "host lost"), (2, "more workers")]
    steps = [event["step"] for event in of("step")]
    assert steps == sorted(steps)


@pytest.fixture
def three():
    """The folder of a private cluster that Ray takes for one of three cores."""
    with private(3, TARGET, REPOSITORY) as cluster:
        yield cluster.spec.folder


@pytest.mark.timeout(600)
def test_job_of_3_2_3_workers_has_the_losses_of_an_unbroken_run(three, make, corpus):
    often = ["save_every=10", "eval_every=0", "schedule.warmup=0"]
    settings = [*often, "cluster.workers=3", "batch.global=6", "zero=2", "optimizer.lr=1e-3"]
    elastic = ["cluster.min_workers=2", "cluster.grow_after=0", "cluster.stay_away=1"]
    config = make(*settings, *elastic, "steps=100000", name="elastic")
    (Path(config.run.dir) / "logs").mkdir(parents=True)
    events, stop = [], StopRequest()

    def of(kind):
        return [event for event in events if event["event"] == kind]

    def play():
        until(lambda: of("save"))
        os.kill(of("started")[0]["pids"][1], signal.SIGTERM)
        until(lambda: len(of("recovered")) == 2)
        grown = len(of("step"))
        until(lambda: len(of("step")) > grown + 10)
        stop.request(signal.SIGTERM)

    job = Job(config, str(corpus), TARGET, three.name, events.append, stop, StartupClock(time.time()))
    script = threading.Thread(target=play)
    script.start()
    supervisor = Supervisor(job, "cpu")
    assert supervisor.run().kind == "stopped"
    script.join()
    supervisor.release_slots()
    told = [event for event in events if event["event"] in ("note", "failure")]
    assert [len(event["pids"]) for event in of("started")] == [3, 2, 3], told
    ours = gloo_ranks.metrics(config)
    whole = make(*settings, f"steps={ours[-1]['step']}", name="whole")
    assert gloo_ranks.train_world(whole, corpus, timeout=250) == ["done"] * 3
    theirs = gloo_ranks.metrics(whole)
    hashes = [line["data_hash"] for line in theirs]
    losses = [line["loss"] for line in theirs]
    assert [line["data_hash"] for line in ours] == hashes
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=1e-4)
