"""Speed by numbers worked out by hand."""

import pytest
import torch

from train.reporting.throughput import (
    TYPICAL_SHARE,
    estimated_seconds,
    matmul_rate,
    peak_flops,
    tokens_per_second,
    utilization,
)


def test_tokens_per_second_is_tokens_over_seconds():
    assert tokens_per_second(4096, 2.0) == 2048
    assert tokens_per_second(4096, 0.0) == 0


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peak_flops_by_device_name(device, tflops):
    assert peak_flops(device, "bf16") == peak_flops(device, "fp16") == tflops * 1e12


def test_peak_flops_of_an_unknown_device_is_none():
    assert peak_flops("NVIDIA H200", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    assert utilization(1000, 1e9, 1, None) is None


def test_utilization_is_model_flops_over_peak_flops():
    # 8 devices of 1e15 FLOP/s; 4e6 tokens a second of 1e9 FLOPs each: half of what they can do
    assert utilization(4e6, 1e9, 8, 1e15) == pytest.approx(0.5)


def test_estimated_seconds_are_flops_over_the_measured_rate():
    assert estimated_seconds(1e12, 2, 1e11) == pytest.approx(5 / TYPICAL_SHARE)
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, 0.005) < 1e14
