"""GPUs that are held at a lower clock than the others, from samples as NVML gives them."""

import random
import statistics

import pytest

from cluster.device_health.gpu_state import GpuState
from cluster.device_health.slow_clocks import SlowClockDetector, medians_of_others

H100 = "NVIDIA H100 80GB HBM3"
HEAT, POWER, IDLE = 0x40, 0x4, 0x1


def gpu(mhz, throttle=0, name=H100):
    return GpuState(name=name, sm_mhz=mhz, throttle=throttle)


WELL = {0: gpu(1980), 1: gpu(1965), 2: gpu(1980)}


@pytest.mark.parametrize(
    ("odd", "slow_ranks"),
    [
        (gpu(1110, HEAT), [3]),
        (gpu(1980), []),
        (gpu(1900, POWER), []),  # a little less under the power cap is usual
        (gpu(345, IDLE), []),  # it waits
        (gpu(None, HEAT), []),
        (gpu(1110, HEAT, "NVIDIA A100-SXM4-80GB"), []),  # none of its kind to compare with
    ],
)
def test_slow_clock_is_reported_after_two_samples_once(odd, slow_ranks):
    detector = SlowClockDetector()
    samples = [detector.find_slow({**WELL, 3: odd}) for _ in range(4)]
    assert samples == [[], slow_ranks, [], []]


def test_gpu_that_recovers_is_forgiven():
    detector = SlowClockDetector()
    hot = {**WELL, 3: gpu(1110, HEAT)}
    assert [detector.find_slow(sample) for sample in (hot, WELL | {3: gpu(1980)}, hot, hot)] == [[], [], [], [3]]


def test_job_under_one_power_cap_has_no_slow_gpu():
    detector = SlowClockDetector()
    capped = {rank: gpu(1400, POWER) for rank in range(8)}
    assert [detector.find_slow(capped) for _ in range(3)] == [[], [], []]


def test_medians_of_others_equal_those_computed_one_by_one():
    draw = random.Random(3)
    for size in range(9):
        values = {key: draw.choice([1.0, 2.0, draw.random()]) for key in range(size)}
        wanted = {}
        for key in values if size > 1 else ():
            wanted[key] = statistics.median(value for other, value in values.items() if other != key)
        assert medians_of_others(values) == pytest.approx(wanted)
