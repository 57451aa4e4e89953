"""How often the driver looks at its ranks; what it sees is tested with ``hang_detector`` and with whole jobs."""

import time
from types import SimpleNamespace

from cluster.supervision.hang_detector import StragglerDetector
from cluster.supervision.health_monitor import HealthMonitor, group_by_host
from cluster.supervision.outcome import Heartbeat
from cluster.supervision.timeouts import TICK_S
from cluster.worker.messages import SlotInfo
from train.config import load as configuration


def test_ranks_are_looked_at_once_a_tick_however_many_answers_come():
    job = SimpleNamespace(config=configuration.load([]), show=print)
    [host] = group_by_host([None], [SlotInfo("node", "host", "127.0.0.1", 1)])
    monitor = HealthMonitor(job, [host])
    assert monitor.diagnose() is None  # the first look counts the time before as a pause of the driver's
    host.answered = time.monotonic() - 2 * monitor.limits.hang_s
    assert [monitor.diagnose() for _ in range(100)] == [None] * 100
    time.sleep(1.1 * TICK_S)
    diagnosis = monitor.diagnose()
    assert diagnosis is not None
    assert (diagnosis.fault, diagnosis.rank) == ("network lost", 0)


def make_hosts(hosts, workers):
    """Hosts that have just answered, each with so many ranks."""
    infos = [SlotInfo(f"node{n // workers}", f"host{n // workers}", "127.0.0.1", 1) for n in range(hosts * workers)]
    agents = [f"agent {n}" for n in range(hosts * workers)]
    return group_by_host(agents, infos)


def test_ranks_of_a_host_are_heard_by_the_agent_of_its_first_slot():
    hosts = make_hosts(3, 4)
    assert [host.agent for host in hosts] == ["agent 0", "agent 4", "agent 8"]
    for number, host in enumerate(hosts):
        assert [status.rank for status in host.ranks] == [*range(4 * number, 4 * number + 4)]
    assert all(status.host is host for host in hosts for status in host.ranks)
    hosts[1].unreachable = 1.0, RuntimeError()
    assert [len(host.living) for host in hosts] == [4, 0, 4]


def test_slow_ranks_that_are_found_together_are_named_in_one_note(tmp_path):
    notes = []
    job = SimpleNamespace(
        config=configuration.load([]), show=lambda event: notes.append(event["text"]), run_dir=tmp_path
    )
    hosts = make_hosts(4, 4)
    monitor = HealthMonitor(job, hosts)
    for look in range(5):
        monitor.checked = monitor.stragglers.since = -100.0  # as if the time of a window had passed
        for status in monitor.ranks:
            status.host.answered = time.monotonic()
            busy = 10.0 * look * (2.0 if status.rank in (4, 5, 6, 11) else 1.0)
            status.heartbeat = Heartbeat(status.rank, 10 * look, "data", busy_s=busy)
        assert monitor.diagnose() is None
    assert notes == ["ranks 4-6, 11 on 2 hosts are slow: they work 2.0 times as long as the others"]


def test_look_at_the_steps_of_a_thousand_ranks_costs_little():
    """CPU of one look at the heartbeats of 1,024 ranks, of which it takes five a second; as many as it has ranks."""
    hosts = make_hosts(128, 8)
    ranks = [status.rank for host in hosts for status in host.ranks]
    detector = StragglerDetector()
    detector.find_slow([Heartbeat(rank, 0, "data") for rank in ranks], 0.0)
    later = [Heartbeat(rank, 10, "data", busy_s=10.0 + rank / 1e6) for rank in ranks]
    began = time.process_time()
    assert detector.find_slow(later, 100.0) == []
    assert time.process_time() - began < 0.015  # 1 ms; sorted anew for each rank it was 38 ms
