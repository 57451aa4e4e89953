"""A real run, DeepSpeed and all, that loses a worker, goes on without it, and takes it back."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import worlds

from cluster import host, nodes
from cluster.job import Clock, Job
from cluster.signals import Signals
from cluster.supervisor import Supervisor

TARGET = "train.run:train_rank"


@pytest.fixture
def three_cores():
    """A private cluster that Ray takes for one of three cores, and the folder with its warm process."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    folder = host.make_folder()
    warm = host.WarmProcess(folder, TARGET)
    warm.set_device("cpu")
    node = nodes.start_private(3, 0, folder)
    yield folder
    nodes.shutdown(node)
    warm.close()
    os.environ.clear()
    os.environ.update(before)


def test_from_three_workers_to_two_to_three_the_data_and_the_losses_are_those_of_an_undisturbed_run(
    three_cores, make, corpus, monkeypatch
):
    monkeypatch.setattr("cluster.supervisor.LEAVE_S", 0.5)
    settings = ["steps=600", "save_every=10", "eval_every=0", "cluster.workers=3", "batch.global=6", "zero=2"]
    whole = make(*settings, name="whole")
    assert worlds.train_world(whole, corpus) == ["done"] * 3
    config = make(*settings, "cluster.min_workers=2", "cluster.grow_after=0", name="elastic")
    (Path(config.run.dir) / "logs").mkdir(parents=True)
    events = []

    def of(kind):
        return [event for event in events if event["event"] == kind]

    def terminate():
        end = time.monotonic() + 120
        while not of("save"):
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(of("started")[0]["pids"][1], signal.SIGTERM)

    job = Job(config, str(corpus), TARGET, three_cores.name, events.append, Signals(), Clock(time.time()))
    notice = threading.Thread(target=terminate)
    notice.start()
    supervisor = Supervisor(job, "cpu")
    assert supervisor.run().kind == "done"
    notice.join()
    supervisor.release()
    assert [len(event["pids"]) for event in of("started")] == [3, 2, 3], [e for e in events if e["event"] in ("note", "failure")]
    ours, theirs = worlds.metrics(config), worlds.metrics(whole)
    assert [line["data_hash"] for line in ours] == [line["data_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
