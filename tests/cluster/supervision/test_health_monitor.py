"""How often the driver looks at its ranks; what it sees is tested with ``hang_detector`` and with whole jobs."""

import time
from types import SimpleNamespace

from cluster.supervision.health_monitor import HealthMonitor, RankStatus
from cluster.supervision.timeouts import TICK_S
from cluster.worker.messages import SlotInfo
from train.config import load as configuration


def test_ranks_are_looked_at_once_a_tick_however_many_answers_come():
    job = SimpleNamespace(config=configuration.load([]), show=print)
    status = RankStatus(0, None, SlotInfo("node", "host", "127.0.0.1", 1))
    monitor = HealthMonitor(job, [status])
    assert monitor.diagnose() is None  # the first look counts the time before as a pause of the driver's
    status.answered = time.monotonic() - 2 * monitor.limits.hang_s
    assert [monitor.diagnose() for _ in range(100)] == [None] * 100
    time.sleep(1.1 * TICK_S)
    diagnosis = monitor.diagnose()
    assert diagnosis is not None
    assert (diagnosis.fault, diagnosis.rank) == ("network lost", 0)
