"""NVML on hosts without a GPU: it is asked, and nothing is known."""

import time

import pytest

from cluster.device_health import nvml
from cluster.device_health.evidence import DeviceEvidence
from cluster.device_health.gpu_state import GpuState

WITHOUT = pytest.mark.skipif(nvml.read_state("0") is not None, reason="this machine has a GPU")


@WITHOUT
def test_host_without_a_driver_has_no_counters_and_no_evidence():
    assert nvml.read_state("GPU-5f1c8a11") is None
    watch = nvml.GpuWatch(["0"])
    assert watch.read(5) == (True, None)
    assert watch.collect(5) == DeviceEvidence()


def test_gpu_that_blocks_its_readers_is_not_waited_for(monkeypatch):
    state = GpuState(uuid="GPU-5f1c")
    monkeypatch.setattr(nvml, "read_state", lambda gpu: state)
    watch = nvml.GpuWatch(["0"])
    assert watch.collect(5) == DeviceEvidence(state, state)
    monkeypatch.setattr(nvml, "read_state", lambda gpu: time.sleep(30))
    began = time.monotonic()
    assert watch.collect(0.1) == DeviceEvidence(), "an answer that is late says nothing of the GPU"
    assert watch.read(0.1) == (False, None)
    assert time.monotonic() - began < 2
